"""The `eager` backend: the reference, given tokens as they lie.

What fills a slot takes the op's arguments as they come, tokens [..., d] of any strides and lines [G, S], and returns
the op's own shapes; the reference takes tokens [M, d].
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from . import backend, reference
from .reference import DenseRows, LatentGradients, PairTerms, SparseGradients


def rows(x: Tensor) -> Tensor:
    """[M, d] of [..., d]."""
    return x.reshape(-1, x.shape[-1])


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Where precision is "exact", float32 products are not rounded to TF32 or bfloat16, whatever torch is set to."""
    setting = torch.get_float32_matmul_precision()
    if precision != "exact" or setting == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(setting)


def parts(x: Tensor, most: int | None, *lines: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tokens of x [m, d], `most` or all at a time, and their share of each [G, S] of `lines`; at least one part."""
    tokens = rows(x)
    most = most or max(1, len(tokens))
    per_line = len(tokens) // len(lines[0])
    if per_line > most:
        for line, of_line in enumerate(tokens.split(per_line)):
            for part in of_line.split(most):
                yield part, *(entries[line : line + 1] for entries in lines)
        return
    some = most // max(1, per_line)
    for first in range(0, len(lines[0]), some):
        share = slice(first * per_line, (first + some) * per_line)
        yield tokens[share], *(entries[first : first + some] for entries in lines)


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int, precision: str
) -> tuple[Tensor, Tensor]:
    with float32_products(precision):
        values, indices = reference.encode_topk(rows(x), W_enc, b_enc, b_dec, k)
    return values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)


def decode(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    x: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """With x and scale: `reference.decode_error`."""
    arguments = (rows(values), rows(indices), W_dec, b_dec)
    shape = (*values.shape[:-1], W_dec.shape[1])
    if x is None or scale is None:
        return reference.decode(*arguments).view(shape)
    grad, squares = reference.decode_error(*arguments, rows(x), scale)
    return grad.view(shape), squares.view(shape[:-1])


def erase(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    W_dec: Tensor,
    k: int,
    latents: Tensor,
    thresholds: Tensor,
    factors: Tensor,
    mode: str,
    norm_scaled: bool,
    precision: str,
    *,
    in_place: bool = False,
    definition: Callable[..., Tensor] = reference.erase,
    tokens_at_once: int | None = reference.ROWS_PER_GEMM,
) -> Tensor:
    """`definition`: the reference, or it with another `encode` and `decode`, of which no pre-activations are [M, N]."""
    weights = (W_enc, b_enc, b_dec, W_dec, k)
    with float32_products(precision):
        erased = [
            definition(tokens, *weights, *lines, mode, norm_scaled)
            for tokens, *lines in parts(x, tokens_at_once, latents, thresholds, factors)
        ]
    out = x if in_place else torch.empty_like(x)
    return out.copy_(torch.cat(erased).view(x.shape))


def probe(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    k: int,
    latents: Tensor,
    thresholds: Tensor,
    precision: str,
) -> tuple[Tensor, Tensor]:
    with float32_products(precision):
        seen = [
            reference.probe(tokens, W_enc, b_enc, b_dec, k, *lines)
            for tokens, *lines in parts(x, reference.ROWS_PER_GEMM, latents, thresholds)
        ]
    shape = (*x.shape[:-1], latents.shape[1])
    activations, steered = (torch.cat(one).view(shape) for one in zip(*seen, strict=True))
    return activations, steered


def latent_gradients(
    terms: Sequence[PairTerms],
    x: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    W_enc: Tensor | None,
    out: LatentGradients | None = None,
) -> LatentGradients:
    flat = [
        PairTerms(rows(values), rows(indices), rows(grad), None if extra is None else rows(extra), adds_b_dec)
        for values, indices, grad, extra, adds_b_dec in terms
    ]
    gradients = reference.latent_gradients(flat, rows(x), W_dec, b_dec, W_enc)
    if out is None:
        return gradients
    for total, gradient in zip(out, gradients, strict=True):
        total.add_(gradient)
    return out


def encoder_gradients(
    d_value: Tensor, indices: Tensor, x: Tensor, b_dec: Tensor, num_latents: int
) -> tuple[Tensor, Tensor]:
    return reference.encoder_gradients(rows(d_value), rows(indices), rows(x), b_dec, num_latents)


def decoder_gradient(values: Tensor, indices: Tensor, grad_x_hat: Tensor, num_latents: int) -> Tensor:
    dtype = reference.compute_dtype(values)
    return reference.sum_by_latent(rows(values).to(dtype), rows(indices), rows(grad_x_hat).to(dtype), num_latents)


def gather_dot(indices: Tensor, W: Tensor, grad: Tensor) -> Tensor:
    dtype = reference.compute_dtype(grad)
    return reference.gather_dot(rows(indices), W.to(dtype), rows(grad).to(dtype)).view(indices.shape)


def sparse_gradients(
    terms: Sequence[PairTerms], x: Tensor, W_dec: Tensor, b_dec: Tensor, dense: DenseRows | None
) -> SparseGradients:
    return reference.sparse_gradients(terms, x, W_dec, b_dec, dense, gradients=latent_gradients)


def register() -> None:
    """Fill the slots of all ops."""
    gradients = (latent_gradients, encoder_gradients, decoder_gradient, gather_dot, sparse_gradients)
    for op in (encode_topk, decode, erase, probe, *gradients):
        backend.register(op.__name__, "eager", op)
    for definition in (reference.steering_lines, reference.adam_rows):
        backend.register(definition.__name__, "eager", definition)
