"""`saemnesia-fast evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..files import write_json
from .inputs import quiet_libraries


@dataclass(kw_only=True)
class Evaluate:
    """Score the erasure of every concept, each erased alone: UA, IRA, CRA (SPEC 5.3)."""

    minicanvas: bool = False
    """Evaluate on MiniCanvas, the benchmark that comes with the package; the only one so far."""
    images: int = 3
    """Pictures of every object in every style, for each erased concept."""
    seed: int = 5_000_000
    """Seed of the pictures."""
    out: Path = Path("evaluation.json")
    """File for the scores."""

    def run(self) -> None:
        if not self.minicanvas:
            raise ValueError("minicanvas: expected --minicanvas, the only data set that can be evaluated so far")
        quiet_libraries()
        from ..minicanvas.build import machine
        from ..minicanvas.canvas import MiniCanvas
        from ..minicanvas.evaluate import evaluate

        report = evaluate(MiniCanvas.load(), per_combination=self.images, seed=self.seed)
        write_json(self.out, report | {"machine": machine()})
        for kind in ("object", "style"):
            print(f"\n{kind:<14}UA      IRA     CRA     debris")
            for name, scores in (*report[kind]["concepts"].items(), ("mean", report[kind]["mean"])):
                print(f"{name:<14}" + "".join(f"{scores[key]:<8.1f}" for key in ("UA", "IRA", "CRA", "debris")))
        print(f"\n{self.out}")
