"""Which latents are steered at which step, from what threshold on and by how much (SPEC 2.3, 3.1, 3.5)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SCALES = ("mean", "constant", "norm")


def nearest_row(timesteps: Tensor, timestep: Tensor | float) -> Tensor:
    """Index (int64, on the device of `timesteps`) of the entry of `timesteps` [T] nearest to each `timestep`.

    Halfway between two entries the first one counts, the noisier one in a table. Nothing waits for the device.
    """
    given = timestep[..., None] if isinstance(timestep, Tensor) else timestep
    return (timesteps - given).abs().argmin(-1)


@dataclass(frozen=True, eq=False)
class Selection:
    """What erasing needs, at every stored timestep. Within a row the latents ascend and the padding comes last."""

    timesteps: Tensor
    """[T] int64, descending."""
    latents: Tensor
    """[T, S] int64, padding 0."""
    thresholds: Tensor
    """[T, S] float32: m_i(t), the mean of mu over all concepts of the table; padding +inf."""
    factors: Tensor
    """[T, S] float32: strength * mu, strength, or strength / ||d_i||, by `scale`; padding 1."""
    owners: Tensor
    """[T, S] int64: whose claim on the latent counts, an index into `concepts`; padding -1."""
    concepts: tuple[str, ...]
    """The selected concepts, in the order of the table."""
    scale: str
    """mean, constant or norm (then a token's factor is yet to be multiplied by the norm of its top-k values)."""

    def row(self, timestep: Tensor | float) -> int:
        """Index of the stored timestep nearest to `timestep` (SPEC 2.4)."""
        return int(nearest_row(self.timesteps, timestep))


class ClaimBoard:
    """Collects the claims of several concepts on latents and keeps, for each, the most negative strength * mu.

    Claims must come in an order that does not depend on the caller, since among equal claims the first one stays.
    """

    def __init__(self, num_steps: int, num_latents: int) -> None:
        self.owner = torch.full((num_steps, num_latents), -1, dtype=torch.int64)
        self._strongest = torch.full((num_steps, num_latents), math.inf, dtype=torch.float64)

    def claim(self, concept: int, mask: Tensor, mu: Tensor, strength: float) -> None:
        """`mask`, `mu`: [T, N]. float64, so that a rounded product ties no two different claims."""
        claims = strength * mu.double()
        wins = mask & (claims < self._strongest)
        self._strongest[wins] = claims[wins]
        self.owner[wins] = concept

    def slots(self) -> tuple[Tensor, Tensor]:
        """(latents [T, S], owners [T, S]) int64, padded with 0 and -1, S the largest number of a step."""
        steps, latents = (self.owner >= 0).nonzero(as_tuple=True)
        counts = steps.bincount(minlength=len(self.owner))
        slot = torch.arange(len(steps)) - (counts.cumsum(0) - counts)[steps]
        shape = (len(self.owner), int(counts.max()))
        packed_latents = torch.zeros(shape, dtype=torch.int64).index_put_((steps, slot), latents)
        packed_owners = torch.full(shape, -1).index_put_((steps, slot), self.owner[steps, latents])
        return packed_latents, packed_owners
