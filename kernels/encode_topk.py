"""Exact TopK of `relu(x @ W_enc.T + bias)` by group maxima: a product, then a select per token, no sort (SPEC 1.2).

Let t be the k-th largest of the maxima of GROUP columns each. k values reach t, so no value below t is kept; and every
value above t lies in a group whose maximum is above t. The k groups with the largest maxima, equal ones taken from the
left, therefore hold the k largest values, equal ones taken from the left.

With precision="exact" the product is a screen (see `screen`) and z the most that each activation can be. More than k
columns are selected, and `rescore_kernel` puts the k largest exact activations in place of them.
"""

import triton
import triton.language as tl

from .scores import is_finite, scores
from .screen import bound, exact_scores, screened
from .tokens import token_offsets, token_range

INFINITY_BITS = tl.constexpr(0x7F800000)
LAST_COLUMN = tl.constexpr(0x7FFFFFFF)


def group_size(k: int) -> int:
    """How many columns share a maximum: the candidates of a token, k groups, stay within 2048."""
    return 32 if k <= 64 else 16 if k <= 128 else 8


@triton.jit
def store_activations(
    pre, rows, live, tile, num_latents, z, maxima, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr
):
    """Write relu(pre), what is not finite as +inf, to z [., N], and the maximum of every GROUP columns to maxima."""
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < num_latents
    activations = tl.where(is_finite(pre), tl.where(pre > 0, pre, 0.0), float("inf"))
    rows = rows.to(tl.int64)[:, None]
    tl.store(z + rows * num_latents + columns[None, :], activations, mask=live[:, None] & inside[None, :])
    grouped = tl.reshape(tl.where(inside[None, :], activations, -1.0), (BLOCK_M, BLOCK_N // GROUP, GROUP))
    groups = tile * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    num_groups = tl.cdiv(num_latents, GROUP)
    mask = live[:, None] & (groups < num_groups)[None, :]
    tl.store(maxima + rows * num_groups + groups[None, :], tl.max(grouped, axis=2), mask=mask)


@triton.jit(do_not_specialize=["first_row", "num_rows"])
def encode_kernel(
    x,
    per_batch,
    stride_b,
    stride_t,
    stride_d,
    W_enc,
    bias,
    x_screen,
    W_screen,
    z,
    maxima,
    first_row,
    num_rows,
    num_latents,
    d,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`z[m] = relu(x[first_row + m] @ W_enc.T + bias)` for num_rows tokens, and the maxima of its groups.

    x [M, d] by strides; W_enc [N, d]; bias [N]; z [num_rows, N] and maxima [num_rows, ceil(N / GROUP)] float32. Every
    value of a token with NaN or infinity is +inf. With x_screen [M, 2] and W_screen [N, 2], else None, x and W_enc
    are those that `round_kernel` made, and z is `relu(pre + bound)`.

    Who writes what: a program owns one tile of z, made of whole groups, and their maxima. Neighbouring programs share
    their columns of W_enc, so that it is read once.
    """
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    first = first_row + tl.program_id(0) % row_tiles * BLOCK_M
    rows, live = token_range(first, first_row + num_rows, BLOCK_M, ALIGNED)
    tile = tl.program_id(0) // row_tiles
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < num_latents
    x_rows = x + token_offsets(rows, per_batch, stride_b, stride_t)
    W_rows = W_enc + columns.to(tl.int64) * d
    acc = scores(x_rows, live, stride_d, W_rows, inside, d, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, OPERAND, PRECISION)
    added = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if x_screen is None:
        pre = acc + added
    else:
        pre, margin = screened(acc, added, x_screen + 2 * rows, live, W_screen + 2 * columns, inside)
        pre += margin
    store_activations(pre, rows - first_row, live, tile, num_latents, z, maxima, BLOCK_M, BLOCK_N, GROUP)


@triton.jit(do_not_specialize=["num_rows"])
def maxima_kernel(
    z,
    bias,
    maxima,
    num_rows,
    num_latents,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What `encode_kernel` does after its product: z + bias to relu in place, and the maxima of its groups.

    For products of another make. Shapes, and who writes what, as there.
    """
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    rows = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < num_rows
    tile = tl.program_id(0) // row_tiles
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < num_latents
    mask = live[:, None] & inside[None, :]
    pre = tl.load(z + rows.to(tl.int64)[:, None] * num_latents + columns[None, :], mask=mask, other=0.0)
    pre += tl.load(bias + columns, mask=inside, other=0.0)[None, :]
    store_activations(pre, rows, live, tile, num_latents, z, maxima, BLOCK_M, BLOCK_N, GROUP)


@triton.jit
def largest(bits, k):
    """Which of `bits` [R, n], floats >= 0 seen as int32 or padding < 0, are the k largest of a row, ties from the left.

    The k-th largest is found bit by bit; with fewer than k values it is 0, and all are taken.
    """
    kth = tl.zeros((bits.shape[0],), dtype=tl.int32)
    for step in range(31):
        trial = kth | (1 << (30 - step))
        reached = tl.sum((bits >= trial[:, None]).to(tl.int32), axis=1)
        kth = tl.where(reached >= k, trial, kth)
    above = bits > kth[:, None]
    equal = bits == kth[:, None]
    room = k - tl.sum(above.to(tl.int32), axis=1)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= room[:, None]))


@triton.jit(do_not_specialize=["first_row", "num_rows"])
def select_kernel(
    z,
    maxima,
    scratch,
    values,
    indices,
    first_row,
    num_rows,
    num_latents,
    k,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The k largest of each row of z, values descending and equal ones by ascending column.

    z [num_rows, N] and maxima [num_rows, ceil(N / GROUP)] float32 as `encode_kernel` leaves them; values, indices
    [M, k], of which rows first_row ... are written; scratch [num_rows, 3, BLOCK_K] int32; BLOCK_G >= the number of
    groups, BLOCK_K >= k. A row whose largest value is +inf becomes NaN, its indices staying in range.

    Who writes what: a program owns BLOCK_R rows of every array, the scratch included, and waits at a barrier between
    writing scratch and reading it.
    """
    rows = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    live = rows < num_rows
    num_groups = tl.cdiv(num_latents, GROUP)
    every = tl.arange(0, BLOCK_G)[None, :]
    slots = tl.arange(0, BLOCK_K)[None, :]
    mask = live & (every < num_groups)
    top = tl.load(maxima + rows * num_groups + every, mask=mask, other=-1.0).to(tl.int32, bitcast=True)
    bad = tl.max(top, axis=1)[:, None] >= INFINITY_BITS

    groups = scratch + rows * 3 * BLOCK_K
    taken = largest(top, k)
    tl.store(groups + tl.cumsum(taken.to(tl.int32), 1) - 1, tl.broadcast_to(every, (BLOCK_R, BLOCK_G)), mask=taken)
    tl.debug_barrier()
    mask = live & (slots < tl.minimum(k, num_groups))
    group = tl.load(groups + slots, mask=mask, other=num_groups)

    columns = group[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    columns = tl.reshape(columns, (BLOCK_R, BLOCK_K * GROUP))
    candidates = tl.load(z + rows * num_latents + columns, mask=columns < num_latents, other=-1.0)
    candidates = candidates.to(tl.int32, bitcast=True)
    kept_bits = groups + BLOCK_K
    kept_columns = groups + 2 * BLOCK_K
    taken = largest(candidates, k)
    place = tl.cumsum(taken.to(tl.int32), 1) - 1
    tl.store(kept_bits + place, candidates, mask=taken)
    tl.store(kept_columns + place, columns, mask=taken)
    tl.debug_barrier()

    mask = live & (slots < k)
    bits = tl.load(kept_bits + slots, mask=mask, other=-1)
    column = tl.load(kept_columns + slots, mask=mask, other=0)
    order = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.int32)
    for other in range(k):
        theirs = tl.load(kept_bits + other, mask=live, other=-1)
        order += ((theirs > bits) | ((theirs == bits) & (other < slots))).to(tl.int32)
    target = (first_row + rows) * k + order
    value = tl.where(bad, float("nan"), bits.to(tl.float32, bitcast=True))
    tl.store(values + target, value.to(values.dtype.element_ty), mask=mask)
    tl.store(indices + target, column, mask=mask)


@triton.jit
def by_rank(activations, columns):
    """Keys that are larger for larger activations >= 0, and for lower columns among equal ones."""
    return (activations.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (-columns + LAST_COLUMN)


@triton.jit(do_not_specialize=["first_row"])
def rescore_kernel(
    x,
    per_batch,
    stride_b,
    stride_t,
    stride_d,
    W_enc,
    b_enc,
    b_dec,
    x_screen,
    W_screen,
    z,
    most,
    columns,
    values,
    indices,
    first_row,
    num_latents,
    d,
    k,
    num_listed,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The k largest of each token's exact activations, of which only those that the screen leaves open are scored.

    An activation lies between `most` and `most` less two bounds, or 0 if that is less. t, the k-th largest of these
    lower ends, is no more than the k-th largest activation, so what may not reach t is not kept. If t = 0, zeros may
    be: those known to be 0 are listed from the lowest column on, and suffice if no more than num_listed - k others may
    or may not be 0. Where the list is too short for that, or for all that may reach t, all N columns are scored.

    x [M, d] by strides; W_enc [N, d]; b_enc [N]; b_dec [d]; x_screen, W_screen and z as for `encode_kernel`; most and
    columns [num_rows, num_listed] as `select_kernel` leaves them; values, indices [M, k], rows first_row ... written;
    BLOCK_L >= num_listed. A row whose `most` is NaN stays NaN.

    Who writes what: a program owns one row of every array, z included, of which it makes its workspace, and waits at a
    barrier between writing it and reading it.
    """
    part = tl.program_id(0).to(tl.int64)
    row = first_row + part
    z += part * num_latents
    most += part * num_listed
    columns += part * num_listed
    slots = tl.arange(0, BLOCK_L)
    listed = slots < num_listed
    high = tl.load(most + slots, mask=listed, other=0.0)
    W_factor = tl.load(W_screen + 2 * tl.load(columns + slots, mask=listed, other=0) + 1, mask=listed, other=0.0)
    low = tl.maximum(high - 2.0 * bound(high, tl.load(x_screen + 2 * row + 1), W_factor), 0.0)
    low_bits = tl.where(listed, low.to(tl.int32, bitcast=True), -1)
    sure = tl.reshape(largest(low_bits[None, :], k), (BLOCK_L,))
    t = tl.min(tl.where(sure, low, float("inf")))
    open_ = listed & (high >= t) & (high > 0)
    num_open = tl.sum(open_.to(tl.int32))
    perhaps_zero = tl.sum((open_ & (low == 0)).to(tl.int32))
    short = (num_open == num_listed) | ((t == 0) & (perhaps_zero > num_listed - k))
    short &= num_listed < num_latents
    num_open = tl.where(short, num_latents, num_open)

    tl.store(z + slots, 0.0, mask=listed)
    tl.debug_barrier()
    x_row = x + token_offsets(row + tl.arange(0, 1), per_batch, stride_b, stride_t)
    one = tl.full((1,), 1, tl.int1)
    for first in range(0, num_open, BLOCK_R):
        at = first + tl.arange(0, BLOCK_R)
        live = at < num_open
        column = tl.where(short, at, tl.load(columns + at, mask=live & ~short, other=0)).to(tl.int64)
        bias = tl.load(b_enc + column, mask=live, other=0.0)
        pre = exact_scores(x_row, one, stride_d, b_dec, W_enc + column * d, live, bias, d, 1, BLOCK_R)
        pre = tl.reshape(pre, (BLOCK_R,))
        tl.store(z + at, tl.where(pre > 0, pre, 0.0), mask=live)
    tl.debug_barrier()

    values += row * k
    indices += row * k
    if short:
        last = by_rank(tl.full((), float("inf"), tl.float32), 0)
        for place in range(k):
            best = tl.zeros((), tl.int64) - 1
            for first in range(0, num_latents, BLOCK_L):
                at = first + slots
                inside = at < num_latents
                key = by_rank(tl.load(z + at, mask=inside, other=0.0), at)
                best = tl.maximum(best, tl.max(tl.where(inside & (key < last), key, -1)))
            value = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
            tl.store(values + place, value.to(values.dtype.element_ty))
            tl.store(indices + place, -(best & LAST_COLUMN).to(tl.int32) + LAST_COLUMN)
            last = best
    else:
        value = tl.load(z + slots, mask=listed, other=0.0)
        column = tl.load(columns + slots, mask=listed, other=0)
        key = by_rank(value, column)
        order = tl.zeros((BLOCK_L,), dtype=tl.int32)
        for first in range(0, num_listed, 8):
            at = first + tl.arange(0, 8)
            inside = at < num_listed
            theirs = by_rank(tl.load(z + at, mask=inside, other=0.0), tl.load(columns + at, mask=inside, other=0))
            order += tl.sum((inside[None, :] & (theirs[None, :] > key[:, None])).to(tl.int32), axis=1)
        leading = tl.load(most)
        value = tl.where(leading == leading, value, float("nan"))
        tl.store(values + order, value.to(values.dtype.element_ty), mask=listed & (order < k))
        tl.store(indices + order, column, mask=listed & (order < k))
