"""ops.encode_topk: SPEC 1.1, 1.2, 1.6, 7.1."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import naive
from saemnesia_fast import ops
from weights import SPLIT_CASES, random_tokens, random_weights, same_bits, threads

OP = torch.ops.saemnesia_fast.encode_topk
pytestmark = pytest.mark.usefixtures("each_backend")
encode_topk: Callable[..., ops.SparseLatents] = ops.encode_topk


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_equals_the_loops_on_random_numbers(dtype: torch.dtype, tolerance: float) -> None:
    weights, _ = random_weights(11, 40, dtype)
    x = random_tokens(3, 5, 11, dtype=dtype)
    values, indices = encode_topk(x, *weights, 6)
    want_values, want_indices = naive.encode_topk(x, *weights, 6)
    assert (values.dtype, indices.dtype) == (dtype, torch.int32)
    torch.testing.assert_close(values.double(), want_values, rtol=tolerance, atol=tolerance)
    assert torch.equal(indices, want_indices)


@given(st.integers(0, 6), st.integers(1, 5), st.integers(1, 30), st.data(), st.integers(0, 99))
def test_ties_go_to_the_lowest_index_in_ascending_order(m: int, d: int, n: int, data: st.DataObject, seed: int) -> None:
    """SPEC 1.2, on whole numbers, where nothing is rounded and equal values (zeros above all) abound."""
    k = data.draw(st.integers(1, n))
    weights, _ = random_weights(d, n, torch.float32, integer=True, seed=seed)
    x = random_tokens(m, d, dtype=torch.float32, integer=True, seed=seed + 1)
    values, indices = encode_topk(x, *weights, k)
    want_values, want_indices = naive.encode_topk(x, *weights, k)
    assert torch.equal(values.double(), want_values)
    assert torch.equal(indices, want_indices)


def test_selects_on_float32_accumulators() -> None:
    """SPEC 1.6: two pre-activations that bfloat16 cannot tell apart."""
    W_enc = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.bfloat16)
    x = torch.tensor([[1.0, 2.0**-10]], dtype=torch.bfloat16)
    zeros = torch.zeros(2, dtype=torch.bfloat16)
    values, indices = encode_topk(x, W_enc, zeros, zeros, 1)
    assert indices.tolist() == [[1]]
    assert (values.dtype, values.tolist()) == (torch.bfloat16, [[1.0]])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("k", [1, 4, 12])
def test_a_bad_token_becomes_nan_and_touches_no_other(bad: float, k: int) -> None:
    """SPEC 7.1."""
    weights, _ = random_weights(5, 12, torch.float32)
    x = random_tokens(7, 5, dtype=torch.float32)
    clean = encode_topk(x, *weights, k)
    x[3, 2] = bad
    values, indices = encode_topk(x, *weights, k)
    assert values[3].isnan().all()
    assert ((indices >= 0) & (indices < 12)).all()
    others = [0, 1, 2, 4, 5, 6]
    assert same_bits(values[others], clean.values[others])
    assert torch.equal(indices[others], clean.indices[others])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("d", "n", "dtype"), SPLIT_CASES)
def test_batch_splits_agree_bit_for_bit(d: int, n: int, dtype: torch.dtype, count: int) -> None:
    weights, _ = random_weights(d, n, dtype)
    x = random_tokens(300, d, dtype=dtype)
    with threads(count):
        values, indices = encode_topk(x, *weights, 8)
        for start, stop in ((0, 1), (1, 2), (2, 5), (5, 133), (133, 300), (299, 300)):
            part = encode_topk(x[start:stop], *weights, 8)
            assert same_bits(part.values, values[start:stop])
            assert torch.equal(part.indices, indices[start:stop])


@given(st.permutations(range(9)))
def test_order_of_tokens_does_not_matter(order: list[int]) -> None:
    weights, _ = random_weights(6, 20, torch.float32)
    x = random_tokens(9, 6, dtype=torch.float32)
    values, indices = encode_topk(x, *weights, 5)
    moved = encode_topk(x[order], *weights, 5)
    assert same_bits(moved.values, values[order])
    assert torch.equal(moved.indices, indices[order])


@pytest.mark.parametrize("layout", ["permuted", "channels_last", "sliced", "expanded"])
def test_reads_tokens_by_their_strides(layout: str) -> None:
    """SPEC 7.2."""
    weights, _ = random_weights(6, 20)
    image = random_tokens(2, 6, 3, 4)
    x = {
        "permuted": image.permute(0, 2, 3, 1),
        "channels_last": image.to(memory_format=torch.channels_last).permute(0, 2, 3, 1),
        "sliced": random_tokens(2, 3, 8, 12)[:, :, ::2, 3:9],
        "expanded": random_tokens(1, 6).expand(4, 6),
    }[layout]
    values, indices = encode_topk(x, *weights, 5)
    want = encode_topk(x.clone(memory_format=torch.contiguous_format), *weights, 5)
    assert same_bits(values, want.values)
    assert torch.equal(indices, want.indices)
    assert values.shape == (*x.shape[:-1], 5)
    assert values.is_contiguous()


def test_gradients_are_those_of_the_dense_formula_through_kept_positive_values() -> None:
    weights, _ = random_weights(5, 16)
    arguments = [t.requires_grad_() for t in (random_tokens(9, 5), *weights)]
    g = random_tokens(9, 12, seed=3)
    values, indices = encode_topk(*arguments, 12)
    assert (values == 0).any()
    got = torch.autograd.grad(values, arguments, g)
    x, W_enc, b_enc, b_dec = arguments
    dense = torch.relu((x - b_dec) @ W_enc.T + b_enc).gather(1, indices.long())
    for ours, want in zip(got, torch.autograd.grad(dense, arguments, g), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    weights, _ = random_weights(4, 9)
    arguments = tuple(t.requires_grad_() for t in (random_tokens(2, 3, 4), *weights))
    assert torch.autograd.gradcheck(lambda *a: OP(*a, 3, "default")[0], arguments)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4), (1, 4)])
def test_opcheck(shape: tuple[int, ...], grad: bool) -> None:
    weights, _ = random_weights(4, 9, torch.float32)
    x = random_tokens(*shape, dtype=torch.float32)
    torch.library.opcheck(OP.default, (*(t.requires_grad_(grad) for t in (x, *weights)), 3, "default"))


def test_compiles_as_one_graph() -> None:
    weights, _ = random_weights(4, 9)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(x: Tensor) -> Tensor:
        return encode_topk(x, *weights, 3).values.square().sum()

    x = random_tokens(5, 4).requires_grad_()
    (got,) = torch.autograd.grad(loss(x), x)
    (want,) = torch.autograd.grad(encode_topk(x, *weights, 3).values.square().sum(), x)
    assert same_bits(got, want)


def test_bad_arguments_are_named() -> None:
    """SPEC 7.1."""
    (W_enc, b_enc, b_dec), _ = random_weights(4, 9)
    x = random_tokens(5, 4)
    cases: list[tuple[tuple[object, ...], type[Exception], str]] = [
        (
            (x, W_enc.T, b_enc, b_dec, 3),
            ValueError,
            r"W_enc: expected \[N, d\] = \[N, 4\] to match x \[\*, d=4\], got \[4, 9\]",
        ),
        (
            (x, W_enc, b_enc[:5], b_dec, 3),
            ValueError,
            r"b_enc: expected \[N\] = \[9\] to match W_enc \[N=9, d\], got \[5\]",
        ),
        ((x, W_enc, b_enc, b_dec[:2], 3), ValueError, r"b_dec: expected \[d\] = \[4\] .* got \[2\]"),
        ((x, W_enc, b_enc, b_dec, 10), ValueError, r"k: expected 1 <= k <= N = 9, got 10"),
        ((x, W_enc, b_enc, b_dec, 0), ValueError, r"k: expected 1 <= k"),
        ((x, W_enc, b_enc, b_dec, 2.0), TypeError, r"k: expected an int, got float"),
        ((x.int(), W_enc, b_enc, b_dec, 3), TypeError, r"x: expected a floating-point tensor, got torch.int32"),
        ((x.tolist(), W_enc, b_enc, b_dec, 3), TypeError, r"x: expected a torch.Tensor, got list"),
        ((x[0, 0], W_enc, b_enc, b_dec, 3), ValueError, r"x: expected \[\.\.\., d\] with d >= 1, got \[\]"),
        ((x, W_enc.to("meta"), b_enc, b_dec, 3), ValueError, r"W_enc: expected device cpu .* got meta"),
    ]
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            encode_topk(*arguments)
