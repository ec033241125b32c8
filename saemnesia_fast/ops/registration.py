"""The ops as `torch.ops.saemnesia_fast.*`: schemas, fakes, gradients, and the call into the chosen backend.

`torch.library` definitions with an `autograd.Function` on the Autograd key: torch.compile sees one opaque op each.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import backend, cpu_backend, eager_backend, reference, triton_backend
from .eager_backend import rows as _rows
from .validation import check_range

_library = torch.library.Library("saemnesia_fast", "DEF")
_ops = torch.ops.saemnesia_fast
_below_autograd = torch._C._AutoDispatchBelowAutograd

_ENCODER = "Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_dec"
_library.define(f"encode_topk({_ENCODER}, int k) -> (Tensor, Tensor)")
_library.define("decode(Tensor values, Tensor indices, Tensor W_dec, Tensor b_dec) -> Tensor")
_library.define(
    f"erase({_ENCODER}, Tensor W_dec, int k, Tensor latents, Tensor thresholds, Tensor factors, str mode, "
    "bool norm_scaled) -> Tensor"
)
_library.define(f"probe({_ENCODER}, int k, Tensor latents, Tensor thresholds) -> (Tensor, Tensor)")
_library.define(
    "steering_lines(Tensor timesteps, Tensor stored, Tensor latents, Tensor thresholds, Tensor factors, Tensor owners, "
    "Tensor switches, SymInt num_lines, SymInt num_blocks, SymInt first_block, float earliest, float latest) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "latent_gradients(Tensor values, Tensor indices, Tensor grad_x_hat, Tensor x, Tensor W_dec, Tensor b_dec, "
    "Tensor? W_enc, Tensor? extra_d_value) -> (Tensor, Tensor, Tensor, Tensor)"
)


eager_backend.register()
cpu_backend.register()
triton_backend.register()


def _implement(op: str, key: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _library.impl(op, function, key)
        return function

    return register


@_implement("encode_topk", "CompositeExplicitAutograd")
def _encode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return backend.select("encode_topk", x.device)(x, W_enc, b_enc, b_dec, k)


@torch.library.register_fake("saemnesia_fast::encode_topk", lib=_library)
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int32)


@_implement("decode", "CompositeExplicitAutograd")
def _decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    check_range("indices", indices, W_dec.shape[0])
    return backend.select("decode", values.device)(values, indices, W_dec, b_dec)


@torch.library.register_fake("saemnesia_fast::decode", lib=_library)
def _(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    return values.new_empty(*values.shape[:-1], W_dec.shape[1])


@_implement("erase", "CompositeExplicitAutograd")
def _erase(x: Tensor, *arguments: Any) -> Tensor:
    check_range("latents", arguments[5], arguments[0].shape[0])
    return backend.select("erase", x.device)(x, *arguments)


@torch.library.register_fake("saemnesia_fast::erase", lib=_library)
def _(x: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(x)


@_implement("probe", "CompositeExplicitAutograd")
def _probe(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    check_range("latents", arguments[4], arguments[0].shape[0])
    return backend.select("probe", x.device)(x, *arguments)


@torch.library.register_fake("saemnesia_fast::probe", lib=_library)
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], arguments[4].shape[1])
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.bool)


@_implement("steering_lines", "CompositeExplicitAutograd")
def _steering_lines(timesteps: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return backend.select("steering_lines", timesteps.device)(timesteps, *arguments)


@torch.library.register_fake("saemnesia_fast::steering_lines", lib=_library)
def _(
    timesteps: Tensor,
    stored: Tensor,
    latents: Tensor,
    thresholds: Tensor,
    factors: Tensor,
    owners: Tensor,
    switches: Tensor,
    num_lines: int,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    tables = [table.new_empty(num_lines, table.shape[2]) for table in (latents, thresholds, factors, owners)]
    return (*tables, switches.new_empty(num_lines))


@_implement("latent_gradients", "CompositeExplicitAutograd")
def _latent_gradients(
    values: Tensor, indices: Tensor, grad_x_hat: Tensor, x: Tensor, W_dec: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_range("indices", indices, W_dec.shape[0])
    return backend.select("latent_gradients", x.device)(values, indices, grad_x_hat, x, W_dec, *arguments)


@torch.library.register_fake("saemnesia_fast::latent_gradients", lib=_library)
def _(
    values: Tensor,
    indices: Tensor,
    grad_x_hat: Tensor,
    x: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    W_enc: Tensor | None,
    extra_d_value: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_latents, d = W_dec.shape
    like = x.new_empty(0, dtype=reference.compute_dtype(x))
    return (
        like.new_empty(num_latents, d),
        like.new_empty(num_latents),
        like.new_empty(num_latents, d),
        like.new_empty(d),
    )


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int) -> tuple[Tensor, Tensor]:
        with _below_autograd():
            values, indices = _ops.encode_topk(x, W_enc, b_enc, b_dec, k)
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(x, W_enc, b_enc, b_dec, values, indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        x, W_enc, b_enc, b_dec, values, indices = ctx.saved_tensors
        dtype = reference.compute_dtype(x)
        rows, columns = _rows(x).to(dtype), _rows(indices)
        d_value = torch.where(values > 0, grad, 0).reshape(columns.shape).to(dtype)
        dx = dW_enc = db_enc = db_dec = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
            dx = reference.gather_sum(d_value, columns, W_enc)
            db_dec = -dx.sum(0).to(b_dec.dtype)
            dx = dx.view(x.shape).to(x.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            centred = rows - b_dec.to(dtype)
            dW_enc, db_enc = reference.encoder_gradients(d_value, columns, centred, W_enc.shape[0])
            dW_enc, db_enc = dW_enc.to(W_enc.dtype), db_enc.to(b_enc.dtype)
        return dx, dW_enc, db_enc, db_dec, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, W_dec, b_dec)
        with _below_autograd():
            return _ops.decode(values, indices, W_dec, b_dec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, W_dec, b_dec = ctx.saved_tensors
        dtype = reference.compute_dtype(values)
        rows, columns = _rows(grad).to(dtype), _rows(indices)
        d_values = dW_dec = db_dec = None
        if ctx.needs_input_grad[0]:
            d_values = reference.gather_dot(columns, W_dec.to(dtype), rows).view(values.shape).to(values.dtype)
        if ctx.needs_input_grad[2]:
            dW_dec = reference.sum_by_latent(_rows(values).to(dtype), columns, rows, W_dec.shape[0]).to(W_dec.dtype)
        if ctx.needs_input_grad[3]:
            db_dec = rows.sum(0).to(b_dec.dtype)
        return d_values, None, dW_dec, db_dec


_differentiable_erase = partial(reference.erase, encode=_ops.encode_topk, decode=_ops.decode)


def _wants_gradient(*arguments: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


def call(op: str, *arguments: Any) -> Any:
    """`op` without its checks, and straight into the backend where only numbers are asked for: not while a graph is
    traced, nor for a gradient. The first argument is a tensor on the op's device."""
    first = arguments[0]
    if type(first) is not Tensor or torch.compiler.is_compiling() or _wants_gradient(*arguments):
        return getattr(_ops, op)(*arguments)
    return backend.select(op, first.device)(*arguments)


@_implement("encode_topk", "Autograd")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    if _wants_gradient(*arguments):
        return _EncodeTopK.apply(*arguments)
    with _below_autograd():
        return _ops.encode_topk(*arguments)


@_implement("decode", "Autograd")
def _(*arguments: Any) -> Tensor:
    if _wants_gradient(*arguments):
        return _Decode.apply(*arguments)
    with _below_autograd():
        return _ops.decode(*arguments)


@_implement("erase", "Autograd")
def _(x: Tensor, *arguments: Any) -> Tensor:
    if _wants_gradient(x, *arguments):
        return eager_backend.erase(x, *arguments, definition=_differentiable_erase)
    with _below_autograd():
        return _ops.erase(x, *arguments)


@_implement("probe", "Autograd")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    with _below_autograd():
        return _ops.probe(*arguments)


@_implement("steering_lines", "Autograd")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    with _below_autograd():
        return _ops.steering_lines(*arguments)


@_implement("latent_gradients", "Autograd")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with _below_autograd():
        return _ops.latent_gradients(*arguments)
