"""ops.adam_rows: SPEC 4.1."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saemnesia_fast import ops
from saemnesia_fast.ops import reference
from saemnesia_fast.training.optim import normalize_rows, remove_parallel_gradient
from weights import random_tokens, same_bits, threads

OP = torch.ops.saemnesia_fast.adam_rows
pytestmark = pytest.mark.usefixtures("each_backend")
RECIPE: dict[str, Any] = {"lr": 1e-2, "eps": 6.25e-10}


def parameter(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """W and both moments."""
    W = random_tokens(*shape, dtype=dtype, seed=seed)
    return W, torch.zeros_like(W), torch.zeros_like(W)


@pytest.mark.parametrize("shape", [(9, 7), (4, 300), (2048,), (13,)])
def test_equals_adam_of_torch(shape: tuple[int, ...]) -> None:
    W, m, v = parameter(*shape)
    theirs = torch.nn.Parameter(W.clone())
    optimizer = torch.optim.Adam([theirs], **RECIPE)
    for step in range(1, 6):
        theirs.grad = random_tokens(*shape, seed=10 + step)
        optimizer.step()
        ops.adam_rows(W, theirs.grad, m, v, step, **RECIPE)
    torch.testing.assert_close(W, theirs.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_whole_recipe_equals_its_steps(dtype: torch.dtype, tolerance: float) -> None:
    """Clip, remove the parallel part, Adam, unit norm, as the trainer takes them one by one in float64."""
    W, m, v = parameter(11, 150, dtype=dtype)
    W[4] = 0
    theirs = torch.nn.Parameter(W.double())
    optimizer = torch.optim.Adam([theirs], **RECIPE)
    shadow = torch.empty_like(W, dtype=torch.float16)
    for step in range(1, 5):
        grad = random_tokens(11, 150, dtype=dtype, seed=10 + step)
        grad[7] = 0
        theirs.grad = 0.25 * grad.double()
        remove_parallel_gradient(theirs, theirs.grad)
        optimizer.step()
        normalize_rows(theirs)
        scale = torch.tensor(0.25, dtype=dtype)
        ops.adam_rows(W, grad, m, v, step, scale=scale, shadow=shadow, remove_parallel=True, unit_norm=True, **RECIPE)
        assert torch.equal(shadow, W.half())
    torch.testing.assert_close(W.double(), theirs.detach(), rtol=tolerance, atol=tolerance)


def test_a_row_of_zeros_without_gradient_stays() -> None:
    W, m, v = parameter(3, 40)
    W[1] = 0
    ops.adam_rows(W, torch.zeros_like(W), m, v, 1, remove_parallel=True, unit_norm=True, **RECIPE)
    assert torch.equal(W[1], torch.zeros(40, dtype=W.dtype))
    torch.testing.assert_close(W[[0, 2]].norm(dim=1), torch.ones(2, dtype=W.dtype))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@given(st.lists(st.floats(width=32, allow_infinity=True), min_size=1, max_size=30))
def test_shadow_is_rounded_as_torch_rounds(kind: torch.dtype, numbers: list[float]) -> None:
    """Subnormals, overflow, ties, NaN."""
    ties = [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 2**-25, 3 * 2**-26, 65519.0, 65520.0, 6e-8, -2e-7]
    W, m, v = torch.tensor([[*numbers, *ties]]), torch.zeros(1, len(numbers) + 9), torch.zeros(1, len(numbers) + 9)
    shadow = torch.zeros_like(W, dtype=kind)
    ops.adam_rows(W, torch.zeros_like(W), m, v, 1, lr=0.0, shadow=shadow)
    assert torch.equal(shadow.isnan(), W.isnan())
    assert same_bits(shadow.nan_to_num(7), W.to(kind).nan_to_num(7))


def test_short_moments_keep_their_mean() -> None:
    """v decays by 0.1 % a step, which rounding to the nearest bfloat16 would undo each time."""
    W, m, v = parameter(64, 64, dtype=torch.float32)
    short_m, short_v = torch.zeros(64, 64, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16)
    m.zero_()
    v.fill_(1)
    for step in range(1, 201):
        grad = torch.full_like(W, 0.5)
        ops.adam_rows(W, grad, m, v, step, **RECIPE)
        ops.adam_rows(W, grad, short_m, short_v, step, **RECIPE)
    assert v.mean() < 0.87
    torch.testing.assert_close(short_v.float().mean(), v.mean(), rtol=2e-3, atol=0)
    torch.testing.assert_close(short_m.float().mean(), m.mean(), rtol=2e-3, atol=0)
    assert len(short_v.unique()) > 3


def test_short_moments_have_the_same_bits_everywhere() -> None:
    """The random bits are those of the reference, of the step and the element, whoever computes it."""
    start, grad = random_tokens(40, 96, dtype=torch.float32), random_tokens(40, 96, dtype=torch.float32, seed=2)

    def three_steps() -> tuple[Tensor, ...]:
        W, m, v = start.clone(), torch.zeros(40, 96, dtype=torch.bfloat16), torch.zeros(40, 96, dtype=torch.bfloat16)
        for step in range(1, 4):
            ops.adam_rows(W, grad, m, v, step, unit_norm=True, **RECIPE)
        return W, m, v

    with threads(1):
        alone = three_steps()
    with threads(2):
        together = three_steps()
    with ops.use_backend("eager"):
        eager = three_steps()
    assert all(same_bits(a, b) for a, b in zip(alone, together, strict=True))
    # Where a last bit of the sums tips the rounding, a moment is 1/128 off.
    torch.testing.assert_close(alone[0], eager[0], rtol=0, atol=RECIPE["lr"] / 128)
    for short, wanted in zip(alone[1:], eager[1:], strict=True):
        assert (short == wanted).double().mean() > 0.995


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_eager_blocks_of_rows_have_the_bits_of_the_whole(moments: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The random bits too, which go by the number of an element."""
    start, grad = random_tokens(23, 96, dtype=torch.float32), random_tokens(23, 96, dtype=torch.float32, seed=2)
    found = []
    for elements in (1, 5 * 96, 23 * 96):
        monkeypatch.setattr(reference, "ADAM_ELEMENTS", elements)
        tensors = (start.clone(), grad, torch.zeros(23, 96, dtype=moments), torch.ones(23, 96, dtype=moments))
        options = {"scale": torch.tensor(0.3), "shadow": torch.zeros(23, 96, dtype=torch.float16)}
        with ops.use_backend("eager"):
            ops.adam_rows(*tensors, 3, remove_parallel=True, unit_norm=True, **options, **RECIPE)
        found.append([*tensors, options["shadow"]])
    for some in found[:2]:
        assert all(same_bits(a, b) for a, b in zip(some, found[2], strict=True))


def test_nan_stays_in_its_row() -> None:
    W, m, v = parameter(5, 70, dtype=torch.float32)
    grad = random_tokens(5, 70, dtype=torch.float32)
    clean = W.clone()
    ops.adam_rows(clean, grad, m.clone(), v.clone(), 1, remove_parallel=True, unit_norm=True, **RECIPE)
    grad[2, 3] = torch.nan
    ops.adam_rows(W, grad, m.bfloat16(), v.bfloat16(), 1, remove_parallel=True, unit_norm=True, **RECIPE)
    assert W[2].isnan().all()
    assert same_bits(W[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("shape", [(5, 70), (13,)])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_a_scale_of_nan_leaves_everything_as_it_is(shape: tuple[int, ...], moments: torch.dtype) -> None:
    W, m, v = parameter(*shape, dtype=torch.float32)
    tensors = (W, m.to(moments), v.to(moments) + 1, torch.full_like(W, 7, dtype=torch.float16))
    before = [tensor.clone() for tensor in tensors]
    by_rows = {"remove_parallel": len(shape) == 2, "unit_norm": len(shape) == 2}
    grad, scale = torch.full_like(W, torch.nan), torch.tensor(torch.nan)
    ops.adam_rows(W, grad, *tensors[1:3], 3, scale=scale, shadow=tensors[3], **by_rows, **RECIPE)
    assert all(same_bits(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("shape", [(5, 6), (0, 6)])
def test_opcheck(shape: tuple[int, int]) -> None:
    W, m, v = parameter(*shape, dtype=torch.float32)
    shadow = torch.zeros_like(W, dtype=torch.bfloat16)
    settings = (1, 1e-2, 0.9, 0.999, 1e-8, True, True)
    torch.library.opcheck(OP.default, (W, torch.ones_like(W), m, v, torch.tensor(0.5), shadow, *settings))


def test_autograd_sees_that_a_parameter_changed() -> None:
    W, m, v = parameter(3, 4)
    W = torch.nn.Parameter(W)
    loss = W.square().sum()
    ops.adam_rows(W, torch.ones_like(W), m, v, 1, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bad_arguments_are_named() -> None:
    """SPEC 7.1."""
    W, m, v = parameter(5, 6)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
        ((W.half(), W, m, v, 1), {}, TypeError, "W: expected torch.float32 or torch.float64, got torch.float16"),
        ((W, W.float(), m, v, 1), {}, TypeError, "grad: expected torch.float64, got torch.float32"),
        ((W, W[:4], m, v, 1), {}, ValueError, r"grad: expected \[5, 6\] contiguous as W, got \[4, 6\]"),
        ((W, W, m.T.contiguous().T, v, 1), {}, ValueError, r"exp_avg: expected .*, strides \[1, 5\]"),
        ((W, W, m, v.bfloat16(), 1), {}, TypeError, "exp_avg_sq: expected torch.float64, got torch.bfloat16"),
        ((W, W, m, v, 0), {}, ValueError, "step: expected at least 1, got 0"),
        ((W[0], W[0], m[0], v[0], 1), {"unit_norm": True}, ValueError, r"W: expected \[N, d\], got \[6\]"),
        ((W, W, m, v, 1), {"shadow": W}, TypeError, "shadow: expected torch.float16 or torch.bfloat16"),
        ((W, W, m, v, 1), {"scale": torch.ones(2)}, ValueError, "scale: expected"),
    ]
    for arguments, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            ops.adam_rows(*arguments, lr=0.1, **options)
