"""ops.decode_error: SPEC 1.3, 4.1, 7.1."""

import pytest
import torch

import naive
from saemnesia_fast import ops
from saemnesia_fast.ops import reference
from test_decode import random_latents
from triton_cases import LAYOUTS, assert_no_worse, doubled, lay_out
from weights import SPLIT_CASES, random_tokens, random_weights, same_bits, threads

pytestmark = pytest.mark.usefixtures("each_backend")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_loops_on_tokens_of_any_strides(layout: str, dtype: torch.dtype) -> None:
    x = lay_out(layout, dtype)
    (_, _, b_dec), W_dec = random_weights(6, 20, dtype)
    values, indices = random_latents(*x.shape[:-1], 5, n=20, dtype=dtype)
    indices[..., 1] = indices[..., 0]
    scale = torch.tensor(-0.3, dtype=torch.float64)
    grad, squares = ops.decode_error(values, indices, W_dec, b_dec, x, scale)
    assert grad.dtype == squares.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error = x.double() - naive.decode(values, indices, W_dec, b_dec)
    flat = [tensor.flatten(0, -2) for tensor in (values, indices)]
    eager = reference.decode_error(*flat, W_dec, b_dec, x.reshape(-1, 6), scale)
    for got, same_dtype, exact in zip((grad, squares), eager, (scale * error, error.square().sum(-1)), strict=True):
        assert got.shape == exact.shape
        assert_no_worse(got, same_dtype.view(exact.shape), exact)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_exact_on_whole_numbers(index_dtype: torch.dtype) -> None:
    (_, _, b_dec), W_dec = random_weights(150, 20, torch.float32, integer=True)
    values, x = (random_tokens(8, width, dtype=torch.float32, integer=True) for width in (6, 150))
    _, indices = random_latents(8, 6, n=20)
    grad, squares = ops.decode_error(values, indices.to(index_dtype), W_dec, b_dec, x, torch.tensor(-0.25))
    error = x.double() - naive.decode(values, indices, W_dec, b_dec)
    assert torch.equal(grad.double(), -0.25 * error)
    assert torch.equal(squares.double(), error.square().sum(1))


def test_is_the_gradient_of_the_fraction_of_variance_unexplained() -> None:
    """SPEC 4.1."""
    (_, _, b_dec), W_dec = random_weights(7, 20)
    values, indices = random_latents(9, 6, n=20)
    x = random_tokens(9, 7)
    variance = (x - x.mean(0)).square().sum()
    x_hat = ops.decode(values, indices, W_dec, b_dec).requires_grad_()
    fvu = (x - x_hat).square().sum() / variance
    grad, squares = ops.decode_error(*doubled(values, indices, W_dec, b_dec, x), -2 / variance)
    torch.testing.assert_close(squares.sum() / variance, fvu.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, *torch.autograd.grad(fvu, x_hat), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_stays_in_its_token(bad: float) -> None:
    """SPEC 7.1. That of a value, and that of x."""
    (_, _, b_dec), W_dec = random_weights(7, 20)
    values, indices = random_latents(5, 6, n=20)
    x, scale = random_tokens(5, 7), torch.tensor(2.0)
    clean = ops.decode_error(values, indices, W_dec, b_dec, x, scale)
    values[1], x[3, 4] = torch.nan, bad
    spoilt = ops.decode_error(values, indices, W_dec, b_dec, x, scale)
    assert not spoilt[1][[1, 3]].isfinite().any()
    for got, want in zip(spoilt, clean, strict=True):
        assert same_bits(got[[0, 2, 4]], want[[0, 2, 4]])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("d", "n", "dtype"), SPLIT_CASES)
def test_batch_splits_agree_bit_for_bit(d: int, n: int, dtype: torch.dtype, count: int) -> None:
    (_, _, b_dec), W_dec = random_weights(d, n, dtype)
    values, indices = random_latents(150, 16, n=n, dtype=dtype)
    x, scale = random_tokens(150, d, dtype=dtype), torch.tensor(0.7)
    with threads(count):
        whole = ops.decode_error(values, indices, W_dec, b_dec, x, scale)
        for start, stop in ((0, 1), (1, 2), (2, 5), (5, 150), (149, 150), (3, 3)):
            part = ops.decode_error(values[start:stop], indices[start:stop], W_dec, b_dec, x[start:stop], scale)
            assert all(same_bits(some, all_[start:stop]) for some, all_ in zip(part, whole, strict=True))


def test_bad_arguments_are_named() -> None:
    """SPEC 7.1."""
    (_, _, b_dec), W_dec = random_weights(4, 9)
    values, indices = random_latents(6, 5, n=9)
    x, scale = random_tokens(6, 4), torch.tensor(1.0)
    cases = [
        ((values, indices, W_dec, b_dec, x[:5], scale), ValueError, r"values: expected .* = \[5, k\] to match x"),
        ((values, indices[:, :3], W_dec, b_dec, x, scale), ValueError, r"indices: expected .* = \[6, 5\]"),
        ((values, indices.double(), W_dec, b_dec, x, scale), TypeError, "indices: expected int32 or int64"),
        ((values, indices, W_dec.T, b_dec, x, scale), ValueError, r"W_dec: expected \[N, d\] = \[N, 4\]"),
        ((values, indices, W_dec, b_dec[:3], x, scale), ValueError, r"b_dec: expected \[d\] = \[4\]"),
        ((values, indices, W_dec, b_dec, x, x), ValueError, r"scale: expected one number, \[\], got \[6, 4\]"),
        ((values, indices, W_dec, b_dec, x, 1.0), TypeError, "scale: expected a torch.Tensor, got float"),
        ((values, indices + 9, W_dec, b_dec, x, scale), ValueError, r"indices: expected indices in \[0, N=9\), got"),
    ]
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            ops.decode_error(*arguments)
