"""Products of tokens with the rows that their latents name: how the kept values' gradient is found (SPEC 4.3)."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_latents"])
def gather_dot_kernel(indices, W, grad, out, k, d, num_latents, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr):
    """`out[m, j] = <grad[m], W[indices[m, j]]>`, in float32 over ascending channels.

    indices, out [M, k]; W [N, d], N = `num_latents`; grad [M, d]. An index outside of [0, N) gives NaN.
    Who writes what: program (m, n) writes out[m, n * BLOCK_J : (n + 1) * BLOCK_J].
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    index = tl.load(indices + row * k + columns, mask=columns < k, other=0).to(tl.int64)
    known = (index >= 0) & (index < num_latents)
    start = tl.where(known, index, 0) * d
    total = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    for first in range(0, d, BLOCK_D):
        channels = first + tl.arange(0, BLOCK_D)
        inside = channels < d
        g = tl.load(grad + row * d + channels, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(W + start[:, None] + channels[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        total += w * g[None, :]
    dots = tl.where(known, tl.sum(total, axis=1), float("nan"))
    tl.store(out + row * k + columns, dots, mask=columns < k)
