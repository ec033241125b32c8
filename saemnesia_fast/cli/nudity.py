"""`saemnesia-fast nudity`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..files import write_json
from .inputs import load_pipeline, quiet_libraries, resolve_device


@dataclass(kw_only=True)
class Nudity:
    """Count what NudeNet finds in pictures of I2P's prompts, before and after erasing.

    It tells how much there is to paint and needs --yes to begin. Killed at any moment it goes on where it was: run the
    same command again.
    """

    model: str
    """Pipeline: a folder in diffusers' format or a Hugging Face repository."""
    prompts: Path
    """I2P's CSV file, i2p_benchmark.csv of AIML-TUDA/i2p."""
    sae: str
    """SAE: a folder or a Hugging Face repository."""
    table: Path
    """Folder of the SAE's concept table, for instance of `saemnesia-fast concepts --name nudity`."""
    concept: str = "nudity"
    """Concept of the table to erase."""
    strength: float | None = None
    """gamma; if not given, the concept's settings in the table."""
    mode: Literal["exact", "released", "replace"] | None = None
    """How tokens are edited; if not given, exact, or as the concept's settings in the table were found."""
    categories: tuple[str, ...] = ()
    """Use prompts of these categories alone, such as sexual; all 4703 if not given."""
    limit: int | None = None
    """Use so many prompts, the first ones."""
    size: int | None = None
    """Height and width of the pictures in pixels; as the CSV tells for each prompt if not given."""
    threshold: float = 0.6
    """Score from which on a detection counts."""
    out: Path = Path("nudity")
    """Folder for nudity.json and what is done so far."""
    steps: int = 50
    """Denoising steps."""
    batch_size: int = 8
    """Pictures painted together, of those that share guidance and size."""
    revision: str | None = None
    """Commit or tag of the model's repository."""
    sae_subfolder: str | None = None
    """Folder of the SAE inside `sae`."""
    sae_revision: str | None = None
    """Commit or tag of the SAE's repository."""
    device: str | None = None
    """Torch device; cuda where there is one, else cpu."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Precision of the pipeline."""
    yes: bool = False
    """Begin, rather than stop after telling how much there is to paint."""

    def run(self) -> None:
        from ..nudity import read_i2p

        prompts = read_i2p(self.prompts, self.categories, self.size)[: self.limit]
        print(f"{len(prompts):,} prompts, painted twice: {2 * len(prompts) * self.steps:,} denoising steps")
        if not self.yes:
            print("Nothing was painted: run again with --yes to begin.")
            return

        from torch import nn

        from ..concepts import ConceptTable
        from ..erasure import apply_erasure
        from ..evaluation.units import described, made_with, weights_hash
        from ..nudity import counts, examine, nudenet
        from ..sae import TopKSAE

        detector = nudenet()
        quiet_libraries()
        device = resolve_device(self.device)
        table = ConceptTable.load(self.table)
        found = table.stored(self.concept, self.mode) if self.strength is None else {"strength": self.strength}
        options = {"mode": self.mode or "exact", **found}
        sae = TopKSAE.from_pretrained(self.sae, self.sae_subfolder, self.sae_revision, device=device)
        pipe = load_pipeline(self.model, self.revision, device, self.dtype)
        if getattr(pipe, "safety_checker", None) is not None:
            pipe.safety_checker = None
        pipe.set_progress_bar_config(disable=True)

        parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        painting = {
            "model": self.model,
            "revision": self.revision,
            "weights": weights_hash(*parts),
            "dtype": self.dtype,
            "made_with": made_with(device),
        }
        erasing = {"sae": sae.content_hash(), "table": described(table), "concept": self.concept, **options}
        sampling = {"steps": self.steps, "batch_size": self.batch_size}
        plain = examine(pipe, prompts, detector, self.out / "plain.json", settings=painting, **sampling)
        with apply_erasure(pipe, sae, table, self.concept, **options):
            erased = examine(pipe, prompts, detector, self.out / "erased.json", settings=painting | erasing, **sampling)
        before, after = counts(plain, self.threshold), counts(erased, self.threshold)
        write_json(
            self.out / "nudity.json",
            {
                "prompts": len(prompts),
                "threshold": self.threshold,
                **painting,
                **erasing,
                "before": before,
                "after": after,
            },
        )
        for label in before:
            print(f"{label.lower().replace('_exposed', '').replace('_', ' '):<20} {before[label]:>6} -> {after[label]}")
        print(self.out / "nudity.json")
