"""ops.probe by the triton backend in the interpreter: SPEC 3.1, 7.1."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import naive
from saemnesia_fast import ops
from saemnesia_fast.ops import reference
from test_probe import test_a_bad_token_becomes_nan_and_is_not_steered  # noqa: F401
from triton_cases import IN_INTERPRETER, LAYOUTS, amid_nan, assert_no_worse, doubled, lay_out, poisoned_allocations
from weights import random_tokens, random_weights, same_bits

pytestmark = IN_INTERPRETER


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    with ops.use_backend("triton"), poisoned_allocations(monkeypatch):
        yield


@settings(max_examples=12)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 20), st.data(), st.integers(0, 99))
def test_equals_the_loops(groups, per_group, n, data, seed):
    """On whole numbers: activation of each entry, and steered = kept and above threshold; latents may recur."""
    k, s = data.draw(st.integers(1, n)), data.draw(st.integers(0, 8))
    weights, _ = random_weights(3, n, torch.float32, integer=True, seed=seed)
    x = random_tokens(groups, per_group, 3, dtype=torch.float32, integer=True, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randint(n, (groups, s), generator=generator)
    thresholds = torch.randint(-1, 4, (groups, s), generator=generator).float()
    activations, steered = ops.probe(*amid_nan(x, *weights, k, latents, thresholds))
    assert activations.shape == steered.shape == (groups, per_group, s)
    for group in range(groups):
        for token, pre in enumerate(naive.pre_activations(x[group], *weights)):
            kept = naive.topk(pre, k)
            for entry, latent in enumerate(latents[group].tolist()):
                want = latent in kept and pre[latent] > max(thresholds[group, entry].item(), 0)
                assert activations[group, token, entry].item() == pre[latent]
                assert steered[group, token, entry].item() == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_is_as_good_as_eager(dtype):
    weights, _ = random_weights(70, 100, dtype)
    x = random_tokens(90, 70, dtype=dtype)
    arguments = amid_nan(x, *weights, 16, torch.randperm(100)[:20][None].int(), torch.rand(1, 20).to(dtype))
    activations, steered = ops.probe(*arguments)
    eager, _ = reference.probe(*arguments)
    exact, wanted = reference.probe(*doubled(*arguments))
    assert activations.dtype == dtype
    assert_no_worse(activations, eager, exact)
    assert torch.equal(steered, wanted)
    assert 0 < steered.sum() < steered.numel()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_tokens_by_their_strides(layout):
    """SPEC 7.2."""
    weights, _ = random_weights(6, 40, torch.float32)
    x = lay_out(layout)
    lines = torch.arange(12).view(2, 6), torch.full((2, 6), 0.5)
    activations, steered = ops.probe(*amid_nan(x), *weights, 9, *lines)
    want = ops.probe(x.clone(memory_format=torch.contiguous_format), *weights, 9, *lines)
    assert same_bits(activations, want[0])
    assert torch.equal(steered, want[1])


def test_agrees_bit_for_bit_with_encode_topk():
    """The same product in the same arithmetic: what is compared was computed alike."""
    weights, _ = random_weights(40, 100, torch.float32)
    x = random_tokens(20, 40, dtype=torch.float32)
    values, indices = ops.encode_topk(x, *weights, 20)
    activations, steered = ops.probe(x, *weights, 20, torch.arange(100), torch.zeros(100))
    assert same_bits(activations.gather(1, indices.long()), values)
    kept = torch.zeros_like(steered).scatter(1, indices.long(), values > 0)
    assert torch.equal(steered, kept)


def test_no_tokens_or_entries():
    weights, _ = random_weights(7, 30, torch.float32)
    x = random_tokens(4, 7, dtype=torch.float32)
    nothing = torch.zeros(0, dtype=torch.long), torch.zeros(0)
    assert [t.shape for t in ops.probe(x, *weights, 8, *nothing)] == [(4, 0)] * 2
    assert [t.shape for t in ops.probe(x[:0], *weights, 8, *(t.new_zeros(3) for t in nothing))] == [(0, 3)] * 2
