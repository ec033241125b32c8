"""The edit itself, after `probe_kernel` and `rank_kernel`: `x' = x + Delta` (SPEC 3.2, mode "exact")."""

import triton
import triton.language as tl

from .tokens import token_offsets


@triton.jit(do_not_specialize=["per_line", "num_entries", "latents", "factors"])
def erase_kernel(
    x,
    per_batch,
    stride_b,
    stride_t,
    stride_d,
    out,
    out_stride_b,
    out_stride_t,
    out_stride_d,
    W_dec,
    latents,
    factors,
    z,
    rank,
    flagged_rows,
    num_flagged,
    per_line,
    num_entries,
    d,
    k,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`out_m = x_m + sum over steered s of (factor_s - 1) z_s W_dec[c_s]`, steered: rank < k; in float32, rounded once.

    Summed by ascending (rank, latent), so neither the order of entries nor anything else but the token matters. Tokens
    that nothing steers are not written: `out` is x itself or holds a copy of it.

    x, out: [M, d] by strides; W_dec [N, d]; latents, factors [G, S]; z, rank, flagged_rows and num_flagged as
    `probe_kernel` and `rank_kernel` left them; S <= BLOCK_S.

    Who writes what: a program takes whole (flagged token, BLOCK_D channels) pairs, reads their x and writes their out,
    and no two programs take the same pair. The grid is fixed and shares num_flagged tokens, read on the device.
    """
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    inside = channels < d
    entries = tl.arange(0, BLOCK_S)
    last: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    for slot in range(tl.program_id(0), tl.load(num_flagged), tl.num_programs(0)):
        row = tl.load(flagged_rows + slot).to(tl.int64)
        line = row // per_line
        ranks = tl.load(rank + row * num_entries + entries, mask=entries < num_entries, other=k).to(tl.int64)
        steered = ranks < k
        columns = tl.load(latents + line * num_entries + entries, mask=steered, other=0).to(tl.int64)
        factor = tl.load(factors + line * num_entries + entries, mask=steered, other=1.0).to(tl.float32)
        activation = tl.load(z + row * num_entries + entries, mask=steered, other=0.0)
        change = (factor - 1.0) * activation
        order = tl.where(steered, (ranks << 32) | columns, last)
        count = tl.sum(steered.to(tl.int32))
        if count > 0:
            delta = tl.zeros((BLOCK_D,), dtype=tl.float32)
            for _ in range(count):
                key = tl.min(order)
                amount = tl.sum(tl.where(order == key, change, 0.0))
                direction = W_dec + (key & 0xFFFFFFFF) * d + channels
                delta += amount * tl.load(direction, mask=inside, other=0.0).to(tl.float32)
                order = tl.where(order == key, last, order)
            x_row = x + token_offsets(row, per_batch, stride_b, stride_t)
            out_row = out + token_offsets(row, per_batch, out_stride_b, out_stride_t)
            value = tl.load(x_row + channels * stride_d, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_row + channels * out_stride_d, (value + delta).to(out.dtype.element_ty), mask=inside)
