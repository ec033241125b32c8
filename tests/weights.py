"""Random SAE weights and tokens for the tests of the ops."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """In the order in which the ops take them."""

    W_enc: Tensor
    b_enc: Tensor
    b_dec: Tensor


def random_weights(
    d: int, num_latents: int, dtype: torch.dtype = torch.float64, integer: bool = False, seed: int = 0
) -> tuple[Weights, Tensor]:
    """(W_enc [N, d], b_enc [N], b_dec [d]) and W_dec [N, d]; small whole numbers if `integer`, so that ties abound."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        if integer:
            return torch.randint(-2, 3, shape, generator=generator).to(dtype)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return Weights(draw(num_latents, d), draw(num_latents), draw(d)), draw(num_latents, d)


def random_tokens(*shape: int, dtype: torch.dtype = torch.float64, integer: bool = False, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if integer:
        return torch.randint(-2, 3, shape, generator=generator).to(dtype)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits: -0.0 is not 0.0, and a NaN equals itself."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


SPLIT_CASES = [
    (7, 13, torch.float32),
    (16, 64, torch.float64),
    (96, 1536, torch.float32),
    (320, 500, torch.float32),
    (320, 500, torch.float64),
    (1280, 2048, torch.float32),
]
"""(d, N, dtype) at which a BLAS was seen to change its order of summation with the number of rows."""
