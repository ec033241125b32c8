"""Which tokens may be steered, and which latents really are: `z_c > m_c`, and a count instead of a top-k (SPEC 3.3).

With precision="exact", z_c is an exact score (see `screen`), and the others are screened: `rank_kernel` counts those
that are surely ahead of z_c and lists those that may be, up to DOUBTS of them. `settle_kernel` scores exactly what is
listed of an entry that this can still push out of the top k.
"""

import triton
import triton.language as tl

from .scores import is_finite, scores
from .screen import exact_scores, round_rows, screened
from .tokens import token_offsets, token_range

DOUBTS = tl.constexpr(31)
NO_COLUMN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def store_nan(rows, stride, bad, d, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """NaN to all d channels of the rows [BLOCK_M] that are bad."""
    if tl.sum(bad) > 0:
        nan = tl.full((BLOCK_M, BLOCK_K), float("nan"), tl.float32).to(rows.dtype.element_ty)
        for start in range(0, d, BLOCK_K):
            channels = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            mask = (bad > 0)[:, None] & (channels < d)[None, :]
            tl.store(rows[:, None] + channels[None, :] * stride, nan, mask=mask)


@triton.jit(do_not_specialize=["per_line", "tiles_per_line", "num_entries", "latents", "thresholds", "factors"])
def probe_kernel(
    x,
    per_batch,
    stride_b,
    stride_t,
    stride_d,
    out,
    out_stride_b,
    out_stride_t,
    out_stride_d,
    W_enc,
    bias,
    latents,
    thresholds,
    factors,
    z,
    rank,
    flagged_rows,
    num_flagged,
    flagged_x,
    b_dec,
    flagged_screen,
    doubts,
    per_line,
    tiles_per_line,
    num_entries,
    d,
    k,
    HAS_FACTORS: tl.constexpr,
    HAS_OUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`z[m, s] = relu(<x_m, W_enc[c]> + bias[c])`, c = latents[line of m, s], and the list of tokens worth a count.

    An entry is a candidate if `z > max(threshold, 0)` and its factor is not 1; `rank[m, s]` starts at 0 for candidates
    and at k for all others. A token with a candidate is flagged: its number goes to flagged_rows, its values to
    flagged_x. A token with NaN or infinity has z = NaN, no candidate, and is overwritten with NaN in `out`.

    x and out: [M, d] by strides; W_enc [N, d]; bias [N]; latents, thresholds, factors [G, S]; z [M, S] float32; rank
    [M, S] int32; flagged_rows [M] int32; num_flagged [1] int32, zero at the start; flagged_x [M, d] of OPERAND.

    With b_dec [d], else None, z is exact, bias is b_enc, the values in flagged_x are rounded as `round_kernel` does,
    with flagged_screen [M, 2], and no other latent is in doubt yet: doubts[m, s, 0] = 0 in [M, S, 1 + DOUBTS] int32.

    Who writes what: a program owns BLOCK_M tokens of one line, hence their rows of z, rank and out, which no other
    program reads or writes, and the slots that its one addition to num_flagged gives it. The order of slots differs
    from run to run; nothing that is computed of a token depends on its slot.
    """
    line = tl.program_id(0) // tiles_per_line
    first = line * per_line
    local = tl.program_id(0) % tiles_per_line * BLOCK_M
    rows, live = token_range(first + local, first + per_line, BLOCK_M, ALIGNED)
    x_rows = x + token_offsets(rows, per_batch, stride_b, stride_t)
    flagged = tl.zeros((BLOCK_M,), dtype=tl.int32)
    bad = tl.zeros((BLOCK_M,), dtype=tl.int32)
    # One block even of no entries: a row of zeros times a NaN or an infinity is NaN.
    for first in range(0, tl.maximum(num_entries, 1), BLOCK_S):
        entries = first + tl.arange(0, BLOCK_S)
        named = entries < num_entries
        at = line.to(tl.int64) * num_entries + entries
        columns = tl.load(latents + at, mask=named, other=0).to(tl.int64)
        W_rows = W_enc + columns * d
        added = tl.load(bias + columns, mask=named, other=0.0)
        if b_dec is None:
            acc = scores(x_rows, live, stride_d, W_rows, named, d, BLOCK_M, BLOCK_S, BLOCK_K, EVEN, OPERAND, PRECISION)
            pre = acc + added[None, :]
        else:
            pre = exact_scores(x_rows, live, stride_d, b_dec, W_rows, named, added, d, BLOCK_M, BLOCK_S)
        finite = is_finite(pre)
        bad = tl.maximum(bad, tl.max((~finite).to(tl.int32), axis=1))
        activations = tl.where(finite, tl.where(pre > 0, pre, 0.0), float("nan"))
        threshold = tl.load(thresholds + at, mask=named, other=float("inf")).to(tl.float32)
        candidate = (activations > threshold[None, :]) & (activations > 0)
        if HAS_FACTORS:
            candidate &= (tl.load(factors + at, mask=named, other=1.0).to(tl.float32) != 1.0)[None, :]
        places = rows.to(tl.int64)[:, None] * num_entries + entries[None, :]
        tl.store(z + places, activations, mask=live[:, None] & named[None, :])
        tl.store(rank + places, tl.where(candidate, 0, k), mask=live[:, None] & named[None, :])
        if b_dec is not None:
            none = tl.zeros((BLOCK_M, BLOCK_S), dtype=tl.int32)
            tl.store(doubts + places * (1 + DOUBTS), none, mask=live[:, None] & named[None, :])
        flagged = tl.maximum(flagged, tl.max(candidate.to(tl.int32), axis=1))
    flagged = tl.where(live & (bad == 0), flagged, 0)
    bad = tl.where(live, bad, 0)
    inner = tl.arange(0, BLOCK_K)
    count = tl.sum(flagged)
    if count > 0:
        slots = (tl.atomic_add(num_flagged, count) + tl.cumsum(flagged, 0) - 1).to(tl.int64)
        tl.store(flagged_rows + slots, rows, mask=flagged > 0)
        copies = flagged_x + slots * d
        if b_dec is None:
            for start in range(0, d, BLOCK_K):
                channels = (start + inner).to(tl.int64)
                mask = (flagged > 0)[:, None] & (channels < d)[None, :]
                values = tl.load(x_rows[:, None] + channels[None, :] * stride_d, mask=mask, other=0.0)
                tl.store(copies[:, None] + channels[None, :], values.to(OPERAND), mask=mask)
        else:
            round_rows(x_rows, flagged > 0, stride_d, b_dec, copies, flagged_screen + 2 * slots, d, BLOCK_M)
    if HAS_OUT:
        out_rows = out + token_offsets(rows, per_batch, out_stride_b, out_stride_t)
        store_nan(out_rows, out_stride_d, bad, d, BLOCK_M, BLOCK_K)


@triton.jit
def append_doubts(doubtful, doubts, columns):
    """Lengthen the list of each row [R] by its doubtful columns [R, C]: a count, then up to DOUBTS columns."""
    more = tl.sum(doubtful.to(tl.int32), axis=1)
    if tl.max(more) > 0:
        slots = tl.atomic_add(doubts, more, mask=more > 0, sem="relaxed")
        more = tl.where(more > 0, tl.minimum(more, -slots + DOUBTS), 0)
        for number in range(tl.max(more)):
            column = tl.min(tl.where(doubtful, columns[None, :], NO_COLUMN), axis=1)
            tl.store(doubts + 1 + slots + number, column, mask=number < more)
            doubtful &= columns[None, :] > column[:, None]


@triton.jit(do_not_specialize=["per_line", "num_entries", "latents"])
def rank_kernel(
    flagged_x,
    z,
    rank,
    flagged_rows,
    num_flagged,
    W_enc,
    bias,
    latents,
    flagged_screen,
    W_screen,
    doubts,
    per_line,
    num_entries,
    num_latents,
    d,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`rank[m, s] += #{j != c : pre_j > z_c, or pre_j = z_c and j < c}` for every candidate c: in the top k iff < k.

    `pre` is never stored: a tile [BLOCK_M flagged tokens, BLOCK_N latents] is compared and dropped. z_c and pre_j come
    out of `scores` alike, so equal rows of W_enc tie exactly and go to the lowest index, as in the reference; unequal
    pre-activations closer than the rounding of a float32 sum may be ordered either way, as in any other float32 sum.

    With flagged_screen and W_screen [N, 2], else None, W_enc is that of `round_kernel` and pre a screen: rank counts
    what is ahead by more than its bound. What may be ahead or behind is counted in doubts[m, s, 0] and listed after it,
    where there is room.

    Shapes as in `probe_kernel`. The grid is fixed: programs share the tiles of num_flagged tokens, read on the device.

    Who writes what: programs meet only in `rank` and `doubts`, by atomic additions of integers, whose order cannot
    matter; an addition to doubts gives slots of a list, whose order does not either. A program that reads a rank while
    others add sees some value of its growth: at k or above the entry has lost and needs no further count, below k it is
    counted; so a rank that ends below k is complete, and its doubts are, and one that does not stays lost.
    """
    count = tl.load(num_flagged)
    row_blocks = tl.cdiv(count, BLOCK_M)
    for item in range(tl.program_id(0), row_blocks * tl.cdiv(num_latents, BLOCK_N), tl.num_programs(0)):
        slots = item % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        live = slots < count
        columns = item // row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = columns < num_latents
        x_rows = flagged_x + slots.to(tl.int64) * d
        W_rows = W_enc + columns.to(tl.int64) * d
        acc = scores(x_rows, live, 1, W_rows, inside, d, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, OPERAND, PRECISION)
        added = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        if W_screen is None:
            pre = acc + added
        else:
            pre, margin = screened(acc, added, flagged_screen + 2 * slots, live, W_screen + 2 * columns, inside)
        pre = tl.where(inside[None, :], pre, float("-inf"))
        rows = tl.load(flagged_rows + slots, mask=live, other=0).to(tl.int64)
        lines = rows // per_line
        for entry in range(num_entries):
            place = rows * num_entries + entry
            open_ = live & (tl.load(rank + place, mask=live, other=k) < k)
            if tl.sum(open_.to(tl.int32)) > 0:
                own = tl.load(latents + lines * num_entries + entry, mask=open_, other=-1).to(tl.int32)[:, None]
                z_c = tl.load(z + place, mask=open_, other=float("inf"))[:, None]
                other = columns[None, :] != own
                if W_screen is None:
                    ahead = ((pre > z_c) | ((pre == z_c) & (columns[None, :] < own))) & other
                else:
                    ahead = (pre - margin > z_c) & other
                    doubtful = (pre + margin >= z_c) & ~(pre - margin > z_c) & other & open_[:, None]
                    append_doubts(doubtful, doubts + place * (1 + DOUBTS), columns)
                more = tl.sum(ahead.to(tl.int32), axis=1)
                tl.atomic_add(rank + place, more, mask=open_ & (more > 0), sem="relaxed")


@triton.jit(do_not_specialize=["per_line", "num_entries", "latents"])
def settle_kernel(
    x,
    per_batch,
    stride_b,
    stride_t,
    stride_d,
    z,
    rank,
    flagged_rows,
    num_flagged,
    W_enc,
    b_enc,
    b_dec,
    latents,
    doubts,
    per_line,
    num_entries,
    num_latents,
    d,
    k,
    BLOCK_R: tl.constexpr,
):
    """`rank[m, s]` made what the definition of `rank_kernel` says, by exact scores, where doubts decide over rank < k.

    It adds those of the doubtful latents that are ahead; of a list that is too short, it counts anew among all N.

    Shapes as in `probe_kernel`. Who writes what: a program takes whole (flagged token, entry) pairs, reads their lists
    and writes their rank, and no two programs take the same pair. The grid is fixed and shares num_flagged tokens, read
    on the device.
    """
    one = tl.full((1,), 1, tl.int1)
    for item in range(tl.program_id(0), tl.load(num_flagged) * num_entries, tl.num_programs(0)):
        row = tl.load(flagged_rows + item // num_entries).to(tl.int64)
        entry = item % num_entries
        place = row * num_entries + entry
        ahead = tl.load(rank + place)
        listed = doubts + place * (1 + DOUBTS)
        count = tl.load(listed)
        if (ahead < k) & (ahead + count >= k):
            short = count > DOUBTS
            count = tl.where(short, num_latents, count)
            ahead = tl.where(short, 0, ahead)
            own = tl.load(latents + row // per_line * num_entries + entry).to(tl.int32)
            z_c = tl.load(z + place)
            x_row = x + token_offsets(row + tl.arange(0, 1), per_batch, stride_b, stride_t)
            for first in range(0, count, BLOCK_R):
                at = first + tl.arange(0, BLOCK_R)
                live = at < count
                columns = tl.where(short, at, tl.load(listed + 1 + at, mask=live & ~short, other=0))
                bias = tl.load(b_enc + columns, mask=live, other=0.0)
                W_rows = W_enc + columns.to(tl.int64) * d
                pre = exact_scores(x_row, one, stride_d, b_dec, W_rows, live, bias, d, 1, BLOCK_R)
                pre = tl.reshape(pre, (BLOCK_R,))
                before = (pre > z_c) | ((pre == z_c) & (columns < own))
                ahead += tl.sum((live & (columns != own) & before).to(tl.int32))
            tl.store(rank + place, ahead)
