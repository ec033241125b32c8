"""Tokens read and written where they lie: any tensor [..., d] as [B, T, d] with three strides."""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Tokens(NamedTuple):
    """A tensor [..., d] seen as [B, T, d]; token m, in row-major order, is (m // T, m % T)."""

    data: torch.Tensor
    per_batch: int
    """T, at least 1: that of an image [B, C, H, W] is H W, that of a matrix is 1, neither depending on the batch."""
    stride_b: int
    stride_t: int
    stride_d: int

    def aligned(self, *periods: int) -> bool:
        """Whether tokens, rather than channels, lie side by side, and 16 divides T and every one of `periods`."""
        return self.stride_d != 1 and not any(period % 16 for period in (self.per_batch, *periods))


def view(*tensors: torch.Tensor) -> tuple[Tokens, ...] | None:
    """Tensors of one shape [..., d] as [B, T, d] with one T for all; None where the strides of one forbid it."""
    found = _strides(tensors[0].shape, tuple([tensor.stride() for tensor in tensors]))
    if found is None:
        return None
    return tuple([Tokens(tensor, *strides) for tensor, strides in zip(tensors, found, strict=True)])


@lru_cache
def _strides(shape: torch.Size, strides: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, int, int, int], ...] | None:
    """What `view` adds to tensors of that shape and these strides; every erased call asks for the same."""
    if 0 in shape:
        return ((1, 0, 0, 1),) * len(strides)
    dims: list[tuple[int, tuple[int, ...]]] = []
    for axis, size in enumerate(shape[:-1]):
        steps = tuple(of_tensor[axis] for of_tensor in strides)
        if size == 1:
            continue
        if dims and all(outer == inner * size for outer, inner in zip(dims[-1][1], steps, strict=True)):
            dims[-1] = (dims[-1][0] * size, steps)
        else:
            dims.append((size, steps))
    if len(dims) > 2:
        return None
    missing = [(1, (0,) * len(strides))] * (2 - len(dims))
    (_, outer), (per_batch, inner) = dims + missing if strides[0][-1] == 1 else missing + dims
    return tuple((per_batch, o, i, of_tensor[-1]) for o, i, of_tensor in zip(outer, inner, strides, strict=True))


def locate(x: torch.Tensor) -> Tokens:
    """x [..., d] as the kernels read it: in place, or a copy where three strides cannot express it."""
    in_place = view(x)
    return in_place[0] if in_place else locate(x.contiguous())


@triton.jit
def token_offsets(rows, per_batch, stride_b, stride_t):
    """Where the tokens `rows` begin, as int64."""
    rows = rows.to(tl.int64)
    return rows // per_batch * stride_b + rows % per_batch * stride_t


@triton.jit
def token_range(first, end, BLOCK_M: tl.constexpr, ALIGNED: tl.constexpr):
    """The tokens first ... [BLOCK_M], and which of them are before `end`.

    ALIGNED promises that both are multiples of 16, so that neighbouring tokens are loaded together.
    """
    rows = first + tl.arange(0, BLOCK_M)
    live = rows < end
    if ALIGNED:
        rows = tl.multiple_of(rows, 16)
        live = tl.max_constancy(live, 16)
    return rows, live
