"""ops.decode: SPEC 1.3, 7.1."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import naive
from saemnesia_fast import ops
from weights import SPLIT_CASES, random_tokens, random_weights, same_bits, threads

OP = torch.ops.saemnesia_fast.decode
pytestmark = pytest.mark.usefixtures("each_backend")
decode: Callable[..., Tensor] = ops.decode


def random_latents(*shape: int, n: int, dtype: torch.dtype = torch.float64, seed: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(n, shape, generator=generator, dtype=torch.int32)
    return random_tokens(*shape, dtype=dtype, seed=seed).abs(), indices


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)],
)
def test_equals_the_loops_and_counts_duplicates_twice(dtype: torch.dtype, tolerance: float) -> None:
    (_, _, b_dec), W_dec = random_weights(11, 20, dtype)
    values, indices = random_latents(3, 5, 6, n=20, dtype=dtype)
    indices[0, 0, 1] = indices[0, 0, 0]
    x_hat = decode(values, indices, W_dec, b_dec)
    assert x_hat.dtype == dtype
    torch.testing.assert_close(
        x_hat.double(), naive.decode(values, indices, W_dec, b_dec), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_exact_on_whole_numbers(index_dtype: torch.dtype) -> None:
    (_, _, b_dec), W_dec = random_weights(7, 20, torch.float32, integer=True)
    _, indices = random_latents(8, 6, n=20)
    values = random_tokens(8, 6, dtype=torch.float32, integer=True)
    x_hat = decode(values, indices.to(index_dtype), W_dec, b_dec)
    assert torch.equal(x_hat.double(), naive.decode(values, indices, W_dec, b_dec))


def test_no_tokens() -> None:
    (_, _, b_dec), W_dec = random_weights(7, 20)
    values, indices = random_latents(0, 6, n=20)
    assert decode(values, indices, W_dec, b_dec).shape == (0, 7)


def test_nan_stays_in_its_token() -> None:
    """SPEC 7.1."""
    (_, _, b_dec), W_dec = random_weights(7, 20)
    values, indices = random_latents(4, 6, n=20)
    clean = decode(values, indices, W_dec, b_dec)
    values[2] = torch.nan
    x_hat = decode(values, indices, W_dec, b_dec)
    assert x_hat[2].isnan().all()
    assert same_bits(x_hat[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("d", "n", "dtype"), SPLIT_CASES)
def test_batch_splits_agree_bit_for_bit(d: int, n: int, dtype: torch.dtype, count: int) -> None:
    (_, _, b_dec), W_dec = random_weights(d, n, dtype)
    values, indices = random_latents(150, 16, n=n, dtype=dtype)
    with threads(count):
        x_hat = decode(values, indices, W_dec, b_dec)
        for start, stop in ((0, 1), (1, 2), (2, 5), (5, 150), (149, 150)):
            assert same_bits(decode(values[start:stop], indices[start:stop], W_dec, b_dec), x_hat[start:stop])


def test_gradcheck() -> None:
    (_, _, b_dec), W_dec = random_weights(4, 9)
    values, indices = random_latents(2, 3, 5, n=9)
    arguments = tuple(t.requires_grad_() for t in (values, W_dec, b_dec))
    assert torch.autograd.gradcheck(lambda v, w, b: OP(v, indices, w, b), arguments)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)])
def test_opcheck(shape: tuple[int, ...], grad: bool) -> None:
    (_, _, b_dec), W_dec = random_weights(4, 9, torch.float32)
    values, indices = random_latents(*shape, n=9, dtype=torch.float32)
    values, W_dec, b_dec = (t.requires_grad_(grad) for t in (values, W_dec, b_dec))
    torch.library.opcheck(OP.default, (values, indices, W_dec, b_dec))


def test_sparse_backward_of_encode_and_decode_equals_dense_autograd() -> None:
    """The whole autoencoder, float64, against relu, scatter and matrix products (SPEC 4.3)."""
    weights, W_dec = random_weights(5, 16)
    arguments = [t.requires_grad_() for t in (random_tokens(9, 5), *weights, W_dec)]
    x, W_enc, b_enc, b_dec, W_dec = arguments
    values, indices = ops.encode_topk(x, W_enc, b_enc, b_dec, 6)
    x_hat = decode(values, indices, W_dec, b_dec)
    pre = torch.relu((x - b_dec) @ W_enc.T + b_enc)
    mask = torch.zeros_like(pre).scatter(1, indices.long(), 1.0)
    dense = (pre * mask) @ W_dec + b_dec
    torch.testing.assert_close(x_hat, dense, rtol=1e-12, atol=1e-12)
    g = random_tokens(9, 5, seed=8)
    wanted = torch.autograd.grad(dense, arguments, g)
    for got, want in zip(torch.autograd.grad(x_hat, arguments, g), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_bad_arguments_are_named() -> None:
    """SPEC 7.1."""
    (_, _, b_dec), W_dec = random_weights(4, 9)
    values, indices = random_latents(6, 5, n=9)
    cases = [
        (
            (values, indices[:, :3], W_dec, b_dec),
            ValueError,
            r"indices: expected \[\.\.\., k\] = \[6, 5\] .* got \[6, 3\]",
        ),
        ((values, indices.double(), W_dec, b_dec), TypeError, r"indices: expected int32 or int64, got torch.float64"),
        (
            (values, indices, W_dec.T, b_dec),
            ValueError,
            r"b_dec: expected \[d\] = \[9\] to match W_dec \[N, d=9\], got \[4\]",
        ),
        ((values, indices, W_dec[0], b_dec), ValueError, r"W_dec: expected \[N, d\] = \[N, d\] .* got \[4\]"),
        ((values, indices + 9, W_dec, b_dec), ValueError, r"indices: expected indices in \[0, N=9\), got"),
        ((values, indices - 9, W_dec, b_dec), ValueError, r"indices: expected indices in \[0, N=9\), got"),
    ]
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            decode(*arguments)
