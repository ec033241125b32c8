"""Argument checks of the public ops: ValueError or TypeError naming argument, symbols and actual shape (SPEC 7.1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

MODES = ("exact", "released", "reconstruct")


def check_tensor(name: str, tensor: object, like: Tensor | None = None, integer: bool = False) -> None:
    """Raise unless `tensor` is a floating (or `integer`: int32 or int64) tensor on the device of `like`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if integer and tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {tensor.dtype}")
    if not integer and not tensor.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} as of the tokens, got {tensor.device}")


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


def check_latents(values: Tensor, indices: Tensor) -> None:
    """Check values [..., k] and indices [..., k]."""
    check_tokens("values", values)
    check_tensor("indices", indices, like=values, integer=True)
    if indices.shape != values.shape:
        raise ValueError(
            f"indices: expected [..., k] = {list(values.shape)} to match values, got {list(indices.shape)}"
        )


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


def check_range(name: str, indices: Tensor, size: int) -> None:
    """Raise unless every index is in [0, size). On the CPU only: elsewhere a look at the data would stop the host."""
    if indices.device.type == "cpu" and indices.numel():
        low, high = indices.aminmax()
        if low < 0 or high >= size:
            raise ValueError(f"{name}: expected indices in [0, N={size}), got {int(low)} to {int(high)}")
