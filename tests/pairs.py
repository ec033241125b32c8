"""Random pairs for the tests of the gradients."""

import torch
from torch import Tensor

from saemnesia_fast import ops
from saemnesia_fast.ops import LatentGradients, PairTerms
from weights import random_tokens


def random_terms(x: Tensor, n: int, widths: tuple[int, ...], integer: bool = False) -> list[PairTerms]:
    """Terms of random pairs of the tokens x [..., d], some with a value of 0, every other with extra terms."""
    terms = []
    for i, k in enumerate(widths):
        generator = torch.Generator().manual_seed(10 + i)
        indices = torch.randint(n, (*x.shape[:-1], k), generator=generator, dtype=torch.int32)
        values = random_tokens(*indices.shape, dtype=x.dtype, integer=integer, seed=20 + i).abs()
        values[torch.rand(values.shape, generator=generator) < 0.3] = 0
        extra = random_tokens(*indices.shape, dtype=x.dtype, integer=integer, seed=30 + i) if i % 2 else None
        grad = random_tokens(*x.shape, dtype=x.dtype, integer=integer, seed=40 + i)
        terms.append(PairTerms(values, indices, grad, extra, adds_b_dec=i % 3 != 1))
    return terms


def call(terms: list[PairTerms], *arguments: Tensor, out: LatentGradients | None = None) -> LatentGradients:
    """`latent_gradients` of the terms; arguments: x, W_dec, b_dec, W_enc."""
    first = terms[0]
    return ops.latent_gradients(*first[:3], *arguments, first.extra_d_value, terms[1:], out)
