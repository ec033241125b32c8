"""`saemnesia-fast unlearn-canvas`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..files import write_atomic, write_json
from .inputs import quiet_libraries, resolve_device

if TYPE_CHECKING:
    from ..evaluation import Plan
    from ..unlearn_canvas import UnlearnCanvas


@dataclass(kw_only=True)
class UnlearnCanvasCommand:
    """Evaluate on UnlearnCanvas (SPEC 5.2) with its published weights; tells the cost first.

    It needs --yes to begin. Killed at any moment it goes on where it was: run the same command again. How to fill the
    folder of assets: docs/unlearn_canvas.md.
    """

    assets: Path
    """Folder with pipeline/, object.safetensors, style.safetensors and, for every NAME-MODE among the methods,
    NAME/sae/HOOK_POINT and NAME/concepts/HOOK_POINT."""
    methods: tuple[str, ...] = ("none", "saeuron-released", "saeuron-exact", "saemnesia-released", "saemnesia-exact")
    """none, NAME-exact, NAME-released, NAME-replace, NAME-contrast, negative_prompt, uce, esd, neuron_masking."""
    protocol: tuple[Literal["single", "sequence", "pairs"], ...] = ("single",)
    """Erase concepts one at a time, one after the other in the published order, or in all pairs."""
    kinds: tuple[Literal["object", "style"], ...] = ("object",)
    """Kinds of concepts to erase."""
    seeds: tuple[int, ...] = (188, 288, 588, 688, 888)
    """Each stands for 1020 pictures."""
    retained: int | None = None
    """Of the pictures that ask for no erased concept, paint so many for each erasure and seed; all if not given."""
    strength: float | None = None
    """One strength for all concepts and their assigned latents, which NAME-contrast needs; if not given, each one's
    settings in its table."""
    out: Path = Path("unlearn_canvas")
    """Folder for evaluation.json, report.html and, in units/, what is done so far."""
    steps: int = 100
    """Denoising steps (DDIM)."""
    guidance: float = 9.0
    """Classifier-free guidance scale."""
    batch_size: int = 20
    """Pictures painted together."""
    size: int | None = None
    """Height and width of the pictures in pixels; the model's own if not given."""
    device: str | None = None
    """Torch device; cuda where there is one, else cpu."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Precision of the pipeline; SAEs are read in that of their files, classifiers run in float32."""
    seconds_per_step: float | None = None
    """Of one picture, for the estimate; measured on the device if not given."""
    yes: bool = False
    """Begin, rather than stop after the estimate."""
    shard: str | None = None
    """Part i/n, such as 0/8: paint this part only, one for each device; whoever finds all parts writes the report."""

    def run(self) -> None:
        from ..evaluation import paint
        from ..unlearn_canvas import UnlearnCanvas, estimate, measure
        from .evaluate import read_shard

        shard = (0, 1) if self.shard is None else read_shard(self.shard)
        quiet_libraries()
        canvas = UnlearnCanvas()
        if self.yes or self.seconds_per_step is None:
            canvas = self.load()
        plan = self.plan(canvas)
        seconds = self.seconds_per_step or measure(canvas)
        print(estimate(plan, self.steps, seconds, self.size or 512))
        if not self.yes:
            print("\nNothing was painted: run again with --yes to begin.")
            return
        paint(plan, shard=shard)
        missing = len(plan.missing())
        if missing:
            print(f"{missing} units are yet to be painted by other parts")
        else:
            self.report(plan)

    def load(self) -> UnlearnCanvas:
        import torch

        from ..unlearn_canvas import UnlearnCanvas

        return UnlearnCanvas.load(
            self.assets,
            device=resolve_device(self.device),
            dtype=getattr(torch, self.dtype),
            steps=self.steps,
            guidance_scale=self.guidance,
            batch_size=self.batch_size,
            size=self.size,
        )

    def plan(self, canvas: UnlearnCanvas) -> Plan:
        from ..evaluation import Plan, cases
        from ..unlearn_canvas import SEQUENCE, methods

        found = [
            case
            for protocol in self.protocol
            for case in cases(protocol, canvas.classes, self.kinds, SEQUENCE if protocol == "sequence" else None)
        ]
        chosen = methods(
            self.methods,
            self.assets,
            strength=self.strength,
            steps=self.steps,
            guidance_scale=self.guidance,
            device=resolve_device(self.device),
        )
        return Plan(canvas, chosen, found, self.seeds, self.out / "units", retained=self.retained)

    def report(self, plan: Plan) -> None:
        from ..env import environment
        from ..evaluation import html, summarize
        from .evaluate import print_table

        summary = summarize(plan, {"versions": environment()})
        write_json(self.out / "evaluation.json", summary)
        write_atomic(self.out / "report.html", html(plan, summary).encode())
        for protocol, results in summary["protocols"].items():
            print_table(protocol, results)
        print(f"\n{self.out / 'evaluation.json'}\n{self.out / 'report.html'}")
