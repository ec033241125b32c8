"""Adam's moments in 8 bits, in the format of torchao's `Adam8bit` (arXiv 2110.02861).

Neighbours in a row share a scale, the largest magnitude of their block. A number is the entry of a map of 256 that is
nearest to its part of that scale. The map has a sign for exp_avg and none for exp_avg_sq.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_BLOCK = 256
LEAST_SCALE = 1e-12
DECADES = 7


class EightBit(NamedTuple):
    """Numbers [N, d], `map[codes] * scale`, in blocks of d / B neighbours."""

    codes: Tensor
    """[N, d] uint8."""
    scale: Tensor
    """[N, B] float32."""

    @classmethod
    def zeros_like(cls, W: Tensor) -> "EightBit":
        """For W [N, d]: in blocks of gcd(d, 256)."""
        blocks = W.shape[1] // math.gcd(W.shape[1], MOST_BLOCK)
        return cls(torch.zeros_like(W, dtype=torch.uint8), W.new_zeros(len(W), blocks, dtype=torch.float32))


Moment = Tensor | EightBit


def parts(moment: Moment) -> tuple[Tensor, ...]:
    """The tensors of which a moment consists."""
    return moment if isinstance(moment, EightBit) else (moment,)


@cache
def code_map(signed: bool, device: torch.device) -> Tensor:
    """[256] float32, ascending: 0, 1, and the middles of equal parts of each of seven decades, the highest to 1.

    Of the lowest decade there is one part, or without a sign two; of the others twice as many as of the one below.
    """
    float32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    middles = []
    for decade in range(DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, **float32)
        middles.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade + 1 - DECADES))
    positive = torch.cat(middles)
    ends = torch.tensor([0.0, 1.0], **float32)
    return torch.cat([positive, ends, -positive] if signed else [positive, ends]).sort().values.to(device)


def encode(numbers: Tensor, signed: bool) -> Tensor:
    """The codes, uint8, of float32 numbers: the nearest entries of the map, of two the upper."""
    entries = code_map(signed, numbers.device)
    below = (torch.searchsorted(entries, numbers.contiguous(), right=True) - 1).clamp_min(0)
    above = (below + 1).clamp_max(len(entries) - 1)
    rounded_up = numbers - entries[below] >= (entries[above] - entries[below]) * 0.5
    return torch.where(rounded_up, above, below).byte()


def widened(moment: EightBit, signed: bool) -> Tensor:
    """The numbers [N, d], float32."""
    (rows, d), blocks = moment.codes.shape, moment.scale.shape[1]
    entries = code_map(signed, moment.codes.device)[moment.codes.int()]
    return (entries.view(rows, blocks, d // blocks) * moment.scale[..., None]).view(rows, d)


def quantized(numbers: Tensor, blocks: int, signed: bool) -> EightBit:
    """Of numbers [N, d], in so many blocks a row."""
    rows, d = numbers.shape
    blockwise = numbers.float().view(rows, blocks, d // blocks)
    scale = blockwise.abs().amax(2).clamp_min(LEAST_SCALE)
    return EightBit(encode(blockwise / scale[..., None], signed).view(numbers.shape), scale)


def as_given(moments: Sequence[Moment]) -> tuple[list[Tensor], list[Tensor]]:
    """(moments, scales) as the libraries take them (csrc/gradient_ops.h)."""
    scales = [moment.scale for moment in moments if isinstance(moment, EightBit)]
    return [parts(moment)[0] for moment in moments], scales
