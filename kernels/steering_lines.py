"""A UNet call's lines out of the tables of all timesteps and prompts (SPEC 2.4, 3.4)."""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=[
        "timesteps",
        "timestep_stride",
        "num_stored",
        "num_prompts",
        "num_entries",
        "num_lines",
        "num_blocks",
        "first_block",
    ]
)
def steering_lines_kernel(
    timesteps,
    timestep_stride,
    stored,
    latents,
    thresholds,
    factors,
    owners,
    switches,
    out_latents,
    out_thresholds,
    out_factors,
    out_owners,
    active,
    num_stored,
    num_prompts,
    num_entries,
    num_lines,
    num_blocks,
    first_block,
    earliest,
    latest,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Line l takes `table[argmin |stored - t_l|, block % G]`, `block = l * num_blocks // L`; of equal steps the first.

    Where `active` is false, as the prompt's switch, the block or the timestep says, its thresholds are +inf.

    timesteps [1 or L] by its stride; stored [T] float32; the tables [T, G, S]; switches [G] and active [L] uint8; the
    results [L, S]. Who writes what: program l writes line l.
    """
    line = tl.program_id(0)
    time = tl.load(timesteps + line * timestep_stride).to(tl.float32)
    nearest = 0
    least = float("inf")
    for first in range(0, num_stored, BLOCK_T):
        steps = first + tl.arange(0, BLOCK_T)
        distance = tl.abs(tl.load(stored + steps, mask=steps < num_stored, other=float("inf")) - time)
        smallest = tl.min(distance, axis=0)
        at = tl.min(tl.where(distance == smallest, steps, num_stored), axis=0)
        nearest = tl.where(smallest < least, at, nearest)
        least = tl.minimum(smallest, least)
    block = (line.to(tl.int64) * num_blocks // num_lines).to(tl.int32)
    prompt = block % num_prompts
    on = (tl.load(switches + prompt) != 0) & (block >= first_block) & (time <= earliest) & (time >= latest)
    tl.store(active + line, on.to(tl.uint8))
    source = (nearest * num_prompts + prompt).to(tl.int64) * num_entries
    target = line.to(tl.int64) * num_entries
    for first in range(0, num_entries, BLOCK_S):
        entries = first + tl.arange(0, BLOCK_S)
        inside = entries < num_entries
        tl.store(out_latents + target + entries, tl.load(latents + source + entries, mask=inside), mask=inside)
        threshold = tl.load(thresholds + source + entries, mask=inside)
        tl.store(out_thresholds + target + entries, tl.where(on, threshold, float("inf")), mask=inside)
        tl.store(out_factors + target + entries, tl.load(factors + source + entries, mask=inside), mask=inside)
        tl.store(out_owners + target + entries, tl.load(owners + source + entries, mask=inside), mask=inside)
