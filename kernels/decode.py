"""Sparse decode by gathering rows of W_dec; in the same pass the steering of the kept latents, or what x_hat misses of
x (SPEC 1.3, 3.2, 4.1)."""

import triton
import triton.language as tl

from .tokens import token_offsets


@triton.jit
def steering(value, index, line, latents, thresholds, factors, num_entries, norm, BLOCK_S: tl.constexpr):
    """`(factor - 1) * value` where an entry of the line names `index` and value > max(threshold, 0), else 0: [n]."""
    change = value * 0.0
    for first in range(0, num_entries, BLOCK_S):
        entries = first + tl.arange(0, BLOCK_S)
        named = entries < num_entries
        at = line * num_entries + entries
        latent = tl.load(latents + at, mask=named, other=-1)
        threshold = tl.load(thresholds + at, mask=named, other=float("inf")).to(tl.float32)
        factor = tl.load(factors + at, mask=named, other=1.0).to(tl.float32) * norm
        hit = (index[:, None] == latent[None, :]) & (value[:, None] > threshold[None, :]) & (value > 0)[:, None]
        change += tl.sum(tl.where(hit, (factor[None, :] - 1.0) * value[:, None], 0.0), axis=1)
    return change


@triton.jit(do_not_specialize=["per_line", "num_entries", "latents", "thresholds", "factors", "scale"])
def decode_kernel(
    values,
    indices,
    W_dec,
    b_dec,
    x,
    per_batch,
    stride_b,
    stride_t,
    stride_d,
    out,
    out_stride_b,
    out_stride_t,
    out_stride_d,
    latents,
    thresholds,
    factors,
    scale,
    squares,
    per_line,
    num_entries,
    d,
    k,
    MODE: tl.constexpr,
    NORM_SCALED: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """With `r = sum_j values_j W_dec[indices_j] + b_dec` and Delta of SPEC 3.2 over the steered of the k kept latents:

    MODE "decode": r; "released": 2 r - x + Delta; "reconstruct": r + Delta; "exact": x + Delta, or x bit for bit where
    nothing is steered; "error": scale (x - r), and the sum of (x - r)^2 over the program's channels in squares. One
    weighted sum of rows of W_dec in each case, in float32, BLOCK_J latents at a time by ascending j. NORM_SCALED
    multiplies each factor by ||values||_2. A token whose first value is NaN becomes NaN.

    values, indices [M, k]; W_dec [N, d]; b_dec [d]; x, out [M, d] by strides; latents, thresholds, factors [G, S], line
    m // per_line for token m; scale [1]; squares [M, programs a token]. "decode" reads neither x nor lines, "error" no
    lines. Who writes what: a program owns BLOCK_D channels of one token of out, and reads the same of x, so out may be
    x; and it owns one of squares.
    """
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    inside = channels < d
    STEERS: tl.constexpr = MODE != "decode" and MODE != "error"
    norm = 1.0
    if NORM_SCALED:
        of_values = tl.zeros((BLOCK_J,), dtype=tl.float32)
        for first in range(0, k, BLOCK_J):
            kept = first + tl.arange(0, BLOCK_J)
            value = tl.load(values + row * k + kept, mask=kept < k, other=0.0).to(tl.float32)
            of_values += value * value
        norm = tl.sqrt(tl.sum(of_values))
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    steered = 0
    for first in range(0, k, BLOCK_J):
        kept = first + tl.arange(0, BLOCK_J)
        live = kept < k
        value = tl.load(values + row * k + kept, mask=live, other=0.0).to(tl.float32)
        index = tl.load(indices + row * k + kept, mask=live, other=0)
        amount = value
        if STEERS:
            change = steering(
                value, index, row // per_line, latents, thresholds, factors, num_entries, norm, BLOCK_S=BLOCK_S
            )
            steered += tl.sum((change != 0).to(tl.int32))
            if MODE == "exact":
                amount = change
            elif MODE == "released":
                amount = 2.0 * value + change
            else:
                amount = value + change
        directions = W_dec + index.to(tl.int64)[:, None] * d + channels[None, :]
        W = tl.load(directions, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(amount[:, None] * W, axis=0)
    result = total
    if MODE != "exact":
        bias = tl.load(b_dec + channels, mask=inside, other=0.0).to(tl.float32)
        result += 2.0 * bias if MODE == "released" else bias
    if MODE != "decode" and MODE != "reconstruct":
        x_row = x + token_offsets(row, per_batch, stride_b, stride_t)
        token = tl.load(x_row + channels * stride_d, mask=inside, other=0.0).to(tl.float32)
        if MODE == "error":
            error = token - result
            tl.store(squares + row * tl.num_programs(1) + tl.program_id(1), tl.sum(error * error))
            result = error * tl.load(scale)
        else:
            result = tl.where(steered > 0, token + result, token) if MODE == "exact" else result - token
    if STEERS:
        leading = tl.load(values + row * k).to(tl.float32)
        result = tl.where(leading == leading, result, float("nan"))
    out_row = out + token_offsets(row, per_batch, out_stride_b, out_stride_t)
    tl.store(out_row + channels * out_stride_d, result.to(out.dtype.element_ty), mask=inside)
