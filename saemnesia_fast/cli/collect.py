"""The `collect` command."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from saemnesia_fast.training import CollectConfig, collect_activations

from .inputs import load_pipeline, read_prompts

logger = logging.getLogger("saemnesia_fast")


@dataclass(kw_only=True)
class Collect(CollectConfig):
    """Write a pipeline's activations at chosen hook points to safetensors shards."""

    model: str
    """Pipeline: a folder in diffusers' format or a Hugging Face repository."""
    prompts: str
    """Text file with one prompt a line, or unlearn-canvas for the 1020 prompts of that benchmark."""
    hook_points: tuple[str, ...]
    """Blocks of the UNet, for example unet.up_blocks.1.attentions.1."""
    out_dir: Path
    """Folder for the shards; an interrupted one is continued."""
    revision: str | None = None
    """Commit or tag of the model's repository."""
    device: str | None = None
    """Torch device; default: cuda where there is one, else cpu."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the pipeline; what is written is float16."""

    def run(self) -> None:
        prompts = read_prompts(self.prompts)
        pipe = load_pipeline(self.model, self.revision, self.device, self.dtype)
        collect_activations(pipe, prompts, self.hook_points, self.out_dir, self)
        logger.info("wrote the activations of %d prompts to %s", len(prompts), self.out_dir)
