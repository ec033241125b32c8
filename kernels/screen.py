"""precision="exact" (SPEC 1.6): a float16 product with a certified bound, and exact scores of what that leaves open.

The exact score of a token and a latent is `<c, w> + b_enc` with c = x - b_dec in float32, summed in float64 and rounded
once. The screen is the product of c' and w', which are c and w in float16, each row times a power of two. It is off by
`|<c, w> - <c', w'>| <= |c| |w - w'| + |c - c'| |w'|` (Cauchy-Schwarz) and by what a matrix instruction cuts off: it
keeps 24 bits of each term, aligned to the largest, and of each sum; none exceeds |c'| |w'|, so d products lose at most
`d 2^-22 |c'| |w'|`. The bound is a product of two factors: of a latent, any number >= |w'| and >= 2^12 |w - w'|; of a
token, `2^-12 |c| + |c - c'| + d 2^-22 |c'|`. Both are computed from the rows as they were rounded. Adding b_enc and the
bound to the screen, and rounding the exact score, moves them by no more than 2^-21 of the sum.
"""

import triton
import triton.language as tl

from .tokens import token_offsets

COLUMNS = tl.constexpr(256)
"""Of a row that are rounded at a time."""
LANES = tl.constexpr(64)
"""The partial sums of an exact score."""
ROUNDING = tl.constexpr(2.0**-21)
ENLARGED = tl.constexpr(1.0 + 2.0**-9)
"""By which factors are enlarged, so that the rounding of norms and products cannot matter."""
LEAST = tl.constexpr(2.0**-63)
"""Added to factors above 0: no product of two is lost below float32's range."""
EXPONENT = tl.constexpr(0xFF << 23)
"""The bits of a float32's exponent: 127 + e, shifted by 23, for 2^e."""
LEAST_EXPONENT = tl.constexpr((127 - 63) << 23)
FLOAT16_EXPONENT = tl.constexpr(14 << 23)
"""Rows are rounded with their largest value in [2^14, 2^15)."""
INVERSE_EXPONENTS = tl.constexpr((127 + 127) << 23)
"""The sum of the bits of 2^e and 2^-e."""


@triton.jit
def centred(x_rows, live, stride, b_dec, channels, d):
    """`x_rows - b_dec` [R, C] in float32; `x_rows` where there is no b_dec."""
    inside = channels < d
    x = tl.load(x_rows[:, None] + channels[None, :] * stride, mask=live[:, None] & inside[None, :], other=0.0)
    c = x.to(tl.float32)
    if b_dec is not None:
        c -= tl.load(b_dec + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
    return c


@triton.jit
def round_rows(rows, live, stride, b_dec, rounded_rows, screen, d, BLOCK_R: tl.constexpr):
    """Rows in float16 to rounded_rows; to screen what undoes their power of two, and their factor of the bound.

    rows, rounded_rows and screen [BLOCK_R] are pointers. Tokens have a b_dec, rows of W_enc have none. A row with NaN
    or infinity keeps one.
    """
    inner = tl.arange(0, COLUMNS).to(tl.int64)
    top = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for start in tl.range(0, d, COLUMNS, num_stages=3):
        top = tl.maximum(top, tl.max(tl.abs(centred(rows, live, stride, b_dec, start + inner, d)), axis=1))
    exponent = tl.maximum(top.to(tl.int32, bitcast=True) & EXPONENT, LEAST_EXPONENT) - FLOAT16_EXPONENT
    scale = exponent.to(tl.float32, bitcast=True)
    inverse = (-exponent + INVERSE_EXPONENTS).to(tl.float32, bitcast=True)
    squares = tl.zeros((BLOCK_R, COLUMNS), dtype=tl.float32)
    errors = tl.zeros((BLOCK_R, COLUMNS), dtype=tl.float32)
    for start in tl.range(0, d, COLUMNS, num_stages=3):
        channels = start + inner
        inside = live[:, None] & (channels < d)[None, :]
        c = tl.where(inside, centred(rows, live, stride, b_dec, channels, d) * inverse[:, None], 0.0)
        half = c.to(tl.float16)
        tl.store(rounded_rows[:, None] + channels[None, :], half, mask=inside)
        rounded = half.to(tl.float32)
        squares += rounded * rounded
        errors += (c - rounded) * (c - rounded)
    norm = tl.sqrt(tl.sum(squares, axis=1))
    error = tl.sqrt(tl.sum(errors, axis=1))
    if b_dec is None:
        factor = tl.maximum(norm, error * 2.0**12)
    else:
        factor = (norm + error) * 2.0**-12 + error + norm * (d * 2.0**-22)
    factor *= scale * ENLARGED
    tl.store(screen, scale, mask=live)
    tl.store(screen + 1, tl.where(factor > 0, factor + LEAST, factor), mask=live)


@triton.jit(do_not_specialize=["num_rows"])
def round_kernel(
    x, per_batch, stride_b, stride_t, stride_d, b_dec, rounded, screen, num_rows, d, BLOCK_R: tl.constexpr
):
    """A screen's operand: `rounded[m] * screen[m, 0]` is x[m] - b_dec, nearly; screen[m, 1] is its factor of the bound.

    x [M, d] by strides; b_dec [d], or None for rows of W_enc; rounded [M, d] float16; screen [M, 2] float32. Who
    writes what: a program owns BLOCK_R rows of rounded and screen.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    x_rows = x + token_offsets(rows, per_batch, stride_b, stride_t)
    rounded_rows = rounded + rows.to(tl.int64) * d
    round_rows(x_rows, rows < num_rows, stride_d, b_dec, rounded_rows, screen + 2 * rows, d, BLOCK_R)


@triton.jit
def bound(pre, x_factor, W_factor):
    """By how much a screened score may differ from the exact one, and more than what computing with it rounds."""
    return x_factor * W_factor + tl.abs(pre) * ROUNDING


@triton.jit
def screened(products, bias, x_screen, x_live, W_screen, W_live):
    """Scores [R, C] of the rounded rows, and their bounds; x_screen [R] and W_screen [C] are pointers."""
    x_scale = tl.load(x_screen, mask=x_live, other=0.0)[:, None]
    W_scale = tl.load(W_screen, mask=W_live, other=0.0)[None, :]
    x_factor = tl.load(x_screen + 1, mask=x_live, other=0.0)[:, None]
    W_factor = tl.load(W_screen + 1, mask=W_live, other=0.0)[None, :]
    pre = products * W_scale * x_scale + bias
    return pre, bound(pre, x_factor, W_factor)


@triton.jit
def exact_scores(
    x_rows, x_live, x_stride, b_dec, W_rows, W_live, bias, d, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr
):
    """`<x_rows[t] - b_dec, W_rows[r]> + bias[r]` in float32, summed in float64 and rounded once: [BLOCK_T, BLOCK_R].

    Sum l of LANES takes the channels l, l + LANES, ... in turn, and the sums are added in a tree of pairs: the bits
    depend on the two rows and the bias alone, whichever kernel asks. Products of float32 are exact in float64.
    """
    inner = tl.arange(0, LANES).to(tl.int64)
    acc = tl.zeros((BLOCK_T, BLOCK_R, LANES), dtype=tl.float64)
    for start in tl.range(0, d, LANES, num_stages=3):
        channels = start + inner
        c = centred(x_rows, x_live, x_stride, b_dec, channels, d).to(tl.float64)
        inside = W_live[:, None] & (channels < d)[None, :]
        W = tl.load(W_rows[:, None] + channels[None, :], mask=inside, other=0.0).to(tl.float32).to(tl.float64)
        acc += c[:, None, :] * W[None, :, :]
    for _ in tl.static_range(6):
        acc = tl.sum(tl.reshape(acc, (BLOCK_T, BLOCK_R, 2, acc.shape[2] // 2)), axis=2)
    return (tl.reshape(acc, (BLOCK_T, BLOCK_R)) + bias.to(tl.float32).to(tl.float64)[None, :]).to(tl.float32)
