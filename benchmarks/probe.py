"""probe: the activations of the selected latents and whether they are steered (SPEC 3.1)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from activations import as_block, checked_rows, concept_lines, exact_pre_activations, tokens, weights
from harness import Case, Contest, Work
from providers import ours, torch_compiled, torch_eager
from saemnesia_fast import ops

BASELINE = "eager"
FLAGGED = (0, 64, 512)
DTYPES = {"cpu": ("float32",), "cuda": ("float16", "float32")}
LIMIT = {"float32": 1e-4, "float16": 1e-2}


def cases(device: str) -> list[Case]:
    return [Case("probe", M=512, dtype=dtype, flagged=n) for dtype in DTYPES[device] for n in FLAGGED]


def work(case: Case) -> Work:
    size, flagged = case.torch_dtype.itemsize, case.flagged or 0
    rows = case.N if flagged else 8
    return Work((case.M + rows) * case.d * size + 8 * case.M * (size + 1), 2 * flagged * case.N * case.d)


def contest(case: Case, device: str) -> Contest:
    own, x = weights(case.d, case.N, case.torch_dtype, device), tokens(case, device)
    W_enc, b_enc, b_dec, _ = own
    lines = concept_lines(x, own, case.flagged or 0)
    latents, thresholds = lines.latents, lines.thresholds
    block = as_block(x)

    def plain() -> tuple[Tensor, Tensor]:
        pre = torch.relu(F.linear(block - b_dec, W_enc, b_enc))
        kth = pre.topk(case.k).values[..., -1:]
        seen = pre[..., latents[0]]
        return seen, (seen >= kth) & (seen > thresholds[0])

    providers = [
        torch_eager(plain, case.torch_dtype),
        torch_compiled(plain, case.torch_dtype),
        *ours("probe", device, lambda: ops.probe(block, W_enc, b_enc, b_dec, case.k, latents, thresholds)),
    ]
    rows = checked_rows(case.M, device)
    pre = exact_pre_activations(x[rows], own)
    exact = pre[:, latents[0]]
    kth = pre.topk(case.k).values[:, -1:]
    threshold = thresholds[0].double()
    steered = (exact >= kth) & (exact > threshold)
    band = LIMIT[case.dtype]
    sure = ((exact - kth).abs() > band) & ((exact - threshold).abs() > band)

    def errors(answer: Any) -> Tensor:
        """The distance of the activations, relative to the token's largest; infinite where the choice is wrong."""
        seen, chosen = (part.flatten(0, 2)[rows] for part in answer)
        error = (seen.double() - exact).abs().amax(1) / pre.amax(1)
        return error.where(((chosen == steered) | ~sure).all(1), torch.inf)

    return Contest(case, work(case), providers, errors, LIMIT[case.dtype], BASELINE)
