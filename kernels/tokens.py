"""Tokens read and written where they lie: any tensor [..., d] as [B, T, d] with three strides."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Tokens(NamedTuple):
    """A tensor [..., d] seen as [B, T, d]; token m, in row-major order, is (m // T, m % T)."""

    data: torch.Tensor
    per_batch: int
    """T; 1 where there are no tokens, so that it always divides."""
    stride_b: int
    stride_t: int
    stride_d: int


def view(*tensors: torch.Tensor) -> tuple[Tokens, ...] | None:
    """Tensors of one shape [..., d] as [B, T, d] with one T for all; None where the strides of one forbid it."""
    dims: list[tuple[int, tuple[int, ...]]] = []
    first = tensors[0]
    if first.numel() == 0:
        return tuple(Tokens(tensor, 1, 0, 0, 1) for tensor in tensors)
    for axis, size in enumerate(first.shape[:-1]):
        strides = tuple(tensor.stride(axis) for tensor in tensors)
        if size == 1:
            continue
        if dims and all(outer == inner * size for outer, inner in zip(dims[-1][1], strides, strict=True)):
            dims[-1] = (dims[-1][0] * size, strides)
        else:
            dims.append((size, strides))
    if len(dims) > 2:
        return None
    none = (0,) * len(tensors)
    (_, outer), (per_batch, inner) = [(1, none)] * (2 - len(dims)) + dims
    return tuple(
        Tokens(tensor, per_batch, outer[number], inner[number], tensor.stride(-1))
        for number, tensor in enumerate(tensors)
    )


@triton.jit
def token_offsets(rows, per_batch, stride_b, stride_t):
    """Where the tokens `rows` begin, as int64."""
    rows = rows.to(tl.int64)
    return rows // per_batch * stride_b + rows % per_batch * stride_t
