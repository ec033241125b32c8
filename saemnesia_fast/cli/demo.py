"""`saemnesia-fast demo`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..files import write_atomic, write_json
from .inputs import quiet_libraries

if TYPE_CHECKING:
    from torch import Tensor

    from ..minicanvas.canvas import MiniCanvas, Request


@dataclass(kw_only=True)
class Demo:
    """Erase a concept from a small diffusion model that comes with the package, and show it.

    Paints every object in every style with the same seeds before and after, and writes a picture and its scores.
    """

    object: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default_factory=tuple)
    """An object to erase; may be repeated. Without any object or style: flower."""
    style: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default_factory=tuple)
    """A style to erase; may be repeated."""
    method: str | None = None
    """What erases, as for `evaluate`; saemnesia-contrast for objects, saemnesia-exact where a style is among them."""
    out: Path = Path("demo")
    """Folder for the PNG and the JSON."""
    images: int = 3
    """Pictures of every object in every style that are scored; the first of each is shown."""
    seed: int = 7_000_000
    """Seed of the pictures."""

    def run(self) -> None:
        quiet_libraries()
        from ..evaluation import mean_scores
        from ..evaluation.units import described
        from ..minicanvas.canvas import KINDS, MiniCanvas, requests
        from ..minicanvas.drawing import OBJECTS, STYLES
        from ..minicanvas.methods import methods
        from ..minicanvas.picture import comparison

        concepts = [*self.object, *self.style] or ["flower"]
        for kind, names in (("object", self.object), ("style", self.style)):
            for name in names:
                if name not in KINDS[kind]:
                    raise ValueError(f"{kind}: expected one of {', '.join(KINDS[kind])}, got {name!r}")
        canvas = MiniCanvas.load()
        chosen = self.method or ("saemnesia-exact" if self.style else "saemnesia-contrast")
        (method,) = methods([chosen], canvas, work=self.out / "weights")
        wanted = requests(self.images, self.seed)
        canvas.paint(wanted[: len(OBJECTS) * len(STYLES)])  # what a first call takes is neither's
        before, plain_seconds = _timed(canvas, wanted, "before")
        with method.erased(canvas.pipe, concepts) as arguments:
            after, erased_seconds = _timed(canvas, wanted, "after", arguments)

        name = "without-" + "-".join(concepts).replace(" ", "_")
        shown = len(OBJECTS) * len(STYLES)
        scores = canvas.scores(after, wanted, concepts)
        seconds = {"before": plain_seconds, "after": erased_seconds}
        report = {
            **mean_scores(list(scores.values())).as_dict(),
            "erased": concepts,
            "by_kind": {kind: one.as_dict() for kind, one in scores.items()},
            "images": len(wanted),
            "seed": self.seed,
            "seconds_per_image": {when: round(spent / len(wanted), 4) for when, spent in seconds.items()},
            "method": described(method),
        }
        caption = f"erased: {', '.join(concepts)}    UA {report['UA']}   IRA {report['IRA']}   CRA {report['CRA']}"
        picture = comparison(before[:shown], after[:shown], concepts, caption)
        self.out.mkdir(parents=True, exist_ok=True)
        write_atomic(self.out / f"{name}.png", lambda path: picture.save(path, format="PNG"))
        write_json(self.out / f"{name}.json", report)
        _print(report, self.out / name)


def _timed(
    canvas: MiniCanvas, wanted: Sequence[Request], label: str, arguments: Mapping[str, Any] | None = None
) -> tuple[Tensor, float]:
    started = time.perf_counter()
    images = canvas.paint(wanted, arguments=arguments, progress=label)
    return images, time.perf_counter() - started


def _print(report: dict[str, Any], stem: Path) -> None:
    seconds = report["seconds_per_image"]
    print(f"\nerased: {', '.join(report['erased'])}   ({report['images']} pictures before and after, same seeds)\n")
    print("  UA      IRA     CRA     debris")
    print("  " + "".join(f"{report[key]:<8.1f}" for key in ("UA", "IRA", "CRA", "debris")) + "percent")
    print(f"\n  seconds per image   before {seconds['before']:.3f}   after {seconds['after']:.3f}")
    print(f"\n  {stem}.png\n  {stem}.json")
