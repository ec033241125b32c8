"""What this installation consists of and which backend computes each op: `python -m saemnesia_fast.env`."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from . import __version__
from .ops import backend_report, current_backend
from .ops.cpu_backend import build

PACKAGES = ("triton", "diffusers", "transformers", "safetensors", "huggingface_hub", "accelerate", "numpy")
SWITCHES = ("SAEMNESIA_FAST_BACKEND", "SAEMNESIA_FAST_STRICT")


def _package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def environment() -> dict[str, str]:
    """Versions of what results depend on, by name; Triton and the others are looked up, not imported."""
    lines = {
        "saemnesia-fast": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "CUDA": f"{torch.version.cuda or 'none'} in torch's build",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    lines |= {name: _package_version(name) for name in PACKAGES}
    lines["extension _C"] = build()
    lines["extension _C_cuda"] = "built" if find_spec("saemnesia_fast._C_cuda") else "not built"
    return lines | {name: os.environ.get(name, "not set") for name in SWITCHES}


def describe() -> str:
    """The environment and one line per op with its backend and why, as text."""
    lines = environment()
    width = max(map(len, lines)) + 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = [f"{name:{width}}{value}" for name, value in lines.items()]
    report += ["", f"backend {current_backend()!r} on {device}:"]
    report += [f"{choice.op:{width}}{choice.backend}: {choice.why}" for choice in backend_report(device)]
    return "\n".join(report)


if __name__ == "__main__":
    print(describe())
