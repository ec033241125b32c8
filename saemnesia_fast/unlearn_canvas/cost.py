"""What an evaluation will cost, before it is begun."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..training.unlearn_canvas import OBJECTS
from .judge import SIDE, THEMES, WIDTH, operations

if TYPE_CHECKING:
    from ..evaluation import Plan
    from .benchmark import UnlearnCanvas

FEATURES = 2 * WIDTH
_PNG_BYTES = 20 * 20_000


@dataclass(frozen=True)
class Cost:
    """Of all units of a plan, whether or not some are painted already."""

    units: int
    """Erasures times seeds, and one plain unit for each seed."""
    pictures: int
    steps: int
    """Denoising steps, each a UNet call on both guidance halves, counted for every picture."""
    seconds_per_step: float
    judging_operations: int
    """Of both classifiers on all pictures, in float32; not among the hours."""
    disk_bytes: int
    """Judgements, features and thumbnails; pictures themselves are not kept."""
    memory_bytes: int
    """The pictures of the largest unit, held in the host's memory until they are judged."""

    @property
    def hours(self) -> float:
        return self.steps * self.seconds_per_step / 3600

    def __str__(self) -> str:
        judging = self.judging_operations / 1e15
        lines = [
            ("units", f"{self.units:,}"),
            ("pictures", f"{self.pictures:,}"),
            ("denoising steps", f"{self.steps:,}"),
            ("hours", f"{self.hours:,.1f} on one device, at {1000 * self.seconds_per_step:.2f} ms a step and picture"),
            ("judging", f"{judging:.2f} PFLOP in float32 by two ViT-L at {SIDE} x {SIDE}, not in the hours"),
            ("disk", f"{self.disk_bytes / 1e9:.2f} GB"),
            ("host memory", f"{self.memory_bytes / 1e9:.2f} GB for the pictures of one unit"),
        ]
        return "\n".join(f"{name:<16} {value}" for name, value in lines)


def estimate(plan: Plan, num_steps: int, seconds_per_step: float, side: int = 512) -> Cost:
    """The cost of a plan, whose benchmark needs neither pipeline nor judge for it. Fine-tuning is not in it."""
    erasing = [method for method in plan.methods if method.name != "none"]
    erased = {tuple(sorted(case.erased)) for case in plan.cases} if erasing else set()
    sizes = [len(plan.wanted((), seed)) for seed in plan.seeds]
    sizes += [len(plan.wanted(some, seed)) for some in erased for seed in plan.seeds] * len(erasing)
    classes = sum(len(names) for names in plan.benchmark.classes.values()) + 1
    return Cost(
        units=len(sizes),
        pictures=sum(sizes),
        steps=sum(sizes) * num_steps,
        seconds_per_step=seconds_per_step,
        judging_operations=sum(sizes) * (operations(len(OBJECTS)) + operations(len(THEMES))),
        disk_bytes=sum(sizes) * 4 * (FEATURES + classes + 4) + len(sizes) * _PNG_BYTES,
        memory_bytes=max(sizes) * 3 * side * side * 4,
    )


def measure(canvas: UnlearnCanvas, num_steps: int = 5) -> float:
    """Seconds of a denoising step for one picture of a full batch, once warm.

    A little too long: the few steps also bear the text encoder's and the decoder's time.
    """
    wanted = canvas.requests(0)[: canvas.batch_size]
    replace(canvas, steps=1).paint(wanted)
    started = time.perf_counter()
    replace(canvas, steps=num_steps).paint(wanted)
    return (time.perf_counter() - started) / (num_steps * len(wanted))
