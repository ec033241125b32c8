"""The `cpu` backend: C++ in torch's threads (csrc/cpu), loaded at the first question for it.

Its results depend neither on the number of threads nor on how tokens are split into batches. It computes float64
tokens in float64 and all others in float32, summing in another order than the eager reference: `precision` changes
nothing.
"""

from collections.abc import Sequence
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import backend, eager_backend, reference
from .eight_bit import as_given
from .gradients import GradientSlots
from .reference import DenseRows, LatentMoments, PairTerms, SparseGradients

_ops = torch.ops.saemnesia_fast_cpu


@cache
def extension() -> ModuleType | backend.Refusal:
    """`saemnesia_fast._C`, whose import registers the C++ ops, or why there is none."""
    try:
        return import_module("saemnesia_fast._C")
    except ModuleNotFoundError:
        reason = "the C++ extension is not built: install from source with a C++17 compiler, torch and pybind11"
    except ImportError as error:
        reason = f"the C++ extension does not load: {error}"
    return backend.Refusal(reason, missed=True)


def build() -> str:
    """One line on the extension: its compiler and the instruction set in use, or why there is none."""
    found = extension()
    if isinstance(found, backend.Refusal):
        return found.reason
    config = found.build_config()
    return f"{config['compiler']}, {config['instruction_set']} of {', '.join(config['instruction_sets'])}"


def _refuse(device: torch.device) -> backend.Refusal | None:
    if device.type != "cpu":
        return backend.Refusal("computes on the CPU", missed=False)
    found = extension()
    return found if isinstance(found, backend.Refusal) else None


def _encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int, precision: str = "exact"
) -> tuple[Tensor, Tensor]:
    return _ops.encode_topk(x, W_enc, b_enc, b_dec, k)


def _decode(*arguments: Tensor) -> Any:
    """With x and scale: `decode_error`."""
    return _ops.decode(*arguments) if len(arguments) == 4 else _ops.decode_error(*arguments)


def _erase(x: Tensor, *arguments: Any, in_place: bool = False) -> Tensor:
    *tensors, mode, norm_scaled, _ = arguments
    if mode != "exact" or norm_scaled:
        definition = partial(reference.erase, encode=_encode_topk, decode=_decode)
        return eager_backend.erase(x, *arguments, in_place=in_place, definition=definition, tokens_at_once=None)
    out = x if in_place else x.clone()
    _ops.erase(x, *tensors, out)
    return out


def _probe(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int, latents: Tensor, thresholds: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    return _ops.probe(x, W_enc, b_enc, b_dec, k, latents, thresholds)


class _Slots(GradientSlots):
    """Here most rows that Adam takes are never in memory (csrc/cpu/adam_latents.cpp)."""

    def sparse_gradients(
        self, terms: Sequence[PairTerms], x: Tensor, W_dec: Tensor, b_dec: Tensor, dense: DenseRows | None
    ) -> SparseGradients:
        dtype = reference.compute_dtype(x)
        given = self.given(terms, x, W_dec, b_dec.clone())
        dense_rows = [] if dense is None else [dense.latents.long(), *(rows.to(dtype) for rows in dense[1:])]
        dense_rows = [rows.contiguous() for rows in dense_rows]
        squared_norm, db_enc, *kept = self.library.gradient_norms(*given, dense_rows)

        def adam(W_enc: Tensor, W_dec: Tensor, moments: LatentMoments, *arguments: Any) -> None:
            rows = (*kept, given.grads, given.x, given.b_dec, dense_rows)
            self.library.adam_latents(*rows, W_enc, W_dec, *as_given(moments), *arguments)

        return SparseGradients(squared_norm, db_enc, W_dec.shape, adam)


def register() -> None:
    """Fill the slots; nothing is loaded yet."""
    for op in (_encode_topk, _decode, _erase, _probe):
        backend.register(op.__name__.removeprefix("_"), "cpu", op, _refuse)
    backend.register("steering_lines", "cpu", reference.steering_lines, _refuse)
    _Slots(_ops, widens=True).register("cpu", _refuse)
