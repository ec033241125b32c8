"""The `train` command."""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from saemnesia_fast.training import (
    LiveActivations,
    Sampling,
    SeveralActivations,
    ShardActivations,
    TrainConfig,
    train_saes,
)
from saemnesia_fast.training.parallel import connect
from saemnesia_fast.training.trainer import TokenBatches

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
    more_hook_points: tuple[str, ...] = ()
    """Further blocks, for each an SAE from the same prompts; with --model their maps must be of one size."""
    more_k: tuple[int, ...] = ()
    """Further numbers of latents per token, for each an SAE on the same tokens, then all in folders k<k> of out_dir."""
    more_expansion_factors: tuple[int, ...] = ()
    """Further N / d, for each an SAE on the same tokens, then all in folders x<N / d>, within those of k."""
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
    latent_ranks: int = 1
    """Under torchrun: how many processes share the latents. Groups of so many share the tokens of each batch."""

    def run(self) -> None:
        if self.more_expansion_factors and self.num_latents is not None:
            raise ValueError(f"more_expansion_factors: expected none beside num_latents={self.num_latents}")
        with connect(self.latent_ranks, self.device) as layout:
            self.device = layout.device or self.device
            names = (self.hook_point, *self.more_hook_points)
            runs = [
                replace(self, hook_point=name, k=k, expansion_factor=factor, out_dir=self._folder(k, factor))
                for name in names
                for k in (self.k, *self.more_k)
                for factor in (self.expansion_factor, *self.more_expansion_factors)
            ]
            train_saes(runs, self._data(), layout)
            for config in runs:
                logger.info("wrote the SAE to %s", config.out_dir / config.hook_point)

    def _folder(self, k: int, factor: int) -> Path:
        """Of the SAEs with k latents per token and N / d = factor."""
        parts = [f"k{k}"] * bool(self.more_k) + [f"x{factor}"] * bool(self.more_expansion_factors)
        return self.out_dir.joinpath(*parts)

    def _data(self) -> TokenBatches:
        size = {"batch_size": self.batch_size, "buffer_tokens": self.buffer_tokens}
        device = self.buffer_device or resolve_device(self.device)
        names = (self.hook_point, *self.more_hook_points)
        if self.activations is not None and self.model is None and self.prompts is None:
            sources = {
                name: ShardActivations(self.activations, name, seed=self.seed, device=device, **size) for name in names
            }
            return SeveralActivations(sources) if self.more_hook_points else sources[self.hook_point]
        if self.activations is None and self.model is not None and self.prompts is not None:
            prompts = read_prompts(self.prompts)
            pipe = load_pipeline(self.model, self.revision, self.device, self.dtype)
            hook_points = names if self.more_hook_points else self.hook_point
            return LiveActivations(pipe, prompts, hook_points, self.sampling, device=device, **size)
        raise ValueError("activations: expected either --activations, or --model with --prompts")
