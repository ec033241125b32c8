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
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from saemnesia_fast.kernels.decode import decode_kernel
from saemnesia_fast.kernels.encode_topk import encode_kernel, maxima_kernel, select_kernel
from saemnesia_fast.kernels.erase import erase_kernel
from saemnesia_fast.kernels.probe import probe_kernel, rank_kernel
from saemnesia_fast.kernels.steering_lines import steering_lines_kernel
from saemnesia_fast.ops.triton_tiles import Tile, heuristic

BUDGETS = Path(__file__).with_name("budgets.json")
ARCHITECTURES = (80, 89, 90, 100, 120)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
OPERANDS = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
FIXED_TYPES = {
    "*fp32": "bias z maxima thresholds factors stored out_thresholds out_factors",
    "*i32": "rank flagged_rows num_flagged scratch indices",
    "*i64": "latents owners timesteps out_latents out_owners",
    "*u8": "switches active",
    "fp32": "earliest latest",
}
TYPE_OF = {name: kind for kind, names in FIXED_TYPES.items() for name in names.split()}
OF_THE_TOKENS = {"x", "out", "flagged_x", "W_enc", "W_dec", "b_dec", "values"}
NOT_DIVISIBLE = {"num_entries", "k", "first_row", "tiles_per_line", "timestep_stride", "num_stored", "num_prompts"}
NOT_DIVISIBLE |= {"num_lines", "num_blocks", "first_block", "earliest", "latest"}


class Case(NamedTuple):
    """One kernel as it is launched for an SAE of SD 1.5: d = 1280, N = 20480, k = 32."""

    name: str
    kernel: Any
    dtype: torch.dtype
    constants: dict[str, Any]
    warps: int
    stages: int = 3


def product(tile: Tile, dtype: torch.dtype) -> dict[str, Any]:
    import triton.language as tl

    return {
        "BLOCK_M": tile.tokens,
        "BLOCK_K": tile.depth,
        "EVEN": True,
        "OPERAND": getattr(tl, OPERANDS[dtype]),
        "PRECISION": "tf32x3",
    }


LAYOUTS = {"": {"stride_d": 1, "out_stride_d": 1}, "_nchw": {"stride_t": 1, "out_stride_t": 1}}


def cases(architecture: int) -> Iterator[Case]:
    """All kernels for fp16 tokens; the products also for fp32 ones and for tokens of a [B, C, H, W] tensor."""
    variants = [(torch.float16, "")] + ([(torch.float32, ""), (torch.float16, "_nchw")] if architecture == 90 else [])
    for dtype, layout in variants:
        tiles = heuristic(divmod(architecture, 10), dtype)
        name = f"{{}}_{TYPES[dtype]}{layout}"
        strides = LAYOUTS[layout]
        encode, probe, rank = tiles
        constants = {**product(encode, dtype), **strides, "BLOCK_N": encode.latents, "GROUP": 32}
        yield Case(name.format("encode_topk.encode"), encode_kernel, dtype, constants, encode.warps, encode.stages)
        constants = {**product(probe, dtype), **strides, "BLOCK_S": probe.latents, "HAS_FACTORS": True, "HAS_OUT": True}
        yield Case(name.format("probe.probe"), probe_kernel, dtype, constants, probe.warps, probe.stages)
        if not layout:
            constants = {**product(rank, dtype), "BLOCK_N": rank.latents}
            yield Case(name.format("probe.rank"), rank_kernel, dtype, constants, rank.warps, rank.stages)
    contiguous, half = LAYOUTS[""], torch.float16
    blocks = {"GROUP": 32, "BLOCK_R": 1, "BLOCK_G": 1024, "BLOCK_K": 32}
    yield Case("encode_topk.select_fp16", select_kernel, half, blocks, 4)
    blocks = {"MODE": "released", "NORM_SCALED": False, "BLOCK_J": 8, "BLOCK_S": 32, "BLOCK_D": 256}
    yield Case("decode.decode_fp16", decode_kernel, half, {**contiguous, **blocks}, 4)
    yield Case("erase.erase_fp16", erase_kernel, half, {**contiguous, "BLOCK_S": 16, "BLOCK_D": 256}, 2)
    blocks = {"BLOCK_T": 128, "BLOCK_S": 32}
    yield Case("steering_lines.steering_lines", steering_lines_kernel, torch.float32, blocks, 1)
    if architecture == 90:
        blocks = {"GROUP": 8, "BLOCK_R": 1, "BLOCK_G": 4096, "BLOCK_K": 256}
        yield Case("encode_topk.select_k256", select_kernel, half, blocks, 16)
        yield Case("encode_topk.maxima", maxima_kernel, half, {"GROUP": 32, "BLOCK_M": 16, "BLOCK_N": 256}, 4)


def signature(case: Case) -> dict[str, str]:
    """Types as the launcher would find them: pointers by name, all other numbers int32."""
    types = {}
    for parameter in case.kernel.params:
        name = parameter.name
        if name in case.constants:
            types[name] = "constexpr"
        else:
            types[name] = f"*{TYPES[case.dtype]}" if name in OF_THE_TOKENS else TYPE_OF.get(name, "i32")
    return types


def measure(case: Case, architecture: int) -> dict[str, Any]:
    """Compile and read registers, spilled bytes, shared memory and the matrix instruction."""
    types = signature(case)
    attributes = {
        (number,): [["tt.divisibility", 16]]
        for number, (name, kind) in enumerate(types.items())
        if kind != "constexpr" and name not in NOT_DIVISIBLE
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
