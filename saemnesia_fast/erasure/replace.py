"""Token replacement, the edit of PER (arXiv 2606.31699; SPEC 3.8)."""

from __future__ import annotations

import torch
from torch import Tensor


def replace_tokens(x: Tensor, detected: Tensor) -> Tensor:
    """x [B, H, W, d] with every detected token overwritten by an undetected one of the same image.

    detected: [B, H, W] bool. The token taken is the nearest on the grid, in Euclidean distance; of equally near ones
    that of the lowest index in row-major order. Tokens that hold NaN or infinity are never taken. An image without a
    token to take stays as it is, and so do all undetected tokens, bit for bit. Shapes do not depend on values, and
    nothing waits for the device. Differentiable in x.
    """
    height, width = detected.shape[1:]
    rows = torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device)
    far = height + width  # more than any distance on the grid
    usable = ~detected & x.isfinite().all(-1)

    # A distance and a place in one integer: the smallest is the nearest, the lowest place among equally near ones.
    in_row = (columns[:, None] - columns).abs() * width + columns
    in_row = torch.where(usable[:, :, None], in_row, far * width).amin(-1)
    down = (rows[:, None] - rows).square()[:, None]
    across = (in_row // width).square().transpose(1, 2)[:, None]
    nearest = ((down + across) * height + rows).amin(-1)

    row = nearest % height
    column = (in_row % width).gather(1, row)
    taken = detected & (nearest // height < far * far)
    source = torch.where(taken, row * width + column, rows[:, None] * width + columns).flatten(1)
    tokens = x.flatten(1, 2)
    return tokens.gather(1, source[..., None].expand_as(tokens)).view(x.shape)
