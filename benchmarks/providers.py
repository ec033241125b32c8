"""Who competes: our backends, PyTorch, and other people's packages where they are installed."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from harness import Absent, Provider
from saemnesia_fast import ops

HALF_TOLERANCE = 2e-2
"""For those who compute in 16 bits throughout: of the median token."""

BACKENDS = {"cpu": ("eager", "cpu"), "cuda": ("eager", "triton", "cuda")}


def ours(op: str, device: str, call: Callable[[], Any], exact: Callable[[], Any] | None = None) -> list[Provider]:
    """`call`, which uses `saemnesia_fast.ops`, on each of our backends for the device; and `exact`, the same with
    precision="exact", where that computes otherwise."""

    def start(backend: str, call: Callable[[], Any]) -> Callable[[], Any]:
        with ops.use_backend(backend):
            choice = next(choice for choice in ops.backend_report(device) if choice.op == op)
        if choice.backend != backend:
            raise Absent(choice.why.partition(f"cannot run on {device}: ")[2] or choice.why)
        return call

    entered = [(backend, "", call) for backend in BACKENDS[device]]
    if exact is not None and device == "cuda":
        entered.append(("triton", ", exact", exact))
    return [
        Provider(f"ours {backend}{how}", partial(start, backend, what), context=partial(ops.use_backend, backend))
        for backend, how, what in entered
    ]


def torch_eager(call: Callable[[], Any], dtype: torch.dtype, name: str = "eager") -> Provider:
    return Provider(name, lambda: call, tolerance=_tolerance(dtype))


def torch_compiled(call: Callable[[], Any], dtype: torch.dtype) -> Provider:
    """Compiled once before time is taken; the inductor's own graphs are off, as the clock makes them."""

    def start() -> Callable[[], Any]:
        torch.compiler.reset()
        return torch.compile(call, dynamic=False)

    return Provider("torch.compile", start, tolerance=_tolerance(dtype))


def peer(name: str, module: str, dtype: torch.dtype, bind: Callable[[Any], Callable[[], Any]]) -> Provider:
    """Somebody else's package: `bind(module)` gives the call."""

    def start() -> Callable[[], Any]:
        try:
            return bind(load_peer(module))
        except ImportError as error:
            raise Absent(str(error)) from error

    return Provider(name, start, tolerance=_tolerance(dtype))


def load_peer(module: str) -> Any:
    """A module of somebody else's package; Absent where it is not installed."""
    if find_spec(module.split(".")[0]) is None:
        raise Absent("not installed")
    return _import_alone(module)


def _tolerance(dtype: torch.dtype) -> float | None:
    return HALF_TOLERANCE if dtype.itemsize == 2 else None


def _import_alone(module: str) -> Any:
    """The module without its package's `__init__`, which in training libraries wants data sets and trainers."""
    package, _, inner = module.partition(".")
    if inner and package not in sys.modules:
        spec = find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError(f"{package} is no package")
        bare = types.ModuleType(package)
        bare.__spec__ = spec
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules[package] = bare
    return importlib.import_module(module)
