"""`saemnesia-fast evaluate`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..files import write_atomic, write_json
from .inputs import quiet_libraries
from .processes import in_processes

if TYPE_CHECKING:
    from ..evaluation import Plan


@dataclass(kw_only=True)
class Evaluate:
    """Score how well methods erase concepts and keep the rest: UA, IRA, CRA, FID (SPEC 5.3).

    Killed at any moment it goes on where it was: run the same command again.
    """

    minicanvas: bool = False
    """Evaluate on MiniCanvas, the benchmark that comes with the package; the only one so far."""
    methods: tuple[str, ...] = ("none", "saeuron-exact")
    """none, saeuron-exact, saeuron-released, saeuron-replace, saeuron-contrast, saemnesia-exact, saemnesia-released,
    saemnesia-replace, saemnesia-contrast, saemnesia-exact-reselected, saemnesia-released-reselected, negative_prompt,
    uce, esd, neuron_masking; an SAE's with -stored behind it takes each concept's setting from the table, where `sweep`
    left it."""
    protocol: tuple[Literal["single", "sequence", "pairs"], ...] = ("single",)
    """Erase concepts one at a time, one after the other until one is left, or in all pairs."""
    kinds: tuple[Literal["object", "style"], ...] = ("object", "style")
    """Kinds of concepts to erase."""
    order: tuple[str, ...] = ()
    """Concepts as they are erased in sequence; all as they come if not given."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Intervals are over these; each stands for pictures of its own."""
    images: int = 1
    """Pictures of every object in every style, for each erasure and seed."""
    supervised: Path | None = None
    """Folder of SAEmnesia's SAEs and tables: settings.json, sae/POINT, concepts/POINT; the package's if not given."""
    out: Path = Path("evaluation")
    """Folder for evaluation.json, report.html and, in units/, what is done so far."""
    processes: int = 0
    """Processes that paint, which change no result; as many as there are cores for `threads` if 0."""
    threads: int = 1
    """CPU threads of each process. Results may differ in the last bits between numbers of threads."""
    shard: str | None = None
    """Part i/n, such as 0/2: paint this part only; whoever finds all parts in units/ writes the report."""

    def run(self) -> None:
        if not self.minicanvas:
            raise ValueError("minicanvas: expected --minicanvas, the only data set that can be evaluated so far")
        quiet_libraries()
        plan = self.plan()
        if self.shard is not None:
            self.paint(read_shard(self.shard))
        elif plan.missing():
            in_processes(self.paint, self.processes, self.threads)
        missing = len(plan.missing())
        if missing:
            print(f"{missing} units are yet to be painted by other parts")
        else:
            self.report(plan)

    def plan(self) -> Plan:
        """What to paint; loads the models."""
        from ..evaluation import Plan, cases
        from ..minicanvas.canvas import MiniCanvas
        from ..minicanvas.methods import SUPERVISED, methods

        canvas = MiniCanvas.load()
        canvas.per_combination = self.images
        found = [
            case
            for protocol in self.protocol
            for case in cases(protocol, canvas.classes, self.kinds, self.order or None)
        ]
        chosen = methods(self.methods, canvas, self.supervised or SUPERVISED, self.out / "weights")
        return Plan(canvas, chosen, found, self.seeds, self.out / "units", threads=self.threads)

    def paint(self, shard: tuple[int, int]) -> None:
        """Paint one part, on `threads` threads."""
        import torch

        from ..evaluation import paint

        quiet_libraries()
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            paint(self.plan(), shard=shard)
        finally:
            torch.set_num_threads(before)

    def report(self, plan: Plan) -> None:
        from ..env import environment
        from ..evaluation import html, summarize
        from ..minicanvas.build import machine

        summary = summarize(plan, {"machine": machine(), "versions": environment()})
        write_json(self.out / "evaluation.json", summary)
        write_atomic(self.out / "report.html", html(plan, summary).encode())
        for protocol, results in summary["protocols"].items():
            print_table(protocol, results)
        print(f"\n{self.out / 'evaluation.json'}\n{self.out / 'report.html'}")


def read_shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n"."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise ValueError(f"shard: expected i/n with 0 <= i < n, got {text!r}")
    return int(found[1]), int(found[2])


def print_table(protocol: str, results: Mapping[str, Any]) -> None:
    """One line for each method and group."""
    names = ("UA", "IRA", "CRA", "average", "debris")
    width = max(map(len, results)) + 2
    for group in next(iter(results.values())):
        heads = "".join(f"{name:<14}" for name in ("UA", "RA" if protocol == "sequence" else "IRA", *names[2:]))
        print(f"\n{f'{protocol}, {group}':<{width}}  {heads}FID")
        for method, groups in results.items():
            cells = "".join(f"{_cell(groups[group]['scores'][name]):<14}" for name in names)
            fid = groups[group]["fid"]
            print(f"{method:<{width}}  {cells}{'' if fid is None else f'{fid:.2f}'}")


def _cell(score: Mapping[str, float | None]) -> str:
    width = score["plus_minus"]
    return f"{score['mean']:.1f}" + (f" ± {width:.1f}" if width is not None else "")
