"""The triton backend: what it refuses, and the launches of `saemnesia_fast.kernels`.

No launch waits for the device, looks at data, or allocates by what it finds: all of it can be captured in a CUDA graph.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import backend
from .backend import Refusal, current_backend
from .triton_product import Product, product, round_rows
from .triton_tiles import EXACT_PROBE, SCREEN_WARPS, num_programs
from .workspace import Workspace

if TYPE_CHECKING:
    from saemnesia_fast.kernels.tokens import Tokens

MAX_K = 256
DOUBTFUL = 32
"""Room for latents that a screen cannot tell from the k-th largest, of which a token ordinarily has a few."""
Z_BYTES = 1 << 29
"""Room for the pre-activations of `encode_topk`: longer batches are encoded in parts."""

BLOCK_D = 256
"""Channels of a program that decodes."""


@cache
def _interpreting() -> bool:
    import triton

    return triton.knobs.runtime.interpret


def refuse(device: torch.device) -> Refusal | None:
    """Why these kernels cannot run on `device`. On the CPU, Triton's interpreter runs them when asked for by name."""
    needs_gpu = Refusal("needs an NVIDIA GPU", missed=False)
    on_gpu = device.type == "cuda" and torch.cuda.is_available() and not torch.version.hip
    by_name = device.type == "cpu" and current_backend() == "triton"
    if not (on_gpu or by_name):
        return needs_gpu
    if find_spec("triton") is None:
        return Refusal("triton is not installed", missed=True)
    if by_name:
        return None if _interpreting() else needs_gpu
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else Refusal(f"needs compute capability 8.0, not {major}.{minor}", missed=False)


def _power_of_two(number: int, least: int = 1) -> int:
    return max(least, 1 << (number - 1).bit_length())


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    k: int,
    precision: str = "default",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.encode_topk`, with values in `dtype` (None: that of x)."""
    from saemnesia_fast.kernels.encode_topk import encode_kernel, group_size, rescore_kernel
    from saemnesia_fast.kernels.tokens import locate

    values = x.new_empty(*x.shape[:-1], k, dtype=dtype or x.dtype)
    indices = torch.empty_like(values, dtype=torch.int32)
    rows, d, num_latents = x.numel() // x.shape[-1], x.shape[-1], W_enc.shape[0]
    if rows == 0:
        return values, indices
    with torch.cuda.device_of(x):
        weights = product(x, W_enc, b_enc, b_dec, precision)
        tile = weights.tiles.encode_topk
        part = min(rows, max(16, Z_BYTES // (4 * num_latents) // 16 * 16))
        z = x.new_empty(part, num_latents, dtype=torch.float32)
        if weights.screen is None:
            tokens, screen, num_listed = x, None, k
        else:
            tokens, screen = round_rows(x, b_dec.contiguous())
            num_listed = min(num_latents, _power_of_two(k + DOUBTFUL))
        source = locate(tokens)
        group = group_size(num_listed)
        maxima = z.new_empty(part, -(-num_latents // group))
        for first in range(0, rows, part):
            some = min(part, rows - first)
            grid = (-(-some // tile.tokens) * -(-num_latents // tile.latents),)
            encode_kernel[grid](
                *source,
                weights.W_enc,
                weights.bias,
                screen,
                weights.screen,
                z,
                maxima,
                first,
                some,
                num_latents,
                d,
                GROUP=group,
                ALIGNED=source.aligned(tile.tokens),
                BLOCK_N=tile.latents,
                **weights.launch(tile),
            )
            if screen is None:
                select(z[:some], maxima, k, values, indices, first)
            else:
                most = z.new_empty(some, num_listed)
                columns = most.new_empty(most.shape, dtype=torch.int32)
                select(z[:some], maxima, num_listed, most, columns)
                rescore_kernel[(some,)](
                    *locate(x),
                    W_enc.contiguous(),
                    weights.bias,
                    b_dec.contiguous(),
                    screen,
                    weights.screen,
                    z,
                    most,
                    columns,
                    values,
                    indices,
                    first,
                    num_latents,
                    d,
                    k,
                    num_listed,
                    BLOCK_L=_power_of_two(num_listed, 16),
                    BLOCK_R=32 if num_listed <= 256 else 16,
                    num_warps=8 if num_listed <= 256 else 16,
                )
    return values, indices


def select(z: Tensor, maxima: Tensor, k: int, values: Tensor, indices: Tensor, first: int = 0) -> None:
    """Fill tokens first ... of values, indices [..., k] with the k largest of each row of z [R, N] (SPEC 1.2)."""
    from saemnesia_fast.kernels.encode_topk import group_size, select_kernel

    rows, num_latents = z.shape
    group, block_k, block_g = group_size(k), _power_of_two(k, 16), _power_of_two(maxima.shape[1], 16)
    block_r = 1 if z.is_cuda else 16
    scratch = z.new_empty(rows, 3, block_k, dtype=torch.int32)
    select_kernel[(-(-rows // block_r),)](
        z,
        maxima,
        scratch,
        values,
        indices,
        first,
        rows,
        num_latents,
        k,
        GROUP=group,
        BLOCK_R=block_r,
        BLOCK_G=block_g,
        BLOCK_K=block_k,
        num_warps=min(16, max(1, max(block_g, block_k * group) // 256)),
    )


def select_topk(z: Tensor, bias: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """TopK of relu(z + bias) for a product z [M, N] float32 of another make, which is overwritten (SPEC 1.2)."""
    from saemnesia_fast.kernels.encode_topk import group_size, maxima_kernel

    values = z.new_empty(len(z), k, dtype=dtype)
    indices = z.new_empty(len(z), k, dtype=torch.int32)
    if len(z):
        with torch.cuda.device_of(z):
            maxima = z.new_empty(len(z), -(-z.shape[1] // group_size(k)))
            grid = (-(-len(z) // 16) * -(-z.shape[1] // 256),)
            maxima_kernel[grid](z, bias, maxima, *z.shape, GROUP=group_size(k), BLOCK_M=16, BLOCK_N=256)
            select(z, maxima, k, values, indices)
    return values, indices


def decode(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    x: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ops.decode`, and with x and scale `ops.decode_error`."""
    nothing = values.new_empty(1, 0)
    lines = (nothing.int(), nothing, nothing)
    if x is None:
        out = values.new_empty(*values.shape[:-1], W_dec.shape[1])
        _sum_directions(values, indices, W_dec, b_dec, out, out, lines, "decode", False)
        return out
    from saemnesia_fast.kernels.tokens import view

    grad = values.new_empty(x.shape, dtype=torch.float32)
    squares = values.new_empty(*x.shape[:-1], -(-x.shape[-1] // BLOCK_D), dtype=torch.float32)
    source = x if view(x, grad) else x.contiguous()
    _sum_directions(values, indices, W_dec, b_dec, source, grad, lines, "error", False, scale, squares)
    return grad, squares.sum(-1)


def _sum_directions(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    x: Tensor,
    out: Tensor,
    lines: tuple[Tensor, Tensor, Tensor],
    mode: str,
    norm_scaled: bool,
    scale: Tensor | None = None,
    squares: Tensor | None = None,
) -> None:
    from saemnesia_fast.kernels.decode import decode_kernel
    from saemnesia_fast.kernels.tokens import view

    k, d = values.shape[-1], out.shape[-1]
    rows = values.numel() // k
    if rows == 0:
        return
    source, target = view(x, out)
    per_line, num_entries = rows // len(lines[0]), lines[0].shape[1]
    with torch.cuda.device_of(out):
        decode_kernel[rows, -(-d // BLOCK_D)](
            values.contiguous(),
            indices.contiguous(),
            W_dec.contiguous(),
            b_dec.contiguous(),
            *source,
            *target[:1],
            *target[2:],
            *lines,
            scale,
            squares,
            per_line,
            num_entries,
            d,
            k,
            MODE=mode,
            NORM_SCALED=norm_scaled,
            BLOCK_J=8,
            BLOCK_S=32,
            BLOCK_D=BLOCK_D,
            num_warps=4,
        )


def gather_dot(indices: Tensor, W: Tensor, grad: Tensor) -> Tensor:
    """[..., k] float32: each token's grad [..., d] times the rows of W [N, d] that its indices [..., k] name."""
    from saemnesia_fast.kernels.gather_dot import gather_dot_kernel

    k, d = indices.shape[-1], grad.shape[-1]
    out = grad.new_empty(indices.shape, dtype=torch.float32)
    if out.numel():
        with torch.cuda.device_of(grad):
            grid = (out.numel() // k, -(-k // 8))
            gather_dot_kernel[grid](
                indices.contiguous(),
                W.contiguous(),
                grad.contiguous(),
                out,
                k,
                d,
                W.shape[0],
                BLOCK_J=8,
                BLOCK_D=128,
                num_warps=4,
            )
    return out


class Probed(NamedTuple):
    """What `probe_kernel` and `rank_kernel` leave behind."""

    z: Tensor
    """[M, S] float32: the activation of each entry, NaN for a token with NaN or infinity."""
    rank: Tensor
    """[M, S] int32: below k where the entry is steered."""
    rows: Tensor
    """[M] int32: the flagged tokens, num_flagged of them."""
    num_flagged: Tensor
    """[1] int32."""


class Scratch(NamedTuple):
    """What the kernels of `erase` and `probe` tell each other."""

    z: Tensor
    rank: Tensor
    rows: Tensor
    flagged_x: Tensor
    """[M, d] of the product's operand: the flagged tokens' values."""
    screen: Tensor | None
    doubts: Tensor | None


def _new_scratch(x: Tensor, rows: int, num_entries: int, d: int, operand: torch.dtype, exact: bool) -> Scratch:
    from saemnesia_fast.kernels.probe import DOUBTS

    z = x.new_empty(rows, num_entries, dtype=torch.float32)
    rank = z.new_empty(rows, num_entries, dtype=torch.int32)
    screen = z.new_empty(rows, 2) if exact else None
    doubts = rank.new_empty(rows, num_entries, 1 + DOUBTS.value) if exact else None
    return Scratch(z, rank, rank.new_empty(rows), z.new_empty(rows, d, dtype=operand), screen, doubts)


def _needed(x: Tensor, weights: Product, latents: Tensor) -> tuple[int, int, int, torch.dtype, bool]:
    """Of `_new_scratch`, after x."""
    d = x.shape[-1]
    return x.numel() // d, latents.shape[1], d, weights.dtype, weights.screen is not None


def _probe(
    source: "Tokens",
    target: "Tokens | None",
    weights: Product,
    W_enc: Tensor,
    b_dec: Tensor,
    k: int,
    latents: Tensor,
    thresholds: Tensor,
    factors: Tensor | None,
    scratch: Scratch,
    workspace: Workspace,
) -> Probed:
    """The activations and ranks of all entries; tokens with NaN or infinity become NaN in `target`, which has the T of
    `source`. At least one token."""
    from saemnesia_fast.kernels.probe import probe_kernel, rank_kernel, settle_kernel

    num_latents, d = W_enc.shape
    num_lines, num_entries = latents.shape
    exact = weights.screen is not None
    probing, ranking = weights.tiles.probe, weights.tiles.rank
    if exact:
        probing, ranking = EXACT_PROBE, ranking._replace(warps=SCREEN_WARPS)
    per_line = len(scratch.rows) // num_lines
    tiles_per_line = -(-per_line // probing.tokens)
    written = target or source
    z, rank, flagged_rows, flagged_x, screen, doubts = scratch
    flagged = Probed(z, rank, flagged_rows, workspace.zero(z))
    W, shift = (W_enc.contiguous(), b_dec.contiguous()) if exact else (weights.W_enc, None)
    workspace.launch(
        probe_kernel,
        (num_lines * tiles_per_line,),
        *source,
        *written[:1],
        *written[2:],
        W,
        weights.bias,
        latents,
        thresholds,
        thresholds if factors is None else factors,
        *flagged,
        flagged_x,
        shift,
        screen,
        doubts,
        per_line,
        tiles_per_line,
        num_entries,
        d,
        k,
        HAS_FACTORS=factors is not None,
        HAS_OUT=target is not None,
        ALIGNED=source.aligned(per_line, probing.tokens),
        BLOCK_S=probing.latents,
        **weights.launch(probing),
    )
    workspace.launch(
        rank_kernel,
        (num_programs(z.device),),
        flagged_x,
        *flagged,
        weights.W_enc,
        weights.bias,
        latents,
        screen,
        weights.screen,
        doubts,
        per_line,
        num_entries,
        num_latents,
        d,
        k,
        BLOCK_N=ranking.latents,
        **weights.launch(ranking),
    )
    if exact:
        workspace.launch(
            settle_kernel,
            (num_programs(z.device),),
            *source,
            *flagged,
            W,
            weights.bias,
            shift,
            latents,
            doubts,
            per_line,
            num_entries,
            num_latents,
            d,
            k,
            BLOCK_R=16,
            num_warps=4,
        )
    return flagged


def probe(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    k: int,
    latents: Tensor,
    thresholds: Tensor,
    precision: str = "default",
) -> tuple[Tensor, Tensor]:
    """`ops.probe`."""
    from saemnesia_fast.kernels.tokens import locate

    shape = (*x.shape[:-1], latents.shape[1])
    if x.numel() == 0:
        return x.new_empty(shape), x.new_empty(shape, dtype=torch.bool)
    with torch.cuda.device_of(x):
        weights = product(x, W_enc, b_enc, b_dec, precision)
        lines = (latents.contiguous(), thresholds.contiguous(), None)
        scratch = _new_scratch(x, *_needed(x, weights, latents))
        seen = _probe(locate(x), None, weights, W_enc, b_dec, k, *lines, scratch, Workspace())
        return seen.z.to(x.dtype).view(shape), (seen.rank < k).view(shape)


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
    precision: str = "default",
    in_place: bool = False,
    workspace: Workspace | None = None,
) -> Tensor:
    """`ops.erase`; `in_place` writes x' over x (mode "exact" without `norm_scaled` then copies no token).

    What "exact" keeps in the workspace is small. The others' [M, N] pre-activations are not: a UNet needs that memory
    for itself between two calls.
    """
    from saemnesia_fast.kernels.erase import erase_kernel
    from saemnesia_fast.kernels.tokens import view

    workspace = workspace or Workspace()
    lines = (latents.contiguous(), thresholds.contiguous(), factors.contiguous())
    out = x if in_place else torch.empty_like(x)
    if x.numel() == 0:
        return out
    located = view(x, out)
    if located is None:
        arguments = (W_enc, b_enc, b_dec, W_dec, k, *lines, mode, norm_scaled, precision)
        return out.copy_(erase(x.contiguous(), *arguments))
    if mode != "exact" or norm_scaled:
        values, indices = encode_topk(x, W_enc, b_enc, b_dec, k, precision, torch.float32)
        _sum_directions(values, indices, W_dec, b_dec, x, out, lines, mode, norm_scaled)
        return out
    if not in_place:
        out.copy_(x)
    with torch.cuda.device_of(x):
        weights = product(x, W_enc, b_enc, b_dec, precision)
        key, scratch = workspace.take("erase", _new_scratch, x, *_needed(x, weights, latents))
        source, target = located
        seen = _probe(source, target, weights, W_enc, b_dec, k, *lines, scratch, workspace)
        d, num_entries = x.shape[-1], latents.shape[1]
        workspace.launch(
            erase_kernel,
            (num_programs(x.device), -(-d // 256)),
            *source,
            *target[:1],
            *target[2:],
            W_dec.contiguous(),
            lines[0],
            lines[2],
            *seen,
            seen.rows.shape[0] // len(latents),
            num_entries,
            d,
            k,
            BLOCK_S=_power_of_two(num_entries, 16),
            BLOCK_D=256,
            num_warps=2,
        )
        workspace.put_back("erase", key, scratch)
        if in_place:
            workspace.allow_repeat()
    return out


def _cannot(op: str, tokens: Tensor, arguments: tuple[Any, ...]) -> str | None:
    if torch.float64 in (tokens.dtype, *(a.dtype for a in arguments[1:2] if op == "gather_dot")):
        return "it computes in float32"
    if op == "encode_topk" and arguments[3] > MAX_K:
        return f"it keeps at most {MAX_K} latents"
    if op == "erase" and arguments[4] > MAX_K and (arguments[8] != "exact" or arguments[9]):
        return f"it keeps at most {MAX_K} latents"
    return None


def _or_eager(op: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """What these kernels cannot compute is computed by the eager reference, unless triton was chosen by name."""
    eager = backend._slots[op, "eager"].implementation

    def run(tokens: Tensor, *arguments: Any, **options: Any) -> Any:
        reason = _cannot(op, tokens, arguments)
        if reason is None:
            return implementation(tokens, *arguments, **options)
        if current_backend() == "triton":
            raise RuntimeError(f"{op}: backend 'triton' was chosen but cannot compute this: {reason}")
        if tokens.dtype != torch.float64:
            backend.tell_missed(op, "eager", "triton", reason)
        options.pop("workspace", None)
        return eager(tokens, *arguments, **options)

    return run


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
    workspace: Workspace | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ops.steering_lines`: one launch."""
    from saemnesia_fast.kernels.steering_lines import steering_lines_kernel

    num_stored, num_prompts, num_entries = latents.shape
    tables = (latents, thresholds, factors, owners)
    lines = [table.new_empty(num_lines, num_entries) for table in tables]
    active = switches.new_empty(num_lines)
    with torch.cuda.device_of(stored):
        (workspace or Workspace()).launch(
            steering_lines_kernel,
            (num_lines,),
            timesteps,
            timesteps.stride(0) if len(timesteps) > 1 else 0,
            stored,
            *tables,
            switches.view(torch.uint8),
            *lines,
            active.view(torch.uint8),
            num_stored,
            num_prompts,
            num_entries,
            num_lines,
            num_blocks,
            first_block,
            earliest,
            latest,
            BLOCK_T=128,
            BLOCK_S=32,
            num_warps=1,
        )
    return lines[0], lines[1], lines[2], lines[3], active


def register() -> None:
    """Fill the slots; nothing is imported yet. The eager ones must be filled before."""
    computed = (encode_topk, decode, erase, probe, gather_dot)
    for op, implementation in ((function.__name__, function) for function in computed):
        backend.register(op, "triton", _or_eager(op, implementation), refuse, takes_workspace=op == "erase")
    backend.register("steering_lines", "triton", steering_lines, refuse, takes_workspace=True)
