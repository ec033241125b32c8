"""The sparse-autoencoder ops on tokens (SPEC 1, 3, 4.3, 8).

Symbols: x [..., d] tokens, M of them in all; W_enc, W_dec [N, d]; b_enc [N]; b_dec [d]; k latents kept per token.
Every op computes in float64 for float64 tokens and in float32 for all others, and returns the dtype of its tokens.
Wrong shapes are a ValueError, wrong types a TypeError, naming the argument (SPEC 7.1). NaN or infinity in a token makes
that token NaN and touches no other. On the CPU the eager results do not depend on how tokens are split into batches.

`precision` (SPEC 1.6): "exact" gives the float32 answer, up to float32's order of summation; "default" too, unless
torch is set to round float32 products (`torch.set_float32_matmul_precision`). Which is faster depends on the backend.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import eight_bit as _eight_bit
from . import registration as _registration
from . import validation as _check
from .backend import backend_report, current_backend, use_backend
from .eight_bit import EightBit
from .reference import DenseRows, LatentGradients, LatentMoments, PairTerms, SparseGradients

__all__ = [
    "DenseRows",
    "EightBit",
    "LatentGradients",
    "LatentMoments",
    "PairTerms",
    "SparseGradients",
    "SparseLatents",
    "SteeringLines",
    "adam_latents",
    "adam_rows",
    "backend_report",
    "current_backend",
    "decode",
    "decode_error",
    "encode_topk",
    "erase",
    "latent_gradients",
    "probe",
    "sparse_gradients",
    "steering_lines",
    "use_backend",
]


class SteeringLines(NamedTuple):
    """L lines as `erase` takes them, each for an equal share of consecutive tokens."""

    latents: Tensor
    """[L, S] int64."""
    thresholds: Tensor
    """[L, S] float32, +inf where nothing is to be steered."""
    factors: Tensor
    """[L, S] float32."""
    owners: Tensor
    """[L, S] int64, index into the erased concepts, -1 for none."""
    active: Tensor
    """[L] bool: False where the tokens are to stay as they are, whatever the mode."""


class SparseLatents(NamedTuple):
    """The k kept latents of each token (SPEC 1.2)."""

    values: Tensor
    """[..., k], >= 0, descending; a value of 0 is an inactive latent."""
    indices: Tensor
    """[..., k] int32, ascending where values are equal."""


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int, precision: str = "default"
) -> SparseLatents:
    """`z = TopK(relu((x - b_dec) @ W_enc.T + b_enc), k)` per token (SPEC 1.1, 1.2).

    The k largest values, equal ones going to the lowest index, selected in the compute dtype before any rounding.
    Differentiable in x and the weights through the kept values above 0. A token with NaN or infinity has values NaN and
    indices in range.
    """
    _check.check_encoder(x, W_enc, b_enc, b_dec, k)
    _check.check_precision(precision)
    return SparseLatents(*torch.ops.saemnesia_fast.encode_topk(x, W_enc, b_enc, b_dec, k, precision))


def decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """`x_hat = sum_j values_j * W_dec[indices_j] + b_dec` (SPEC 1.3): [..., d] in values' dtype.

    values, indices: [..., k]; an index that occurs twice counts twice. Differentiable in values, W_dec and b_dec.
    An index outside [0, N) is a ValueError on the CPU; elsewhere it is not looked for, as that would stop the host.
    """
    _check.check_latents(values, indices)
    for name, tensor in (("W_dec", W_dec), ("b_dec", b_dec)):
        _check.check_tensor(name, tensor, like=values)
    _check.check_shape("W_dec", W_dec, "N, d", (None, None), "b_dec [d]")
    _check.check_shape("b_dec", b_dec, "d", (W_dec.shape[1],), f"W_dec [N, d={W_dec.shape[1]}]")
    return torch.ops.saemnesia_fast.decode(values, indices, W_dec, b_dec)


@torch.no_grad()
def decode_error(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor, x: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`grad = scale * (x - x_hat)` [..., d] and `|x - x_hat|^2` [...] of tokens x [..., d] (SPEC 1.3, 4.1).

    With x_hat of `decode`, which is not written down, and scale 0-d, -2 / variance: the FVU's gradient with respect to
    x_hat, and the parts of its numerator. Both in the compute dtype of the values. Not differentiable.
    """
    _check.check_tokens("x", x)
    _check.check_latents(values, indices, x)
    _check.check_decoder(W_dec, b_dec, x)
    _check.check_scale(scale, x)
    return _registration.decode_error(values, indices, W_dec, b_dec, x, scale)


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
    mode: str = "exact",
    norm_scaled: bool = False,
    precision: str = "default",
    in_place: bool = False,
) -> Tensor:
    """Steer selected latents of each token, z_i <- factor_i * z_i, and return x' with x's shape, dtype and strides.

    A selected latent is steered where it is among the token's k largest and z_i > max(threshold_i, 0) (SPEC 3.1). With
    `Delta = sum (factor_i - 1) z_i W_dec[i]`, mode "exact" gives x + Delta and leaves other tokens bit-identical,
    "released" 2 x_hat - x + Delta, "reconstruct" x_hat + Delta (SPEC 3.2). `norm_scaled` multiplies each factor by the
    token's ||z||_2 (`scale="norm"`).

    latents (integer), thresholds, factors (floating): [S] for all tokens, or [G, S] for G equal consecutive groups of
    the tokens in row-major order. A line names a latent once; an entry with threshold +inf is padding. The order of
    entries does not matter. Differentiable in x, weights and factors; which latents are steered is a constant.

    `in_place` writes x' over x and returns it: with mode "exact" most tokens are then not even copied. ValueError if a
    gradient is wanted of x, or if elements of x share memory.
    """
    d, num_latents = _check.check_encoder(x, W_enc, b_enc, b_dec, k)
    _check.check_tensor("W_dec", W_dec, like=x)
    _check.check_shape("W_dec", W_dec, "N, d", (num_latents, d), f"W_enc [N={num_latents}, d] and x [*, d={d}]")
    _check.check_lines(x, latents, thresholds=thresholds, factors=factors)
    _check.check_mode(mode)
    _check.check_precision(precision)
    if latents.dim() == 1:
        latents, thresholds, factors = latents[None], thresholds[None], factors[None]
    arguments = (W_enc, b_enc, b_dec, W_dec, k, latents, thresholds, factors, mode, norm_scaled, precision)
    if not in_place:
        return torch.ops.saemnesia_fast.erase(x, *arguments)
    _check.check_in_place(x)
    if not torch.compiler.is_compiling():
        _check.check_range("latents", latents, num_latents)
    return _registration.erase_in_place(x, *arguments)


def probe(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    k: int,
    latents: Tensor,
    thresholds: Tensor,
    precision: str = "default",
) -> tuple[Tensor, Tensor]:
    """What `erase` sees of the selected latents, entry by entry (SPEC 3.1).

    Returns activations [..., S], `relu((x - b_dec) @ W_enc[latents].T + b_enc[latents])` in x's dtype, and steered
    [..., S] bool, true where the latent is among the token's k largest and above max(threshold, 0). latents and
    thresholds: [S] or [G, S] as in `erase`. Not differentiable.
    """
    _check.check_encoder(x, W_enc, b_enc, b_dec, k)
    _check.check_lines(x, latents, thresholds=thresholds)
    _check.check_precision(precision)
    if latents.dim() == 1:
        latents, thresholds = latents[None], thresholds[None]
    return torch.ops.saemnesia_fast.probe(x, W_enc, b_enc, b_dec, k, latents, thresholds, precision)


def steering_lines(
    timesteps: Tensor,
    stored: Tensor,
    latents: Tensor,
    thresholds: Tensor,
    factors: Tensor,
    owners: Tensor,
    switches: Tensor,
    num_lines: int,
    num_blocks: int = 1,
    first_block: int = 0,
    earliest: float = math.inf,
    latest: float = -math.inf,
) -> SteeringLines:
    """The lines of one UNet call, found on the device in tables of T stored timesteps and G prompts (SPEC 2.4, 3.4).

    Line l of L belongs to block `l * num_blocks // L` of the batch and to prompt `block % G`; it is that prompt's entry
    at the stored timestep nearest to its own, the first of equally near ones. It is active, and steers, where its
    prompt's switch is on, its block is not below `first_block`, and `earliest >= timestep >= latest` (noise falls).

    timesteps: [1] for all lines or [L]; stored [T] float32; latents, owners int64 and thresholds, factors float32
    [T, G, S]; switches [G] bool. The caller answers for the shapes: this runs in every UNet call.
    """
    return SteeringLines(
        *_registration.call(
            "steering_lines",
            timesteps,
            stored,
            latents,
            thresholds,
            factors,
            owners,
            switches,
            num_lines,
            num_blocks,
            first_block,
            earliest,
            latest,
        )
    )


def latent_gradients(
    values: Tensor,
    indices: Tensor,
    grad_x_hat: Tensor,
    x: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    W_enc: Tensor | None = None,
    extra_d_value: Tensor | None = None,
    more: Sequence[PairTerms] = (),
    out: LatentGradients | None = None,
) -> LatentGradients:
    """Gradients (dW_enc [N, d], db_enc [N], dW_dec [N, d], db_dec [d]) for g = grad_x_hat [..., d] (SPEC 4.3).

    With `d_value = <g, W_dec[i]> * [value > 0] + extra_d_value` and sums over the (token, latent) pairs of latent i:
    `dW_dec[i] = sum value * g`, `dW_enc[i] = sum d_value * (x - b_dec)`, `db_enc[i] = sum d_value`,
    `db_dec = sum g - W_enc.T @ db_enc`; without W_enc only `sum g`. values, indices and extra_d_value (zero where
    nothing should flow): [..., k]. Sums run in a fixed order, the same in every run. Returned in the compute dtype.

    `more` are further pairs of the same tokens, with a g of their own (AuxK, multi-TopK) or but an extra term (a value
    of 0, as of supervised terms). `out` are gradients to add to, over micro-batches: contiguous, in the compute dtype.
    """
    d = _check.check_tokens("x", x)
    terms = (PairTerms(values, indices, grad_x_hat, extra_d_value), *more)
    _check.check_terms("more", terms, x, first=1)
    _check.check_decoder(W_dec, b_dec, x)
    if W_enc is not None:
        _check.check_tensor("W_enc", W_enc, like=x)
        _check.check_shape("W_enc", W_enc, "N, d", tuple(W_dec.shape), f"W_dec [N={W_dec.shape[0]}, d={d}]")
    arguments = (x, W_dec, b_dec, W_enc)
    if out is not None:
        _check.check_gradients(out, x, W_dec)
        return _registration.add_latent_gradients(terms, *arguments, out)
    columns = (list(column) for column in zip(*terms, strict=True))
    return LatentGradients(*torch.ops.saemnesia_fast.latent_gradients(*columns, *arguments))


@torch.no_grad()
def adam_rows(
    W: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 6.25e-10,
    scale: Tensor | None = None,
    shadow: Tensor | None = None,
    remove_parallel: bool = False,
    unit_norm: bool = False,
) -> None:
    """One step of Adam on the rows of W [N, d] (or on a bias [N]), in place and in one pass (SPEC 4.1).

    `g = scale * grad`, less its part along the row if `remove_parallel`; `m += (1 - beta1) (g - m)`,
    `v = beta2 v + (1 - beta2) g^2`, `W -= lr m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps)`; rows at unit
    length if `unit_norm`. A row of zeros has no direction and stays. A scale of NaN leaves everything as it is.

    W, grad: float32 or float64. exp_avg, exp_avg_sq (m, v): W's dtype, or bfloat16, rounded up or down at random by
    bits fixed by step and element, so that small changes add up. step counts from 1. scale: 0-d, such as that which
    clips the gradient's norm. shadow: W's shape in float16 or bfloat16, set to the new W. All contiguous.
    """
    _check.check_adam(W, grad, exp_avg, exp_avg_sq, step, scale, shadow, remove_parallel or unit_norm)
    rows = W.shape if W.dim() == 2 else (-1, math.gcd(W.numel(), 1024) or 1)
    torch.ops.saemnesia_fast.adam_rows(
        *(tensor.view(rows) for tensor in (W, grad, exp_avg, exp_avg_sq)),
        None if scale is None else scale.to(W.dtype),
        None if shadow is None else shadow.view(rows),
        step,
        lr,
        *betas,
        eps,
        remove_parallel,
        unit_norm,
    )


@torch.no_grad()
def sparse_gradients(
    terms: Sequence[PairTerms], x: Tensor, W_dec: Tensor, b_dec: Tensor, dense: DenseRows | None = None
) -> SparseGradients:
    """`latent_gradients` of W_enc, b_enc and W_dec on their way into `adam_latents`, nowhere [N, d] if that can be.

    Over the pairs of all `terms` of the tokens x [..., d], and `dense` added. The `cpu` backend keeps what the rows are
    made of, and makes them twice in cache: here for their norm, and for Adam. The tensors given, but for the weights
    and b_dec, must not change until then. The gradient of b_dec, which has more parts than the pairs, is left to the
    caller: `db_dec = sum g - W_enc.T @ db_enc`.
    """
    _check.check_tokens("x", x)
    if not terms:
        raise ValueError("terms: expected at least one")
    _check.check_terms("terms", terms, x)
    _check.check_decoder(W_dec, b_dec, x)
    if dense is not None:
        _check.check_dense_rows(dense, x, W_dec.shape[0])
    return _registration.sparse_gradients(terms, x, W_dec, b_dec, dense)


@torch.no_grad()
def adam_latents(
    gradients: SparseGradients,
    W_enc: Tensor,
    W_dec: Tensor,
    moments: LatentMoments,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 6.25e-10,
    scale: Tensor | None = None,
    shadow: Tensor | None = None,
    unit_norm: bool = True,
) -> None:
    """One step of Adam on W_enc and W_dec [N, d], in place (SPEC 4.1): `adam_rows` on each.

    W_dec with `remove_parallel` and `unit_norm` if `unit_norm`, W_enc without. `shadow` is W_enc's. All else as there,
    the weights in the dtype of the gradients; moments may also be in 8 bits (`EightBit`), as torchao's `Adam8bit` keeps
    them. A latent without pairs takes its step with a gradient of zero.
    """
    _check.check_adam_latents(gradients, W_enc, W_dec, moments, step, scale, shadow)
    scale = None if scale is None else scale.to(W_enc.dtype)
    gradients.adam(W_enc, W_dec, moments, scale, shadow, unit_norm, step, lr, *betas, eps)
    written = (W_enc, W_dec, *(part for moment in moments for part in _eight_bit.parts(moment)), shadow)
    torch.autograd.graph.increment_version([tensor for tensor in written if tensor is not None])
