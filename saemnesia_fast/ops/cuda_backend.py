"""The `cuda` backend: the gradients in CUDA (csrc/cuda), loaded at the first question for it.

No call waits for the device or looks at data: all of it can be captured in a CUDA graph. Its sums have the order of the
`cpu` backend's, as both compile the same loops.
"""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from . import backend
from .gradients import GradientSlots


@cache
def extension() -> ModuleType | backend.Refusal:
    """`saemnesia_fast._C_cuda`, whose import registers the CUDA ops, or why there is none."""
    try:
        return import_module("saemnesia_fast._C_cuda")
    except ModuleNotFoundError:
        reason = "the CUDA extension is not built: install from source with CUDA_HOME set to a CUDA toolkit"
    except ImportError as error:
        reason = f"the CUDA extension does not load: {error}"
    return backend.Refusal(reason, missed=True)


def _refuse(device: torch.device) -> backend.Refusal | None:
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return backend.Refusal("needs an NVIDIA GPU", missed=False)
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return backend.Refusal(f"needs compute capability 8.0, not {major}.{minor}", missed=False)
    found = extension()
    return found if isinstance(found, backend.Refusal) else None


def register() -> None:
    """Fill the slots; nothing is loaded yet."""
    GradientSlots(torch.ops.saemnesia_fast_cuda, widens=False).register("cuda", _refuse)
