"""Argument checks of the public ops: ValueError or TypeError naming argument, symbols and actual shape (SPEC 7.1)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .eight_bit import MOST_BLOCK, EightBit
from .reference import DenseRows, LatentGradients, LatentMoments, PairTerms, SparseGradients, compute_dtype

MODES = ("exact", "released", "reconstruct")
PRECISIONS = ("default", "exact")
SHADOWS = (torch.float16, torch.bfloat16)


def check_tensor(name: str, tensor: object, like: Tensor | None = None, integer: bool = False) -> None:
    """Raise unless `tensor` is a floating (or `integer`: int32 or int64) tensor on the device of `like`."""
    tensor = _check_placed(name, tensor, like)
    if integer and tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {tensor.dtype}")
    if not integer and not tensor.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")


def _check_placed(name: str, tensor: object, like: Tensor | None) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} as of the tokens, got {tensor.device}")
    return tensor


def check_shape(name: str, tensor: Tensor, symbols: str, sizes: Sequence[int | None], match: str) -> None:
    """Raise unless `tensor` has the shape `sizes` (None: any size), written `symbols` in the message."""
    if tensor.dim() == len(sizes) and all(
        want is None or want == got for want, got in zip(sizes, tensor.shape, strict=True)
    ):
        return
    known = [
        symbol.strip() if size is None else str(size) for symbol, size in zip(symbols.split(","), sizes, strict=True)
    ]
    raise ValueError(f"{name}: expected [{symbols}] = [{', '.join(known)}] to match {match}, got {list(tensor.shape)}")


def check_tokens(name: str, x: Tensor) -> int:
    """Return d of tokens [..., d]."""
    check_tensor(name, x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: expected [..., d] with d >= 1, got {list(x.shape)}")
    return x.shape[-1]


def check_encoder(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int) -> tuple[int, int]:
    """Check x [..., d], W_enc [N, d], b_enc [N], b_dec [d] and 1 <= k <= N; return (d, N)."""
    d = check_tokens("x", x)
    for name, tensor in (("W_enc", W_enc), ("b_enc", b_enc), ("b_dec", b_dec)):
        check_tensor(name, tensor, like=x)
    check_shape("W_enc", W_enc, "N, d", (None, d), f"x [*, d={d}]")
    num_latents = W_enc.shape[0]
    check_shape("b_enc", b_enc, "N", (num_latents,), f"W_enc [N={num_latents}, d]")
    check_shape("b_dec", b_dec, "d", (d,), f"x [*, d={d}]")
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: expected an int, got {type(k).__name__}")
    if not 1 <= k <= num_latents:
        raise ValueError(f"k: expected 1 <= k <= N = {num_latents}, got {k}")
    return d, num_latents


def check_latents(values: Tensor, indices: Tensor, x: Tensor | None = None) -> None:
    """Check values [..., k] and indices [..., k], and both against tokens x [..., d]."""
    check_tokens("values", values)
    check_tensor("indices", indices, like=values, integer=True)
    if indices.shape != values.shape:
        raise ValueError(
            f"indices: expected [..., k] = {list(values.shape)} to match values, got {list(indices.shape)}"
        )
    if x is None:
        return
    check_tensor("values", values, like=x)
    if values.shape[:-1] != x.shape[:-1]:
        shape = ", ".join(map(str, (*x.shape[:-1], "k")))
        raise ValueError(f"values: expected [..., k] = [{shape}] to match x, got {list(values.shape)}")


def check_terms(name: str, terms: Sequence[PairTerms], x: Tensor, first: int = 0) -> None:
    """Check the terms against tokens x [..., d]: `<name>[i].values` and so on, i from 0 after the `first`, unnamed."""
    for number, term in enumerate(terms, -first):
        try:
            _check_term(term, x)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}[{number}].{error}" if number >= 0 else str(error)) from None


def _check_term(term: PairTerms, x: Tensor) -> None:
    check_latents(term.values, term.indices, x)
    optional = (
        () if term.extra_d_value is None else (("extra_d_value", "k", term.extra_d_value, "values", term.values),)
    )
    for name, last, tensor, other, like in (("grad_x_hat", "d", term.grad_x_hat, "x", x), *optional):
        check_tensor(name, tensor, like=x)
        if tensor.shape != like.shape:
            raise ValueError(
                f"{name}: expected [..., {last}] = {list(like.shape)} to match {other}, got {list(tensor.shape)}"
            )


def check_gradients(out: LatentGradients, x: Tensor, W_dec: Tensor) -> None:
    """Check the four gradients that are to be added to: shape, compute dtype, device, contiguous."""
    for name, tensor, shape in zip(LatentGradients._fields, out, LatentGradients.shapes(W_dec), strict=True):
        check_tensor(f"out.{name}", tensor, like=x)
        if tensor.shape != shape or tensor.dtype != compute_dtype(x) or not tensor.is_contiguous():
            raise ValueError(
                f"out.{name}: expected {list(shape)} contiguous, {compute_dtype(x)}, "
                f"got {list(tensor.shape)}, {tensor.dtype}, strides {list(tensor.stride())}"
            )


def check_decoder(W_dec: Tensor, b_dec: Tensor, x: Tensor) -> None:
    """Check W_dec [N, d] and b_dec [d] against tokens x [..., d]."""
    d = x.shape[-1]
    check_tensor("W_dec", W_dec, like=x)
    check_shape("W_dec", W_dec, "N, d", (None, d), f"x [*, d={d}]")
    check_tensor("b_dec", b_dec, like=x)
    check_shape("b_dec", b_dec, "d", (d,), f"x [*, d={d}]")


def check_dense_rows(dense: DenseRows, x: Tensor, num_latents: int) -> None:
    """Check the gradients of C latents; that these differ, and are below N, on the CPU only."""
    d = x.shape[-1]
    check_tensor("dense.latents", dense.latents, like=x, integer=True)
    check_shape("dense.latents", dense.latents, "C", (None,), "[C]")
    count = len(dense.latents)
    for name, symbols, shape in (
        ("dW_enc", "C, d", (count, d)),
        ("db_enc", "C", (count,)),
        ("dW_dec", "C, d", (count, d)),
    ):
        tensor = getattr(dense, name)
        check_tensor(f"dense.{name}", tensor, like=x)
        check_shape(f"dense.{name}", tensor, symbols, shape, f"dense.latents [C={count}] and x [*, d={d}]")
    check_range("dense.latents", dense.latents, num_latents)
    if x.device.type == "cpu" and len(dense.latents.unique()) != count:
        raise ValueError("dense.latents: expected each latent once")


def check_adam_latents(
    gradients: SparseGradients,
    W_enc: Tensor,
    W_dec: Tensor,
    moments: LatentMoments,
    step: int,
    scale: Tensor | None,
    shadow: Tensor | None,
) -> None:
    """Check W_enc and W_dec [N, d], and what goes with them, by the N and the dtype of the gradients."""
    db_enc = gradients.db_enc
    check_tensor("W_enc", W_enc, like=db_enc)
    check_shape("W_enc", W_enc, "N, d", gradients.shape, "the gradients")
    _check_alike(
        "W_enc",
        W_enc,
        ("W_enc", W_enc, (db_enc.dtype,)),
        ("W_dec", W_dec, (db_enc.dtype,)),
        *_as_tensors(moments, W_enc),
        ("shadow", shadow, SHADOWS),
    )
    check_step(W_enc, step, scale)


def _as_tensors(moments: LatentMoments, W: Tensor) -> Iterator[tuple[str, Tensor, tuple[torch.dtype, ...]]]:
    """The moments for `_check_alike`, the scales of those in 8 bits checked."""
    first = moments[0]
    short = () if isinstance(first, EightBit) else (first.dtype,)
    for field, moment in zip(moments._fields, moments, strict=True):
        name = f"moments.{field}"
        if isinstance(moment, EightBit) != isinstance(first, EightBit):
            raise TypeError(f"{name}: expected {type(first).__name__} as the first, got {type(moment).__name__}")
        if isinstance(moment, EightBit):
            yield f"{name}.codes", moment.codes, (torch.uint8,)
            _check_block_scales(f"{name}.scale", moment.scale, W)
        else:
            yield name, moment, short if moment is not first else (W.dtype, torch.bfloat16)


def _check_block_scales(name: str, scale: Tensor, W: Tensor) -> None:
    check_tensor(name, scale, like=W)
    (rows, d), blocks = W.shape, scale.shape[-1] if scale.dim() else 0
    fits = blocks and d % blocks == 0 and d // blocks <= MOST_BLOCK and scale.shape == (rows, blocks)
    if not fits or scale.dtype != torch.float32 or not scale.is_contiguous():
        raise ValueError(
            f"{name}: expected [N={rows}, B] contiguous, torch.float32, of blocks of d / B <= {MOST_BLOCK} numbers, "
            f"got {list(scale.shape)}, {scale.dtype}, strides {list(scale.stride())}"
        )


def _check_alike(first: str, like: Tensor, *tensors: tuple[str, Tensor | None, tuple[torch.dtype, ...]]) -> None:
    """Check the dtypes, and that all have the shape and the device of `like`, named `first`, and are contiguous."""
    for name, tensor, dtypes in tensors:
        if tensor is None:
            continue
        _check_placed(name, tensor, like)
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
        if tensor.shape != like.shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected {list(like.shape)} contiguous as {first}, "
                f"got {list(tensor.shape)}, strides {list(tensor.stride())}"
            )


def check_scale(scale: Tensor, like: Tensor) -> None:
    """Check a factor that lies on the device."""
    check_tensor("scale", scale, like=like)
    if scale.dim():
        raise ValueError(f"scale: expected one number, [], got {list(scale.shape)}")


def check_step(W: Tensor, step: int, scale: Tensor | None) -> None:
    """Check the number of the step, and its scale."""
    if scale is not None:
        check_scale(scale, W)
    if step < 1:
        raise ValueError(f"step: expected at least 1, got {step}")


def check_adam(
    W: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    scale: Tensor | None,
    shadow: Tensor | None,
    by_rows: bool,
) -> None:
    """Check W [N, d] or, unless `by_rows`, [N], and what goes with it."""
    check_tensor("W", W)
    if W.dim() not in ((2,) if by_rows else (1, 2)) or (W.dim() == 2 and W.shape[1] == 0):
        raise ValueError(f"W: expected [N, d]{'' if by_rows else ' or [N]'}, got {list(W.shape)}")
    _check_alike(
        "W",
        W,
        ("W", W, (torch.float32, torch.float64)),
        ("grad", grad, (W.dtype,)),
        ("exp_avg", exp_avg, (W.dtype, torch.bfloat16)),
        ("exp_avg_sq", exp_avg_sq, (exp_avg.dtype,)),
        ("shadow", shadow, SHADOWS),
    )
    check_step(W, step, scale)


def check_lines(x: Tensor, latents: Tensor, **entries: Tensor) -> None:
    """Check latents and its `entries` (thresholds, factors): [S], or [G, S] where G divides the tokens of x."""
    check_tensor("latents", latents, like=x, integer=True)
    if latents.dim() not in (1, 2) or (latents.dim() == 2 and latents.shape[0] == 0):
        raise ValueError(f"latents: expected [S] or [G, S] with G >= 1, got {list(latents.shape)}")
    for name, tensor in entries.items():
        check_tensor(name, tensor, like=x)
        if tensor.shape != latents.shape:
            raise ValueError(
                f"{name}: expected [S] or [G, S] = {list(latents.shape)} to match latents, got {list(tensor.shape)}"
            )
    rows = x.numel() // x.shape[-1]
    if latents.dim() == 2 and rows % latents.shape[0]:
        raise ValueError(
            f"latents: expected [G, S] with G dividing the M = {rows} tokens of x, got {list(latents.shape)}"
        )


def check_mode(mode: str) -> None:
    """Raise unless `mode` is one of SPEC 3.2."""
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")


def check_precision(precision: str) -> None:
    """Raise unless `precision` is one of SPEC 1.6."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")


def check_in_place(x: Tensor) -> None:
    """Raise unless x can be written over: no gradient is wanted of it, and no two of its elements share memory."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("in_place: expected x without a gradient")
    if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(f"in_place: expected x whose elements lie apart, got strides {list(x.stride())}")


def check_range(name: str, indices: Tensor, size: int) -> None:
    """Raise unless every index is in [0, size). On the CPU only: elsewhere a look at the data would stop the host."""
    if indices.device.type == "cpu" and indices.numel():
        low, high = indices.aminmax()
        if low < 0 or high >= size:
            raise ValueError(f"{name}: expected indices in [0, N={size}), got {int(low)} to {int(high)}")
