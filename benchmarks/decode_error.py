"""decode_error: `scale * (x - x_hat)` and `|x - x_hat|^2` of each token, from the kept latents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from activations import checked_rows, relative_error, tokens, weights
from harness import Case, Contest, Work
from providers import ours, torch_compiled, torch_eager
from saemnesia_fast import ops

BASELINE = "eager"
SIZES = {"cpu": (1024, 4096), "cuda": (1024, 4096, 16384)}
LIMIT = 2e-6


def cases(device: str) -> list[Case]:
    return [Case("decode_error", M=M) for M in SIZES[device]]


def work(case: Case) -> Work:
    """Of W_dec at least the rows that are used; x read, the gradient written."""
    used = min(case.N, case.M * case.k)
    traffic = case.M * case.k * 8 + (used + 2 * case.M) * case.d * 4
    return Work(traffic, 2 * case.M * case.k * case.d)


def contest(case: Case, device: str) -> Contest:
    dtype = case.torch_dtype
    own, x = weights(case.d, case.N, dtype, device), tokens(case, device)
    b_dec, W_dec = own.b_dec, own.W_dec
    values, indices = ops.encode_topk(x, *own[:3], case.k)
    scale = -2 / (x - x.mean(0)).square().sum()

    def composed() -> tuple[Tensor, Tensor]:
        error = x - (F.embedding_bag(indices, W_dec, mode="sum", per_sample_weights=values) + b_dec)
        return error * scale, error.square().sum(1)

    providers = [
        torch_eager(composed, dtype),
        torch_compiled(composed, dtype),
        *ours("decode", device, lambda: ops.decode_error(values, indices, W_dec, b_dec, x, scale)),
    ]
    rows = checked_rows(case.M, device)
    sums = torch.einsum("mk,mkd->md", values[rows].double(), W_dec.double()[indices[rows].long()])
    exact = x[rows].double() - (sums + b_dec.double())

    def errors(answer: tuple[Tensor, Tensor]) -> Tensor:
        """Of the gradient and of the squares, the larger."""
        grad, squares = answer
        of_squares = relative_error(squares[rows, None], exact.square().sum(1, keepdim=True))
        return torch.maximum(relative_error(grad[rows], exact * scale.double()), of_squares)

    return Contest(case, work(case), providers, errors, LIMIT, BASELINE)
