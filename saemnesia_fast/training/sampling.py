"""Running a pipeline on prompts and handing out the activations of the conditional half (SPEC 5.1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saemnesia_fast.hookpoints import Stream, capture


@dataclass(kw_only=True)
class Sampling:
    """How the pipeline samples while its activations are read; the defaults are UnlearnCanvas's guidance (SPEC 5.2)."""

    num_inference_steps: int = 50
    """Denoising steps; every one of them is read."""
    guidance_scale: float = 9.0
    """Classifier-free guidance; only the conditional half is read."""
    seed: int = 0
    """The i-th prompt starts from the noise of seed + i."""
    prompts_per_call: int = 1
    """Prompts that go through the pipeline together."""
    height: int | None = None
    """Image height in pixels; default: the pipeline's."""
    width: int | None = None
    """Image width in pixels; default: the pipeline's."""
    stream: Stream | dict[str, Stream] = "output"
    """output: what the block returns; residual: output minus input (SDXL); or {hook point: ...} where they differ."""

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "prompts_per_call"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number >= 1, got {getattr(self, name)}")


def sample_activations(
    pipe: Any,
    prompts: Sequence[str],
    first_seed: int,
    hook_points: Sequence[str],
    sampling: Sampling,
    device: str | torch.device = "cpu",
) -> tuple[dict[str, Tensor], Tensor]:
    """Run `prompts` (B of them) once, prompt i from the noise of first_seed + i, without decoding the images.

    Returns {hook point: activations [B, T, H*W, d] on `device`, in the pipeline's dtype} and the timestep values [T]
    int64 on the CPU, one for each UNet call.
    """
    calls: dict[str, list[Tensor]] = {name: [] for name in hook_points}
    timesteps: list[Tensor] = []

    def keep(hook_point: str, activation: Tensor, timestep: Tensor) -> None:
        if pipe.do_classifier_free_guidance:
            activation = activation.chunk(2)[1]
        if len(activation) != len(prompts):
            got = f"{len(activation)} rows at {hook_point}"
            raise ValueError(f"prompts: expected one conditional row for each of {len(prompts)} prompts, got {got}")
        calls[hook_point].append(activation.detach().flatten(2).transpose(1, 2).to(device))
        if hook_point == hook_points[0]:
            timesteps.append(timestep)

    size = {name: value for name in ("height", "width") if (value := getattr(sampling, name)) is not None}
    with _without_progress_bar(pipe), capture(pipe, hook_points, keep, stream=sampling.stream):
        pipe(
            prompt=list(prompts),
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            generator=[torch.Generator().manual_seed(first_seed + i) for i in range(len(prompts))],
            output_type="latent",
            **size,
        )
    return {name: torch.stack(parts, dim=1) for name, parts in calls.items()}, torch.stack(timesteps).cpu()


def activation_shapes(pipe: Any, hook_points: Sequence[str], sampling: Sampling) -> dict[str, tuple[int, int, int]]:
    """{hook point: (T, H*W, d)} of one prompt, from two denoising steps of an empty prompt."""
    short = replace(sampling, num_inference_steps=2)
    activations, _ = sample_activations(pipe, [""], 0, hook_points, short)
    pipe.scheduler.set_timesteps(sampling.num_inference_steps)
    calls = len(pipe.scheduler.timesteps)
    return {name: (calls, *x.shape[2:]) for name, x in activations.items()}


@contextmanager
def _without_progress_bar(pipe: Any) -> Iterator[None]:
    """Silence the pipeline's own bar; prompts are what the caller counts."""
    config = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**(config | {"disable": True}))
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**config)
