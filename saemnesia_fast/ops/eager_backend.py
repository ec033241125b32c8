"""The `eager` backend: the reference, given tokens as they lie.

What fills a slot takes the op's arguments as they come, tokens [..., d] of any strides and lines [G, S], and returns
the op's own shapes; the reference takes tokens [M, d].
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backend, reference


def rows(x: Tensor) -> Tensor:
    """[M, d] of [..., d]."""
    return x.reshape(-1, x.shape[-1])


def encode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = reference.encode_topk(rows(x), W_enc, b_enc, b_dec, k)
    return values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)


def decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    x_hat = reference.decode(rows(values), rows(indices), W_dec, b_dec)
    return x_hat.view(*values.shape[:-1], W_dec.shape[1])


def erase(x: Tensor, *arguments: Any, definition: Callable[..., Tensor] = reference.erase) -> Tensor:
    """`definition`: the reference, or it with another `encode` and `decode`."""
    return torch.empty_like(x).copy_(definition(rows(x), *arguments).view(x.shape))


def probe(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    activations, steered = reference.probe(rows(x), *arguments)
    shape = (*x.shape[:-1], activations.shape[1])
    return activations.view(shape), steered.view(shape)


def latent_gradients(
    values: Tensor,
    indices: Tensor,
    grad_x_hat: Tensor,
    x: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    W_enc: Tensor | None,
    extra_d_value: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    extra = None if extra_d_value is None else rows(extra_d_value)
    return reference.latent_gradients(
        rows(values), rows(indices), rows(grad_x_hat), rows(x), W_dec, b_dec, W_enc, extra
    )


def register() -> None:
    """Fill the slots of all ops."""
    for op in (encode_topk, decode, erase, probe, latent_gradients):
        backend.register(op.__name__, "eager", op)
    backend.register("steering_lines", "eager", reference.steering_lines)
