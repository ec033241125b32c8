"""What a classifier saw in the pictures of one erasure: all that scores and FID need, without the pictures."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files import load_tensors, read_metadata, save_tensors
from .metrics import ErasureScores, among, erasure_scores


@dataclass(frozen=True, eq=False)
class Outcome:
    """n pictures, wanted and judged."""

    wanted: dict[str, Tensor]
    """{kind: [n] int64}: the class that the prompt asks for, -1 for none."""
    probabilities: dict[str, Tensor]
    """{kind: [n, classes] float32}."""
    features: Tensor
    """[n, D] float32."""
    paint_seconds: float = 0.0
    """Painting and judging."""
    ready_seconds: float = 0.0
    """Making the method erase: setting hooks, solving, fine-tuning."""

    def save(self, path: Path) -> None:
        tensors = {f"wanted.{kind}": classes for kind, classes in self.wanted.items()}
        tensors |= {f"probabilities.{kind}": values for kind, values in self.probabilities.items()}
        seconds = {"paint_seconds": self.paint_seconds, "ready_seconds": self.ready_seconds}
        save_tensors(path, tensors | {"features": self.features}, {"seconds": json.dumps(seconds)})

    @classmethod
    def load(cls, path: Path) -> Outcome:
        tensors = load_tensors(path)
        seconds = json.loads(read_metadata(path)["seconds"])
        wanted, probabilities = (
            {name.removeprefix(part): tensors[name] for name in sorted(tensors) if name.startswith(part)}
            for part in ("wanted.", "probabilities.")
        )
        return cls(wanted, probabilities, tensors["features"], **seconds)

    def scores(self, classes: Mapping[str, Sequence[str]], erased: Collection[str]) -> dict[str, ErasureScores]:
        """{kind: scores} of every kind among the erased concepts; `classes` are two kinds, the first has the shapes."""
        indices = erased_indices(classes, erased)
        recognised = {kind: values.argmax(1) for kind, values in self.probabilities.items()}
        shapes, looks = classes
        return {
            kind: erasure_scores(
                indices[kind],
                wanted=self.wanted[kind],
                recognised=recognised[kind],
                cross_wanted=self.wanted[other],
                cross_recognised=recognised[other],
                object_confidence=self.probabilities[shapes].amax(1),
                cross_erased=indices[other],
            )
            for kind, other in ((shapes, looks), (looks, shapes))
            if indices[kind]
        }

    def retained(self, classes: Mapping[str, Sequence[str]], erased: Collection[str]) -> Tensor:
        """[n] bool: pictures that ask for no erased concept."""
        hits = [among(self.wanted[kind], some) for kind, some in erased_indices(classes, erased).items()]
        return ~torch.stack(hits).any(0)


def erased_indices(classes: Mapping[str, Sequence[str]], erased: Collection[str]) -> dict[str, list[int]]:
    """{kind: class indices} of concepts by name. Raises ValueError for a name that no kind has."""
    unknown = sorted(set(erased) - {name for names in classes.values() for name in names})
    if unknown:
        known = ", ".join(name for names in classes.values() for name in names)
        raise ValueError(f"concepts: expected some of {known}, got {unknown}")
    return {kind: [c for c, name in enumerate(names) if name in erased] for kind, names in classes.items()}
