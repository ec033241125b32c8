"""The machine under test: what it is, and the ceilings that it sets, measured before anything else."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from harness import Work, clock_for, percentile
from results import Stamp

ROOT = Path(__file__).resolve().parents[1]
GEMM_SIZE = {"cpu": 1536, "cuda": 8192}
COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do at best."""

    bandwidth: float
    """Bytes per second, read and written."""
    flops: dict[str, float]
    """Per second, of a large matrix product, by dtype ("tfloat32" for TF32)."""

    def floor_us(self, work: Work) -> float:
        """Microseconds that `work` takes at the ceilings: the larger of traffic and arithmetic, in whatever dtype."""
        return 1e6 * max(work.bytes / self.bandwidth, work.flops / max(self.flops.values()))


H100 = Ceilings(bandwidth=3.0e12, flops={"float16": 580e12, "bfloat16": 580e12, "tfloat32": 300e12, "float32": 50e12})
"""As of KERNELS.md 1, float32 without tensor cores: an estimate to plan with, never to report."""


def describe(device: str) -> Stamp:
    return Stamp(
        commit=_commit(),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        machine=torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        triton=_triton(),
    )


def measure_ceilings(device: str, seconds: float = 1.0) -> Ceilings:
    """Copy of a large buffer, and product of two large square matrices per dtype, each at its fastest fifth."""
    dtypes = ("float32",) if device == "cpu" else ("float32", "tfloat32", "float16", "bfloat16")
    return Ceilings(_bandwidth(device, seconds), {name: _flops(name, device, seconds) for name in dtypes})


def _bandwidth(device: str, seconds: float) -> float:
    source = torch.rand(COPY_BYTES[device] // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * COPY_BYTES[device] / _fastest(lambda: target.copy_(source), device, seconds)


def _flops(name: str, device: str, seconds: float) -> float:
    n, dtype = GEMM_SIZE[device], torch.float32 if name == "tfloat32" else getattr(torch, name)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "tfloat32"
    try:
        return 2 * n**3 / _fastest(lambda: a @ b, device, seconds)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _fastest(call: Callable[[], object], device: str, seconds: float) -> float:
    clock = clock_for(device)
    clock.samples(call, 2)
    count = max(3, min(100, int(1e6 * seconds / clock.samples(call, 1)[0])))
    return percentile(clock.samples(call, count), 20) / 1e6


def _commit() -> str:
    """Short hash, with a plus where files differ from it; "unknown" outside a checkout."""
    try:
        answers = [
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short=10", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown")
    return answers[0] + ("+" if answers[1] else "")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "absent"
