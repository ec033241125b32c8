"""What supervision adds to a batch's loss and to its gradient, without autograd (SPEC 4.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saemnesia_fast.ops import DenseRows, PairTerms
from saemnesia_fast.sae import TopKSAE
from saemnesia_fast.training.layout import ALONE, Layout

# Room for the pre-activations of all latents: more tokens are taken in parts.
DENSE_BYTES = 1 << 29
# Latents that vary by less than so many roundings of their mean count as constant.
CONSTANT = 16


@dataclass(kw_only=True)
class SupervisedLoss:
    """beta * (L_CA + eta * L_DC) + lambda * L_1; the defaults are SAEmnesia's."""

    beta: float = 3.0
    """Weight of what the assigned latents are taught."""
    eta: float = 0.1
    """Weight, times beta, of the squared correlation between objects and styles."""
    l1_weight: float = 0.01
    """Weight lambda of the mean activation."""
    l1: Literal["kept", "dense"] = "kept"
    """Mean over each token's k latents; or, as released, over all N before the top k: twice the cost of encoding."""
    negatives: bool = False
    """Also teach the other assigned latents to be silent."""
    rectified: bool = True
    """Pool pre-activations after the ReLU; before it, a latent also learns from images on which it is silent."""

    def __post_init__(self) -> None:
        for name in ("beta", "eta", "l1_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}")
        if self.l1 not in ("kept", "dense"):
            raise ValueError(f"l1: expected kept or dense, got {self.l1!r}")


class Supervision:
    """C concepts of `kinds`, with a latent each (`assignment`), in the order of the labels' columns."""

    def __init__(
        self,
        assignment: Mapping[str, int],
        kinds: Mapping[str, str],
        loss: SupervisedLoss,
        num_latents: int,
        device: torch.device | str = "cpu",
        layout: Layout = ALONE,
    ) -> None:
        latents = list(assignment.values())
        if not latents or len(set(latents)) < len(latents) or not all(0 <= i < num_latents for i in latents):
            raise ValueError(f"assignment: expected different latents in [0, N={num_latents}), got {latents}")
        self.assignment = dict(assignment)
        self.loss = loss
        rows = layout.shard(num_latents)
        columns = [c for c, i in enumerate(latents) if rows.start <= i < rows.stop]
        self.columns = torch.tensor(columns, dtype=torch.int64, device=device)
        """[c] int64: the concepts whose latents this process holds."""
        self.latents = torch.tensor([latents[c] - rows.start for c in columns], dtype=torch.int64, device=device)
        """[c] int64: their rows."""
        is_object, is_style = (
            torch.tensor([kinds[name] == kind for name in assignment], device=device) for kind in ("object", "style")
        )
        pairs = is_object[:, None] & is_style
        self.num_pairs = int(pairs.sum())
        self.pairs = pairs | pairs.T
        """[C, C] bool: an object and a style, either way round."""


class Supervised(NamedTuple):
    """How a batch of B images of T tokens each is supervised."""

    supervision: Supervision
    labels: Tensor
    """[B, C] bool: the concepts of each image."""


class SupervisedTerms(NamedTuple):
    """0-d tensors."""

    loss: Tensor
    """beta * (concepts + eta * correlation) + lambda * l1."""
    concepts: Tensor
    """L_CA."""
    correlation: Tensor
    """L_DC."""
    l1: Tensor
    """L_1."""


def supervised_gradient(
    sae: TopKSAE,
    x: Tensor,
    k: int,
    supervised: Supervised,
    main: PairTerms,
    dense: DenseRows | None = None,
    layout: Layout = ALONE,
) -> tuple[SupervisedTerms, PairTerms, DenseRows | None]:
    """The supervised terms of tokens x [M, d], M = B * T, and their gradients: joined to `main` and to `dense`.

    With v[b, c] the mean of pre at i_c over image b's tokens, d loss / d pre = d loss / d v[b, c] / T * [pre > 0]
    (without that factor unless `rectified`): one product of C columns with x gives W_enc's rows i_c. L_1 is an extra
    term of the kept pairs' gradient. Where `dense` is given, its latents ascend, and the assigned ones of this process
    are among them.
    """
    supervision, labels = supervised
    weights = supervision.loss
    pre = assigned_pre(sae, layout.rows_of(x), supervision, layout).view(len(labels), -1, labels.shape[1])
    concepts, correlation, d_v = concept_terms(pre.mean(1), labels, supervision)
    d_pre = (d_v[:, None] / pre.shape[1]).expand_as(pre)
    if weights.rectified:
        d_pre = torch.where(pre > 0, d_pre, 0)
    d_pre = d_pre.flatten(0, 1)
    if supervision.columns.numel() < labels.shape[1]:
        d_pre = d_pre[:, supervision.columns]
    db_enc = d_pre.sum(0)
    dW_enc = d_pre.T @ x - torch.outer(db_enc, sae.b_dec)
    rows = [DenseRows(supervision.latents, dW_enc, db_enc, torch.zeros_like(dW_enc))] if len(db_enc) else []
    l1 = x.new_zeros(())
    if weights.l1_weight and weights.l1 == "kept":
        l1 = layout.sum_over_latents(main.values.sum()) / (len(x) * k)
        main = main._replace(extra_d_value=(main.values > 0).to(x.dtype) * (weights.l1_weight / (len(x) * k)))
    elif weights.l1_weight:
        l1, everything = dense_l1(sae, x, weights.l1_weight, layout)
        rows, dense = [*([] if dense is None else [dense]), *rows], everything
    for part in rows:
        dense = _added(dense, part)
    return combined(concepts, correlation, l1, weights), main, dense


def assigned_pre(sae: TopKSAE, x: Tensor, supervision: Supervision, layout: Layout = ALONE) -> Tensor:
    """pre [M, C] of the assigned latents, rectified or not, on all tokens, of which this process has x [m, d]."""
    W_enc = sae.W_enc[supervision.latents]
    bias = sae.b_enc[supervision.latents].double() - W_enc.double() @ sae.b_dec.double()
    own = torch.addmm(bias.to(x.dtype), x, W_enc.T)
    if supervision.loss.rectified:
        own = own.relu_()
    if layout.latents_size > 1:
        own = x.new_zeros(len(x), len(supervision.assignment)).index_copy_(1, supervision.columns, own)
    return layout.gather_tokens(layout.sum_over_latents(own))


def concept_terms(v: Tensor, labels: Tensor, supervision: Supervision) -> tuple[Tensor, Tensor, Tensor]:
    """L_CA and L_DC (0-d) of pooled pre-activations v [B, C], and d beta * (L_CA + eta * L_DC) / d v [B, C].

    L_CA: mean over images of the mean over their concepts of softplus(-v); with `negatives` the mean over their other
    concepts of softplus(v) is added. L_DC: mean over pairs of an object and a style of Pearson's rho^2 over the images;
    that of a constant v is 0.
    """
    weights = supervision.loss
    share = _shares(labels, v.dtype)
    concepts, d_v = -(share * F.logsigmoid(v)).sum(), -share * torch.sigmoid(-v)
    if weights.negatives:
        share = _shares(~labels, v.dtype)
        concepts, d_v = concepts - (share * F.logsigmoid(-v)).sum(), d_v + share * torch.sigmoid(v)

    centred = v - v.mean(0)
    length = torch.linalg.vector_norm(centred, dim=0)
    constant = length <= CONSTANT * torch.finfo(v.dtype).eps * torch.linalg.vector_norm(v, dim=0)
    unit = torch.where(constant, 0, centred / length)
    rho = torch.where(supervision.pairs, unit.T @ unit, 0)
    pairs = max(supervision.num_pairs, 1)
    correlation = rho.square().sum() / (2 * pairs)
    d_unit = unit @ rho * (2 / pairs)
    of_correlation = torch.where(constant, 0, (d_unit - unit * (unit * d_unit).sum(0)) / length)
    return concepts, correlation, weights.beta * (d_v + weights.eta * of_correlation)


def combined(concepts: Tensor, correlation: Tensor, l1: Tensor, weights: SupervisedLoss) -> SupervisedTerms:
    """The terms with their weighted sum."""
    loss = weights.beta * (concepts + weights.eta * correlation) + weights.l1_weight * l1
    return SupervisedTerms(loss, concepts, correlation, l1)


def dense_l1(sae: TopKSAE, x: Tensor, weight: float, layout: Layout = ALONE) -> tuple[Tensor, DenseRows]:
    """Mean pre-activation (0-d) of all N latents on tokens x [M, d], and `weight` times its gradient, of all rows."""
    total = x.new_zeros(())
    dW_enc, db_enc = torch.zeros_like(sae.W_enc), torch.zeros_like(sae.b_enc)
    for tokens in layout.rows_of(x).split(_tokens_at_once(sae)):
        centred = tokens - sae.b_dec
        pre = torch.relu(torch.addmm(sae.b_enc, centred, sae.W_enc.T))
        total += pre.sum()
        active = (pre > 0).to(x.dtype)
        dW_enc.addmm_(active.T, centred)
        db_enc += active.sum(0)
    count = len(x) * sae.num_latents
    dW_enc, db_enc = (layout.sum_over_data(rows) * (weight / count) for rows in (dW_enc, db_enc))
    latents = torch.arange(len(db_enc), device=x.device)
    l1 = layout.sum_over_latents(layout.sum_over_data(total)) / count
    return l1, DenseRows(latents, dW_enc, db_enc, torch.zeros_like(dW_enc))


def dense_mean(sae: TopKSAE, x: Tensor) -> Tensor:
    """Each image's mean [B] of `pre` over its tokens x [B, T, d] and all N latents, of which only this process's count.

    So it is a summand of the whole mean where processes share the latents.
    """
    pre = (torch.relu(torch.addmm(sae.b_enc, image - sae.b_dec, sae.W_enc.T)).sum() for image in x)
    return torch.stack(list(pre)) / (x.shape[1] * sae.num_latents)


def _tokens_at_once(sae: TopKSAE) -> int:
    return max(1, DENSE_BYTES // (len(sae.W_enc) * sae.W_enc.element_size()))


def _shares(chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """What each entry of chosen [B, C] counts in the mean over rows of the means over their chosen entries."""
    return chosen.to(dtype) / (chosen.sum(1, keepdim=True).clamp(min=1) * len(chosen))


def _added(total: DenseRows | None, rows: DenseRows) -> DenseRows:
    """`total` with `rows` added to its own of the same latents."""
    if total is None:
        return rows
    places = torch.searchsorted(total.latents, rows.latents)
    for whole, part in zip(total[1:], rows[1:], strict=True):
        whole.index_add_(0, places, part)
    return total
