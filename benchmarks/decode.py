"""decode: `x_hat = sum_j values_j * W_dec[indices_j] + b_dec`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from activations import Weights, checked_rows, relative_error, tokens, weights
from harness import Case, Contest, Work
from providers import ours, peer, torch_compiled, torch_eager
from saemnesia_fast import ops

BASELINE = "eager"
SIZES = {"cpu": (512, 2048), "cuda": (512, 2048, 4096, 16384)}
DTYPES = {"cpu": ("float32",), "cuda": ("float16", "float32")}
LIMIT = {"float32": 2e-6, "float16": 2e-3}


def cases(device: str) -> list[Case]:
    return [Case("decode", M=M, dtype=dtype) for dtype in DTYPES[device] for M in SIZES[device]]


def work(case: Case) -> Work:
    """Of W_dec at least the rows that are used: with many tokens all of them, once."""
    size = case.torch_dtype.itemsize
    used = min(case.N, case.M * case.k)
    traffic = case.M * case.k * (size + 4) + (used + case.M) * case.d * size
    return Work(traffic, 2 * case.M * case.k * case.d)


def contest(case: Case, device: str) -> Contest:
    dtype = case.torch_dtype
    own, x = weights(case.d, case.N, dtype, device), tokens(case, device)
    b_dec, W_dec = own.b_dec, own.W_dec
    values, where = _kept(x, own, case.k)
    indices = where.int()

    def bag() -> Tensor:
        return F.embedding_bag(indices, W_dec, mode="sum", per_sample_weights=values) + b_dec

    def dense() -> Tensor:
        z = torch.zeros(case.M, case.N, dtype=dtype, device=device).scatter_(1, where, values)
        return z @ W_dec + b_dec

    def sparsify(module: Any) -> Callable[[], Tensor]:
        decoder = module.decoder_impl if device == "cuda" else module.eager_decode
        return lambda: decoder(indices, values, W_dec.mT) + b_dec

    providers = [
        torch_eager(bag, dtype),
        torch_eager(dense, dtype, "dense"),
        torch_compiled(bag, dtype),
        peer("eai-sparsify", "sparsify.utils", dtype, sparsify),
        *ours("decode", device, lambda: ops.decode(values, indices, W_dec, b_dec)),
    ]
    rows = checked_rows(case.M, device)
    exact = torch.einsum("mk,mkd->md", values[rows].double(), W_dec.double()[where[rows]]) + b_dec.double()
    return Contest(
        case, work(case), providers, lambda x_hat: relative_error(x_hat[rows], exact), LIMIT[case.dtype], BASELINE
    )


def _kept(x: Tensor, own: Weights, k: int) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations [M, k] of the tokens, some at a time."""
    bias = own.b_enc - own.W_enc @ own.b_dec
    parts = [torch.relu(F.linear(part, own.W_enc, bias)).topk(k) for part in x.split(1024)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])
