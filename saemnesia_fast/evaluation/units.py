"""The work of an evaluation in units (method, erased concepts, seed), each painted once and kept as files.

A unit's file is named by a hash of all that its pictures depend on, so that a run that is started again, or that
shares its folder with other processes, finds what is done and never takes it for something else.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from .. import __version__
from ..files import remove_leftovers, write_atomic
from ..ops import backend_report
from .methods import Benchmark, Method, NoErasure
from .outcome import Outcome, erased_indices
from .protocols import Case

FORMAT = 1
PLAIN: Method = NoErasure()
THUMBNAIL, GAP = 96, 2
ERASING = ("erase", "probe", "steering_lines")


@dataclass(frozen=True, eq=False)
class Unit:
    """One erasure and one seed."""

    method: Method
    erased: tuple[str, ...]
    seed: int
    path: Path
    """Its outcome; beside it, as .png, a row of pictures."""

    @property
    def picture(self) -> Path:
        return self.path.with_suffix(".png")


@dataclass(frozen=True)
class Plan:
    """What to paint: every method, on every case, for every seed; and the plain pictures that all are compared with."""

    benchmark: Benchmark
    methods: Sequence[Method]
    cases: Sequence[Case]
    seeds: Sequence[int]
    folder: Path
    """Where units are kept."""
    retained: int | None = None
    """Paint the pictures that ask for an erased concept and so many others, not all that belong to a seed."""
    threads: int = 1
    """CPU threads of each process, on which the last bits of pictures may depend."""

    def __post_init__(self) -> None:
        names = [method.name for method in self.methods]
        if len(set(names)) != len(names):
            raise ValueError(f"methods: expected different names, got {names}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: expected different ones, at least one, got {list(self.seeds)}")
        if len(self.benchmark.classes) != 2:
            raise ValueError(f"benchmark: expected two kinds of concepts, got {list(self.benchmark.classes)}")

    @cached_property
    def descriptions(self) -> dict[str, Any]:
        """What pictures depend on, as JSON: under "" of the benchmark and the programs, and of every method by name."""
        programs = made_with(getattr(self.benchmark.pipe, "device", "cpu"))
        benchmark = {"name": self.benchmark.name, **self.benchmark.described(), "made_with": programs}
        return {"": described(benchmark), **{one.name: described(one) for one in [PLAIN, *self.methods]}}

    def unit(self, method: Method, erased: Sequence[str], seed: int) -> Unit:
        """The unit of one erasure, whatever the order of its concepts; the plain pictures for `NoErasure`."""
        names = [name for classes in self.benchmark.classes.values() for name in classes]
        some = tuple(sorted(set(erased), key=names.index)) if not isinstance(method, NoErasure) else ()
        parts = [FORMAT, self.descriptions[""], self.descriptions[method.name], some, seed, self.retained, self.threads]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        stem = re.sub(r"[^\w+-]", "_", "+".join(some) or "all")[:80]
        return Unit(method, some, seed, self.folder / method.name / f"{stem}.{seed}.{digest}.safetensors")

    def groups(self) -> list[list[Unit]]:
        """The units that one opening of a method serves: those of one erasure, for every seed."""
        found: dict[Path, list[Unit]] = {}
        erasures = [(method, case.erased) for method in self.methods for case in self.cases]
        for method, erased in [(PLAIN, ()), *erasures]:
            units = [self.unit(method, erased, seed) for seed in self.seeds]
            found.setdefault(units[0].path, units)
        return list(found.values())

    def missing(self) -> list[Unit]:
        return [unit for units in self.groups() for unit in units if not unit.path.exists()]

    def wanted(self, erased: Collection[str], seed: int) -> list[Any]:
        """The requests of a unit."""
        wanted = list(self.benchmark.requests(seed))
        if self.retained is None or not erased:
            return wanted
        some = erased_indices(self.benchmark.classes, erased)
        asks = [any(getattr(one, kind) in classes for kind, classes in some.items()) for one in wanted]
        others = [n for n, asking in enumerate(asks) if not asking]
        kept = {others[i * len(others) // self.retained] for i in range(min(self.retained, len(others)))}
        return [one for n, one in enumerate(wanted) if asks[n] or n in kept]


def paint(plan: Plan, *, shard: tuple[int, int] = (0, 1), progress: bool = True) -> None:
    """Paint and judge the missing units of part i of n; the parts together are the plan, each unit in one of them.

    A unit's files appear when it is done, so that killing the process loses the unit that it was at and no more.
    """
    part, parts = shard
    if not 0 <= part < parts:
        raise ValueError(f"shard: expected i of n with 0 <= i < n, got {part} of {parts}")
    mine = plan.groups()[part::parts]
    for folder in {units[0].path.parent for units in mine}:
        folder.mkdir(parents=True, exist_ok=True)
        if parts == 1:
            remove_leftovers(folder)
    todo = [[unit for unit in units if not unit.path.exists()] for units in mine]
    with tqdm(total=sum(map(len, todo)), unit="unit", position=part, disable=not progress) as bar:
        for units in filter(None, todo):
            bar.set_description(f"{units[0].method.name} {'+'.join(units[0].erased)}".strip())
            started = time.perf_counter()
            with units[0].method.erased(plan.benchmark.pipe, list(units[0].erased)) as arguments:
                ready = time.perf_counter() - started
                for unit in units:
                    _paint(plan, unit, arguments, ready)
                    bar.update()


def _paint(plan: Plan, unit: Unit, arguments: Mapping[str, Any], ready_seconds: float) -> None:
    benchmark = plan.benchmark
    wanted = plan.wanted(unit.erased, unit.seed)
    started = time.perf_counter()
    images = benchmark.paint(wanted, arguments=arguments)
    judgement = benchmark.judged(images)
    outcome = Outcome(
        wanted={kind: torch.tensor([getattr(one, kind) for one in wanted]) for kind in benchmark.classes},
        probabilities={kind: values.float().cpu() for kind, values in judgement.probabilities.items()},
        features=judgement.features.float().cpu(),
        paint_seconds=time.perf_counter() - started,
        ready_seconds=ready_seconds,
    )
    row = picture_row(images[shown(wanted, benchmark.classes)])
    write_atomic(unit.picture, lambda path: row.save(path, format="PNG", optimize=True))
    outcome.save(unit.path)


def shown(wanted: Sequence[Any], classes: Mapping[str, Sequence[str]]) -> list[int]:
    """Which pictures a report shows: of each class of the first kind one, the classes of the second taken in turn."""
    shapes, looks = classes
    first = {(getattr(one, shapes), getattr(one, looks)): n for n, one in reversed(list(enumerate(wanted)))}
    turns = [(shape, shape % len(classes[looks])) for shape in range(len(classes[shapes]))]
    return [first[turn] for turn in turns if turn in first]


def picture_row(images: Tensor) -> Image.Image:
    """Images [n, 3, H, W] in [0, 1] side by side, no larger than a thumbnail."""
    size = min(THUMBNAIL, images.shape[-1])
    pixels = (images.float().cpu().clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    return in_row([Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC) for one in pixels], size)


def in_row(pictures: Sequence[Image.Image | None], size: int) -> Image.Image:
    """Pictures of size x size pixels side by side on white, `GAP` pixels apart; None leaves a place empty."""
    row = Image.new("RGB", (max(1, len(pictures) * (size + GAP) - GAP), size), (255, 255, 255))
    for n, picture in enumerate(pictures):
        if picture is not None:
            row.paste(picture, (n * (size + GAP), 0))
    return row


def made_with(device: torch.device | str) -> dict[str, Any]:
    """The programs that pictures erased on `device` depend on: versions, and the backend of each op of an erasure."""
    return {
        "saemnesia-fast": __version__,
        "torch": torch.__version__,
        **{name: version(name) for name in ("diffusers", "transformers")},
        "backend": {one.op: one.backend for one in backend_report(device) if one.op in ERASING},
    }


def weights_hash(*parts: nn.Module | None) -> str:
    """16 hex digits over names and bytes of the parts' weights, whatever device they lie on."""
    digest = hashlib.sha256()
    for part in parts:
        for name, tensor in sorted(part.state_dict().items()) if part is not None else ():
            digest.update(name.encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def described(value: Any) -> Any:
    """`value` as JSON: numbers, texts and what is made of them; tensors and SAEs by their hash.

    Of a dataclass its public fields. Of anything else, paths among it, the name of its type: it tells nothing about
    pictures.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): described(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [described(one) for one in value]
    if isinstance(value, Tensor):
        return hashlib.sha256(_bytes(value)).hexdigest()[:16]
    if hasattr(value, "content_hash"):
        return value.content_hash()[:16]
    if is_dataclass(value) and not isinstance(value, type):
        public = [one.name for one in fields(value) if not one.name.startswith("_")]
        return {"type": type(value).__name__} | {name: described(getattr(value, name)) for name in public}
    return type(value).__name__


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
