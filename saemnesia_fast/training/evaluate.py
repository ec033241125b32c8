"""How well an SAE reconstructs tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from saemnesia_fast.sae import TopKSAE


class Evaluation(NamedTuple):
    fvu: float
    """sum |x - x_hat|^2 / sum |x - mean(x)|^2 over all tokens."""
    dead_fraction: float
    """Share of the latents that fired on no token."""
    l0: float
    """Mean number of values > 0 per token."""


@torch.no_grad()
def evaluate_sae(sae: TopKSAE, activations: Tensor, batch_size: int = 4096) -> Evaluation:
    """Reconstruct activations [n, d] with the per-token TopK that serves (SPEC 1); sums are kept in float64."""
    if activations.ndim != 2 or activations.shape[1] != sae.d or len(activations) < 2:
        got = list(activations.shape)
        raise ValueError(f"activations: expected [n, d] = [>= 2, {sae.d}] to match the SAE, got {got}")
    device, dtype = sae.W_dec.device, sae.W_dec.dtype
    mean = activations.mean(0, dtype=torch.float64).to(device)
    fired = torch.zeros(sae.num_latents, dtype=torch.bool, device=device)
    error = variance = firings = torch.zeros((), dtype=torch.float64, device=device)
    for part in activations.split(batch_size):
        x = part.to(device, dtype)
        x_hat, latents = sae(x)
        error = error + (x - x_hat).double().square().sum()
        variance = variance + (x.double() - mean).square().sum()
        positive = latents.values > 0
        firings = firings + positive.sum()
        fired[latents.indices[positive].long()] = True
    dead_fraction = 1 - fired.double().mean().item()
    return Evaluation((error / variance).item(), dead_fraction, firings.item() / len(activations))


def evaluate_fvu(sae: TopKSAE, activations: Tensor, batch_size: int = 4096) -> float:
    """The fraction of the variance of activations [n, d] that `sae` leaves unexplained."""
    return evaluate_sae(sae, activations, batch_size).fvu
