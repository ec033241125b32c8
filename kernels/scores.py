"""The one product that every kernel shares: equal operands give equal bits, whichever kernel asks."""

import triton
import triton.language as tl


@triton.jit
def scores(
    x_rows,
    x_live,
    x_stride,
    W_rows,
    W_live,
    d,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`acc[m, n] = sum_c x_rows[m][c * x_stride] * W_rows[n][c]` in float32: [BLOCK_M, BLOCK_N].

    x_rows [BLOCK_M] and W_rows [BLOCK_N] are pointers; rows that are not live count as zeros. Both operands are cast to
    OPERAND, and float32 ones multiplied as PRECISION says. Each element is accumulated alone and over ascending c, in
    steps of the matrix instruction's depth: its bits depend neither on its place in the tile nor on the other rows,
    nor on BLOCK_M and BLOCK_N, as long as both choose the same instruction (BLOCK_M >= 64 everywhere).
    EVEN promises that BLOCK_K divides d.
    """
    inner = tl.arange(0, BLOCK_K)
    x_tile = x_rows[:, None] + inner[None, :].to(tl.int64) * x_stride
    W_tile = W_rows[None, :] + inner[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, d, BLOCK_K):
        if EVEN:
            x = tl.load(x_tile, mask=x_live[:, None], other=0.0)
            W = tl.load(W_tile, mask=W_live[None, :], other=0.0)
        else:
            inside = inner < d - start
            x = tl.load(x_tile, mask=x_live[:, None] & inside[None, :], other=0.0)
            W = tl.load(W_tile, mask=W_live[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(x.to(OPERAND), W.to(OPERAND), acc, input_precision=PRECISION)
        x_tile += BLOCK_K * x_stride
        W_tile += BLOCK_K
    return acc


@triton.jit
def is_finite(values):
    return tl.abs(values) < float("inf")
