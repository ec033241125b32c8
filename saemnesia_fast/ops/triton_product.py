"""The product `x @ W_enc.T + bias` of the Triton kernels: the folded bias, the dtype of its operands, its tiles."""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .triton_tiles import Tile, Tiles, tiles_for


class Folded(NamedTuple):
    """A folded bias, and what it was made of. W_enc, the key, dies of its own; holding the others keeps them unique."""

    b_enc: Tensor
    b_dec: Tensor
    state: list[tuple[int, int | None]]
    bias: Tensor


_folded: dict[int, Folded] = {}


def folded_bias(W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """`b_enc - W_enc @ b_dec` [N] float32, summed in float64 (SPEC 1.1), kept until one of the three changes.

    Inference tensors have no version: a change of theirs in place is not noticed.
    """
    state = [(w.data_ptr(), None if w.is_inference() else w._version) for w in (W_enc, b_enc, b_dec)]
    known = _folded.get(id(W_enc))
    if known is not None and known.b_enc is b_enc and known.b_dec is b_dec and known.state == state:
        return known.bias
    shift = b_dec.double()
    parts = zip(W_enc.split(4096), b_enc.double().split(4096), strict=True)
    bias = torch.cat([b - W.double() @ shift for W, b in parts]).float()
    # What is allocated while a graph is captured belongs to the graph.
    if not (W_enc.is_cuda and torch.cuda.is_current_stream_capturing()):
        if known is None:
            weakref.finalize(W_enc, _folded.pop, id(W_enc), None)
        _folded[id(W_enc)] = Folded(b_enc, b_dec, state, bias)
    return bias


class Product(NamedTuple):
    """The weights of `x @ W_enc.T + bias`, and how it is computed."""

    W_enc: Tensor
    bias: Tensor
    dtype: torch.dtype
    tiles: Tiles
    meta: dict[str, Any]

    def launch(self, tile: Tile) -> dict[str, Any]:
        even = self.W_enc.shape[1] % tile.depth == 0
        cut = {"BLOCK_M": tile.tokens, "BLOCK_K": tile.depth, "num_warps": tile.warps, "num_stages": tile.stages}
        return {**self.meta, **cut, "EVEN": even}


def product(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Product:
    """16-bit operands where tokens and weights are of one 16-bit dtype, else float32 ones; float32 sums in any case.

    float32 operands are multiplied as three TF32 products; as one where `torch.backends.cuda.matmul.allow_tf32` asks
    for it, or where it is exact, tokens and weights being 16-bit numbers.
    """
    import triton.language as tl

    operands = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    dtype = x.dtype if x.dtype == W_enc.dtype and x.dtype in operands else torch.float32
    exact = x.dtype in operands and W_enc.dtype in operands
    precision = "tf32" if exact or torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    meta = {"OPERAND": operands.get(dtype, tl.float32), "PRECISION": precision}
    bias = folded_bias(W_enc, b_enc, b_dec)
    return Product(W_enc.contiguous(), bias, dtype, tiles_for(x.device, dtype), meta)
