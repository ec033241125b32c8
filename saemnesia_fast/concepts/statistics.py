"""Mean activation of every latent by concept and timestep, summed up while activations stream by (SPEC 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from saemnesia_fast.ops import SparseLatents


class ConceptStatistics:
    """Running sums of latent activations: C * N float64 for each timestep seen, whatever the number of prompts.

    Sums are float64: millions of tokens go into one of them, and a float32 sum would stop growing by small terms, which
    would make the result depend on how prompts are batched. Sums stay on the device of the first latents of a timestep.

    Args:
        num_concepts: C.
        num_latents: N.
    """

    def __init__(self, num_concepts: int, num_latents: int) -> None:
        if num_concepts < 1 or num_latents < 1:
            raise ValueError(f"num_concepts, num_latents: expected >= 1, got {num_concepts}, {num_latents}")
        self.num_concepts = num_concepts
        self.num_latents = num_latents
        self._sums: dict[int, Tensor] = {}
        self._tokens: dict[int, Tensor] = {}

    def update(self, latents: SparseLatents, timestep: int, concepts: Sequence[Sequence[int]]) -> None:
        """Add the tokens of B images at one timestep.

        Args:
            latents: values and indices [B, P, k], P tokens an image.
            timestep: the scheduler's value.
            concepts: for each image the rows (0 <= c < C) of all concepts that it belongs to, each once.

        Raises:
            ValueError: a shape or a concept row does not fit.
        """
        values, indices = latents.values, latents.indices
        if values.ndim != 3 or values.shape != indices.shape or len(values) != len(concepts):
            raise ValueError(
                f"latents: expected values and indices [B, P, k] with B = len(concepts) = {len(concepts)}, "
                f"got {list(values.shape)} and {list(indices.shape)}"
            )
        pairs = [(image, c) for image, members in enumerate(concepts) for c in members]
        if any(not 0 <= c < self.num_concepts for _, c in pairs) or len(set(pairs)) != len(pairs):
            raise ValueError(f"concepts: expected different rows in [0, C={self.num_concepts}), got {concepts}")
        if not pairs:
            return
        sums, tokens = self._row(timestep, values.device)
        images, rows = torch.tensor(pairs, device=sums.device).T
        per_image = torch.zeros(len(values), self.num_latents, dtype=torch.float64, device=values.device)
        per_image.scatter_add_(1, indices.flatten(1).long(), values.flatten(1).double())
        sums.index_add_(0, rows, per_image.to(sums.device)[images])
        tokens.index_add_(0, rows, torch.full_like(rows, values.shape[1]))

    def _row(self, timestep: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if timestep not in self._sums:
            shape = (self.num_concepts, self.num_latents)
            self._sums[timestep] = torch.zeros(shape, dtype=torch.float64, device=device)
            self._tokens[timestep] = torch.zeros(self.num_concepts, dtype=torch.int64, device=device)
        return self._sums[timestep], self._tokens[timestep]

    def merge(self, other: ConceptStatistics) -> None:
        """Add what `other`, of the same C and N, has seen (another process, another set of prompts)."""
        sizes = (self.num_concepts, self.num_latents)
        if (other.num_concepts, other.num_latents) != sizes:
            raise ValueError(f"other: expected [C, N] = {list(sizes)}, got {[other.num_concepts, other.num_latents]}")
        for timestep, their_sums in other._sums.items():
            sums, tokens = self._row(timestep, their_sums.device)
            sums += their_sums.to(sums.device)
            tokens += other._tokens[timestep].to(tokens.device)

    def finish(self) -> tuple[Tensor, Tensor]:
        """(mu [C, T, N] float32, timesteps [T] int64 descending), on the CPU; more may be added afterwards.

        Raises:
            ValueError: nothing was added, or a concept has no token at one of the timesteps.
        """
        if not self._sums:
            raise ValueError("no activations were added: was the hook point called?")
        timesteps = sorted(self._sums, reverse=True)
        mu = torch.empty(self.num_concepts, len(timesteps), self.num_latents)
        for t, timestep in enumerate(timesteps):
            tokens = self._tokens[timestep]
            if int(tokens.min()) == 0:
                raise ValueError(f"concept {int(tokens.argmin())} has no token at timestep {timestep}")
            mu[:, t] = self._sums[timestep] / tokens[:, None]
        return mu, torch.tensor(timesteps)
