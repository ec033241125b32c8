"""csrc/cuda compiled for the host, its kernels run thread by thread: what computes on a GPU, proven without one.

A launch becomes a call (`kernel<<<grid, threads, 0, stream>>>(x)` -> `launch(grid, threads, 0, stream, kernel)(x)`) and
the ops are registered for the CPU; all else is the source that nvcc compiles, with the headers of tests/cuda_on_host.
Triton's interpreter does the same for its kernels: what it cannot see are races between warps, and time.
"""

import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
TORCH = Path(torch.__file__).parent
LAUNCH = re.compile(r"(\w+(?:<[^;<]*>)?)<<<([^;]*?)>>>\(")
FLAGS = [
    "-std=c++17",
    "-O2",
    "-march=native",
    "-ffp-contract=fast",
    "--param=avoid-fma-max-bits=0",
    "-fPIC",
    "-shared",
    "-w",
    "-include",
    "cuda_runtime_api.h",
]
MACROS = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]


INSTEAD = {
    "saemnesia_fast_cuda, CUDA": "saemnesia_fast_cuda_on_host, CPU",
    "LIBRARY(saemnesia_fast_cuda,": "LIBRARY(saemnesia_fast_cuda_on_host,",
    "torch::stable::accelerator::DeviceGuard": "int",
    "defined(__CUDACC__)": "true",
}


def translated(source: str) -> str:
    """The source without what only nvcc understands."""
    text = LAUNCH.sub(r"emulated::launch(\2, [&](auto... arguments) { \1(arguments...); })(", source)
    for there, here in INSTEAD.items():
        text = text.replace(there, here)
    return text


def build(folder: Path) -> Path:
    """The library that registers `torch.ops.saemnesia_fast_cuda_on_host` for the CPU."""
    sources = [ROOT / "csrc" / "cuda" / name for name in ("ops.cpp", "latent_gradients.cu", "adam_rows.cu")]
    for source in [*sources, *(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.*h")]:
        target = folder / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(translated(source.read_text(encoding="utf-8")), encoding="utf-8")
    paths = [f"-I{path}" for path in (ROOT / "tests" / "cuda_on_host", TORCH / "include")]
    library = folder / "cuda_on_host.so"
    inputs = [str(folder / source.relative_to(ROOT)) for source in sources]
    command = ["g++", *FLAGS, *MACROS, *paths, "-x", "c++", *inputs, "-o", str(library)]
    command += [f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return library
