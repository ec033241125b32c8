"""The `erase` command."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .inputs import load_pipeline

logger = logging.getLogger("saemnesia_fast")


@dataclass
class Erase:
    """Generate images from which concepts are erased."""

    model: str
    """Pipeline: a folder in diffusers' format or a Hugging Face repository."""
    sae: str
    """SAE: a folder or a Hugging Face repository."""
    table: Path
    """Concept table: the folder that `saemnesia-fast concepts` wrote."""
    concept: tuple[str, ...]
    """Names of the concepts to erase, as in the table."""
    prompt: tuple[str, ...]
    """Prompts, one image each."""
    out: Path
    """Folder to write 000.png, 001.png, ... into."""
    revision: str | None = None
    """Commit or tag of the model's repository."""
    sae_subfolder: str | None = None
    """Folder of the SAE inside `sae`, often named after the hook point."""
    sae_revision: str | None = None
    """Commit or tag of the SAE's repository."""
    strength: float | None = None
    """Gamma: negative erases, more negative erases more strongly. -5 if not given, with contrast -1.5."""
    mode: Literal["exact", "released", "reconstruct", "replace", "contrast"] | None = None
    """The papers' formula; the public code's, which flips the reconstruction error; the reconstruction alone; tokens
    of the concept overwritten by their nearest others, which needs no strength; or moved along what the prompt adds to
    them. exact if not given."""
    anchor: str | None = None
    """With contrast: the concept of the table that comes into their place."""
    halves: Literal["both", "cond"] | None = None
    """Halves of the guided batch to steer; both if not given."""
    start: float = 0.0
    """Fraction of the denoising at which to start."""
    stop: float = 1.0
    """Fraction of the denoising at which to stop."""
    num_latents: int | None = None
    """Latents a concept and step; the assigned one, or the best one, if not given."""
    percentile: float | None = None
    """Instead of a number: latents with a score above this percentile."""
    stored: bool = False
    """Strength, latents and scale of each concept as `sweep` left them in the table, whatever is given here; its mode
    and halves too, where others are an error."""
    scale: Literal["mean", "constant", "norm"] = "mean"
    """What multiplies the strength: the concept's mean activation, nothing, or the norm of the token's latents."""
    stream: Literal["output", "residual"] | None = None
    """What the SAE reads: the module's output, or output - input; as the table says if not given."""
    precision: Literal["default", "exact"] = "default"
    """exact: float32 products are not rounded, whatever torch is set to."""
    steps: int = 50
    """Denoising steps."""
    guidance: float = 7.5
    """Classifier-free guidance scale."""
    seed: int = 0
    """Seed of the first image's noise; the next image has the next seed."""
    height: int | None = None
    """Height of the images in pixels; the model's own if not given."""
    width: int | None = None
    """Width of the images in pixels; the model's own if not given."""
    device: str | None = None
    """Torch device; cuda where there is one, else cpu."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the pipeline; the SAE runs in float32."""

    def run(self) -> None:
        import torch

        from saemnesia_fast.concepts import ConceptTable
        from saemnesia_fast.erasure import apply_erasure
        from saemnesia_fast.sae import TopKSAE

        if self.stored and self.mode == "contrast":
            raise ValueError("stored: expected a strength with contrast, as those in tables are of other modes")
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        table = ConceptTable.load(self.table)
        sae = TopKSAE.from_pretrained(
            self.sae, subfolder=self.sae_subfolder, revision=self.sae_revision, device=device, dtype=torch.float32
        )
        pipe = load_pipeline(self.model, self.revision, device, self.dtype)
        chosen = {name: getattr(self, name) for name in ("num_latents", "percentile", "scale")}
        default = -1.5 if self.mode == "contrast" else -5.0
        chosen["strength"] = default if self.strength is None else self.strength
        chosen |= {"mode": self.mode or "exact", "halves": self.halves or "both"}
        if self.stored:
            chosen |= {"percentile": None} | table.stored(self.concept, self.mode, self.halves)
        erasure = apply_erasure(
            pipe,
            sae,
            table,
            self.concept,
            anchor=self.anchor,
            start=self.start,
            stop=self.stop,
            stream=self.stream,
            precision=self.precision,
            **chosen,
        )
        self.out.mkdir(parents=True, exist_ok=True)
        with erasure:
            logger.info("%s", erasure.explain())
            for i, prompt in enumerate(self.prompt):
                (image,) = pipe(
                    prompt,
                    num_inference_steps=self.steps,
                    guidance_scale=self.guidance,
                    generator=torch.Generator("cpu").manual_seed(self.seed + i),
                    height=self.height,
                    width=self.width,
                ).images
                path = self.out / f"{i:03}.png"
                image.save(path)
                logger.info("wrote %s: %s", path, prompt)
