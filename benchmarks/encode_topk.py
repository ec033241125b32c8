"""encode_topk: `TopK(relu((x - b_dec) @ W_enc.T + b_enc), k)`, and the selection alone on ready pre-activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from activations import checked_rows, exact_pre_activations, tokens, weights
from harness import Absent, Case, Contest, Provider, Work
from providers import ours, peer, torch_compiled, torch_eager
from saemnesia_fast import ops

BASELINE = "eager"
SIZES = {
    "cpu": {"float32": (512, 2048)},
    "cuda": {"float16": (512, 2048, 4096, 16384), "bfloat16": (512, 4096), "float32": (512, 4096)},
}
MIXED_SIZES = {"cpu": (), "cuda": (512, 4096)}
"""float16 tokens, float32 weights."""
SELECT_SIZES = {"cpu": (512, 2048), "cuda": (512, 4096)}
LIMIT = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}


def cases(device: str) -> list[Case]:
    sizes = SIZES[device]
    whole = [Case("encode_topk", M=M, dtype=dtype) for dtype in sizes for M in sizes[dtype]]
    whole += [Case("encode_topk", M=M, dtype="float16", weights="float32") for M in MIXED_SIZES[device]]
    selects = [
        Case("encode_topk", M=M, dtype=dtype, variant=f"select alone, {data}")
        for dtype in sizes
        if dtype != "bfloat16"
        for M in SELECT_SIZES[device]
        for data in ("random", "relu")
    ]
    return whole + selects


def work(case: Case) -> Work:
    size = case.torch_dtype.itemsize
    out = case.M * case.k * (size + 4)
    if case.variant:
        return Work(case.M * case.N * size + out, 0)
    read = case.M * case.d * size + case.N * case.d * case.weights_dtype.itemsize
    return Work(read + out, 2 * case.M * case.N * case.d)


def contest(case: Case, device: str) -> Contest:
    return _select(case, device) if case.variant else _encode(case, device)


def _encode(case: Case, device: str) -> Contest:
    dtype, k = case.weights_dtype, case.k
    own, x = weights(case.d, case.N, dtype, device), tokens(case, device)
    W_enc, b_enc, b_dec, _ = own
    folded = (b_enc.double() - W_enc.double() @ b_dec.double()).to(dtype)
    rows = checked_rows(case.M, device)

    def activations() -> Tensor:
        return torch.relu(F.linear(x.to(dtype), W_enc, folded))

    def plain() -> tuple[Tensor, Tensor]:
        return activations().topk(k)

    def encode(precision: str) -> Any:
        return ops.encode_topk(x, W_enc, b_enc, b_dec, k, precision)

    providers = [
        torch_eager(plain, dtype),
        torch_compiled(plain, dtype),
        peer(
            "eai-sparsify",
            "sparsify.fused_encoder",
            dtype,
            lambda m: lambda: m.fused_encoder(x.to(dtype), W_enc, folded, k, "topk"),
        ),
        peer("flashinfer select", "flashinfer", dtype, lambda m: lambda: _flashinfer(m, activations(), k)),
        *([Provider("ours v0", partial(_triton_on_cublas, x, W_enc, folded, k))] if device == "cuda" else []),
        *ours(
            "encode_topk",
            device,
            partial(encode, "default"),
            partial(encode, "exact") if dtype == torch.float32 else None,
        ),
    ]
    errors = topk_errors(exact_pre_activations(x[rows], own), rows, k)
    return Contest(case, work(case), providers, errors, LIMIT[case.dtype], BASELINE)


def _select(case: Case, device: str) -> Contest:
    generator = torch.Generator(device).manual_seed(2)
    pre = torch.randn(case.M, case.N, generator=generator, device=device).to(case.torch_dtype)
    if case.variant.endswith("relu"):
        pre.relu_()
    providers = [
        torch_eager(lambda: pre.topk(case.k), case.torch_dtype),
        torch_compiled(lambda: pre.topk(case.k), case.torch_dtype),
        peer("flashinfer", "flashinfer", case.torch_dtype, lambda m: lambda: _flashinfer(m, pre, case.k)),
        Provider("ours triton", partial(_triton_select, pre, case.k))
        if device == "cuda"
        else Provider("ours cpu", partial(_cpu_select, pre, case.k)),
    ]
    rows = checked_rows(case.M, device)
    errors = topk_errors(pre[rows].double(), rows, case.k)
    return Contest(case, work(case), providers, errors, LIMIT[case.dtype], BASELINE)


def _cpu_select(pre: Tensor, k: int) -> Callable[[], Any]:
    from saemnesia_fast.ops import cpu_backend
    from saemnesia_fast.ops.backend import Refusal

    extension = cpu_backend.extension()
    if isinstance(extension, Refusal):
        raise Absent(extension.reason)
    return lambda: torch.ops.saemnesia_fast_cpu.select_topk(pre, k)


def _triton_select(pre: Tensor, k: int) -> Callable[[], Any]:
    """On a copy, as it works in place; it selects from float32 accumulators only."""
    from saemnesia_fast.ops.triton_backend import select_topk

    if pre.dtype != torch.float32:
        raise Absent("selects from float32")
    own, bias = pre.clone(), pre.new_zeros(pre.shape[1])
    return lambda: select_topk(own, bias, k, torch.float32)


def _triton_on_cublas(x: Tensor, W_enc: Tensor, bias: Tensor, k: int) -> Callable[[], Any]:
    """The bar for the fused product: cuBLAS with float32 output, then our select."""
    from saemnesia_fast.ops.triton_backend import select_topk

    bias = bias.float()
    if W_enc.dtype == torch.float32:
        return lambda: select_topk(x.to(W_enc.dtype) @ W_enc.T, bias, k, x.dtype)
    return lambda: select_topk(torch.mm(x, W_enc.T, out_dtype=torch.float32), bias, k, x.dtype)


def topk_errors(pre: Tensor, rows: Tensor, k: int) -> Callable[[Any], Tensor]:
    """Checks (values, indices, ...) [M, k] against float64 pre-activations of the tokens `rows`.

    A token's error is the largest distance of its sorted values, and of what its indices point at, from the k largest,
    relative to the largest: which of two near-equal latents is kept does not matter. Infinite where an index is out of
    range or occurs twice.
    """
    best = pre.topk(k).values
    scale = best[:, :1].clamp(min=1e-9)

    def errors(answer: Any) -> Tensor:
        values, indices = answer[0][rows].double(), answer[1][rows].long()
        ordered = indices.sort(dim=1).values
        sound = (ordered[:, 0] >= 0) & (ordered[:, -1] < pre.shape[1]) & (ordered.diff(dim=1) > 0).all(1)
        found = pre.gather(1, indices.clamp(0, pre.shape[1] - 1)).sort(dim=1, descending=True).values
        values = values.sort(dim=1, descending=True).values
        error = torch.maximum((values - best).abs(), (found - best).abs()) / scale
        return error.amax(1).where(sound, torch.inf)

    return errors


def _flashinfer(module: Any, pre: Tensor, k: int) -> Any:
    return module.top_k(pre, k, deterministic=True, tie_break=1)
