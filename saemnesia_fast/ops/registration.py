"""The ops as `torch.ops.saemnesia_fast.*`: schemas, fakes, gradients, and the call into the chosen backend.

`torch.library` definitions with an `autograd.Function` on the Autograd key: torch.compile sees one opaque op each.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import starmap
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backend, cpu_backend, cuda_backend, eager_backend, reference, triton_backend
from .eager_backend import rows as _rows
from .reference import DenseRows, LatentGradients, PairTerms, SparseGradients
from .validation import check_range

_library = torch.library.Library("saemnesia_fast", "DEF")
_ops = torch.ops.saemnesia_fast
_below_autograd = torch._C._AutoDispatchBelowAutograd

_ENCODER = "Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_dec"
_library.define(f"encode_topk({_ENCODER}, int k, str precision) -> (Tensor, Tensor)")
_library.define("decode(Tensor values, Tensor indices, Tensor W_dec, Tensor b_dec) -> Tensor")
_library.define(
    f"erase({_ENCODER}, Tensor W_dec, int k, Tensor latents, Tensor thresholds, Tensor factors, str mode, "
    "bool norm_scaled, str precision) -> Tensor"
)
_library.define(f"probe({_ENCODER}, int k, Tensor latents, Tensor thresholds, str precision) -> (Tensor, Tensor)")
_library.define(
    "steering_lines(Tensor timesteps, Tensor stored, Tensor latents, Tensor thresholds, Tensor factors, Tensor owners, "
    "Tensor switches, SymInt num_lines, SymInt num_blocks, SymInt first_block, float earliest, float latest) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "latent_gradients(Tensor[] values, Tensor[] indices, Tensor[] grads, Tensor?[] extras, bool[] adds_b_dec, "
    "Tensor x, Tensor W_dec, Tensor b_dec, Tensor? W_enc) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "encoder_gradients(Tensor d_value, Tensor indices, Tensor x, Tensor b_dec, SymInt num_latents) -> (Tensor, Tensor)"
)
_library.define("decoder_gradient(Tensor values, Tensor indices, Tensor grad_x_hat, SymInt num_latents) -> Tensor")
_library.define("gather_dot(Tensor indices, Tensor W, Tensor grad) -> Tensor")
_library.define(
    "adam_rows(Tensor(a!) W, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor? scale, "
    "Tensor(d!)? shadow, int step, float lr, float beta1, float beta2, float eps, bool remove_parallel, "
    "bool unit_norm) -> ()"
)


eager_backend.register()
cpu_backend.register()
cuda_backend.register()
triton_backend.register()


def _implement(op: str, key: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _library.impl(op, function, key)
        return function

    return register


@_implement("encode_topk", "CompositeExplicitAutograd")
def _encode_topk(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return backend.select("encode_topk", x.device)(x, *arguments)


@torch.library.register_fake("saemnesia_fast::encode_topk", lib=_library)
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int, precision: str) -> tuple[Tensor, Tensor]:
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
    values: list[Tensor],
    indices: list[Tensor],
    grads: list[Tensor],
    extras: list[Tensor | None],
    adds_b_dec: list[bool],
    x: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    W_enc: Tensor | None,
) -> tuple[Tensor, ...]:
    terms = list(starmap(PairTerms, zip(values, indices, grads, extras, adds_b_dec, strict=True)))
    return tuple(_add_latent_gradients(terms, x, W_dec, b_dec, W_enc, None))


def _add_latent_gradients(
    terms: Sequence[PairTerms],
    x: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    W_enc: Tensor | None,
    out: LatentGradients | None,
) -> LatentGradients:
    for term in terms:
        check_range("indices", term.indices, W_dec.shape[0])
    return backend.select("latent_gradients", x.device)(terms, x, W_dec, b_dec, W_enc, out)


@torch.library.register_fake("saemnesia_fast::latent_gradients", lib=_library)
def _(
    values: list[Tensor],
    indices: list[Tensor],
    grads: list[Tensor],
    extras: list[Tensor | None],
    adds_b_dec: list[bool],
    x: Tensor,
    W_dec: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    dtype = reference.compute_dtype(x)
    return tuple(x.new_empty(shape, dtype=dtype) for shape in LatentGradients.shapes(W_dec))


@_implement("encoder_gradients", "CompositeExplicitAutograd")
def _encoder_gradients(d_value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return backend.select("encoder_gradients", d_value.device)(d_value, *arguments)


@torch.library.register_fake("saemnesia_fast::encoder_gradients", lib=_library)
def _(d_value: Tensor, indices: Tensor, x: Tensor, b_dec: Tensor, num_latents: int) -> tuple[Tensor, Tensor]:
    like = x.new_empty(0, dtype=reference.compute_dtype(x))
    return like.new_empty(num_latents, x.shape[-1]), like.new_empty(num_latents)


@_implement("decoder_gradient", "CompositeExplicitAutograd")
def _decoder_gradient(values: Tensor, *arguments: Any) -> Tensor:
    return backend.select("decoder_gradient", values.device)(values, *arguments)


@torch.library.register_fake("saemnesia_fast::decoder_gradient", lib=_library)
def _(values: Tensor, indices: Tensor, grad_x_hat: Tensor, num_latents: int) -> Tensor:
    return values.new_empty(num_latents, grad_x_hat.shape[-1], dtype=reference.compute_dtype(values))


@_implement("gather_dot", "CompositeExplicitAutograd")
def _gather_dot(indices: Tensor, *arguments: Any) -> Tensor:
    return backend.select("gather_dot", indices.device)(indices, *arguments)


@torch.library.register_fake("saemnesia_fast::gather_dot", lib=_library)
def _(indices: Tensor, W: Tensor, grad: Tensor) -> Tensor:
    return grad.new_empty(indices.shape, dtype=reference.compute_dtype(grad))


@_implement("adam_rows", "CompositeExplicitAutograd")
def _adam_rows(W: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *arguments: Any) -> None:
    backend.select("adam_rows", W.device)(W, grad, exp_avg, exp_avg_sq, *arguments)
    written = (W, exp_avg, exp_avg_sq, arguments[1])
    torch.autograd.graph.increment_version([tensor for tensor in written if tensor is not None])


@torch.library.register_fake("saemnesia_fast::adam_rows", lib=_library)
def _(*arguments: Any) -> None:
    return None


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int, precision: str
    ) -> tuple[Tensor, Tensor]:
        with _below_autograd():
            values, indices = _ops.encode_topk(x, W_enc, b_enc, b_dec, k, precision)
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(x, W_enc, b_enc, b_dec, values, indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        x, W_enc, b_enc, b_dec, values, indices = ctx.saved_tensors
        d_value = torch.where(values > 0, grad, 0).to(reference.compute_dtype(x))
        dx = dW_enc = db_enc = db_dec = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
            dx = _ops.decode(d_value, indices, W_enc, d_value.new_zeros(x.shape[-1]))
            db_dec = -_rows(dx).sum(0).to(b_dec.dtype)
            dx = dx.to(x.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            dW_enc, db_enc = _ops.encoder_gradients(d_value, indices, x, b_dec, W_enc.shape[0])
            dW_enc, db_enc = dW_enc.to(W_enc.dtype), db_enc.to(b_enc.dtype)
        return dx, dW_enc, db_enc, db_dec, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, W_dec, b_dec)
        with _below_autograd():
            return _ops.decode(values, indices, W_dec, b_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, W_dec, b_dec = ctx.saved_tensors
        d_values = dW_dec = db_dec = None
        if ctx.needs_input_grad[0]:
            d_values = _ops.gather_dot(indices, W_dec, grad).to(values.dtype)
        if ctx.needs_input_grad[2]:
            dW_dec = _ops.decoder_gradient(values, indices, grad, W_dec.shape[0]).to(W_dec.dtype)
        if ctx.needs_input_grad[3]:
            db_dec = _rows(grad).to(reference.compute_dtype(values)).sum(0).to(b_dec.dtype)
        return d_values, None, dW_dec, db_dec


def _wants_gradient(*arguments: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


def only_numbers(first: object, *arguments: Any) -> bool:
    """Whether neither a graph is traced nor a gradient wanted, so that a backend may be called past the dispatcher."""
    return type(first) is Tensor and not torch.compiler.is_compiling() and not _wants_gradient(first, *arguments)


def call(op: str, *arguments: Any) -> Any:
    """`op` without its checks, and straight into the backend where only numbers are asked for. The first argument is a
    tensor on the op's device."""
    if only_numbers(*arguments):
        return backend.select(op, arguments[0].device)(*arguments)
    return getattr(_ops, op)(*arguments)


def add_latent_gradients(
    terms: Sequence[PairTerms],
    x: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    W_enc: Tensor | None,
    out: LatentGradients,
) -> LatentGradients:
    """`latent_gradients` added to `out`, past the dispatcher where only numbers are asked for."""
    with torch.no_grad():
        if type(x) is Tensor and not torch.compiler.is_compiling():
            return _add_latent_gradients(terms, x, W_dec, b_dec, W_enc, out)
        columns = (list(column) for column in zip(*terms, strict=True))
        for total, gradient in zip(out, _ops.latent_gradients(*columns, x, W_dec, b_dec, W_enc), strict=True):
            total.add_(gradient)
    return out


def sparse_gradients(
    terms: Sequence[PairTerms], x: Tensor, W_dec: Tensor, b_dec: Tensor, dense: DenseRows | None
) -> SparseGradients:
    """Into the backend: no graph holds it."""
    for term in terms:
        check_range("indices", term.indices, W_dec.shape[0])
    return backend.select("sparse_gradients", x.device)(terms, x, W_dec, b_dec, dense)


def decode_error(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor, x: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Likewise. An epilogue of `decode`, whose slot has it."""
    check_range("indices", indices, W_dec.shape[0])
    return backend.select("decode", x.device)(values, indices, W_dec, b_dec, x, scale)


def erase_in_place(x: Tensor, *arguments: Any) -> Tensor:
    """`erase` over x, likewise without its checks."""
    if only_numbers(x, *arguments):
        return backend.select("erase", x.device)(x, *arguments, in_place=True)
    return x.copy_(_ops.erase(x, *arguments))


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
        encode = partial(_ops.encode_topk, precision=arguments[-1])
        definition = partial(reference.erase, encode=encode, decode=_ops.decode)
        return eager_backend.erase(x, *arguments, definition=definition, tokens_at_once=None)
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


@_implement("encoder_gradients", "Autograd")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    with _below_autograd():
        return _ops.encoder_gradients(*arguments)


@_implement("decoder_gradient", "Autograd")
def _(*arguments: Any) -> Tensor:
    with _below_autograd():
        return _ops.decoder_gradient(*arguments)


@_implement("gather_dot", "Autograd")
def _(*arguments: Any) -> Tensor:
    with _below_autograd():
        return _ops.gather_dot(*arguments)


@_implement("adam_rows", "Autograd")
def _(*arguments: Any) -> None:
    with _below_autograd():
        _ops.adam_rows(*arguments)
