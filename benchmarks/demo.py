"""demo: seconds per picture of MiniCanvas, plain and erased by each backend of the CPU, in interleaved rounds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness import percentile
from machine import describe
from saemnesia_fast import ops

CONCEPTS = ("flower",)
SEED = 7_000_000
Ways = dict[str, Callable[[], AbstractContextManager[Any]]]


def ways(canvas: Any, concepts: Sequence[str]) -> tuple[Ways, dict[str, str]]:
    """{name: what to paint within}, "plain" first; and why a backend is absent."""

    @contextmanager
    def erased(backend: str) -> Iterator[None]:
        with ops.use_backend(backend), canvas.erased(concepts):
            yield

    found: Ways = {"plain": nullcontext}
    absent = {}
    for backend in ("eager", "cpu"):
        with ops.use_backend(backend):
            choice = next(choice for choice in ops.backend_report() if choice.op == "erase")
        if choice.backend == backend:
            found[backend] = lambda backend=backend: erased(backend)
        else:
            absent[backend] = choice.why
    return found, absent


def measure(canvas: Any, found: Ways, rounds: int, pictures: int) -> dict[str, list[float]]:
    """Seconds per picture of every round, which paints the same pictures in each way, another one first each time."""
    from saemnesia_fast.minicanvas.canvas import requests

    wanted = requests(-(-pictures // 48), SEED)[:pictures]
    taken: dict[str, list[float]] = {name: [] for name in found}
    for name in found:
        with found[name]():
            canvas.paint(wanted[:2])
    names = list(found)
    for turn in range(rounds):
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:
            with found[name]():
                before = time.perf_counter()
                canvas.paint(wanted)
                taken[name].append((time.perf_counter() - before) / len(wanted))
    return taken


def summary(taken: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Seconds per picture, and by how many percent of the plain picture of the same round it is longer."""
    return {
        name: {f"p{percent}": round(percentile(seconds, percent), 5) for percent in (20, 50, 80)}
        | {
            "percent_longer": round(
                100 * percentile([one / plain - 1 for one, plain in zip(seconds, taken["plain"], strict=True)], 50), 2
            )
        }
        for name, seconds in taken.items()
    }


def main(out: Path, rounds: int, pictures: int) -> None:
    from saemnesia_fast.minicanvas.canvas import MiniCanvas

    canvas = MiniCanvas.load()
    found, absent = ways(canvas, CONCEPTS)
    report = {
        **asdict(describe("cpu")),
        "diffusers": version("diffusers"),
        "erased": list(CONCEPTS),
        "rounds": rounds,
        "pictures_a_round": pictures,
        "seconds_per_picture": summary(measure(canvas, found, rounds, pictures)),
        "absent": absent,
    }
    text = json.dumps(report, indent=2) + "\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(text)
