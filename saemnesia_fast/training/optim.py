"""What surrounds Adam's step: initialisation, schedule and the decoder's unit-norm rows (SPEC 1.5, 4.1)."""

from __future__ import annotations

import torch
from torch import Tensor


def geometric_median(x: Tensor, max_iterations: int = 200, tolerance: float = 1e-7) -> Tensor:
    """The point [d] with the least sum of distances to the rows of x [M, d], by Weiszfeld's iteration.

    Computed in float64, returned in x.dtype; stops when the point moves by less than `tolerance` of its distance scale.
    """
    points = x.double()
    median = points.mean(0)
    for _ in range(max_iterations):
        distances = (points - median).norm(dim=1)
        weights = 1 / distances.clamp_min(1e-12 * distances.mean() + 1e-300)
        moved = (weights @ points) / weights.sum()
        step, median = (moved - median).norm(), moved
        if step <= tolerance * distances.mean():
            break
    return median.to(x.dtype)


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int = 0) -> float:
    """The rate of step 0 <= step < steps: up linearly over the warm-up, then linearly to 0 (reached after the last)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (steps - step) / (steps - warmup_steps)


@torch.no_grad()
def remove_parallel_gradient(W_dec: Tensor, gradient: Tensor) -> None:
    """Take from each row of `gradient` [N, d], in place, its component along that row of W_dec [N, d]."""
    squared = W_dec.square().sum(1, keepdim=True).clamp_min(torch.finfo(W_dec.dtype).tiny)
    gradient.sub_((gradient * W_dec).sum(1, keepdim=True) / squared * W_dec)


@torch.no_grad()
def normalize_rows(W_dec: Tensor) -> None:
    """Scale the rows of W_dec [N, d] to unit length, in place; a row of zeros stays."""
    W_dec.div_(W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(W_dec.dtype).tiny))
