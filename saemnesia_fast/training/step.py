"""The gradient of one batch without autograd (SPEC 4.1, 4.3): what is not sparse is never written down.

Nothing here makes the host wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saemnesia_fast import ops
from saemnesia_fast.ops import DenseRows, PairTerms
from saemnesia_fast.sae import TopKSAE
from saemnesia_fast.training.layout import ALONE, Layout
from saemnesia_fast.training.loss import keep, least_kept, num_candidates, total_variance
from saemnesia_fast.training.supervised_loss import Supervised, SupervisedTerms, supervised_gradient

# Room for the activations of dead latents: more tokens are taken in parts.
AUXK_BYTES = 1 << 29


class Objective(NamedTuple):
    """What is minimised: FVU + alpha * AuxK (+ FVU at 4k / 8)."""

    k: int
    auxk_alpha: float = 1 / 32
    multi_topk: bool = False
    batch_topk: bool = False


class BatchGradient(NamedTuple):
    """The gradient of a batch's loss, and what else the batch tells. 0-d tensors but for four."""

    sparse: Any
    """Of W_enc, b_enc and W_dec: what `collect` returns."""
    db_dec: Tensor
    """[d]."""
    norm: Tensor
    """Of the whole gradient; NaN where the batch cannot be trained on."""
    hits: Tensor
    """[N] int64: on how many tokens each latent has a value > 0."""
    loss: Tensor
    fvu: Tensor
    auxk: Tensor
    variance: Tensor
    """The denominator of FVU."""
    taught: SupervisedTerms | None = None
    """What supervision has added to the loss."""


def batch_gradient(
    sae: TopKSAE,
    x: Tensor,
    objective: Objective,
    dead: Tensor | None = None,
    candidates: Tensor | None = None,
    *,
    micro_batches: int = 1,
    encoder: Tensor | None = None,
    collect: Callable[..., Any] = ops.sparse_gradients,
    layout: Layout = ALONE,
    supervised: Supervised | None = None,
) -> BatchGradient:
    """The gradient of `objective` for tokens x [M, d] in the SAE's dtype, and of the terms they are `supervised` by.

    `dead` [C] bool marks the latents of AuxK among `candidates` [C] int64, which ascend and hold the latents of
    `supervised`. `encoder` is W_enc in 16 bits to encode with in its place. Dense products take the tokens in
    `micro_batches` parts. In a `layout` of several processes each of them is given all tokens, of which it encodes and
    decodes its share, and an SAE with the latents that it holds.
    """
    variance = total_variance(x)
    own = layout.rows_of(x)
    width = num_candidates(objective.k, sae.num_latents, objective.multi_topk, objective.batch_topk)
    found = [encode(sae, part, width, encoder, layout) for part in own.chunk(micro_batches)]
    values, indices = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
    # What is exchanged is what the gradients are made of: far less than the gradients. And as every process makes them
    # of all tokens, they are those of a process alone.
    all_values, all_indices = layout.gather_tokens(values), layout.gather_tokens(indices)
    pool = layout.sum_over_latents(all_values) if objective.batch_topk else None

    def term(k: int, weight: float) -> tuple[PairTerms, Tensor]:
        """The pairs of all tokens, and their FVU."""
        least = None if pool is None else least_kept(pool, k)
        kept = keep(values, k, least)
        columns = kept.shape[1]
        latents = (kept, indices[:, :columns], sae.W_dec, sae.b_dec)
        scale = -2 * weight / variance
        if layout.latents_size > 1:
            error = own - layout.decode(*latents)
            grad, squares = error * scale, error.square().sum(1)
        else:
            grad, squares = ops.decode_error(*latents, own, scale)
        fvu = layout.gather_tokens(squares).sum() / variance
        all_grads = layout.gather_tokens(grad)
        return PairTerms(keep(all_values, k, least), all_indices[:, :columns], all_grads), fvu

    main, fvu = term(objective.k, 1.0)
    terms, loss = [main], fvu
    if objective.multi_topk:
        multi, multi_fvu = term(4 * objective.k, 1 / 8)
        terms.append(multi)
        loss = loss + multi_fvu / 8
    auxk, dense = x.new_zeros(()), None
    if candidates is not None and dead is not None and objective.auxk_alpha and x.shape[1] > 1:
        alpha = objective.auxk_alpha
        fvu_grad = layout.rows_of(main.grad_x_hat)
        auxk, dense = auxk_gradient(sae, own, fvu_grad, dead, candidates, alpha, variance, micro_batches, layout)
        loss = loss + alpha * auxk
    taught = None
    if supervised is not None:
        taught, terms[0], dense = supervised_gradient(sae, x, objective.k, supervised, main, dense, layout)
        loss = loss + taught.loss

    sparse = collect(terms, x, sae.W_dec, sae.b_dec, dense)
    db_dec = reduce(add, (term.grad_x_hat.sum(0) for term in terms))
    db_dec -= layout.sum_over_latents(sparse.db_enc @ sae.W_enc)
    squares = layout.sum_over_latents(sparse.squared_norm + sparse.db_enc.square().sum()) + db_dec.square().sum()
    # What is not finite is NaN less itself: squares that overflow, a variance of 0 or inf divided by itself.
    doubt = variance / variance + squares
    norm = squares.sqrt() + (doubt - doubt)
    hits = torch.zeros(len(sae.W_dec), dtype=torch.int64, device=x.device)
    hits.scatter_add_(0, main.indices.flatten().long(), (main.values > 0).flatten().long())
    return BatchGradient(sparse, db_dec, norm, hits, loss, fvu, auxk, variance, taught)


def auxk_gradient(
    sae: TopKSAE,
    x: Tensor,
    fvu_grad: Tensor,
    dead: Tensor,
    candidates: Tensor,
    alpha: float,
    variance: Tensor,
    micro_batches: int = 1,
    layout: Layout = ALONE,
) -> tuple[Tensor, DenseRows]:
    """AuxK (0-d) of tokens x [M, d] with errors e [M, d], and `alpha` times its gradient (SPEC 4.1).

    `fvu_grad` [M, d] is -2 e / variance, that of FVU with respect to x_hat.
    The latents that are `dead` [C] bool among `candidates` [C] take part as a dense product, the tokens in at least
    `micro_batches` parts; what is not dead among them has a bias of -inf, so that the shapes do not depend on how many
    are dead.
    """
    half = x.shape[1] // 2
    scale = (layout.sum_over_latents(dead.sum()).to(x.dtype) / half).clamp(max=1) / variance
    W_enc, W_dec = sae.W_enc[candidates], sae.W_dec[candidates]
    b_enc = sae.b_enc[candidates].masked_fill_(~dead, -torch.inf)
    dW_enc, db_enc, dW_dec = (torch.zeros_like(weight) for weight in (W_enc, b_enc, W_dec))
    squares = x.new_zeros(())
    most = -(-sae.num_latents // layout.latents_size) * len(x) * x.element_size()
    parts = max(micro_batches, -(-most // AUXK_BYTES))
    for tokens, part in zip(x.chunk(parts), fvu_grad.chunk(parts), strict=True):
        centred = tokens - sae.b_dec
        z = layout.keep_largest(torch.addmm(b_enc, centred, W_enc.T).relu_(), half)
        difference = layout.sum_over_latents(z @ W_dec) + part * (variance / 2)
        squares += difference.square().sum()
        grad = difference.mul_(2 * alpha * scale)
        d_z = (grad @ W_dec.T).masked_fill_(z <= 0, 0)
        dW_enc.addmm_(d_z.T, centred)
        db_enc += d_z.sum(0)
        dW_dec.addmm_(z.T, grad)
    rows = (layout.sum_over_data(row) for row in (dW_enc, db_enc, dW_dec))
    return scale * layout.sum_over_data(squares), DenseRows(candidates, *rows)


def encode(sae: TopKSAE, x: Tensor, k: int, encoder: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
    """The k largest latents of all, as (values in x's dtype, indices); 0 at those that other processes hold."""
    W_enc = sae.W_enc if encoder is None else encoder
    own = min(k, len(W_enc))
    values, indices = ops.encode_topk(x.to(W_enc.dtype), W_enc, sae.b_enc, sae.b_dec, own)
    return layout.top_latents(values.to(x.dtype), indices, k)
