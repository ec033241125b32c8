"""Every Triton kernel compiled ahead of time as it is launched at full size: registers, spills, shared memory.

`python tests/aot.py` prints the table, `python tests/aot.py 90` that of sm_90; with `--write` it becomes
tests/budgets.json, to which test_triton_aot.py holds the kernels. Must run without TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from saemnesia_fast.kernels.decode import decode_kernel
from saemnesia_fast.kernels.encode_topk import encode_kernel, maxima_kernel, rescore_kernel, select_kernel
from saemnesia_fast.kernels.erase import erase_kernel
from saemnesia_fast.kernels.gather_dot import gather_dot_kernel
from saemnesia_fast.kernels.probe import probe_kernel, rank_kernel, settle_kernel
from saemnesia_fast.kernels.screen import round_kernel
from saemnesia_fast.kernels.steering_lines import steering_lines_kernel
from saemnesia_fast.ops.triton_tiles import EXACT_PROBE, SCREEN_WARPS, Tile, heuristic

BUDGETS = Path(__file__).with_name("budgets.json")
ARCHITECTURES = (80, 89, 90, 100, 120)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
OPERANDS = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
FIXED_TYPES = {
    "*fp32": "bias z most maxima thresholds factors scale squares stored out_thresholds out_factors "
    "screen x_screen W_screen flagged_screen",
    "*i32": "rank flagged_rows num_flagged doubts columns scratch indices",
    "*i64": "latents owners timesteps out_latents out_owners",
    "*u8": "switches active",
    "*fp16": "rounded",
    "fp32": "earliest latest",
}
TYPE_OF = {name: kind for kind, names in FIXED_TYPES.items() for name in names.split()}
OF_THE_TOKENS = {"x", "out", "flagged_x", "W_enc", "W_dec", "b_enc", "b_dec", "values"}


class Case(NamedTuple):
    """One kernel as it is launched for an SAE of SD 1.5: d = 1280, N = 20480, k = 32."""

    name: str
    kernel: Any
    dtype: torch.dtype
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    types: dict[str, str] = {}  # noqa: RUF012


def product(tile: Tile, dtype: torch.dtype, name: str, **constants: Any) -> dict[str, Any]:
    """What a product is launched with; `name` is that of its number of latents."""
    cut = {"BLOCK_M": tile.tokens, "BLOCK_K": tile.depth, name: tile.latents}
    operands = {"EVEN": True, "OPERAND": getattr(tl, OPERANDS[dtype]), "PRECISION": "tf32x3"}
    return {**cut, **operands, **constants}


NO_SCREEN = {name: None for name in ("x_screen", "W_screen", "flagged_screen", "doubts")}
LAYOUTS = {
    "": {"per_batch": 1, "stride_d": 1, "out_stride_d": 1, "ALIGNED": False},
    "_nchw": {"stride_t": 1, "out_stride_t": 1, "ALIGNED": True},
}
CONTIGUOUS = LAYOUTS[""]


def cases(architecture: int) -> Iterator[Case]:
    """All kernels for fp16 tokens; on sm_90 also for bf16 and fp32 ones, and for tokens of a [B, C, H, W] tensor."""
    half, single = torch.float16, torch.float32
    variants = [(half, "")]
    if architecture == 90:
        variants += [(torch.bfloat16, ""), (single, ""), (half, "_nchw")]
    for dtype, layout in variants:
        encode, probe, rank = heuristic(divmod(architecture, 10), dtype)
        of = f"{TYPES[dtype]}{layout}"
        strides = {**LAYOUTS[layout], **NO_SCREEN}
        constants = product(encode, dtype, "BLOCK_N", GROUP=32, **strides)
        yield Case(f"encode_topk.encode_{of}", encode_kernel, dtype, constants, encode.warps, encode.stages)
        constants = product(probe, dtype, "BLOCK_S", HAS_FACTORS=True, HAS_OUT=True, b_dec=None, **strides)
        yield Case(f"probe.probe_{of}", probe_kernel, dtype, constants, probe.warps, probe.stages)
        if not layout:
            constants = product(rank, dtype, "BLOCK_N", **NO_SCREEN)
            yield Case(f"probe.rank_{of}", rank_kernel, dtype, constants, rank.warps, rank.stages)
    yield from exact(*heuristic(divmod(architecture, 10), half), ("", "_nchw") if architecture == 90 else ("",))
    blocks = {"GROUP": 32, "BLOCK_R": 1, "BLOCK_G": 1024, "BLOCK_K": 32}
    yield Case("encode_topk.select_fp16", select_kernel, half, blocks, 4)
    blocks = {**CONTIGUOUS, "NORM_SCALED": False, "BLOCK_J": 8, "BLOCK_S": 32, "BLOCK_D": 256}
    constants = {"MODE": "released", "scale": None, "squares": None, **blocks}
    yield Case("decode.decode_fp16", decode_kernel, half, constants, 4)
    yield Case("decode.decode_error_fp32", decode_kernel, single, {"MODE": "error", **blocks}, 4)
    types = {"W": "*fp16", "grad": "*fp16", "out": "*fp32"}
    yield Case("gather_dot.gather_dot_fp16", gather_dot_kernel, half, {"BLOCK_J": 8, "BLOCK_D": 128}, 4, types=types)
    yield Case("erase.erase_fp16", erase_kernel, half, {**CONTIGUOUS, "BLOCK_S": 16, "BLOCK_D": 256}, 2)
    blocks = {"BLOCK_T": 128, "BLOCK_S": 32}
    yield Case("steering_lines.steering_lines", steering_lines_kernel, single, blocks, 1)
    if architecture == 90:
        blocks = {"GROUP": 8, "BLOCK_R": 1, "BLOCK_G": 4096, "BLOCK_K": 256}
        yield Case("encode_topk.select_k256", select_kernel, half, blocks, 16)
        blocks = {"BLOCK_L": 512, "BLOCK_R": 16}
        types = {"flagged_x": "*fp16"}
        yield Case("encode_topk.rescore_k256", rescore_kernel, single, {**CONTIGUOUS, **blocks}, 16, types=types)
        yield Case("encode_topk.maxima", maxima_kernel, half, {"GROUP": 32, "BLOCK_M": 16, "BLOCK_N": 256}, 4)


def exact(encode: Tile, probe: Tile, rank: Tile, layouts: tuple[str, ...] = ("",)) -> Iterator[Case]:
    """precision="exact" for fp32 weights and tokens, fp16 ones in [B, C, H, W]: the screens are products of fp16."""
    half, single = torch.float16, torch.float32
    constants = product(encode, half, "BLOCK_N", GROUP=32, **CONTIGUOUS)
    yield Case("encode_topk.encode_exact", encode_kernel, half, constants, encode.warps, encode.stages)
    yield Case("probe.rank_exact", rank_kernel, half, product(rank, half, "BLOCK_N"), SCREEN_WARPS, rank.stages)
    for layout in layouts:
        strides = {**LAYOUTS[layout], "ALIGNED": False}
        types = dict.fromkeys(("x", "out", "values", "flagged_x") if layout else ("flagged_x",), "*fp16")
        yield Case(f"screen.round{layout}", round_kernel, single, {**strides, "BLOCK_R": 4}, 4, types=types)
        constants = {**strides, "BLOCK_L": 64, "BLOCK_R": 32}
        yield Case(f"encode_topk.rescore{layout}", rescore_kernel, single, constants, 8, types=types)
        constants = product(EXACT_PROBE, half, "BLOCK_S", HAS_FACTORS=True, HAS_OUT=True, **strides)
        yield Case(f"probe.probe_exact{layout}", probe_kernel, single, constants, EXACT_PROBE.warps, types=types)
        yield Case(f"probe.settle{layout}", settle_kernel, single, {**strides, "BLOCK_R": 16}, 4, types=types)


def signature(case: Case) -> dict[str, str]:
    """Types as the launcher would find them: pointers by name, all other numbers int32."""
    types = {}
    for parameter in case.kernel.params:
        name = parameter.name
        if name in case.constants:
            types[name] = "constexpr"
        else:
            of_the_tokens = f"*{TYPES[case.dtype]}" if name in OF_THE_TOKENS else "i32"
            types[name] = case.types.get(name) or TYPE_OF.get(name, of_the_tokens)
    return types


def measure(case: Case, architecture: int) -> dict[str, Any]:
    """Compile and read registers, spilled bytes, shared memory and the matrix instruction."""
    types = signature(case)
    attributes = {
        (number,): [["tt.divisibility", 16]]
        for number, parameter in enumerate(case.kernel.params)
        if types[parameter.name] not in ("constexpr", "fp32") and not parameter.do_not_specialize
    }
    constants = {(number,): case.constants[n] for number, n in enumerate(types) if n in case.constants}
    source = ASTSource(case.kernel, types, constants, attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    found = [name for name in ("wgmma", "tcgen05.mma", "mma.sync") if name in compiled.asm["ptx"]]
    return {
        "registers": numbers["REG"],
        "spilled": numbers["STACK"] + numbers["LOCAL"],
        "shared": compiled.metadata.shared,
        "matrix": found[0] if found else None,
    }


def measure_all(architectures: tuple[int, ...] = ARCHITECTURES) -> dict[str, dict[str, Any]]:
    return {
        f"{case.name} sm_{architecture}": measure(case, architecture)
        for architecture in architectures
        for case in cases(architecture)
    }


if __name__ == "__main__":
    table = measure_all(tuple(int(word) for word in sys.argv[1:] if word.isdigit()) or ARCHITECTURES)
    text = "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in table.items()) + "\n}\n"
    sys.stdout.write(text)
    if "--write" in sys.argv:
        BUDGETS.write_text(text, encoding="utf-8")
