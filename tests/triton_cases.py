"""What the tests of the Triton kernels share, in the interpreter and on a GPU."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from weights import random_tokens

BAND = 64
IN_INTERPRETER = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton_interpreter.py"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]
MODES = ["exact", "released", "reconstruct"]


def selection(*shape: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """latents (no latent twice in a line), thresholds and factors [G, S]."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.stack([torch.randperm(n, generator=generator)[: shape[1]] for _ in range(shape[0])])
    thresholds, factors = torch.rand(2, *shape, generator=generator)
    return latents, thresholds.to(dtype), (-5 * factors).to(dtype)


def assert_no_worse(ours: Tensor, eager: Tensor, exact: Tensor) -> None:
    """max |ours - exact| <= 2 max |eager - exact| + 2^-22 max |exact|; `exact` in float64."""
    floor = 2.0**-22 * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= 2 * (eager.double() - exact).abs().max() + floor


def doubled(*arguments: Any) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


def exact_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """The float32 activations [M, N] of which no sum is rounded on the way: what precision "exact" is held to."""
    centred = (x.float() - b_dec.float()).double()
    return (centred @ W_enc.double().T + b_enc.double()).float().relu()


def lay_out(layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Tokens [2, 3, 2, 6] (expanded ones [4, 6]) as UNets, and users, lay them out."""
    image = random_tokens(2, 6, 3, 2, dtype=dtype)
    return {
        "contiguous": lambda: random_tokens(2, 3, 2, 6, dtype=dtype),
        "nchw": lambda: image.permute(0, 2, 3, 1),
        "channels_last": lambda: image.to(memory_format=torch.channels_last).permute(0, 2, 3, 1),
        "sliced": lambda: random_tokens(2, 3, 4, 12, dtype=dtype)[:, :, ::2, 3:9],
        "cropped nchw": lambda: random_tokens(2, 6, 5, 9, dtype=dtype)[:, :, :3, 2:4].permute(0, 2, 3, 1),
        "reversed": lambda: random_tokens(2, 3, 2, 6, dtype=dtype).permute(2, 1, 0, 3),
        "expanded": lambda: random_tokens(1, 6, dtype=dtype).expand(4, 6),
    }[layout]()


LAYOUTS = ["contiguous", "nchw", "channels_last", "sliced", "cropped nchw", "reversed", "expanded"]


def surrounded(tensor: Tensor) -> tuple[Tensor, Callable[[], bool]]:
    """The same numbers and strides amid NaN (or an absurd integer), and a check that nothing wrote there."""
    size = sum((n - 1) * abs(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    absurd = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max - 12345
    around = torch.full((size + 2 * BAND,), absurd, dtype=tensor.dtype, device=tensor.device)
    untouched = around.clone()
    inner = around.as_strided(tensor.shape, tensor.stride(), BAND)

    def intact() -> bool:
        outside = [*around[:BAND], *around[-BAND:]], [*untouched[:BAND], *untouched[-BAND:]]
        return torch.equal(*(torch.stack(part).view(torch.uint8) for part in outside))

    return inner, intact


@contextmanager
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever is allocated without being filled holds NaN (or an absurd integer), in a band of which nobody writes."""
    checks = []
    empty_like, new_empty = torch.empty_like, Tensor.new_empty

    def poison(tensor: Tensor) -> Tensor:
        if tensor.numel() == 0 or tensor.dtype == torch.bool:
            return tensor
        inner, intact = surrounded(tensor)
        checks.append(intact)
        return inner

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda *a, **kw: poison(empty_like(*a, **kw)))
        patch.setattr(Tensor, "new_empty", lambda *a, **kw: poison(new_empty(*a, **kw)))
        yield
    assert checks
    assert all(intact() for intact in checks)


def amid_nan(*arguments: Any) -> list[Any]:
    """Every tensor among the arguments moved into NaN: what reads beside it gives itself away."""
    moved = []
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.numel():
            inner, _ = surrounded(argument)
            argument = inner.copy_(argument) if 0 not in argument.stride() else argument
        moved.append(argument)
    return moved
