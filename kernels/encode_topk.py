"""Exact TopK of `relu(x @ W_enc.T + bias)` by group maxima: a product, then a select per token, no sort (SPEC 1.2).

Let t be the k-th largest of the maxima of GROUP columns each. k values reach t, so no value below t is kept; and every
value above t lies in a group whose maximum is above t. The k groups with the largest maxima, equal ones taken from the
left, therefore hold the k largest values, equal ones taken from the left.
"""

import triton
import triton.language as tl

from .scores import is_finite, scores
from .tokens import token_offsets

INFINITY_BITS = tl.constexpr(0x7F800000)


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


@triton.jit
def encode_kernel(
    x,
    per_batch,
    stride_b,
    stride_t,
    stride_d,
    W_enc,
    bias,
    z,
    maxima,
    first_row,
    num_rows,
    num_latents,
    d,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`z[m] = relu(x[first_row + m] @ W_enc.T + bias)` for num_rows tokens, and the maxima of its groups.

    x [M, d] by strides; W_enc [N, d]; bias [N] float32; z [num_rows, N] and maxima [num_rows, ceil(N / GROUP)] float32.
    Every value of a token with NaN or infinity is +inf. Who writes what: a program owns one tile of z, made of whole
    groups, and their maxima. Neighbouring programs share their columns of W_enc, so that it is read once.
    """
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    rows = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < num_rows
    tile = tl.program_id(0) // row_tiles
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < num_latents
    x_rows = x + token_offsets(first_row + rows, per_batch, stride_b, stride_t)
    W_rows = W_enc + columns.to(tl.int64) * d
    acc = scores(x_rows, live, stride_d, W_rows, inside, d, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, OPERAND, PRECISION)
    pre = acc + tl.load(bias + columns, mask=inside, other=0.0)[None, :]
    store_activations(pre, rows, live, tile, num_latents, z, maxima, BLOCK_M, BLOCK_N, GROUP)


@triton.jit
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


@triton.jit
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
