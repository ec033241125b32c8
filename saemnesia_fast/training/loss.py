"""The unsupervised loss of SPEC 4.1: FVU + alpha * AuxK (+ FVU at 4k / 8)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from saemnesia_fast import ops

if TYPE_CHECKING:
    from saemnesia_fast.sae import TopKSAE


class LossOutput(NamedTuple):
    loss: Tensor
    """0-d, what is minimised: fvu + alpha * auxk (+ multi / 8)."""
    fvu: Tensor
    """0-d, detached: sum |x - x_hat|^2 / variance."""
    auxk: Tensor
    """0-d, detached: the AuxK loss, 0 where no latent is dead."""
    fired: Tensor
    """[N] bool: latents with a value > 0 on some token."""
    firings: Tensor
    """0-d int64: number of values > 0 over all tokens."""


def total_variance(x: Tensor) -> Tensor:
    """sum_m |x_m - mean(x)|^2 of tokens x [M, d]: the denominator of FVU (0-d)."""
    return (x - x.mean(0)).square().sum()


def sae_loss(
    sae: TopKSAE,
    x: Tensor,
    dead: Tensor | None = None,
    *,
    variance: Tensor | None = None,
    auxk_alpha: float = 1 / 32,
    multi_topk: bool = False,
    batch_topk: bool = False,
) -> LossOutput:
    """FVU + alpha * AuxK (+ FVU at 4k / 8) of tokens x [M, d] in the SAE's dtype (SPEC 4.1).

    With e = x - x_hat, FVU = sum |e|^2 / variance. `variance` (0-d) is `total_variance(x)` unless given: with that of
    the whole batch the losses of its micro-batches add up to the batch's. `dead` [N] bool marks the latents of AuxK.
    """
    variance = total_variance(x) if variance is None else variance
    if batch_topk:
        x_hat, x_hat_multi, positive = _reconstruct_batch_topk(sae, x, multi_topk)
        fired, firings = positive.any(0), positive.sum()
    else:
        x_hat, x_hat_multi, values, indices = _reconstruct_topk(sae, x, multi_topk)
        hits = torch.zeros(sae.num_latents, dtype=torch.int64, device=x.device)
        hits.scatter_add_(0, indices.flatten().long(), (values > 0).flatten().long())
        fired, firings = hits > 0, hits.sum()

    error = x - x_hat
    fvu = error.square().sum() / variance
    auxk = x.new_zeros(()) if dead is None else auxk_loss(sae, x, error, dead) / variance
    loss = fvu + auxk_alpha * auxk
    if x_hat_multi is not None:
        loss = loss + (x - x_hat_multi).square().sum() / variance / 8
    return LossOutput(loss, fvu.detach(), auxk.detach(), fired, firings)


def auxk_loss(sae: TopKSAE, x: Tensor, error: Tensor, dead: Tensor) -> Tensor:
    """scale * sum |e_hat - e|^2, not yet divided by the variance (0-d; SPEC 4.1).

    e_hat [M, d] is made of each token's k_aux = min(d/2, n_dead) largest among the `dead` [N] latents, without b_dec;
    scale = min(n_dead / (d/2), 1). `error` e [M, d] is a constant here, so only the dead latents learn from it.
    """
    rows = dead.nonzero().squeeze(1)
    half = x.shape[-1] // 2
    k_aux = min(half, len(rows))
    if k_aux == 0:
        return x.new_zeros(())
    # k_aux is a large part of n_dead: a dense product over the dead rows beats gathering k_aux directions per token.
    pre = torch.relu((x - sae.b_dec) @ sae.W_enc[rows].T + sae.b_enc[rows])
    values, indices = pre.topk(k_aux, dim=-1)
    e_hat = torch.zeros_like(pre).scatter(-1, indices, values) @ sae.W_dec[rows]
    return min(len(rows) / half, 1.0) * (e_hat - error.detach()).square().sum()


def _reconstruct_topk(sae: TopKSAE, x: Tensor, multi_topk: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(x_hat, x_hat from 4k latents or None, values [M, k], indices [M, k])."""
    width = min(4 * sae.k, sae.num_latents) if multi_topk else sae.k
    many = ops.encode_topk(x, sae.W_enc, sae.b_enc, sae.b_dec, width)
    # Values descend, so the k largest are a prefix of the 4k largest.
    values, indices = many.values[:, : sae.k], many.indices[:, : sae.k]
    x_hat = ops.decode(values, indices, sae.W_dec, sae.b_dec)
    x_hat_multi = ops.decode(many.values, many.indices, sae.W_dec, sae.b_dec) if multi_topk else None
    return x_hat, x_hat_multi, values, indices


def _reconstruct_batch_topk(sae: TopKSAE, x: Tensor, multi_topk: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """(x_hat, x_hat from 4k latents a token or None, firing [M, N] bool) with the budget shared by the batch."""
    pre = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)

    def keep(k: int) -> Tensor:
        flat = pre.flatten()
        values, indices = flat.topk(min(k * len(x), flat.numel()), sorted=False)
        return torch.zeros_like(flat).scatter(0, indices, values).view_as(pre)

    kept = keep(sae.k)
    x_hat = kept @ sae.W_dec + sae.b_dec
    x_hat_multi = keep(4 * sae.k) @ sae.W_dec + sae.b_dec if multi_topk else None
    return x_hat, x_hat_multi, kept.detach() > 0
