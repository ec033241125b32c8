"""The eager definition of every op: what all backends are held to.

All functions take tokens flattened to x [M, d] (`latent_gradients` and `decode` likewise) and compute in
`compute_dtype(x)`. Formulas cite SPEC.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .eight_bit import EightBit, Moment, parts, quantized, widened

ROWS_PER_GEMM = 128

ADAM_ELEMENTS = 1 << 16
"""Of a parameter, that a CPU updates at a time: what is made of them on the way stays in cache."""


class PairTerms(NamedTuple):
    """Some (token, latent) pairs, k of each token, through which a loss depends on the parameters (SPEC 4.3)."""

    values: Tensor
    """[..., k]: z of each pair; 0 where it has but the extra term."""
    indices: Tensor
    """[..., k] int32 or int64."""
    grad_x_hat: Tensor
    """[..., d]: d loss / d sum_j values_j * W_dec[indices_j]; unread for a pair whose value is 0."""
    extra_d_value: Tensor | None = None
    """[..., k]: what else d loss / d z has."""
    adds_b_dec: bool = True
    """Whether b_dec was added to that sum, as in x_hat and multi-TopK; not so in AuxK."""


class LatentGradients(NamedTuple):
    """Gradients of the four parameters, in the compute dtype."""

    dW_enc: Tensor
    """[N, d]."""
    db_enc: Tensor
    """[N]."""
    dW_dec: Tensor
    """[N, d]."""
    db_dec: Tensor
    """[d]."""

    @staticmethod
    def shapes(W_dec: Tensor) -> tuple[torch.Size, ...]:
        """The four shapes."""
        return W_dec.shape, W_dec.shape[:1], W_dec.shape, W_dec.shape[1:]


class DenseRows(NamedTuple):
    """Gradients of C latents that are computed densely (AuxK), to be added to those of the pairs."""

    latents: Tensor
    """[C] int32 or int64, distinct."""
    dW_enc: Tensor
    """[C, d]."""
    db_enc: Tensor
    """[C]."""
    dW_dec: Tensor
    """[C, d]."""


class SparseGradients(NamedTuple):
    """Gradients of W_enc and W_dec in whatever form their backend goes on from."""

    squared_norm: Tensor
    """0-d, |dW_enc|^2 + |dW_dec|^2, in the compute dtype."""
    db_enc: Tensor
    """[N], in the compute dtype."""
    shape: torch.Size
    """[N, d] of either."""
    adam: Callable[..., None]
    """`adam_latents` of the backend that computed them, bound to the form in which it keeps them."""


class LatentMoments(NamedTuple):
    """Adam's moments of W_enc and W_dec, [N, d] each, in the weights' dtype, in bfloat16, or all in 8 bits."""

    exp_avg_enc: Moment
    exp_avg_sq_enc: Moment
    exp_avg_dec: Moment
    exp_avg_sq_dec: Moment


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 tokens, float32 for every other dtype."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """`relu((x - b_dec) @ W_enc.T + b_enc)` (SPEC 1.1) as [M, N] in the compute dtype.

    On the CPU the product runs on blocks of exactly ROWS_PER_GEMM rows, the last one padded: a BLAS picks its kernel
    and its thread partition, hence its order of summation, by the shape, so only equal shapes give a token the same
    bits whatever batch it comes in.
    """
    dtype = compute_dtype(x)
    weight, bias = W_enc.to(dtype), b_enc.to(dtype)
    centred = (x.to(dtype) - b_dec.to(dtype)).contiguous()
    if x.device.type != "cpu":
        return F.linear(centred, weight, bias).relu_()
    rows = x.shape[0]
    out = centred.new_empty(rows, W_enc.shape[0])
    for block, result in zip(centred.split(ROWS_PER_GEMM), out.split(ROWS_PER_GEMM), strict=True):
        missing = ROWS_PER_GEMM - block.shape[0]
        result.copy_(F.linear(F.pad(block, (0, 0, 0, missing)), weight, bias)[: block.shape[0]])
    return out.relu_()


def top_columns(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of `pre` [M, N], values descending and equal ones by ascending column (SPEC 1.2).

    `torch.topk` fixes neither which of several equal values it keeps nor their order. Only values equal to the k-th
    largest can be kept wrongly: those are replaced by the lowest columns that hold this value.
    """
    n = pre.shape[1]
    top, columns = pre.topk(min(k + 1, n))
    kth, following = top[:, k - 1 : k], top[:, k:]
    top, columns = top[:, :k], columns[:, :k]
    # On the CPU a look at the data is free; elsewhere it would make the host wait.
    if pre.device.type != "cpu" or bool((following == kth).any()):
        countdown = torch.arange(n, 0, -1, dtype=torch.int32, device=pre.device)
        lowest = n - torch.where(pre == kth, countdown, 0).topk(k).values.long()
        rank = torch.arange(k, device=pre.device) - (top > kth).sum(1, keepdim=True)
        columns = torch.where(rank < 0, columns, lowest.gather(1, rank.clamp(min=0)))
    columns = columns.clamp(max=n - 1).sort(dim=1).values
    values, order = pre.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def encode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`z = TopK(relu((x - b_dec) @ W_enc.T + b_enc), k)` (SPEC 1.1, 1.2): values [M, k], indices [M, k] int32."""
    values, indices = top_columns(pre_activations(x, W_enc, b_enc, b_dec), k)
    finite = x.isfinite().all(1, keepdim=True) & values[:, :1].isfinite()
    return values.where(finite, torch.nan).to(x.dtype), indices.to(torch.int32)


def gather_sum(weights: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """`out[m] = sum_j weights[m, j] * rows[indices[m, j]]`, summed in the order of j: [M, d] in weights' dtype."""
    return F.embedding_bag(indices, rows.to(weights.dtype), mode="sum", per_sample_weights=weights)


def decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """`x_hat = sum_j values_j * W_dec[indices_j] + b_dec` (SPEC 1.3): [M, d] in values' dtype."""
    dtype = compute_dtype(values)
    return (gather_sum(values.to(dtype), indices, W_dec) + b_dec.to(dtype)).to(values.dtype)


def decode_error(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor, x: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`scale * (x - x_hat)` [M, d] and `|x - x_hat|^2` [M] of tokens x [M, d], in the compute dtype (SPEC 1.3, 4.1)."""
    dtype = compute_dtype(values)
    error = x.to(dtype) - decode(values.to(dtype), indices, W_dec, b_dec)
    return error * scale.to(dtype), error.square().sum(1)


def line_table(latents: Tensor, thresholds: Tensor, entries: Tensor, fill: float, num_latents: int) -> Tensor:
    """Dense [G, N + 1] form of `entries` [G, S] by latent, else `fill`; column N takes the padding (threshold +inf)."""
    columns = latents.long().masked_fill(thresholds == torch.inf, num_latents)
    return entries.new_full((latents.shape[0], num_latents + 1), fill).scatter(1, columns, entries)


def look_up(table: Tensor, indices: Tensor) -> Tensor:
    """`table[line of token m, indices[m, j]]`, where G lines share the M tokens in equal consecutive groups: [M, k]."""
    lines = table.shape[0]
    grouped = indices.long().view(lines, indices.shape[0] // lines, indices.shape[1])
    return table[:, None].expand(-1, grouped.shape[1], -1).gather(2, grouped).view(indices.shape)


def erase(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    W_dec: Tensor,
    k: int,
    latents: Tensor,
    thresholds: Tensor,
    factors: Tensor,
    mode: str,
    norm_scaled: bool,
    encode: Callable[..., tuple[Tensor, Tensor]] = encode_topk,
    decode: Callable[..., Tensor] = decode,
) -> Tensor:
    """Steer the selected latents of each token (SPEC 3.1, 3.2): x' [M, d] in x's dtype.

    With z = TopK(pre, k), the steered set {i selected : z_i > max(threshold_i, 0)} and
    `Delta = sum_steered (factor_i - 1) z_i d_i` (factor_i * ||z||_2 instead of factor_i if `norm_scaled`):
    exact: x + Delta; released: 2 x_hat - x + Delta; reconstruct: x_hat + Delta.

    Summed in the order of the token's latents, so the order of the selection cannot matter. `encode` and `decode`
    are exchanged for differentiable ones when a gradient is wanted; the choice of latents is a constant.
    """
    dtype = compute_dtype(x)
    tokens = x.to(dtype)
    values, indices = encode(tokens, W_enc, b_enc, b_dec, k)
    num_latents = W_enc.shape[0]
    thresholds = thresholds.to(dtype)
    threshold = look_up(line_table(latents, thresholds, thresholds, torch.inf, num_latents), indices)
    factor = look_up(line_table(latents, thresholds, factors.to(dtype), 1.0, num_latents), indices)
    if norm_scaled:
        factor = factor * torch.linalg.vector_norm(values, dim=1, keepdim=True)
    steered = (values > threshold) & (values > 0) & (factor != 1)
    change = torch.where(steered, (factor - 1) * values, 0)
    delta = decode(change, indices, W_dec, torch.zeros_like(b_dec))
    if mode == "exact":
        out = torch.where(steered.any(1, keepdim=True), tokens + delta, tokens)
    else:
        x_hat = decode(values, indices, W_dec, b_dec)
        out = (2 * x_hat - tokens if mode == "released" else x_hat) + delta
    return out.where(values[:, :1].isfinite(), torch.nan).to(x.dtype)


def probe(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    k: int,
    latents: Tensor,
    thresholds: Tensor,
) -> tuple[Tensor, Tensor]:
    """What `erase` looks at (SPEC 3.1): `pre` of the selected latents [M, S], and whether it steers each [M, S]."""
    pre = pre_activations(x, W_enc, b_enc, b_dec)
    top, indices = top_columns(pre, k)
    kept = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, indices, True)
    per_token = x.shape[0] // latents.shape[0]
    columns = latents.long().repeat_interleave(per_token, 0)
    threshold = thresholds.to(pre.dtype).repeat_interleave(per_token, 0)
    finite = x.isfinite().all(1, keepdim=True) & top[:, :1].isfinite()
    activations = pre.gather(1, columns)
    steered = kept.gather(1, columns) & (activations > threshold) & (activations > 0) & finite
    return activations.where(finite, torch.nan).to(x.dtype), steered


def steering_lines(
    timesteps: Tensor,
    stored: Tensor,
    latents: Tensor,
    thresholds: Tensor,
    factors: Tensor,
    owners: Tensor,
    switches: Tensor,
    num_lines: int,
    num_blocks: int,
    first_block: int,
    earliest: float,
    latest: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The lines of one UNet call in tables of T stored timesteps and G prompts (SPEC 2.4, 3.4)."""
    line = torch.arange(num_lines, device=stored.device)
    block = line * num_blocks // num_lines
    prompt = block % latents.shape[1]
    times = timesteps.to(torch.float32)
    step = (stored - times[:, None]).abs().argmin(1).expand(num_lines)
    active = switches[prompt] & (block >= first_block) & (times <= earliest) & (times >= latest)
    return (
        latents[step, prompt],
        thresholds[step, prompt].masked_fill(~active[:, None], torch.inf),
        factors[step, prompt],
        owners[step, prompt],
        active,
    )


def sum_by_latent(weights: Tensor, indices: Tensor, rows: Tensor, num_latents: int) -> Tensor:
    """`out[i] = sum over pairs (m, j) with indices[m, j] = i of weights[m, j] * rows[m]`, m ascending: [N, d].

    A stable sort brings the pairs of a latent together: the order of summation is fixed, without atomics (SPEC 4.3).
    A pair of weight 0 is left out, whatever its row holds.
    """
    latents, order = torch.where(weights == 0, num_latents, indices.long()).flatten().sort(stable=True)
    starts = torch.searchsorted(latents, torch.arange(num_latents + 1, device=latents.device))
    tokens, scale = order // indices.shape[1], weights.flatten()[order]
    return F.embedding_bag(tokens, rows, starts, mode="sum", per_sample_weights=scale)[:num_latents]


def gather_dot(indices: Tensor, rows: Tensor, grad: Tensor) -> Tensor:
    """`out[m, j] = <grad[m], rows[indices[m, j]]>`: [M, k], one j at a time, so that nothing exceeds [M, d]."""
    return torch.stack([torch.linalg.vecdot(rows[column], grad) for column in indices.long().unbind(1)], 1)


def latent_gradients(
    terms: Sequence[PairTerms], x: Tensor, W_dec: Tensor, b_dec: Tensor, W_enc: Tensor | None = None
) -> LatentGradients:
    """Gradients of the four parameters for a loss with d loss / d x_hat = g [M, d] for each of `terms` (SPEC 4.3).

    `d_value = <g, d_i> * [value > 0] + extra_d_value`; over the pairs of latent i: `dW_dec[i] = sum value * g`,
    `dW_enc[i] = sum d_value * (x - b_dec)`, `db_enc[i] = sum d_value`; `db_dec = sum g - W_enc.T @ db_enc`, where g is
    of the terms to which b_dec was added.
    """
    dtype = compute_dtype(x)
    weight, num_latents = W_dec.to(dtype), W_dec.shape[0]
    dW_enc, db_enc, dW_dec, db_dec = (weight.new_zeros(shape) for shape in LatentGradients.shapes(W_dec))
    for term in terms:
        grad, values = term.grad_x_hat.to(dtype), term.values.to(dtype)
        d_value = torch.where(values > 0, gather_dot(term.indices, weight, grad), 0)
        if term.extra_d_value is not None:
            d_value = d_value + term.extra_d_value.to(dtype)
        of_rows, of_biases = encoder_gradients(d_value, term.indices, x, b_dec, num_latents)
        dW_enc += of_rows
        db_enc += of_biases
        dW_dec += sum_by_latent(values, term.indices, grad, num_latents)
        if term.adds_b_dec:
            db_dec += grad.sum(0)
    if W_enc is not None:
        db_dec = db_dec - db_enc @ W_enc.to(dtype)
    return LatentGradients(dW_enc, db_enc, dW_dec, db_dec)


def encoder_gradients(
    d_value: Tensor, indices: Tensor, x: Tensor, b_dec: Tensor, num_latents: int
) -> tuple[Tensor, Tensor]:
    """`dW_enc[i] = sum d_value * (x - b_dec)` [N, d] and `db_enc[i] = sum d_value` [N] over the pairs of latent i."""
    dtype = compute_dtype(x)
    centred = x.to(dtype) - b_dec.to(dtype)
    with_one = torch.cat([centred, torch.ones_like(centred[:, :1])], 1)
    both = sum_by_latent(d_value.to(dtype), indices, with_one, num_latents)
    return both[:, :-1].contiguous(), both[:, -1].contiguous()


def _noise(first: int, count: int, step: int, device: torch.device) -> Tensor:
    """32 random bits for each of `count` elements from `first`, fixed by its number and the step: [count] int64."""

    def times(number: Tensor, factor: int) -> Tensor:
        return number * factor & 0xFFFFFFFF

    element = torch.arange(first, first + count, device=device)
    bits = times(element & 0xFFFFFFFF, 0x9E3779B1) + times(element >> 32, 0x7FEB352D) + (step * 0x85EBCA77)
    bits = bits & 0xFFFFFFFF
    bits = times(bits ^ bits >> 15, 0x2C1B3C6D)
    bits = times(bits ^ bits >> 12, 0x297A2D39)
    return bits ^ bits >> 15


def _rounded(wide: Tensor, noise: Tensor) -> Tensor:
    """`wide` in bfloat16, rounded up or down at random, by 16 bits of `noise`, so that the mean is kept."""
    bits = wide.float().contiguous().view(torch.int32) & 0xFFFFFFFF
    kept = (bits + noise.view(wide.shape)) >> 16 << 16
    rounded = torch.where(kept >= 1 << 31, kept - (1 << 32), kept).to(torch.int32).view(torch.float32)
    return torch.where(wide.isnan(), torch.nan, rounded).bfloat16()


def adam_rows(
    W: Tensor,
    grad: Tensor,
    exp_avg: Moment,
    exp_avg_sq: Moment,
    scale: Tensor | None,
    shadow: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    remove_parallel: bool,
    unit_norm: bool,
) -> None:
    """One step of Adam on the rows of W [N, d], in place (SPEC 4.1).

    `g = scale * grad`, less its part along the row if `remove_parallel`; `m += (1 - beta1) (g - m)`,
    `v = beta2 v + (1 - beta2) g^2`, `W -= lr m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps)`; rows at unit
    length if `unit_norm`; `shadow` = W in 16 bits. A row of zeros has no direction and stays. A scale of NaN leaves
    everything as it is.
    """
    # On the CPU a look at the data is free, and rows that stay in cache meanwhile are updated several times as fast.
    on_cpu = W.device.type == "cpu"
    if on_cpu and scale is not None and scale.isnan():
        return
    kept = None if on_cpu or scale is None else scale.isnan()
    d = W.shape[1]
    at_once = max(1, ADAM_ELEMENTS // d if on_cpu else len(W))
    written = (W, *parts(exp_avg), *parts(exp_avg_sq), shadow)
    for first in range(0, len(W), at_once):
        rows = slice(first, first + at_once)
        some = (W[rows], grad[rows], _rows(exp_avg, rows), _rows(exp_avg_sq, rows), scale, first * d)
        new = _adam(*some, step, lr, beta1, beta2, eps, remove_parallel, unit_norm)
        for whole, updated in zip(written, (*new, new[0]), strict=True):
            if whole is not None:
                old = whole[rows]
                old.copy_(updated if kept is None else torch.where(kept, old, updated.to(old.dtype)))


def _rows(moment: Moment, rows: slice) -> Moment:
    return EightBit(*(part[rows] for part in moment)) if isinstance(moment, EightBit) else moment[rows]


def _adam(
    W: Tensor,
    grad: Tensor,
    exp_avg: Moment,
    exp_avg_sq: Moment,
    scale: Tensor | None,
    first: int,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    remove_parallel: bool,
    unit_norm: bool,
) -> tuple[Tensor, ...]:
    """New rows, and the parts of their exp_avg and exp_avg_sq; their first element is number `first` of all."""
    g = grad if scale is None else grad * scale
    if remove_parallel:
        squared = W.square().sum(1, keepdim=True)
        g = g - torch.where(squared > 0, (g * W).sum(1, keepdim=True) / squared, 0) * W
    m, v = (
        (widened(moment, signed) if isinstance(moment, EightBit) else moment).to(W.dtype)
        for moment, signed in ((exp_avg, True), (exp_avg_sq, False))
    )
    m = (g - m).mul_(1 - beta1).add_(m)
    v = (beta2 * v).add_(((1 - beta2) * g).mul_(g))
    change = (lr / (1 - beta1**step) * m).div_(v.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps))
    updated = torch.sub(W, change, out=change)
    if unit_norm:
        norm = torch.linalg.vector_norm(updated, dim=1, keepdim=True)
        updated /= torch.where(norm > 0, norm, 1)
    if isinstance(exp_avg, EightBit):
        blocks = exp_avg.scale.shape[1]
        return updated, *quantized(m, blocks, signed=True), *quantized(v, blocks, signed=False)
    if exp_avg.dtype != W.dtype:
        noise = _noise(first, W.numel(), step, W.device)
        m, v = _rounded(m, noise & 0xFFFF), _rounded(v, noise >> 16)
    return updated, m, v


def sparse_gradients(
    terms: Sequence[PairTerms],
    x: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    dense: DenseRows | None,
    *,
    gradients: Callable[..., LatentGradients] = latent_gradients,
    adam: Callable[..., None] = adam_rows,
) -> SparseGradients:
    """Of `latent_gradients` those of the encoder and of W_dec, `dense` added to them (SPEC 4.3)."""
    terms = [term._replace(adds_b_dec=False) for term in terms]
    dW_enc, db_enc, dW_dec, _ = gradients(terms, x, W_dec, b_dec, None)
    if dense is not None:
        for total, rows in ((dW_enc, dense.dW_enc), (db_enc, dense.db_enc), (dW_dec, dense.dW_dec)):
            total.index_add_(0, dense.latents, rows.to(total.dtype))
    norms = torch.stack([torch.linalg.vector_norm(rows, dim=1) for rows in (dW_enc, dW_dec)])
    return SparseGradients(norms.square().sum(), db_enc, W_dec.shape, partial(adam_latents, dW_enc, dW_dec, adam))


def adam_latents(
    dW_enc: Tensor,
    dW_dec: Tensor,
    adam: Callable[..., None],
    W_enc: Tensor,
    W_dec: Tensor,
    moments: LatentMoments,
    scale: Tensor | None,
    shadow: Tensor | None,
    unit_norm: bool,
    *settings: float,
) -> None:
    """`adam_rows` of W_enc, whose shadow it is, and of W_dec, which alone is held to unit rows (SPEC 4.1)."""
    adam(W_enc, dW_enc, *moments[:2], scale, shadow, *settings, False, False)
    adam(W_dec, dW_dec, *moments[2:], scale, None, *settings, unit_norm, unit_norm)
