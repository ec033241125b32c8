"""The `concepts` command."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from saemnesia_fast.files import read_json

from .inputs import load_pipeline

logger = logging.getLogger("saemnesia_fast")


@dataclass
class Concepts:
    """Measure what each latent of an SAE does for each concept, and write a concept table."""

    model: str
    """Pipeline: a folder in diffusers' format or a Hugging Face repository."""
    sae: str
    """SAE: a folder or a Hugging Face repository."""
    prompts: Path
    """JSON file: {concept: {"kind": "object" or "style", "prompts": [...]}}."""
    hook_point: str
    """UNet module that the SAE reads, for example unet.up_blocks.1.attentions.1."""
    out: Path
    """Folder to write concepts.safetensors and concepts.json into."""
    revision: str | None = None
    """Commit or tag of the model's repository."""
    sae_subfolder: str | None = None
    """Folder of the SAE inside `sae`, often named after the hook point."""
    sae_revision: str | None = None
    """Commit or tag of the SAE's repository."""
    steps: int = 50
    """Denoising steps."""
    guidance: float = 7.5
    """Classifier-free guidance scale."""
    seed: int = 0
    """Seed of all noise."""
    batch_size: int = 8
    """Prompts sampled together."""
    height: int | None = None
    """Height of the images in pixels; the model's own if not given."""
    width: int | None = None
    """Width of the images in pixels; the model's own if not given."""
    stream: Literal["output", "residual"] = "output"
    """What the SAE reads: the module's output, or output - input."""
    assign: bool = False
    """Also assign one latent to every concept, objects first."""
    device: str | None = None
    """Torch device; cuda where there is one, else cpu."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the pipeline; the SAE runs in float32."""

    def run(self) -> None:
        prompts, kinds = read_concepts(self.prompts)

        import torch

        from saemnesia_fast.concepts import collect_concepts
        from saemnesia_fast.sae import TopKSAE

        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        sae = TopKSAE.from_pretrained(
            self.sae, subfolder=self.sae_subfolder, revision=self.sae_revision, device=device, dtype=torch.float32
        )
        pipe = load_pipeline(self.model, self.revision, device, self.dtype)
        table = collect_concepts(
            pipe,
            sae,
            prompts,
            self.hook_point,
            kinds=kinds,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            seed=self.seed,
            batch_size=self.batch_size,
            stream=self.stream,
            height=self.height,
            width=self.width,
        )
        if self.assign:
            table.assignment = table.assign()
        table.save(self.out)
        logger.info("wrote %s to %s", table, self.out)


def read_concepts(path: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """({concept: prompts}, {concept: kind}) of a JSON file {concept: {"kind": str, "prompts": [str]}}.

    Raises:
        ValueError: the file has another form.
    """
    entries = read_json(path)
    if not isinstance(entries, dict):
        raise ValueError(f"prompts: expected {{concept: ...}} in {path}, got a {type(entries).__name__}")
    for concept, entry in entries.items():
        if not (isinstance(entry, dict) and set(entry) == {"kind", "prompts"}):
            raise ValueError(
                f'prompts: expected {{"kind": ..., "prompts": [...]}} for {concept!r} in {path}, got {entry}'
            )
        texts = entry["prompts"]
        if not (isinstance(texts, list) and all(isinstance(text, str) for text in [entry["kind"], *texts])):
            raise ValueError(f"prompts: expected a text and a list of texts for {concept!r} in {path}, got {entry}")
    prompts = {concept: entry["prompts"] for concept, entry in entries.items()}
    return prompts, {concept: entry["kind"] for concept, entry in entries.items()}
