"""`saemnesia-fast sweep`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..files import write_json
from .inputs import quiet_libraries
from .processes import in_processes

if TYPE_CHECKING:
    from ..evaluation import Plan
    from ..evaluation.sweep import Search


@dataclass(kw_only=True)
class Sweep:
    """Search the best strength and number of latents of every concept, and store them in its table.

    Killed at any moment it goes on where it was: run the same command again.
    """

    minicanvas: bool = False
    """Search on MiniCanvas, the benchmark that comes with the package; the only one so far."""
    method: Literal["saemnesia", "saeuron"] = "saemnesia"
    """saemnesia: the assigned latent at every strength; saeuron: sets of every size at every strength."""
    mode: Literal["exact", "released", "replace"] = "exact"
    """How tokens are edited."""
    strengths: tuple[float, ...] = ()
    """-1 -5 -10 -15 -20 -25 -30 if not given."""
    set_sizes: tuple[int, ...] = ()
    """Numbers of latents; 1 to 30 for saeuron if not given."""
    scale: Literal["mean", "constant", "norm"] | None = None
    """What multiplies the strength; as in the folder's settings if not given."""
    kinds: tuple[Literal["object", "style"], ...] = ("object", "style")
    """Kinds of concepts to search for."""
    concepts: tuple[str, ...] = ()
    """Concepts to search for; all of the kinds if not given."""
    seeds: tuple[int, ...] = (90,)
    """Seeds of the pictures; others than those of an evaluation."""
    retained: int = 12
    """Pictures of other concepts in each run, beside all that ask for the erased one."""
    supervised: Path | None = None
    """Folder of SAEmnesia's SAEs and tables: settings.json, sae/POINT, concepts/POINT; the package's if not given."""
    out: Path = Path("sweep")
    """Folder for sweep.json and what is done so far."""
    tables: Path | None = None
    """Folder to write the tables with the best settings to, POINT/; `out`/concepts if not given."""
    processes: int = 0
    """Processes that paint, which change no result; as many as there are cores for `threads` if 0."""
    threads: int = 1
    """CPU threads of each process."""

    def run(self) -> None:
        if not self.minicanvas:
            raise ValueError("minicanvas: expected --minicanvas, the only data set that can be searched on so far")
        quiet_libraries()
        from ..env import environment
        from ..evaluation.sweep import best_settings, store
        from ..minicanvas.build import machine

        search, plan = self.search()
        if plan.missing():
            in_processes(self.paint, self.processes, self.threads)
        found = best_settings(search, plan)
        record = {"machine": machine(), "versions": environment(), "settings": plan.descriptions[""]}
        write_json(self.out / "sweep.json", {"method": self.method, "mode": self.mode, **found, **record})
        store(found, search, search.sparse.tables, plan.benchmark.classes)
        for point, table in search.sparse.tables.items():
            table.save((self.tables or self.out / "concepts") / point)
        for concept, one in found["concepts"].items():
            best, scores = one["best"], one["scores"]
            print(f"{concept:<14}" + "".join(f"{name} {scores[name]:<8.1f}" for name in ("UA", "IRA", "CRA")), best)
        print(f"\n{found['runs_per_concept']} runs a concept, {found['runs']} in all, {found['seconds']:.0f} s of them")
        print(self.out / "sweep.json")

    def search(self) -> tuple[Search, Plan]:
        """The grid and what is to be painted for it; loads the models."""
        from dataclasses import replace

        from ..evaluation.sweep import SET_SIZES, STRENGTHS, Search
        from ..minicanvas.canvas import MiniCanvas
        from ..minicanvas.methods import SUPERVISED, sparse_erasure

        canvas = MiniCanvas.load()
        sparse = sparse_erasure(f"{self.method}-{self.mode}", canvas, self.supervised or SUPERVISED)
        if self.scale is not None:
            settings = {kind: replace(setting, scale=self.scale) for kind, setting in sparse.settings.items()}
            sparse = replace(sparse, settings=settings)
        sizes: tuple[int | None, ...] = self.set_sizes or ((None,) if self.method == "saemnesia" else SET_SIZES)
        search = Search(sparse, self.strengths or STRENGTHS, sizes, self.kinds, self.concepts)
        return search, search.plan(canvas, self.seeds, self.out / "units", self.retained, self.threads)

    def paint(self, shard: tuple[int, int]) -> None:
        """Paint one part, on `threads` threads."""
        import torch

        from ..evaluation import paint

        quiet_libraries()
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            paint(self.search()[1], shard=shard)
        finally:
            torch.set_num_threads(before)
