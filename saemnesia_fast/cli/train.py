"""The `train` command."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from saemnesia_fast.training import LiveActivations, Sampling, ShardActivations, TrainConfig, train_sae
from saemnesia_fast.training.data import ActivationSource

from .inputs import load_pipeline, read_prompts, resolve_device

logger = logging.getLogger("saemnesia_fast")


@dataclass(kw_only=True)
class Train(TrainConfig):
    """Train a sparse autoencoder on collected activations or on a running pipeline.

    Give either --activations, or --model and --prompts.
    """

    out_dir: Path = field()
    """Folder for the checkpoint, the metrics and the finished SAE, in a subfolder named after the hook point."""
    hook_point: str = field()
    """Block of the UNet, for example unet.up_blocks.1.attentions.1."""
    activations: Path | None = None
    """Folder that `collect` wrote."""
    model: str | None = None
    """Pipeline to run instead: a folder in diffusers' format or a Hugging Face repository."""
    revision: str | None = None
    """Commit or tag of the model's repository."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the pipeline; the SAE is trained in float32."""
    prompts: str | None = None
    """For --model: text file with one prompt a line, or unlearn-canvas for the 1020 prompts of that benchmark."""
    sampling: Sampling = field(default_factory=Sampling)
    batch_size: int = 4096
    """Tokens per step."""
    buffer_tokens: int = 1_000_000
    """Tokens that are shuffled together; as many again are fetched meanwhile."""
    buffer_device: str | None = None
    """Where these tokens wait; default: where the SAE is trained."""

    def run(self) -> None:
        train_sae(self, self._data())
        logger.info("wrote the SAE to %s", self.out_dir / self.hook_point)

    def _data(self) -> ActivationSource:
        size = {"batch_size": self.batch_size, "buffer_tokens": self.buffer_tokens}
        device = self.buffer_device or resolve_device(self.device)
        if self.activations is not None and self.model is None and self.prompts is None:
            return ShardActivations(self.activations, self.hook_point, seed=self.seed, device=device, **size)
        if self.activations is None and self.model is not None and self.prompts is not None:
            prompts = read_prompts(self.prompts)
            pipe = load_pipeline(self.model, self.revision, self.device, self.dtype)
            return LiveActivations(pipe, prompts, self.hook_point, self.sampling, device=device, **size)
        raise ValueError("activations: expected either --activations, or --model with --prompts")
