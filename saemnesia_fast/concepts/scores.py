"""Scores of latents, the choice of latents by score, and the one-to-one assignment (SPEC 2.2, 2.3, 4.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

_EPS = 1e-8


class Scorer:
    """Scores of one concept at a time, from `mu` [C, T, N]; what all concepts sum to is computed once, when needed."""

    def __init__(self, mu: Tensor) -> None:
        self._mu = mu

    @cached_property
    def _total(self) -> Tensor:
        total = torch.zeros(self._mu.shape[1:], dtype=torch.float64)
        for row in self._mu:
            total += row
        return total

    def __call__(self, concept: int) -> Tensor:
        """float32 [T, N]."""
        own = self._mu[concept].double()
        share = own / (own.sum(-1, keepdim=True) + _EPS)
        if len(self._mu) == 1:
            return share.float()
        others = (self._total - own).clamp_min_(0) / (len(self._mu) - 1)
        return (share - others / (others.sum(-1, keepdim=True) + _EPS)).float()


def concept_scores(mu: Tensor) -> Tensor:
    """How much more of its activation a concept puts on each latent than the other concepts do (SPEC 2.2).

    `score = mu_c / (sum_j mu_c + 1e-8) - nu / (sum_j nu + 1e-8)`, nu being the mean of the other concepts, and 0 where
    there are none. Computed in float64.

    Args:
        mu: [C, T, N] mean activations, non-negative.

    Returns:
        float32 [C, T, N].
    """
    scorer = Scorer(mu)
    return torch.stack([scorer(c) for c in range(len(mu))])


def best_latents(scores: Tensor, eligible: Tensor, num_latents: int) -> Tensor:
    """Mask [T, N] of the `num_latents` best eligible latents of each step; equal scores go to the lowest index."""
    ranked = scores.masked_fill(~eligible, -math.inf).sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros_like(eligible).scatter_(-1, ranked[..., :num_latents], True)
    return mask & eligible


def latents_above_percentile(scores: Tensor, eligible: Tensor, percentile: float) -> Tensor:
    """Mask [T, N] of the eligible latents whose score exceeds the percentile of their step, strictly (SPEC 2.3).

    The linearly interpolated quantile lies at position p / 100 * (N - 1) of the sorted scores, in [s_lo, s_hi) of two
    neighbours, so exceeding it is exceeding s_lo. No interpolation is needed; the position is exact, in fractions.
    """
    n = scores.shape[-1]
    position = math.floor(Fraction(repr(float(percentile))) / 100 * (n - 1))
    bound = scores.topk(n - position, -1, sorted=True).values[..., -1:]
    return (scores > bound) & eligible


def assign_latents(mean_scores: Tensor, concepts: Sequence[str], kinds: Sequence[str]) -> dict[str, int]:
    """One latent for every concept, no latent twice (SPEC 4.2).

    Greedy by time-averaged score: the best pair of a free concept and a free latent is taken first, among concepts of
    kind "object", then among all others. Equal scores go to the lowest latent, then to the first name, so the order
    of the concepts does not matter.

    Args:
        mean_scores: [C, N] scores averaged over the steps.
        concepts: C names.
        kinds: C kinds.

    Raises:
        ValueError: fewer latents than concepts.
    """
    num_concepts, num_latents = mean_scores.shape
    if num_latents < num_concepts:
        raise ValueError(f"mean_scores: expected [C, N] with N >= C, got {list(mean_scores.shape)}")
    free = mean_scores.clone()
    assignment: dict[str, int] = {}
    for is_object in (True, False):
        waiting = [c for c in range(num_concepts) if (kinds[c] == "object") == is_object]
        best = {c: _first_maximum(free[c]) for c in waiting}
        while best:
            chosen = min(best, key=lambda c: (-best[c][0], best[c][1], concepts[c]))
            latent = best.pop(chosen)[1]
            assignment[concepts[chosen]] = latent
            free[:, latent] = -math.inf
            best.update({c: _first_maximum(free[c]) for c, (_, i) in best.items() if i == latent})
    return {name: assignment[name] for name in concepts}


def _first_maximum(row: Tensor) -> tuple[float, int]:
    index = int(row.argmax())
    return float(row[index]), index
