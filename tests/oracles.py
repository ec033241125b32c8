"""Independent re-expressions, in dense torch, of what others' code computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def released_hook(
    block: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    W_dec: Tensor,
    k: int,
    latents: Tensor,
    thresholds: Tensor,
    factors: Tensor,
) -> Tensor:
    """The released hooks' edit of a block's output [B, C, H, W] (SPEC 1.1-1.3, 3.1, 3.2): x' = 2 r - x + Delta.

    They decode the edited latents, and then add what they call the reconstruction error, r - x, to it:
    x' = decode(z') + (decode(z) - x). latents, thresholds, factors: [S]. All latents are held densely.
    """
    B, C, H, W = block.shape
    x = block.reshape(B, C, H * W).transpose(1, 2).reshape(-1, C)
    pre = torch.relu((x - b_dec) @ W_enc.T + b_enc)
    kept, where = pre.topk(k, dim=1)
    z = torch.zeros_like(pre).scatter(1, where, kept)
    reconstruction = z @ W_dec + b_dec
    edited = z.clone()
    for i, threshold, factor in zip(latents.tolist(), thresholds.tolist(), factors.tolist(), strict=True):
        edited[:, i] = torch.where(z[:, i] > threshold, z[:, i] * factor, z[:, i])
    out = edited @ W_dec + b_dec + (reconstruction - x)
    return out.reshape(B, H * W, C).transpose(1, 2).reshape(B, C, H, W)


def dense_erasure(
    block: Tensor, sae: Any, latents: Tensor, thresholds: Tensor, factors: Tensor, *, mode: str
) -> Tensor:
    """x' of SPEC 3.2 for a block [B, C, H, W], in float64, all rows by the same line of [S] entries."""
    x = block.double().permute(0, 2, 3, 1)
    pre = torch.relu((x - sae.b_dec.double()) @ sae.W_enc.double().T + sae.b_enc.double())
    z = torch.where(pre >= pre.topk(sae.k).values[..., -1:], pre, 0)
    change = torch.zeros_like(z)
    for i, threshold, factor in zip(latents.tolist(), thresholds.tolist(), factors.tolist(), strict=True):
        change[..., i] = torch.where(z[..., i] > threshold, (factor - 1) * z[..., i], 0)
    delta = change @ sae.W_dec.double()
    r = z @ sae.W_dec.double() + sae.b_dec.double()
    out = {"exact": x + delta, "released": 2 * r - x + delta, "reconstruct": r + delta}[mode]
    return out.permute(0, 3, 1, 2)
