"""Our erasure as a technique of the PyPI package eval-unlearn, found by its entry point `eval_unlearn.techniques`.

In a configuration of `eval-unlearn run`:
`"technique": {"name": "saemnesia_fast", "config": {"model_id": ..., "sae": ..., "table": ..., "erase_concept": ...}}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image

from .concepts import ConceptTable
from .sae import TopKSAE


class SaemnesiaFast:
    """A pipeline that erases a concept from all that it paints."""

    def __init__(
        self,
        *,
        model_id: str,
        sae: str,
        table: str,
        erase_concept: str,
        strength: float | None = None,
        mode: str | None = None,
        revision: str | None = None,
        sae_subfolder: str | None = None,
        sae_revision: str | None = None,
        device: str | None = None,
        use_fp16: bool = True,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        batch_size: int = 8,
        **erasure: Any,
    ) -> None:
        """Loads everything and applies the erasure.

        Args:
            model_id: pipeline, a folder or a Hub repository; safetensors only.
            sae: the SAE, a folder or a Hub repository.
            table: folder of its concept table, which also names the hook point.
            erase_concept: a concept of the table, or several between commas.
            strength: gamma; None for what the table's settings have, see `ConceptTable.stored`.
            mode: "exact", "released", "reconstruct", "replace" or "contrast"; None for "exact", or what the settings of
                the table were found with.
            revision, sae_revision: commits or tags of the repositories.
            use_fp16: float16 on a GPU; float32 elsewhere.
            num_inference_steps, guidance_scale: unless `generate` is given others.
            erasure: further arguments of `apply_erasure`, for instance num_latents or scale.

        Raises:
            ValueError: the table lacks the concept, or its settings while strength is None, or these are of another
                mode or other halves, or it is of another SAE.
        """
        from diffusers import DiffusionPipeline

        from .erasure import apply_erasure

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float16 if use_fp16 and torch.device(device).type == "cuda" else torch.float32
        concepts = [name.strip() for name in erase_concept.split(",")]
        concept_table = ConceptTable.load(table)
        if strength is None and mode == "contrast":
            raise ValueError("strength: expected one with mode 'contrast', as those in tables are of other modes")
        halves = erasure.get("halves")
        options = concept_table.stored(concepts, mode, halves) if strength is None else {"strength": strength}
        autoencoder = TopKSAE.from_pretrained(sae, sae_subfolder, sae_revision, device=device)
        pipe: Any = DiffusionPipeline.from_pretrained(model_id, revision=revision, dtype=dtype, use_safetensors=True)
        self.pipe = pipe.to(device)
        if getattr(self.pipe, "safety_checker", None) is not None:
            self.pipe.safety_checker = None
        self.pipe.set_progress_bar_config(disable=True)
        self.device = device
        self.batch_size = batch_size
        self.defaults = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        options = {"mode": mode or "exact", **options, **erasure}
        self.erasure = apply_erasure(self.pipe, autoencoder, concept_table, concepts, **options)

    def generate(self, prompts: Sequence[str], seed: int | None = None, **options: Any) -> list[Image]:
        """A picture for each prompt. Picture i has the noise of `seed` + i, as with the package's own techniques."""
        images: list[Image] = []
        for first in range(0, len(prompts), self.batch_size):
            some = list(prompts[first : first + self.batch_size])
            generators = None
            if seed is not None:
                places = range(first, first + len(some))
                generators = [torch.Generator(self.device).manual_seed(seed + place) for place in places]
            images += self.pipe(some, generator=generators, **{**self.defaults, **options}).images
        return images
