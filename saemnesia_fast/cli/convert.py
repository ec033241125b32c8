"""`saemnesia-fast convert`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

logger = logging.getLogger("saemnesia_fast")


@dataclass(kw_only=True)
class Convert:
    """Turn other projects' checkpoints into our files, without running their pickles (SPEC 6.2, 6.4).

    Of a pickle, tensors, arrays, dicts, lists, strings and numbers are read; anything else is refused, not called.
    """

    what: Literal["sae", "concepts", "weights", "pipeline"]
    """sae: of eai-sparsify, SAeUron, SAEmnesia, SAELens, sdxl-unbox or dictionary_learning. concepts: statistics of
    SAeUron and SAEmnesia (*_latents_dict_*.pkl), to a concept table. weights: a state dict (.pth, .pt, .bin), to one
    safetensors file. pipeline: a folder in diffusers' format that has its weights in .bin files."""
    source: str
    """File or folder; of an SAE also a Hugging Face repository."""
    out: Path
    """Folder to write; with weights a file."""
    subfolder: str | None = None
    """Folder of the SAE inside `source`."""
    revision: str | None = None
    """Commit or tag of the SAE's repository."""
    k: int | None = None
    """Latents kept per token, in place of what the SAE's file says."""
    sae: Path | None = None
    """Folder of the SAE, in our format, that the concepts' latents are of."""
    hook_point: str | None = None
    """UNet module that this SAE reads, for example unet.up_blocks.1.attentions.1."""
    kind: Literal["object", "style"] = "object"
    """Of the concepts."""
    params: Path | None = None
    """class_params.pth: percentile and multiplier of every concept, stored in the table."""
    strength: float | None = None
    """In place of params: one multiplier for all concepts, stored in the table."""
    percentile: float = 99.999
    """With strength: scores above it choose the latents."""
    guidance: float = 9.0
    """Guidance scale that the concepts were sampled with."""

    def run(self) -> None:
        if self.what == "sae":
            self._sae()
        elif self.what == "concepts":
            self._concepts()
        elif self.what == "weights":
            from ..convert import read_state_dict
            from ..files import save_tensors

            save_tensors(self.out, read_state_dict(self.source), {"format": "pt"})
            logger.info("wrote %s", self.out)
        else:
            from ..convert import convert_pipeline

            written = convert_pipeline(self.source, self.out)
            logger.info("wrote %s, %d files of it converted", self.out, len(written))

    def _sae(self) -> None:
        from ..convert import read_sae

        sae = read_sae(self.source, self.subfolder, self.revision, self.k)
        sae.save_pretrained(self.out)
        logger.info("wrote an SAE of N = %d latents, d = %d, k = %d to %s", sae.num_latents, sae.d, sae.k, self.out)

    def _concepts(self) -> None:
        if self.sae is None or self.hook_point is None:
            raise ValueError("sae, hook_point: expected both with --what concepts, whose files name neither")
        if self.params is not None and self.strength is not None:
            raise ValueError("params, strength: expected at most one, got both")

        from ..convert import concept_table
        from ..sae import TopKSAE

        table = concept_table(
            self.source,
            TopKSAE.from_pretrained(self.sae),
            self.hook_point,
            self.kind,
            params=self.params,
            strength=self.strength,
            percentile=self.percentile,
            guidance_scale=self.guidance,
        )
        table.save(self.out)
        logger.info("wrote %s to %s", table, self.out)
