"""ops.decode and decode_error by the triton backend in the interpreter: SPEC 1.3, 4.1, 7.1."""

import pytest
import torch

import naive
from saemnesia_fast import ops
from saemnesia_fast.ops import reference
from triton_cases import IN_INTERPRETER, LAYOUTS, amid_nan, assert_no_worse, doubled, lay_out, poisoned_allocations
from weights import random_tokens, random_weights, same_bits

pytestmark = IN_INTERPRETER


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    with ops.use_backend("triton"), poisoned_allocations(monkeypatch):
        yield


def latents(*shape, n, dtype=torch.float32, integer=False):
    indices = torch.randint(n, shape, generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    return random_tokens(*shape, dtype=dtype, integer=integer), indices


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("k", "d"), [(1, 7), (6, 80), (19, 300)])
def test_is_as_good_as_eager(k, d, dtype):
    (_, _, b_dec), W_dec = random_weights(d, 40, dtype)
    values, indices = latents(2, 3, k, n=40, dtype=dtype)
    arguments = amid_nan(values, indices, W_dec, b_dec)
    x_hat = ops.decode(*arguments)
    assert x_hat.dtype == dtype
    flat = [values.flatten(0, 1), indices.flatten(0, 1), W_dec, b_dec]
    exact = reference.decode(*doubled(*flat))
    assert_no_worse(x_hat.flatten(0, 1), reference.decode(*flat), exact)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_counts_duplicates_twice(index_dtype):
    (_, _, b_dec), W_dec = random_weights(7, 3, torch.float32, integer=True)
    values, indices = latents(4, 10, n=3, integer=True)
    x_hat = ops.decode(values, indices.to(index_dtype), W_dec, b_dec)
    assert torch.equal(x_hat.double(), naive.decode(values, indices, W_dec, b_dec))


def test_reads_any_strides():
    (_, _, b_dec), W_dec = random_weights(7, 20, torch.float32)
    values, indices = latents(6, 4, n=20)
    W_dec, b_dec = W_dec.T.contiguous().T, b_dec.repeat_interleave(2)[::2]
    x_hat = ops.decode(values.T, indices.T, W_dec, b_dec)
    contiguous = [t.clone(memory_format=torch.contiguous_format) for t in (values.T, indices.T, W_dec, b_dec)]
    assert same_bits(x_hat, ops.decode(*contiguous))


def test_nan_stays_in_its_token():
    """SPEC 7.1."""
    (_, _, b_dec), W_dec = random_weights(7, 20, torch.float32)
    values, indices = latents(4, 6, n=20)
    clean = ops.decode(values, indices, W_dec, b_dec)
    values[2] = torch.nan
    x_hat = ops.decode(values, indices, W_dec, b_dec)
    assert x_hat[2].isnan().all()
    assert same_bits(x_hat[[0, 1, 3]], clean[[0, 1, 3]])


def test_batch_splits_and_runs_agree_bit_for_bit():
    (_, _, b_dec), W_dec = random_weights(40, 20, torch.float32)
    values, indices = latents(9, 16, n=20)
    x_hat = ops.decode(values, indices, W_dec, b_dec)
    for start, stop in ((0, 9), (0, 1), (1, 4)):
        assert same_bits(ops.decode(values[start:stop], indices[start:stop], W_dec, b_dec), x_hat[start:stop])


def test_no_tokens():
    (_, _, b_dec), W_dec = random_weights(7, 20, torch.float32)
    values, indices = latents(1, 6, n=20)
    ops.decode(values, indices, W_dec, b_dec)
    assert ops.decode(values[:0], indices[:0], W_dec, b_dec).shape == (0, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_error_is_as_good_as_eager(layout, dtype):
    (_, _, b_dec), W_dec = random_weights(6, 20, dtype)
    x = lay_out(layout, dtype)
    values, indices = latents(*x.shape[:-1], 5, n=20, dtype=dtype)
    arguments = [*amid_nan(values, indices, W_dec, b_dec, x), torch.tensor(-0.3)]
    found = ops.decode_error(*arguments)
    flat = [*(t.flatten(0, -2) for t in (values, indices)), W_dec, b_dec, x.reshape(-1, 6), torch.tensor(-0.3)]
    eager, exact = reference.decode_error(*flat), reference.decode_error(*doubled(*flat))
    for got, same_dtype, wanted in zip(found, eager, exact, strict=True):
        assert got.dtype == torch.float32
        assert_no_worse(got.reshape(wanted.shape), same_dtype, wanted)


def test_the_error_of_several_programs_a_token():
    """Splits and runs agree bit for bit, NaN stays in its token, and whole numbers are exact."""
    (_, _, b_dec), W_dec = random_weights(600, 20, torch.float32, integer=True)
    values, indices = latents(5, 19, n=20, integer=True)
    x, scale = random_tokens(5, 600, dtype=torch.float32, integer=True), torch.tensor(-0.25)
    grad, squares = ops.decode_error(values, indices, W_dec, b_dec, x, scale)
    error = x.double() - naive.decode(values, indices, W_dec, b_dec)
    assert torch.equal(grad.double(), -0.25 * error)
    assert torch.equal(squares.double(), error.square().sum(1))
    values, x = values + 0.1, x / 3
    clean = ops.decode_error(values, indices, W_dec, b_dec, x, scale)
    x[0, 599], values[3] = torch.nan, torch.nan
    for start, stop in ((0, 5), (1, 3), (4, 5), (2, 2)):
        part = ops.decode_error(values[start:stop], indices[start:stop], W_dec, b_dec, x[start:stop], scale)
        for got, want in zip(part, clean, strict=True):
            kept = torch.tensor([m for m in range(start, stop) if m not in (0, 3)], dtype=torch.long)
            assert same_bits(got[kept - start], want[kept])
        assert not part[1][[m - start for m in (0, 3) if start <= m < stop]].isfinite().any()
