"""ops.erase by the triton backend in the interpreter: SPEC 3.1 - 3.5, 7.1, 7.2."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import naive
from saemnesia_fast import ops
from saemnesia_fast.ops import reference, triton_backend
from triton_cases import (
    IN_INTERPRETER,
    LAYOUTS,
    MODES,
    amid_nan,
    assert_no_worse,
    doubled,
    lay_out,
    poisoned_allocations,
    selection,
)
from weights import random_tokens, random_weights, same_bits

pytestmark = IN_INTERPRETER


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    with ops.use_backend("triton"), poisoned_allocations(monkeypatch):
        yield


def reference_erase(x, *arguments):
    return reference.erase(x.reshape(-1, x.shape[-1]), *arguments).view(x.shape)


@settings(max_examples=12)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(2, 20), st.data(), st.integers(0, 99))
def test_ties_are_exact(groups, per_group, n, data, seed):
    """On whole numbers, where every sum is exact: top-k ties, z equal to its threshold, k = N (SPEC 1.2, 3.1)."""
    k = data.draw(st.integers(1, n))
    weights, W_dec = random_weights(3, n, torch.float32, integer=True, seed=seed)
    x = random_tokens(groups * per_group, 3, dtype=torch.float32, integer=True, seed=seed + 1)
    latents, thresholds, factors = selection(groups, data.draw(st.integers(1, n)), n=n, seed=seed)
    arguments = amid_nan(x, *weights, W_dec, k, latents, (thresholds * 4).round(), factors.round(), "exact")
    assert torch.equal(ops.erase(*arguments).double(), naive.erase(*arguments))


@pytest.mark.parametrize("mode", ["released", "reconstruct"])
def test_ties_are_exact_with_a_reconstruction(mode):
    weights, W_dec = random_weights(3, 20, torch.float32, integer=True)
    x = random_tokens(8, 3, dtype=torch.float32, integer=True)
    latents, thresholds, factors = selection(2, 9, n=20)
    arguments = (x, *weights, W_dec, 5, latents, (thresholds * 4).round(), factors.round(), mode)
    assert torch.equal(ops.erase(*arguments).double(), naive.erase(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("mode", "norm_scaled"), [(mode, norm) for mode in MODES for norm in (False, True)])
def test_is_as_good_as_eager(mode, norm_scaled, dtype):
    weights, W_dec = random_weights(37, 60, dtype)
    x = random_tokens(2, 3, 37, dtype=dtype)
    arguments = amid_nan(x, *weights, W_dec, 8, *selection(2, 12, n=60, dtype=dtype), mode, norm_scaled)
    ours = ops.erase(*arguments)
    assert ours.dtype == dtype
    assert_no_worse(ours, reference_erase(*arguments), reference_erase(*doubled(*arguments)))
    assert not torch.equal(ours, x)


def test_many_tokens_channels_entries_and_latents():
    """More than one tile of everything, and k beyond what encode_topk keeps."""
    weights, W_dec = random_weights(300, 320, torch.float32)
    x = random_tokens(70, 300, dtype=torch.float32)
    arguments = (x, *weights, W_dec, 270, *selection(2, 20, n=320), "exact", False)
    want = reference_erase(*arguments)
    assert ((want != x).any(-1)).sum() > 65
    assert_no_worse(ops.erase(*arguments), want, reference_erase(*doubled(*arguments)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_exact_leaves_untouched_tokens_bit_identical(dtype):
    """SPEC 3.3."""
    weights, W_dec = random_weights(7, 30, dtype)
    x = random_tokens(100, 7, dtype=dtype)
    x[:, 3] = -0.0
    lines = selection(2, 2, n=30, dtype=dtype)
    erased = ops.erase(x, *weights, W_dec, 8, *lines)
    touched = (reference_erase(x, *weights, W_dec, 8, *lines, "exact", False) != x).any(-1)
    assert 0 < touched.sum() < 100
    assert same_bits(erased[~touched], x[~touched])
    assert (erased[touched] != x[touched]).any(-1).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_and_writes_tokens_by_their_strides(layout):
    """SPEC 7.2."""
    weights, W_dec = random_weights(6, 30, torch.float32)
    x = lay_out(layout)
    (surrounded,) = amid_nan(x)
    lines = selection(2, 12, n=30)
    for mode in ("exact", "released") if layout == "nchw" else ("exact",):
        erased = ops.erase(surrounded, *weights, W_dec, 8, *lines, mode)
        assert erased.stride() == torch.empty_like(x).stride()
        assert same_bits(
            erased, ops.erase(x.clone(memory_format=torch.contiguous_format), *weights, W_dec, 8, *lines, mode)
        )


@pytest.mark.parametrize("mode", MODES)
def test_in_place_gives_the_same_bits(mode):
    weights, W_dec = random_weights(6, 30, torch.float32)
    x = lay_out("nchw")
    x[0, 1, 1, 3] = torch.inf
    lines = selection(2, 12, n=30)
    want = ops.erase(x, *weights, W_dec, 8, *lines, mode)
    assert triton_backend.erase(x, *weights, W_dec, 8, *lines, mode, False, in_place=True) is x
    assert same_bits(x, want)


def test_batch_splits_and_runs_agree_bit_for_bit():
    weights, W_dec = random_weights(40, 200, torch.float32)
    x = random_tokens(70, 40, dtype=torch.float32)
    arguments = (*weights, W_dec, 16, *selection(1, 20, n=200))
    erased = ops.erase(x, *arguments)
    for start, stop in ((0, 70), (0, 1), (1, 4), (63, 70)):
        assert same_bits(ops.erase(x[start:stop], *arguments), erased[start:stop])


@pytest.mark.parametrize("mode", ["released", "reconstruct"])
def test_batch_splits_agree_with_a_reconstruction(mode):
    weights, W_dec = random_weights(40, 100, torch.float32)
    x = random_tokens(7, 40, dtype=torch.float32)
    arguments = (*weights, W_dec, 16, *selection(1, 20, n=100), mode, True)
    erased = ops.erase(x, *arguments)
    for start, stop in ((0, 1), (1, 7)):
        assert same_bits(ops.erase(x[start:stop], *arguments), erased[start:stop])


@pytest.mark.parametrize("mode", MODES)
def test_order_of_entries_does_not_matter(mode):
    """SPEC 3.5."""
    weights, W_dec = random_weights(7, 30, torch.float32)
    x = random_tokens(8, 7, dtype=torch.float32)
    lines = selection(1, 25, n=30)
    want = ops.erase(x, *weights, W_dec, 12, *lines, mode)
    order = torch.randperm(25)
    assert same_bits(ops.erase(x, *weights, W_dec, 12, *(e[:, order] for e in lines), mode), want)


def test_groups_equal_separate_calls():
    """SPEC 3.4."""
    weights, W_dec = random_weights(7, 30, torch.float32)
    x = random_tokens(3, 2, 5, 7, dtype=torch.float32)
    lines = selection(3, 12, n=30)
    erased = ops.erase(x, *weights, W_dec, 8, *lines)
    for group in range(3):
        alone = ops.erase(x[group], *weights, W_dec, 8, *(e[group] for e in lines))
        assert same_bits(erased[group], alone)


@pytest.mark.parametrize("mode", MODES)
def test_padding_and_factor_one_steer_nothing(mode):
    """Also beside a real entry for the latent that the padding names."""
    weights, W_dec = random_weights(7, 30, torch.float32)
    x = random_tokens(9, 7, dtype=torch.float32)
    latents, thresholds, factors = selection(1, 29, n=30)
    unnamed = torch.tensor([[i for i in range(30) if i not in latents]])
    padding = torch.zeros(1, 4, dtype=torch.long), torch.full((1, 4), torch.inf), torch.zeros(1, 4)
    idle = unnamed, torch.zeros(1, 1), torch.ones(1, 1)
    padded = [torch.cat([p, e, i, p], 1) for p, e, i in zip(padding, (latents, thresholds, factors), idle, strict=True)]
    want = ops.erase(x, *weights, W_dec, 8, latents, thresholds, factors, mode)
    assert same_bits(ops.erase(x, *weights, W_dec, 8, *padded, mode), want)
    if mode == "exact":
        assert same_bits(ops.erase(x, *weights, W_dec, 8, *padding, mode), x)


@pytest.mark.parametrize(
    ("mode", "bad", "entries"),
    [
        ("exact", torch.nan, 20),
        ("exact", torch.inf, 20),
        ("exact", torch.nan, 0),
        ("exact", -torch.inf, 0),
        ("released", -torch.inf, 20),
        ("reconstruct", torch.nan, 0),
    ],
)
def test_a_bad_token_becomes_nan_and_touches_no_other(mode, bad, entries):
    """SPEC 7.1."""
    weights, W_dec = random_weights(7, 30, torch.float32)
    x = random_tokens(6, 7, dtype=torch.float32)
    lines = selection(1, entries, n=30)
    others = [0, 1, 3, 4, 5]
    clean = ops.erase(x, *weights, W_dec, 8, *lines, mode)
    x[2, 4] = bad
    erased = ops.erase(x, *weights, W_dec, 8, *lines, mode)
    assert erased[2].isnan().all()
    assert same_bits(erased[others], clean[others])


def test_steers_in_float32_whatever_the_dtype():
    """SPEC 3.4: factor * z = -2e5 overflows float16, the sum with x_hat's direction 1e-3 does not."""
    x = torch.tensor([[200.0]], dtype=torch.float16)
    one, zero = torch.ones(1, 1, dtype=torch.float16), torch.zeros(1, dtype=torch.float16)
    got = ops.erase(x, one, zero, zero, one * 1e-3, 1, torch.tensor([0]), torch.tensor([1.0]), torch.tensor([-1000.0]))
    want = 200 + (-1000 - 1) * 200 * torch.tensor(1e-3, dtype=torch.float16).double()
    assert got.double().item() == pytest.approx(want.item(), rel=2**-11)


@pytest.mark.parametrize("mode", MODES)
def test_no_tokens(mode):
    weights, W_dec = random_weights(7, 30, torch.float32)
    x = random_tokens(1, 7, dtype=torch.float32)
    lines = selection(1, 12, n=30)
    ops.erase(x, *weights, W_dec, 8, *lines, mode)
    assert ops.erase(x[:0], *weights, W_dec, 8, *lines, mode).shape == (0, 7)


def test_refuses_float64():
    weights, W_dec = random_weights(7, 30)
    ops.encode_topk(random_tokens(1, 7, dtype=torch.float32), *(w.float() for w in weights), 2)
    with pytest.raises(RuntimeError, match="erase: backend 'triton' was chosen but cannot compute this: .* float32"):
        ops.erase(random_tokens(2, 7), *weights, W_dec, 8, *selection(1, 12, n=30))
