"""ops.encode_topk by the triton backend in the interpreter: SPEC 1.1, 1.2, 1.6, 7.1, 7.2."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import naive
from saemnesia_fast import ops
from saemnesia_fast.ops import reference, triton_backend, triton_product
from triton_cases import IN_INTERPRETER, LAYOUTS, amid_nan, assert_no_worse, doubled, lay_out, poisoned_allocations
from weights import random_tokens, random_weights, same_bits

pytestmark = IN_INTERPRETER


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    with ops.use_backend("triton"), poisoned_allocations(monkeypatch):
        yield


@settings(max_examples=12)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 50), st.data(), st.integers(0, 99))
def test_ties_go_to_the_lowest_index_in_ascending_order(m, d, n, data, seed):
    """SPEC 1.2, on whole numbers, where nothing is rounded and equal values (zeros above all) abound."""
    k = data.draw(st.integers(1, n))
    weights, _ = random_weights(d, n, torch.float32, integer=True, seed=seed)
    x = random_tokens(m, d, dtype=torch.float32, integer=True, seed=seed + 1)
    values, indices = ops.encode_topk(*amid_nan(x, *weights), k)
    want_values, want_indices = naive.encode_topk(x, *weights, k)
    assert torch.equal(values.double(), want_values)
    assert torch.equal(indices, want_indices)


@pytest.mark.parametrize("k", [1, 33, 65, 100, 129, 256])
def test_every_group_size_with_ties(k):
    weights, _ = random_weights(3, 300, torch.float32, integer=True)
    x = random_tokens(3, 3, dtype=torch.float32, integer=True)
    values, indices = ops.encode_topk(*amid_nan(x, *weights), k)
    want_values, want_indices = naive.encode_topk(x, *weights, k)
    assert torch.equal(values.double(), want_values)
    assert torch.equal(indices, want_indices)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
    ],
)
@pytest.mark.parametrize(("m", "d", "n", "k"), [(5, 37, 200, 9), (67, 64, 130, 32)])
def test_is_as_good_as_eager(m, d, n, k, dtype, weight_dtype):
    weights, _ = random_weights(d, n, weight_dtype)
    arguments = (random_tokens(m, d, dtype=dtype), *weights, k)
    values, indices = ops.encode_topk(*amid_nan(*arguments))
    assert (values.dtype, indices.dtype) == (dtype, torch.int32)
    pre = reference.pre_activations(*doubled(*arguments[:4]))
    eager, kept = reference.encode_topk(*arguments)
    assert_no_worse(values, eager, pre.gather(1, indices.long()))
    exact = pre.topk(k)
    margin = 2 * (eager.double() - pre.gather(1, kept.long())).abs().max() + 2.0**-20 * pre.max()
    in_doubt = (pre - exact.values[:, -1:]).abs() <= margin
    ours = torch.zeros_like(pre, dtype=torch.bool).scatter(1, indices.long(), True)
    wanted = torch.zeros_like(ours).scatter(1, exact.indices, True)
    assert (ours.sum(1) == k).all()
    assert ((ours == wanted) | in_doubt).all()
    assert (values.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_tokens_by_their_strides(layout):
    """SPEC 7.2."""
    weights, _ = random_weights(6, 40, torch.float32)
    x = lay_out(layout)
    values, indices = ops.encode_topk(*amid_nan(x), *weights, 5)
    want = ops.encode_topk(x.clone(memory_format=torch.contiguous_format), *weights, 5)
    assert same_bits(values, want.values)
    assert torch.equal(indices, want.indices)
    assert values.shape == (*x.shape[:-1], 5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_token_becomes_nan_and_touches_no_other(bad):
    """SPEC 7.1."""
    (W_enc, b_enc, b_dec), _ = random_weights(5, 12, torch.float32)
    x = random_tokens(7, 5, dtype=torch.float32)
    W_enc = W_enc.abs()  # so that -inf alone would end in relu
    clean = ops.encode_topk(x, W_enc, b_enc, b_dec, 4)
    x[3, 2] = bad
    values, indices = ops.encode_topk(x, W_enc, b_enc, b_dec, 4)
    assert values[3].isnan().all()
    assert ((indices >= 0) & (indices < 12)).all()
    others = [0, 1, 2, 4, 5, 6]
    assert same_bits(values[others], clean.values[others])
    assert torch.equal(indices[others], clean.indices[others])


def test_batch_splits_and_runs_agree_bit_for_bit():
    weights, _ = random_weights(40, 200, torch.float32)
    x = random_tokens(70, 40, dtype=torch.float32)
    values, indices = ops.encode_topk(x, *weights, 8)
    for start, stop in ((0, 70), (0, 1), (63, 70)):
        part = ops.encode_topk(x[start:stop], *weights, 8)
        assert same_bits(part.values, values[start:stop])
        assert torch.equal(part.indices, indices[start:stop])


def test_long_batches_are_encoded_in_parts(monkeypatch):
    weights, _ = random_weights(6, 40, torch.float32)
    x = lay_out("nchw")
    want = ops.encode_topk(x, *weights, 8)
    monkeypatch.setattr(triton_backend, "Z_BYTES", 5 * 40 * 4)
    values, indices = ops.encode_topk(x, *weights, 8)
    assert same_bits(values, want.values)
    assert torch.equal(indices, want.indices)


@pytest.mark.parametrize(("n", "k"), [(300, 9), (50, 50), (600, 100)])
def test_select_alone_equals_the_whole(n, k):
    (W_enc, b_enc, b_dec), _ = random_weights(6, n, torch.float32, integer=True)
    x = random_tokens(18, 6, dtype=torch.float32, integer=True)
    x[4, 2] = torch.nan
    values, indices = triton_backend.select_topk((x - b_dec) @ W_enc.T, b_enc, k, torch.float32)
    want = ops.encode_topk(x, W_enc, b_enc, b_dec, k)
    assert same_bits(values, want.values)
    assert torch.equal(indices, want.indices)


def test_the_folded_bias_follows_the_weights():
    (W_enc, b_enc, b_dec), _ = random_weights(6, 40, torch.float32, integer=True)
    x = random_tokens(3, 6, dtype=torch.float32, integer=True)
    for weight in (W_enc, b_enc, b_dec, None):
        values, _ = ops.encode_topk(x, W_enc, b_enc, b_dec, 5)
        assert torch.equal(values, reference.encode_topk(x, W_enc, b_enc, b_dec, 5)[0])
        if weight is not None:
            weight += 1
    for step in range(3):
        values, _ = ops.encode_topk(x, W_enc, b_enc + step, b_dec, 5)
        assert torch.equal(values, reference.encode_topk(x, W_enc, b_enc + step, b_dec, 5)[0])
    before = len(triton_product._biases)
    del W_enc, weight
    assert len(triton_product._biases) == before - 1


def test_refuses_what_it_cannot_keep():
    weights, _ = random_weights(3, 300, torch.float32)
    x = random_tokens(1, 3, dtype=torch.float32)
    ops.encode_topk(x, *weights, 256)
    with pytest.raises(RuntimeError, match="encode_topk: backend 'triton' was chosen but .* keeps at most 256 latents"):
        ops.encode_topk(x, *weights, 257)
    with pytest.raises(
        RuntimeError, match="encode_topk: backend 'triton' was chosen but cannot compute this: .* float32"
    ):
        ops.encode_topk(x.double(), *weights, 2)


def test_no_tokens():
    weights, _ = random_weights(7, 30, torch.float32)
    ops.encode_topk(random_tokens(1, 7, dtype=torch.float32), *weights, 8)
    values, indices = ops.encode_topk(torch.zeros(0, 3, 7), *weights, 8)
    assert values.shape == indices.shape == (0, 3, 8)
