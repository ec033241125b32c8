"""erase: x' of SPEC 3.2 for tokens laid out as a UNet's block leaves them, against the released hook."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from activations import (
    Lines,
    Weights,
    as_block,
    checked_rows,
    concept_lines,
    exact_pre_activations,
    relative_error,
    tokens,
    weights,
)
from harness import Case, Contest, Provider, Work
from oracles import released_hook
from providers import HALF_TOLERANCE, ours, torch_compiled
from saemnesia_fast import ops

BASELINE = "released hook"
FLAGGED = (0, 16, 64, 256, 384, 512)
DTYPES = {"cpu": ("float32",), "cuda": ("float16", "float32")}
MIXED_FLAGGED = {"cpu": (), "cuda": (0, 64, 512)}
"""float16 tokens, float32 weights."""
LIMIT = {"float32": 1e-5, "float16": 2e-3}
BAND = {"float32": 1e-4, "float16": 1e-2}
"""A token whose answer hangs on a pre-activation this close to a boundary is not checked: rounding decides it."""


def cases(device: str) -> list[Case]:
    exact = [Case("erase", M=512, dtype=dtype, variant="exact", flagged=n) for dtype in DTYPES[device] for n in FLAGGED]
    exact += [
        Case("erase", M=512, dtype="float16", weights="float32", variant="exact", flagged=n)
        for n in MIXED_FLAGGED[device]
    ]
    return exact + [Case("erase", M=512, dtype=dtype, variant="released", flagged=512) for dtype in DTYPES[device]]


def work(case: Case) -> Work:
    """Reading and writing x; in "exact" of W_enc the selected rows, and all of it once a token is flagged."""
    size, flagged = case.weights_dtype.itemsize, case.flagged or 0
    through = 2 * case.M * case.d * case.torch_dtype.itemsize
    if case.variant == "exact":
        rows = case.N if flagged else 8
        return Work(through + rows * case.d * size, 2 * flagged * case.N * case.d)
    decoded = min(case.N, case.M * case.k)
    return Work(through + (case.N + decoded) * case.d * size, 2 * case.M * (case.N + case.k) * case.d)


def contest(case: Case, device: str) -> Contest:
    dtype = case.weights_dtype
    own, x = weights(case.d, case.N, dtype, device), tokens(case, device)
    lines = concept_lines(x, own, case.flagged or 0)
    block = as_block(x)
    nchw = block.permute(0, 3, 1, 2)
    mode = case.variant
    line = [entry[0] for entry in lines]

    def dense() -> Tensor:
        return _dense(nchw, own, lines, case.k, mode)

    def erase(precision: str) -> Tensor:
        return ops.erase(block, *own, case.k, *lines, mode=mode, precision=precision).permute(0, 3, 1, 2)

    rows = checked_rows(case.M, device)

    def against(mode: str) -> Callable[[Tensor], Tensor]:
        exact, sure = reference(x[rows], own, lines, case.k, mode, BAND[case.dtype])
        return lambda erased: relative_error(erased.permute(0, 2, 3, 1).flatten(0, 2)[rows][sure], exact[sure])

    providers = [
        Provider(
            BASELINE,
            lambda: lambda: released_hook(nchw, *own, case.k, *line),
            tolerance=HALF_TOLERANCE if dtype.itemsize == 2 else None,
            errors=against("released"),
            capturable=False,
        ),
        torch_compiled(dense, dtype),
        *ours("erase", device, partial(erase, "default"), partial(erase, "exact") if dtype == torch.float32 else None),
    ]
    return Contest(case, work(case), providers, against(mode), LIMIT[case.dtype], BASELINE)


def _dense(block: Tensor, own: Weights, lines: Lines, k: int, mode: str) -> Tensor:
    """The formula in plain dense PyTorch without a loop or a look at the data, as a compiler likes it."""
    W_enc, b_enc, b_dec, W_dec = own
    x = block.permute(0, 2, 3, 1).flatten(0, 2)
    values, indices = torch.relu(F.linear(x - b_dec, W_enc, b_enc)).topk(k)
    threshold, factor = values.new_full((len(W_enc),), torch.inf), values.new_ones(len(W_enc))
    threshold = threshold.scatter(0, lines.latents[0], lines.thresholds[0].to(values.dtype))
    factor = factor.scatter(0, lines.latents[0], lines.factors[0].to(values.dtype))
    change = torch.where(values > threshold[indices], (factor[indices] - 1) * values, 0)
    delta = F.embedding_bag(indices, W_dec, mode="sum", per_sample_weights=change)
    if mode == "exact":
        out = x + delta
    else:
        out = 2 * (F.embedding_bag(indices, W_dec, mode="sum", per_sample_weights=values) + b_dec) - x + delta
    return out.to(block.dtype).view(block.shape[0], *block.shape[2:], -1).permute(0, 3, 1, 2).contiguous()


def reference(x: Tensor, own: Weights, lines: Lines, k: int, mode: str, band: float) -> tuple[Tensor, Tensor]:
    """x' [M, d] in float64, and the tokens [M] that no rounding within `band` can change the choice of."""
    pre = exact_pre_activations(x, own)
    top, where = pre.topk(k + 1)
    boundary = top[:, k - 1 : k + 1].mean(1, keepdim=True)
    z = torch.zeros_like(pre).scatter(1, where[:, :k], top[:, :k])
    selected, threshold, factor = lines.latents[0], lines.thresholds[0].double(), lines.factors[0].double()
    steered = (z[:, selected] > threshold) & (z[:, selected] > 0)
    delta = torch.where(steered, (factor - 1) * z[:, selected], 0) @ own.W_dec.double()[selected]
    candidates = pre[:, selected]
    near = ((candidates - threshold).abs() < band) | (((candidates - boundary).abs() < band) & (candidates > threshold))
    sure = ~near.any(1)
    if mode == "exact":
        return x.double() + delta, sure
    x_hat = z @ own.W_dec.double() + own.b_dec.double()
    return 2 * x_hat - x.double() + delta, sure & (top[:, k - 1] - top[:, k] > band)
