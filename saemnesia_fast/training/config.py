"""What a training run can be told."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

# Fields that may differ between the run that wrote a checkpoint and the run that continues it.
RUNTIME_FIELDS = frozenset({"out_dir", "device", "resume", "checkpoint_every", "keep_checkpoints", "on_bad_batch"})
RUNTIME_FIELDS |= {"log_every", "log_to", "progress"}

LEAST_EPS_8BIT = 1e-6


@dataclass(kw_only=True)
class TrainConfig:
    """The recipe of one unsupervised SAE (SPEC 4.1); the defaults are the papers' for SD 1.5.

    The number of tokens per step and the order of the tokens belong to the data source.
    """

    out_dir: Path | None = None
    """Folder for the checkpoints, the metrics and the finished SAE; without one nothing is written."""
    hook_point: str = "sae"
    """Where the activations come from; names the SAE's folder inside out_dir."""
    num_latents: int | None = None
    """Number of latents N; default: expansion_factor * d."""
    expansion_factor: int = 16
    """N / d where num_latents is not given."""
    k: int = 32
    """Latents kept per token."""
    k_start: int | None = None
    """Latents kept per token at first; falls (or rises) linearly to k over k_steps."""
    k_steps: int = 1000
    """Steps until k, where k_start is given."""
    steps: int | None = None
    """Optimizer steps; default: as many as one pass over the data holds."""
    micro_batches: int = 1
    """Parts in which a batch goes through dense products, to save memory; a resumed run keeps them."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of W_enc and the tokens while encoding; the weights that are trained stay float32."""
    moments: Literal["float32", "bfloat16", "8bit"] = "float32"
    """Precision of Adam's moments of W_enc and W_dec. 8bit, torchao's format, needs an adam_eps >= 1e-6; and torchao
    itself, which takes stored gradients, where d is not a multiple of 64."""
    lr: float = 4e-4
    """Peak learning rate."""
    lr_schedule: Literal["linear", "constant"] = "linear"
    """After the warm-up: falling linearly to 0, or constant."""
    warmup_steps: int = 0
    """Steps over which the learning rate first rises linearly."""
    adam_eps: float = 6.25e-10
    """Epsilon of Adam."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient."""
    auxk_alpha: float = 1 / 32
    """Weight of the AuxK loss, by which dead latents learn the residual; 0 turns it off."""
    dead_after: int = 10_000_000
    """Tokens without a firing (value > 0) after which a latent counts as dead."""
    multi_topk: bool = False
    """Add FVU / 8 of the reconstruction from 4k latents per token."""
    batch_topk: bool = False
    """Let a batch share k latents per token, up to 8k for one, instead of k for each; serving stays per token."""
    seed: int = 0
    """Seed of the SAE's initial weights."""
    device: str | None = None
    """Where to train; default: cuda where there is one, else cpu."""
    resume: bool = False
    """Continue from the newest whole checkpoint in out_dir; start afresh where there is none."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; 0 writes only the last one."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep, besides the one with the lowest mean FVU over the steps since the one before it."""
    on_bad_batch: Literal["raise", "skip"] = "raise"
    """What to do with a batch of NaN or inf, or without variance; a skipped one takes a step and changes nothing."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    log_to: tuple[str, ...] = ()
    """Further places for the metrics: tensorboard, wandb."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        if self.out_dir is not None:
            self.out_dir = Path(self.out_dir)
        elif self.resume or self.log_to:
            raise ValueError("out_dir: expected a folder when resume or log_to is given, got None")
        at_least = {"num_latents": 1, "expansion_factor": 1, "k": 1, "steps": 1, "micro_batches": 1, "log_every": 1}
        at_least |= {"warmup_steps": 0, "auxk_alpha": 0, "checkpoint_every": 0, "dead_after": 1}
        at_least |= {"keep_checkpoints": 1, "k_start": 1, "k_steps": 1}
        for name, lowest in at_least.items():
            value = getattr(self, name)
            if value is not None and not value >= lowest:
                raise ValueError(f"{name}: expected a number >= {lowest}, got {value}")
        for name in ("lr", "adam_eps", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        for name in ("lr_schedule", "compute_dtype", "moments", "on_bad_batch"):
            allowed = get_args(get_type_hints(TrainConfig)[name])
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.moments == "8bit" and self.adam_eps < LEAST_EPS_8BIT:
            least = f"a number >= {LEAST_EPS_8BIT} with 8-bit moments, as these round what is small to 0"
            raise ValueError(f"adam_eps: expected {least}, got {self.adam_eps}")
        unknown = set(self.log_to) - {"tensorboard", "wandb"}
        if unknown:
            raise ValueError(f"log_to: expected tensorboard or wandb, got {sorted(unknown)}")

    def recipe(self) -> dict[str, Any]:
        """The options that decide the result, as plain JSON: without the places, the logging and the device."""
        return {f.name: getattr(self, f.name) for f in fields(TrainConfig) if f.name not in RUNTIME_FIELDS}
