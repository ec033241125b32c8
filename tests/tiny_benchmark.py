"""A benchmark whose pictures say what is in them, and methods whose outcome is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from saemnesia_fast.evaluation import Judgement

CLASSES = {"object": ("cat", "dog", "cow"), "style": ("ink", "pop art")}


@dataclass(frozen=True)
class TinyRequest:
    object: int
    style: int
    seed: int

    @property
    def prompt(self) -> str:
        return f"a {CLASSES['object'][self.object]} in <{CLASSES['style'][self.style]}> style"


@dataclass
class TinyBenchmark:
    """Pixel 0 holds the object's index, pixel 1 the style's, pixel 2 whether the shape is whole, the rest is noise."""

    per_combination: int = 2
    pipe: Any = field(default_factory=lambda: SimpleNamespace(erased={}))
    painted: list[int] = field(default_factory=list)
    """Number of pictures of each call of `paint`."""
    name = "tiny"
    classes = CLASSES
    features = "pixels"

    def described(self) -> Mapping[str, Any]:
        return {"per_combination": self.per_combination}

    def requests(self, seed: int) -> list[TinyRequest]:
        return [TinyRequest(n // 2 % 3, n % 2, 1000 * seed + n) for n in range(6 * self.per_combination)]

    def paint(self, wanted: Sequence[TinyRequest], *, arguments: Mapping[str, Any] | None = None) -> Tensor:
        self.painted.append(len(wanted))
        return torch.stack([self._picture(one, (arguments or {}).get("broken", False)) for one in wanted])

    def _picture(self, one: TinyRequest, broken: bool) -> Tensor:
        noise = torch.Generator().manual_seed(one.seed)
        picture = torch.rand(3, 4, 4, generator=noise) / 10
        strength = max((self.pipe.erased.get(name, 0.0) for name in self._names(one)), default=0.0)
        gone = float(torch.rand((), generator=noise)) < strength
        picture[0, 0] = torch.tensor([(one.object + gone) % 3 / 4, one.style / 4, float(gone and broken), 0])
        return picture

    @staticmethod
    def _names(one: TinyRequest) -> tuple[str, str]:
        return CLASSES["object"][one.object], CLASSES["style"][one.style]

    def judged(self, images: Tensor) -> Judgement:
        sure = torch.where(images[:, 0, 0, 2] > 0, 0.5, 0.9)
        return Judgement(
            {
                kind: _certain((images[:, 0, 0, n] * 4).round().long(), len(names), sure)
                for n, (kind, names) in enumerate(CLASSES.items())
            },
            images.flatten(1)[:, 4:10],
        )


def _certain(classes: Tensor, count: int, sure: Tensor) -> Tensor:
    """[n, count]: probability `sure` for the class, the rest for the others."""
    rest = ((1 - sure) / (count - 1))[:, None].expand(-1, count)
    return rest.scatter(1, classes[:, None], sure[:, None])


@dataclass(frozen=True)
class TinyErasure:
    """Turns an erased object into the next one, in a share of the pictures that its strength tells."""

    name: str = "turn"
    source: str = "this test"
    strength: float = 1.0
    broken: bool = False
    _opened: list[tuple[str, ...]] = field(default_factory=list, compare=False)

    @contextmanager
    def erased(self, pipe: Any, concepts: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        self._opened.append(tuple(concepts))
        pipe.erased = dict.fromkeys(concepts, self.strength)
        try:
            yield {"broken": self.broken}
        finally:
            pipe.erased = {}
