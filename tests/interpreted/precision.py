"""precision="exact" of the triton backend in the interpreter: SPEC 1.2, 1.6, 3.1 - 3.3, 7.1, 7.2.

Its scores are float64 sums rounded once, whatever the kernel: values, sets and order are compared bit for bit.
"""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import naive
from saemnesia_fast import ops
from saemnesia_fast.ops import encode_topk, erase, probe, reference, triton_backend, triton_product
from triton_cases import (
    IN_INTERPRETER,
    MODES,
    amid_nan,
    assert_no_worse,
    doubled,
    exact_activations,
    lay_out,
    poisoned_allocations,
    selection,
)
from weights import Weights, random_tokens, random_weights, same_bits

pytestmark = IN_INTERPRETER
SINGLE, HALF = torch.float32, torch.float16


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    with ops.use_backend("triton"), poisoned_allocations(monkeypatch):
        yield


def near_ties(d, n, spread, seed=0):
    """Weights whose rows are all nearly the same, `spread` apart."""
    weights, W_dec = random_weights(d, n, SINGLE, seed=seed)
    W_enc = weights.W_enc[:1] + spread * weights.W_enc.roll(1, 1)
    return Weights(W_enc.contiguous(), 0.01 * spread * weights.b_enc, weights.b_dec), W_dec


def towards(weights, tokens, seed=1):
    """Tokens that the mean row of W_enc likes, so that activations are positive."""
    x = random_tokens(tokens, weights.W_enc.shape[1], dtype=SINGLE, seed=seed)
    return x + weights.W_enc.mean(0) + weights.b_dec


def about_zero(d, n, spread):
    """Weights that give `towards` token 0 activations of about `spread`, one way or the other."""
    weights, W_dec = random_weights(d, n, SINGLE)
    x = towards(weights, 1)
    dots = ((x - weights.b_dec).double() @ weights.W_enc.double().T)[0]
    return x, weights._replace(b_enc=(-dots + spread * weights.b_enc).float()), W_dec


def assert_exact(values, indices, x, weights, k):
    want, columns = reference.top_columns(exact_activations(x, *weights), k)
    assert same_bits(values, want.to(values.dtype))
    assert torch.equal(indices.long(), columns)


@settings(max_examples=10)
@given(
    st.integers(1, 5),
    st.integers(1, 90),
    st.integers(66, 150),
    st.integers(1, 40),
    st.integers(-6, 6),
    st.integers(0, 99),
)
def test_the_bound_holds(m, d, n, k, scale, seed):
    """For tokens from 1e-6 to 1e6, and rows of norms far apart."""
    weights, _ = random_weights(d, n, SINGLE, seed=seed)
    weights.W_enc.mul_(torch.logspace(-scale, scale, n)[:, None])
    x = random_tokens(m, d, dtype=SINGLE, seed=seed) * torch.logspace(scale, 0, m)[:, None] + weights.b_dec
    rounded_x, rounded_W = triton_product.round_rows(x, weights.b_dec), triton_product.round_rows(weights.W_enc)
    operands = [rounded.rows.float() * rounded.screen[:, :1] for rounded in (rounded_x, rounded_W)]
    screened = operands[0] @ operands[1].T
    bound = rounded_x.screen[:, 1:] * rounded_W.screen[:, 1] + 2.0**-21 * screened.abs()
    centred = (x - weights.b_dec).double()
    assert ((screened - centred @ weights.W_enc.double().T).abs() <= bound).all()
    most = 2.0**-9 * centred.norm(dim=1)[:, None] * weights.W_enc.double().norm(dim=1)
    assert (bound <= 2 * most + 2.0**-60).all()


def test_the_screen_keeps_within_the_bound(monkeypatch):
    """What `encode_kernel` writes is at most two bounds above the exact activation, and never below."""
    select, seen = triton_backend.select, []
    monkeypatch.setattr(triton_backend, "select", lambda z, *rest: (seen.append(z.clone()), select(z, *rest)))
    weights, _ = random_weights(70, 200, SINGLE)
    x = random_tokens(9, 70, dtype=SINGLE)
    encode_topk(x, *weights, 5, "exact")
    exact = exact_activations(x, *weights)
    factors = [triton_product.round_rows(*rows).screen[:, 1] for rows in ((x, weights.b_dec), (weights.W_enc,))]
    width = 2 * factors[0][:, None] * factors[1] + 2.0**-19 * exact
    assert (seen[0] >= exact).all()
    assert (seen[0] <= exact + width).all()
    assert (width < 0.02 * exact.max()).all()


def test_rounding_undoes_its_powers_of_two():
    """From float32's least normal numbers to its largest; what float16 holds is not rounded at all."""
    x = torch.tensor([[3.0, 1.5, -0.25]]) * 2.0 ** torch.tensor([[-60], [0], [125]])
    rounded = triton_product.round_rows(x)
    assert torch.equal(rounded.rows.float() * rounded.screen[:, :1], x)
    empty = triton_product.round_rows(torch.zeros(1, 3))
    assert not empty.rows.any()
    assert empty.screen[0, 1] == 0


@settings(max_examples=6)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 130), st.data(), st.integers(0, 99))
def test_encode_topk_is_exact(m, d, n, data, seed):
    k = data.draw(st.integers(1, n))
    weights, _ = random_weights(d, n, SINGLE, seed=seed)
    x = random_tokens(m, d, dtype=SINGLE, seed=seed + 1)
    assert_exact(*encode_topk(*amid_nan(x, *weights), k, "exact"), x, weights, k)


@settings(max_examples=5)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 90), st.data(), st.integers(0, 99))
def test_ties_go_to_the_lowest_index_in_ascending_order(m, d, n, data, seed):
    """SPEC 1.2, on whole numbers: zeros and other equal values abound."""
    k = data.draw(st.integers(1, n))
    weights, _ = random_weights(d, n, SINGLE, integer=True, seed=seed)
    x = random_tokens(m, d, dtype=SINGLE, integer=True, seed=seed + 1)
    values, indices = encode_topk(x, *weights, k, "exact")
    want_values, want_indices = naive.encode_topk(x, *weights, k)
    assert torch.equal(values.double(), want_values)
    assert torch.equal(indices, want_indices)


@pytest.mark.parametrize(
    ("n", "k", "spread"),
    [(120, 5, 1e-4), (120, 5, 0.0), (300, 256, 1e-4), (80, 80, 1e-4)],
)
def test_near_ties_that_float16_gets_wrong(n, k, spread):
    """With lists that are long enough, too short, and of all latents."""
    weights, _ = near_ties(20, n, spread)
    x = towards(weights, 2)
    assert_exact(*encode_topk(x, *weights, k, "exact"), x, weights, k)
    W_enc, b_enc, b_dec = weights
    product = (x - b_dec).half().float() @ W_enc.half().float().T + b_enc
    right = reference.top_columns(exact_activations(x, *weights), k)[1]
    assert k == n or spread == 0 or not torch.equal(product.topk(k).indices.sort().values, right.sort().values)


@pytest.mark.parametrize("spread", [1.0, 1e-4])
@pytest.mark.parametrize("n", [60, 200])
def test_zeros_and_what_is_nearly_zero(n, spread):
    """Fewer than k positive activations: zeros go to the lowest columns, whichever the screen cannot tell from them."""
    x, weights, _ = about_zero(20, n, spread)
    for k in (3, n - 1):
        assert_exact(*encode_topk(x, *weights, k, "exact"), x, weights, k)
    certain = weights._replace(b_enc=weights.b_enc - 10 * (torch.arange(n) % 20 > 0))
    assert_exact(*encode_topk(x, *certain, 32, "exact"), x, certain, 32)


def test_zeros_for_which_the_list_has_no_room():
    """63 of the 64 listed are barely below 0: of the lowest columns, which are 0 for sure, only one is listed."""
    x, weights, _ = about_zero(20, 200, 0.0)
    certain = torch.arange(200) < 137
    weights = weights._replace(b_enc=weights.b_enc - torch.where(certain, 10.0, 1e-4))
    values, indices = encode_topk(x, *weights, 3, "exact")
    assert not values.any()
    assert indices.tolist() == [[0, 1, 2]]


def test_rows_of_very_different_norms():
    weights, _ = random_weights(30, 200, SINGLE)
    weights.W_enc.mul_(torch.logspace(-6, 6, 200)[torch.randperm(200)][:, None])
    x = random_tokens(3, 30, dtype=SINGLE) * torch.tensor([[1e-6], [1.0], [1e6]]) + weights.b_dec
    assert_exact(*encode_topk(x, *weights, 9, "exact"), x, weights, 9)


@pytest.mark.parametrize("layout", ["nchw", "cropped nchw", "reversed"])
def test_encode_topk_reads_tokens_by_their_strides(layout):
    """SPEC 7.2."""
    weights, _ = random_weights(6, 80, SINGLE)
    x = lay_out(layout)
    values, indices = encode_topk(*amid_nan(x), *weights, 5, "exact")
    assert_exact(values.view(-1, 5), indices.view(-1, 5), x.reshape(-1, 6), weights, 5)


@pytest.mark.parametrize(("dtype", "weight_dtype"), [(HALF, SINGLE), (SINGLE, HALF)])
def test_other_dtypes(dtype, weight_dtype):
    weights, W_dec = random_weights(37, 100, weight_dtype)
    x = random_tokens(5, 37, dtype=dtype)
    assert_exact(*encode_topk(*amid_nan(x, *weights), 9, "exact"), x, weights, 9)
    arguments = (*weights, W_dec, 8, *selection(1, 12, n=100), "exact", False, "exact")
    want = reference.erase(x, *arguments[:-1])
    assert_no_worse(erase(x, *arguments), want, reference.erase(*doubled(x, *arguments[:-1])))


def test_16_bit_operands_are_multiplied_as_they_are():
    weights, W_dec = random_weights(37, 100, HALF)
    x = random_tokens(5, 37, dtype=HALF)
    lines = selection(1, 12, n=100)
    for ours, plain in zip(encode_topk(x, *weights, 9, "exact"), encode_topk(x, *weights, 9), strict=True):
        assert same_bits(ours, plain)
    assert same_bits(
        erase(x, *weights, W_dec, 9, *lines, "exact", False, "exact"), ops.erase(x, *weights, W_dec, 9, *lines)
    )


def test_long_batches_are_encoded_in_parts(monkeypatch):
    weights, _ = random_weights(6, 80, SINGLE)
    x = random_tokens(20, 6, dtype=SINGLE)
    monkeypatch.setattr(triton_backend, "Z_BYTES", 20 * 80 * 4)
    assert_exact(*encode_topk(x, *weights, 8, "exact"), x, weights, 8)


def steered_of(x, weights, k, latents, thresholds):
    """What `probe` should say for [G, S] entries."""
    activations = exact_activations(x, *weights)
    kept = torch.zeros_like(activations, dtype=torch.bool)
    kept.scatter_(1, reference.top_columns(activations, k)[1], True)
    lines = torch.arange(len(latents)).repeat_interleave(len(x) // len(latents))
    z = activations.gather(1, latents[lines])
    return z, kept.gather(1, latents[lines]) & (z > thresholds[lines].clamp(min=0))


@settings(max_examples=10)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 130), st.data(), st.integers(0, 99))
def test_probe_is_exact(groups, per_group, n, data, seed):
    k, s = data.draw(st.integers(1, n)), data.draw(st.integers(0, 20))
    weights, _ = random_weights(9, n, SINGLE, seed=seed)
    x = random_tokens(groups * per_group, 9, dtype=SINGLE, seed=seed + 1)
    latents = torch.randint(n, (groups, s), generator=torch.Generator().manual_seed(seed))
    thresholds = torch.rand(groups, s)
    activations, steered = probe(*amid_nan(x, *weights), k, latents, thresholds, "exact")
    z, want = steered_of(x, weights, k, latents, thresholds)
    assert same_bits(activations, z)
    assert torch.equal(steered, want)


@pytest.mark.parametrize(("n", "spread"), [(25, 1e-4), (110, 1e-4), (110, 0.0)])
@pytest.mark.parametrize("k", [1, 5])
def test_probe_settles_near_ties(n, spread, k):
    """With doubts that are listed, and too many for the list."""
    weights, _ = near_ties(20, n, spread)
    x = towards(weights, 2)
    latents = reference.top_columns(exact_activations(x[:1], *weights), 7)[1]
    activations, steered = probe(x, *weights, k, latents, torch.zeros(1, 7), "exact")
    z, want = steered_of(x, weights, k, latents, torch.zeros(1, 7))
    assert same_bits(activations, z)
    assert torch.equal(steered, want)
    assert want[0].sum() == k


def test_probe_agrees_bit_for_bit_with_encode_topk():
    weights, _ = random_weights(70, 40, SINGLE)
    x = random_tokens(6, 70, dtype=SINGLE)
    values, indices = encode_topk(x, *weights, 20, "exact")
    activations, steered = probe(x, *weights, 20, torch.arange(40)[None], torch.zeros(1, 40), "exact")
    assert same_bits(activations.gather(1, indices.long()), values)
    kept = torch.zeros_like(steered).scatter(1, indices.long(), values > 0)
    assert torch.equal(steered, kept)


@pytest.mark.parametrize(("mode", "norm_scaled"), [(mode, norm) for mode in MODES for norm in (False, True)][:4])
def test_erase_is_as_good_as_eager(mode, norm_scaled):
    weights, W_dec = random_weights(37, 90, SINGLE)
    x = random_tokens(6, 37, dtype=SINGLE)
    arguments = amid_nan(x, *weights, W_dec, 8, *selection(2, 12, n=90), mode, norm_scaled)
    want = reference.erase(*arguments)
    assert_no_worse(erase(*arguments, "exact"), want, reference.erase(*doubled(*arguments)))
    assert not torch.equal(want, x)


def test_erase_steers_what_the_exact_activations_keep():
    """Where the sets of float16 products differ; untouched tokens stay bit-identical (SPEC 3.3)."""
    weights, W_dec = near_ties(20, 120, 1e-4)
    x = towards(weights, 5)
    latents, thresholds, factors = selection(1, 4, n=120)
    arguments = (x, *weights, W_dec, 20, latents, thresholds, factors)
    _, steered = steered_of(x, weights, 20, latents, thresholds)
    erased = erase(*arguments, "exact", False, "exact")
    touched = steered.any(1)
    assert 0 < touched.sum() < 5
    assert same_bits(erased[~touched], x[~touched])
    change = torch.where(steered, (factors - 1) * exact_activations(x, *weights)[:, latents[0]], 0).double()
    want = x + change @ W_dec[latents[0]].double()
    assert (erased - want).abs().max() <= 2.0**-21 * want.abs().max()


@pytest.mark.parametrize("layout", ["nchw", "sliced", "expanded"])
def test_erase_reads_and_writes_tokens_by_their_strides(layout):
    """SPEC 7.2; and in place, where elements do not share memory."""
    weights, W_dec = random_weights(6, 80, SINGLE)
    x = lay_out(layout)
    arguments = (*weights, W_dec, 8, *selection(2, 12, n=80), "exact", False, "exact")
    want = erase(x.clone(memory_format=torch.contiguous_format), *arguments)
    erased = erase(*amid_nan(x), *arguments)
    assert erased.stride() == torch.empty_like(x).stride()
    assert same_bits(erased, want)
    if layout != "expanded":
        assert erase(x, *arguments, in_place=True) is x
        assert same_bits(x, want)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_token_becomes_nan_and_touches_no_other(bad):
    """SPEC 7.1."""
    weights, W_dec = random_weights(7, 50, SINGLE)
    lines, nothing = selection(1, 4, n=50), selection(1, 0, n=50)
    x = random_tokens(3, 7, dtype=SINGLE)

    def everything():
        return [
            *encode_topk(x, *weights, 8, "exact"),
            *probe(x, *weights, 8, *lines[:2], "exact"),
            erase(x, *weights, W_dec, 8, *lines, "exact", False, "exact"),
        ]

    clean = everything()
    x[1, 4] = bad
    values, indices, activations, steered, erased = seen = everything()
    for ours, before in zip(seen, clean, strict=True):
        assert same_bits(ours[::2], before[::2])
    assert all(one[1].isnan().all() for one in (values, activations, erased))
    assert ((indices >= 0) & (indices < 50)).all()
    assert not steered[1].any()
    assert erase(x, *weights, W_dec, 8, *nothing, "exact", False, "exact")[1].isnan().all()


def test_batch_splits_runs_and_order_of_entries_agree_bit_for_bit():
    weights, W_dec = near_ties(20, 80, 0.02)
    x = towards(weights, 4)
    lines = selection(1, 3, n=80)
    arguments = (*weights, W_dec, 16)
    encoded, erased = encode_topk(x, *weights, 16, "exact"), erase(x, *arguments, *lines, "exact", False, "exact")
    for some in (slice(4), slice(1, 3)):
        values, indices = encode_topk(x[some], *weights, 16, "exact")
        assert same_bits(values, encoded[0][some])
        assert torch.equal(indices, encoded[1][some])
        assert same_bits(erase(x[some], *arguments, *lines, "exact", False, "exact"), erased[some])
    backwards = [entries.flip(1) for entries in lines]
    assert same_bits(erase(x, *arguments, *backwards, "exact", False, "exact"), erased)


def test_the_rounded_weights_follow_the_weights():
    (W_enc, b_enc, b_dec), _ = random_weights(6, 80, SINGLE, integer=True)
    x = random_tokens(3, 6, dtype=SINGLE, integer=True)
    for weight in (W_enc, b_enc, b_dec, None):
        values, _ = encode_topk(x, W_enc, b_enc, b_dec, 5, "exact")
        assert torch.equal(values, reference.encode_topk(x, W_enc, b_enc, b_dec, 5)[0])
        if weight is not None:
            weight += 1
    before = len(triton_product._rounded)
    del W_enc, weight
    gc.collect()
    assert len(triton_product._rounded) < before


def test_no_tokens():
    weights, W_dec = random_weights(7, 80, SINGLE)
    x = random_tokens(1, 7, dtype=SINGLE)
    lines = selection(1, 12, n=80)
    erase(x, *weights, W_dec, 8, *lines, "exact", False, "exact")
    x = x[:0]
    assert [t.shape for t in encode_topk(x, *weights, 8, "exact")] == [(0, 8)] * 2
    assert [t.shape for t in probe(x, *weights, 8, *lines[:2], "exact")] == [(0, 12)] * 2
    assert erase(x, *weights, W_dec, 8, *lines, "exact", False, "exact").shape == (0, 7)
