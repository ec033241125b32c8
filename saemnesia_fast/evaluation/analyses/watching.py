"""Paints pictures and keeps what chosen latents did meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saemnesia_fast.hookpoints import capture
from saemnesia_fast.sae import SparseLatents, TopKSAE

from .reading import Reading

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Sample:
    """A picture to paint, and the concepts that its prompt asks for."""

    prompt: str
    seed: int
    concepts: tuple[str, ...]


@dataclass(frozen=True)
class Watched:
    """P pictures and what latents did at each of T steps."""

    images: Tensor
    """[P, 3, height, width] in [0, 1], or [P, 4, h, w] where `output_type` is "latent"."""
    timesteps: Tensor
    """[T] int64, of each UNet call."""
    activations: dict[str, Tensor]
    """{a reading's name: float32 [P, T, L, H, W]}, or what `reduce` makes of the last three."""


def watch(
    pipe: DiffusionPipeline,
    readings: Sequence[Reading],
    samples: Sequence[Sample],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int = 8,
    reduce: Callable[[Tensor], Tensor] = torch.clone,
    **pipe_kwargs: Any,
) -> Watched:
    """Paint the samples and keep the values, zero where not among a token's k, of every reading's latents.

    The latents are those of `Reading.latents`, on the conditional half of what the table's SAE reads, output or
    residual. `reduce` is given [B, L, H, W] at each step.

    Raises:
        ValueError: no sample, a reading without SAE, a table made with another one, or rows that fit no batch.
    """
    if not samples:
        raise ValueError("samples: expected at least one picture to paint, got none")
    for one in readings:
        one.table.check_sae(_sae(one))
    chosen = {one.name: torch.tensor(one.latents()) for one in readings}
    steps: dict[str, list[Tensor]] = {}
    timesteps: list[int] = []
    batch: Sequence[Sample] = ()

    def keep(point: str, activation: Tensor, timestep: Tensor) -> None:
        if len(activation) not in (len(batch), 2 * len(batch)):
            raise ValueError(
                f"activation of {point}: expected B or 2B rows for B = {len(batch)}, got {len(activation)}"
            )
        if point == points[0]:
            timesteps.append(int(timestep))
        tokens = activation[-len(batch) :].permute(0, 2, 3, 1)
        for one in readings:
            if one.table.hook_point == point:
                device = _sae(one).W_enc.device
                latents = _sae(one).encode(tokens.to(device, torch.promote_types(tokens.dtype, torch.float32)))
                values = values_of(latents, chosen[one.name].to(device)).permute(0, 3, 1, 2)
                steps.setdefault(one.name, []).append(reduce(values).cpu())

    images: list[Tensor] = []
    activations: dict[str, list[Tensor]] = {one.name: [] for one in readings}
    streams: dict[str, str] = {}
    for one in readings:
        stream = one.table.sampler.get("stream", "output")
        if streams.setdefault(one.table.hook_point, stream) != stream:
            raise ValueError(f"readings: expected one stream at {one.table.hook_point}, got both")
    points = list(streams)
    with torch.no_grad(), capture(pipe, points, keep, stream=streams):
        for first in range(0, len(samples), batch_size):
            batch = samples[first : first + batch_size]
            steps.clear()
            timesteps.clear()
            images.append(
                pipe(
                    [one.prompt for one in batch],
                    generator=[torch.Generator("cpu").manual_seed(one.seed) for one in batch],
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    **{"output_type": "pt", **pipe_kwargs},
                ).images.cpu()
            )
            for name, some in steps.items():
                activations[name].append(torch.stack(some, 1))
    return Watched(
        torch.cat(images), torch.tensor(timesteps), {name: torch.cat(some) for name, some in activations.items()}
    )


def values_of(latents: SparseLatents, chosen: Tensor) -> Tensor:
    """[..., L]: the values of latents `chosen` [L] among the kept ones [..., k], 0 where a token did not keep one."""
    kept = latents.indices[..., None] == chosen.to(latents.indices.dtype)
    return torch.where(kept, latents.values[..., None], 0).sum(-2)


def _sae(reading: Reading) -> TopKSAE:
    if reading.sae is None:
        raise ValueError(f"sae: expected that of {reading.name}, got None")
    return reading.sae
