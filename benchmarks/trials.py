"""trials: what else a supervised latent was tried with on MiniCanvas' objects, on pictures of other seeds."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from saemnesia_fast.evaluation import Plan, SparseErasure
    from saemnesia_fast.minicanvas.canvas import MiniCanvas

SEEDS = (90, 91)
RETAINED = 18
"""Pictures of other concepts, beside all that ask for the erased one."""
TRAINED: dict[str, dict[str, Any]] = {
    "trained again": {},
    "5 epochs": {"epochs": 5},
    "25 epochs": {"epochs": 25},
    "learning rate 1e-3": {"lr": 1e-3},
    "beta 10": {"beta": 10.0},
    "without L_1": {"l1_weight": 0.0},
    "without negatives": {"negatives": False},
    "pooled after the ReLU": {"rectified": True},
}
"""{name: changes to how the SAEs are taught}."""


class Trial(NamedTuple):
    name: str
    changes: dict[str, Any]
    """Of the setting, `strength` for every hook point."""
    points: slice = slice(None)
    """Which of the hook points of objects."""
    by: str = "saemnesia-exact"


def trials() -> dict[str, list[Trial]]:
    """{what is changed: trials}, of SAEs as they are shipped."""
    papers = [
        Trial(
            f"{mode}, {scale}, both halves, strength {s:g}",
            {"mode": mode, "strength": s, "halves": "both", "scale": scale},
        )
        for mode in ("exact", "released")
        for scale in ("mean", "norm")
        for s in (-5.0, -15.0)
    ]
    return {
        "": [Trial("as shipped", {})],
        "strength": [Trial(f"strength {s:g}", {"strength": s}) for s in (-4.0, -6.0, -10.0, -12.0, -15.0, -20.0)],
        "hook point": [
            Trial(f"the {name} hook point alone, strength {s:g}", {"strength": s}, points)
            for name, points in (("first", slice(1)), ("second", slice(1, None)))
            for s in (-8.0, -16.0)
        ],
        "latents a concept": [
            Trial(f"{n} latents at each hook point, strength -6", {"num_latents": n, "strength": -6.0})
            for n in (2, 3, 4, 8)
        ],
        "strength by timestep": [
            Trial(f"{part} half of the steps, strength {s:g}", {"strength": s, **window})
            for part, window in (("first", {"stop": 0.5}), ("second", {"start": 0.5}))
            for s in (-8.0, -16.0)
        ],
        "guidance halves": [Trial("both halves", {"halves": "both"})],
        "the papers' scales": papers,
        "contrast": [
            Trial(f"contrast without an anchor, strength {s:g}", {"strength": s, "mode": "contrast", "halves": "both"})
            for s in (-1.0, -1.5)
        ]
        + [Trial(f"contrast, strength {s:g}", {"strength": s}, by="saemnesia-contrast") for s in (-1.0, -1.25, -2.0)],
    }


@dataclass
class Run:
    """The trials, and where they keep what is done."""

    work: Path
    threads: int = 1

    @cached_property
    def canvas(self) -> MiniCanvas:
        from saemnesia_fast.minicanvas.canvas import MiniCanvas

        return MiniCanvas.load()

    @cached_property
    def methods(self) -> dict[str, list[SparseErasure]]:
        """{what is changed: erasures}; `teach` has been called."""
        found = {group: [erasure(trial, self.canvas) for trial in some] for group, some in trials().items()}
        found["teaching"] = [erasure(Trial(name, {}), self.canvas, self.taught(name)) for name in TRAINED]
        return found

    def taught(self, name: str) -> Path:
        return self.work / "taught" / name.replace(" ", "_")

    def plan(self) -> Plan:
        from saemnesia_fast.evaluation import Plan, cases

        chosen = [method for some in self.methods.values() for method in some]
        found = cases("single", self.canvas.classes, ["object"])
        return Plan(self.canvas, chosen, found, SEEDS, self.work / "units", RETAINED, self.threads)

    def paint(self, shard: tuple[int, int]) -> None:
        import torch

        from saemnesia_fast.cli.inputs import quiet_libraries
        from saemnesia_fast.evaluation import paint

        quiet_libraries()
        torch.set_num_threads(self.threads)
        paint(self.plan(), shard=shard)

    def teach(self) -> None:
        """Makes the SAEs of TRAINED, from those that are shipped."""
        for name, changes in TRAINED.items():
            if not (self.taught(name) / "settings.json").exists():
                teach(self.work, self.taught(name), changes)


def erasure(trial: Trial, canvas: MiniCanvas, supervised: Path | None = None) -> SparseErasure:
    """Of objects, by the SAEs in a folder; by those that are shipped if None."""
    from saemnesia_fast.minicanvas.methods import SUPERVISED, sparse_erasure

    shipped = sparse_erasure(trial.by, canvas, supervised or SUPERVISED)
    setting, changes = shipped.settings["object"], dict(trial.changes)
    strength = dict(list(setting.strength.items())[trial.points])
    if "strength" in changes:
        strength = dict.fromkeys(strength, changes.pop("strength"))
    return replace(shipped, name=trial.name, settings={"object": replace(setting, strength=strength, **changes)})


def teach(work: Path, out: Path, changes: dict[str, Any]) -> None:
    """Teaches the shipped SAEs of objects their concepts, on tokens that are collected once."""
    from saemnesia_fast.files import write_json
    from saemnesia_fast.minicanvas.build import BuildConfig, Builder
    from saemnesia_fast.minicanvas.canvas import WEIGHTS
    from saemnesia_fast.minicanvas.settings import OBJECTS_AT, SUPERVISED_SETTINGS
    from saemnesia_fast.training import SuperviseConfig

    class Changed(Builder):
        def supervise_config(self, hook_point: str) -> SuperviseConfig:
            return replace(super().supervise_config(hook_point), **changes)

    tokens = Builder(BuildConfig(work=work, start=WEIGHTS, progress=False))
    if not (work / "activations" / "index.json").exists():
        tokens.activations()
    tokens.held_out(OBJECTS_AT[0])
    builder = Changed(BuildConfig(work=out / "build", start=WEIGHTS, progress=False))
    for name in ("activations", "held_out"):
        if not (builder.work / name).exists():
            (builder.work / name).symlink_to((work / name).resolve())
    for name in ("sae", "concepts"):
        shutil.copytree(WEIGHTS / name, builder.work / name, dirs_exist_ok=True)
    builder.supervised(OBJECTS_AT)
    for name in ("sae", "concepts"):
        shutil.copytree(builder.work / "supervised" / name, out / name, dirs_exist_ok=True)
    write_json(out / "settings.json", {"object": asdict(SUPERVISED_SETTINGS["object"])})


def main(out: Path, work: Path | None, processes: int) -> None:
    """Teaches, paints and judges what is not there yet in `work`, and writes the scores."""
    from saemnesia_fast.cli.processes import in_processes
    from saemnesia_fast.env import environment
    from saemnesia_fast.evaluation import summarize
    from saemnesia_fast.files import write_json
    from saemnesia_fast.minicanvas.build import machine

    with tempfile.TemporaryDirectory() as folder:
        run = Run(work or Path(folder))
        run.teach()
        in_processes(run.paint, processes, run.threads)
        plan = run.plan()
        found = summarize(plan)["protocols"]["single"]
        rows = [
            {
                "changed": group,
                "name": method.name,
                "settings": plan.descriptions[method.name]["settings"],
                "scores": {name: one["mean"] for name, one in found[method.name]["object"]["scores"].items()},
            }
            for group, methods in run.methods.items()
            for method in methods
        ]
        pictures = len(plan.wanted(plan.cases[0].erased, SEEDS[0]))
        about = {"machine": machine(), "versions": environment(), "benchmark": plan.descriptions[""]}
        write_json(out, {"seeds": list(SEEDS), "pictures_per_seed": pictures, "trials": rows, **about})
    print(out)
