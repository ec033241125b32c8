"""The unsupervised loss of SPEC 4.1, FVU + alpha * AuxK (+ FVU at 4k / 8), for autograd; training takes `step`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from saemnesia_fast import ops

if TYPE_CHECKING:
    from saemnesia_fast.sae import TopKSAE

# BatchTopK: a token takes no more than this multiple of k, nor than so many, unless that is less than twice its share.
BATCH_TOPK_CAP = 8
BATCH_TOPK_MOST = 256


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


def num_candidates(k: int, num_latents: int, multi_topk: bool = False, batch_topk: bool = False) -> int:
    """Latents of a token that must be found to `keep` k, and 4k for multi-TopK; for BatchTopK, the most it can have."""
    needed = 4 * k if multi_topk else k
    if batch_topk:
        needed = min(BATCH_TOPK_CAP * k, max(BATCH_TOPK_MOST, 2 * needed))
    return min(needed, num_latents)


def least_kept(values: Tensor, k: int) -> Tensor:
    """The k * M-th largest (0-d) of all tokens' candidates [M, w]: where BatchTopK cuts (SPEC 1.4)."""
    pool = values.detach().flatten()
    return pool.topk(min(k * len(values), pool.numel()), sorted=False).values.min()


def keep(values: Tensor, k: int, least: Tensor | None = None) -> Tensor:
    """Of the candidates' values [M, w], descending, those that are kept; they belong to the first columns' latents.

    Each token's first k: [M, k]. With `least`, BatchTopK: those that are not below it, [M, w] with the others 0.
    """
    return values[:, :k] if least is None else torch.where(values >= least, values, 0)


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
    `batch_topk` lets the tokens share the budget; a token takes at most `num_candidates`.
    """
    variance = total_variance(x) if variance is None else variance
    width = num_candidates(sae.k, sae.num_latents, multi_topk, batch_topk)
    candidates = ops.encode_topk(x, sae.W_enc, sae.b_enc, sae.b_dec, width)

    def reconstruct(k: int) -> tuple[Tensor, Tensor, Tensor]:
        least = least_kept(candidates.values, k) if batch_topk else None
        values = keep(candidates.values, k, least)
        indices = candidates.indices[:, : values.shape[1]]
        return ops.decode(values, indices, sae.W_dec, sae.b_dec), values, indices

    x_hat, values, indices = reconstruct(sae.k)
    hits = torch.zeros(sae.num_latents, dtype=torch.int64, device=x.device)
    hits.scatter_add_(0, indices.flatten().long(), (values > 0).flatten().long())
    error = x - x_hat
    fvu = error.square().sum() / variance
    auxk = x.new_zeros(()) if dead is None else auxk_loss(sae, x, error, dead) / variance
    loss = fvu + auxk_alpha * auxk
    if multi_topk:
        loss = loss + (x - reconstruct(4 * sae.k)[0]).square().sum() / variance / 8
    return LossOutput(loss, fvu.detach(), auxk.detach(), hits > 0, hits.sum())


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
