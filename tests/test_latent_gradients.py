"""ops.latent_gradients: SPEC 4.3."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import naive
from saemnesia_fast import ops
from weights import random_tokens, random_weights, same_bits, threads

OP = torch.ops.saemnesia_fast.latent_gradients
latent_gradients: Callable[..., tuple[Tensor, ...]] = ops.latent_gradients


def step(*shape: int, n: int = 30, k: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """(values, indices, grad_x_hat, x, W_dec, b_dec, W_enc, extra_d_value) of tokens [*shape, d=7]."""
    weights, W_dec = random_weights(7, n, dtype)
    x, grad = random_tokens(*shape, 7, dtype=dtype), random_tokens(*shape, 7, dtype=dtype, seed=5)
    values, indices = ops.encode_topk(x, *weights, k)
    extra = random_tokens(*shape, k, dtype=dtype, seed=6)
    return values, indices, grad, x, W_dec, weights.b_dec, weights.W_enc, extra


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("optional", [(), ("W_enc",), ("extra_d_value",), ("W_enc", "extra_d_value")])
def test_equals_the_loops(optional: tuple[str, ...], dtype: torch.dtype, tolerance: float) -> None:
    *arguments, W_enc, extra = step(3, 6, k=25, dtype=dtype)
    assert (arguments[0] == 0).any()
    given = {name: {"W_enc": W_enc, "extra_d_value": extra}[name] for name in optional}
    for got, want in zip(
        latent_gradients(*arguments, **given), naive.latent_gradients(*arguments, **given), strict=True
    ):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_equals_dense_autograd() -> None:
    """d loss / d parameters of the whole autoencoder for a given d loss / d x_hat."""
    weights, W_dec = random_weights(7, 30)
    parameters = [t.requires_grad_() for t in (*weights, W_dec)]
    W_enc, b_enc, b_dec, W_dec = parameters
    x, grad = random_tokens(12, 7), random_tokens(12, 7, seed=5)
    values, indices = ops.encode_topk(x, W_enc, b_enc, b_dec, 8)
    pre = torch.relu((x - b_dec) @ W_enc.T + b_enc)
    kept = pre * torch.zeros_like(pre).scatter(1, indices.long(), 1.0)
    want = torch.autograd.grad(kept @ W_dec + b_dec, (W_enc, b_enc, W_dec, b_dec), grad)
    got = latent_gradients(values, indices, grad, x, W_dec, b_dec, W_enc)
    for ours, theirs in zip(got, want, strict=True):
        assert not ours.requires_grad
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_sums_in_a_fixed_order() -> None:
    """Bit-equal over repetitions and thread counts, also for a latent that every token has."""
    weights, W_dec = random_weights(64, 200, torch.float32)
    x, grad = (random_tokens(3000, 64, dtype=torch.float32, seed=seed) for seed in (1, 2))
    weights.b_enc[3] = 100
    values, indices = ops.encode_topk(x, *weights, 8)
    assert (indices == 3).sum() == 3000
    results = []
    for count in (1, 2, 2):
        with threads(count):
            results.append(latent_gradients(values, indices, grad, x, W_dec, weights.b_dec)[:3])
    for result in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(result, results[0], strict=True))


def test_no_tokens_gives_zeros() -> None:
    for gradient in latent_gradients(*step(0)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,)])
def test_opcheck(shape: tuple[int, ...]) -> None:
    torch.library.opcheck(OP.default, step(*shape, dtype=torch.float32))


def test_bad_arguments_are_named() -> None:
    """SPEC 7.1."""
    good = step(5)
    cases: list[tuple[int, Tensor, type[Exception], str]] = [
        (0, good[0][:4], ValueError, r"indices: expected \[\.\.\., k\] = \[4, 8\] to match values, got \[5, 8\]"),
        (2, good[2][:4], ValueError, r"grad_x_hat: expected \[\.\.\., d\] = \[5, 7\] to match x, got \[4, 7\]"),
        (4, good[4][:, :3], ValueError, r"W_dec: expected \[N, d\] = \[N, 7\] to match x \[\*, d=7\], got \[30, 3\]"),
        (5, good[5][:3], ValueError, r"b_dec: expected \[d\] = \[7\]"),
        (6, good[6][:9], ValueError, r"W_enc: expected \[N, d\] = \[30, 7\] to match W_dec .* got \[9, 7\]"),
        (7, good[7][:4], ValueError, r"extra_d_value: expected \[\.\.\., k\] = \[5, 8\] to match values, got \[4, 8\]"),
    ]
    for position, value, kind, message in cases:
        with pytest.raises(kind, match=message):
            latent_gradients(*good[:position], value, *good[position + 1 :])
    x = random_tokens(2, 3, 7)
    with pytest.raises(ValueError, match=r"values: expected \[\.\.\., k\] = \[2, 3, k\] to match x, got \[5, 8\]"):
        latent_gradients(good[0], good[1], x, x, *good[4:6])
