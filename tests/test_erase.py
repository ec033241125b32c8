"""ops.erase against plain loops, its properties and its gradient: SPEC 3.1 - 3.5, 7.1, 7.2."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import naive
from saemnesia_fast import ops
from saemnesia_fast.ops import eager_backend
from weights import SPLIT_CASES, random_tokens, random_weights, same_bits, threads

OP = torch.ops.saemnesia_fast.erase
pytestmark = pytest.mark.usefixtures("each_backend")
erase: Callable[..., Tensor] = ops.erase
MODES = ["exact", "released", "reconstruct"]


def selection(*shape: int, n: int, dtype: torch.dtype = torch.float64, seed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """latents (no latent twice in a line), thresholds and factors, [S] or [G, S]."""
    generator = torch.Generator().manual_seed(seed)
    lines = [torch.randperm(n, generator=generator)[: shape[-1]] for _ in range(shape[0] if len(shape) == 2 else 1)]
    thresholds = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    factors = -5 * torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.stack(lines).view(shape), thresholds, factors


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("norm_scaled", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_equals_the_loops(mode: str, norm_scaled: bool, dtype: torch.dtype, tolerance: float) -> None:
    """SPEC 3.2."""
    weights, W_dec = random_weights(7, 30, dtype)
    x = random_tokens(4, 6, 7, dtype=dtype)
    entries = selection(4, 12, n=30, dtype=dtype)
    got = erase(x, *weights, W_dec, 8, *entries, mode, norm_scaled)
    want = naive.erase(x, *weights, W_dec, 8, *entries, mode, norm_scaled)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(got, erase(x, *weights, W_dec, 8, *(e[:, :0] for e in entries), mode, norm_scaled))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(2, 20), st.data(), st.sampled_from(MODES), st.integers(0, 99))
def test_ties_are_exact(groups: int, per_group: int, n: int, data: st.DataObject, mode: str, seed: int) -> None:
    """On whole numbers, where every sum is exact: top-k ties, z equal to its threshold, k = N (SPEC 1.2, 3.1)."""
    k = data.draw(st.integers(1, n))
    weights, W_dec = random_weights(3, n, torch.float32, integer=True, seed=seed)
    x = random_tokens(groups * per_group, 3, dtype=torch.float32, integer=True, seed=seed + 1)
    latents, thresholds, factors = selection(groups, data.draw(st.integers(1, n)), n=n, dtype=torch.float32, seed=seed)
    entries = (latents, (thresholds * 4).round(), factors.round())
    got = erase(x, *weights, W_dec, k, *entries, mode)
    assert torch.equal(got.double(), naive.erase(x, *weights, W_dec, k, *entries, mode))


@given(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]), st.integers(0, 99))
def test_factor_one_is_the_identity(dtype: torch.dtype, seed: int) -> None:
    weights, W_dec = random_weights(7, 30, dtype, seed=seed)
    x = random_tokens(6, 7, dtype=dtype, seed=seed + 1)
    x[0, 0], x[1] = -0.0, -0.0
    latents, thresholds, factors = selection(30, n=30, dtype=dtype)
    assert same_bits(erase(x, *weights, W_dec, 8, latents, 0 * thresholds, torch.ones_like(factors)), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_exact_leaves_untouched_tokens_bit_identical(dtype: torch.dtype) -> None:
    """SPEC 3.3."""
    weights, W_dec = random_weights(7, 30, dtype)
    x = random_tokens(200, 7, dtype=dtype)
    x[:, 3] = -0.0
    latents, thresholds, factors = selection(2, n=30, dtype=dtype)
    _, steered = ops.probe(x, *weights, 8, latents, thresholds)
    touched = steered.any(-1)
    assert 0 < touched.sum() < 200
    erased = erase(x, *weights, W_dec, 8, latents, thresholds, factors)
    assert same_bits(erased[~touched], x[~touched])
    assert (erased[touched] != x[touched]).any(-1).all()


@pytest.mark.parametrize("mode", MODES)
def test_order_of_entries_does_not_matter(mode: str) -> None:
    """SPEC 3.5, bit for bit on random numbers."""
    weights, W_dec = random_weights(7, 30, torch.float32)
    x = random_tokens(50, 7, dtype=torch.float32)
    entries = selection(25, n=30, dtype=torch.float32)
    want = erase(x, *weights, W_dec, 12, *entries, mode, True)
    for seed in range(5):
        order = torch.randperm(25, generator=torch.Generator().manual_seed(seed))
        assert same_bits(erase(x, *weights, W_dec, 12, *(e[order] for e in entries), mode, True), want)


@given(st.permutations(range(9)), st.sampled_from(MODES))
def test_order_of_tokens_does_not_matter(order: list[int], mode: str) -> None:
    weights, W_dec = random_weights(7, 30, torch.float32)
    x = random_tokens(9, 7, dtype=torch.float32)
    entries = selection(12, n=30, dtype=torch.float32)
    want = erase(x, *weights, W_dec, 8, *entries, mode)
    assert same_bits(erase(x[order], *weights, W_dec, 8, *entries, mode), want[order])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("d", "n", "dtype"), SPLIT_CASES)
def test_batch_splits_agree_bit_for_bit(d: int, n: int, dtype: torch.dtype, mode: str, count: int) -> None:
    weights, W_dec = random_weights(d, n, dtype)
    x = random_tokens(140, d, dtype=dtype)
    latents, thresholds, factors = selection(min(n, 64), n=n, dtype=dtype)
    for norm_scaled in (False, True):
        arguments = (*weights, W_dec, min(n, 32), latents, thresholds, factors, mode, norm_scaled)
        with threads(count):
            erased = erase(x, *arguments)
            for start, stop in ((0, 1), (1, 4), (4, 140), (139, 140)):
                assert same_bits(erase(x[start:stop], *arguments), erased[start:stop])


@pytest.mark.parametrize("mode", MODES)
def test_groups_equal_separate_calls(mode: str) -> None:
    """SPEC 3.4: a set of latents per group of consecutive tokens."""
    weights, W_dec = random_weights(7, 30, torch.float32)
    x = random_tokens(3, 2, 5, 7, dtype=torch.float32)
    entries = selection(3, 12, n=30, dtype=torch.float32)
    erased = erase(x, *weights, W_dec, 8, *entries, mode)
    for group in range(3):
        alone = erase(x[group], *weights, W_dec, 8, *(e[group] for e in entries), mode)
        assert same_bits(erased[group], alone)


def test_steers_only_kept_latents_strictly_above_their_threshold() -> None:
    """SPEC 3.1, by hand: pre = [3, 2, 1, 0]; with k = 2 the latents 0 and 1 are kept."""
    x = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    eye, zeros = torch.eye(4), torch.zeros(4)

    def steered(latent: int, threshold: float) -> list[float]:
        entry = torch.tensor([latent]), torch.tensor([threshold]), torch.tensor([-2.0])
        return erase(x, eye, zeros, zeros, eye, 2, *entry)[0].tolist()

    assert steered(0, 2.9) == [-6.0, 2.0, 1.0, 0.0]
    assert steered(0, 3.0) == [3.0, 2.0, 1.0, 0.0]
    assert steered(1, 0.0) == [3.0, -4.0, 1.0, 0.0]
    assert steered(2, 0.0) == [3.0, 2.0, 1.0, 0.0]
    assert steered(3, -1.0) == [3.0, 2.0, 1.0, 0.0]


@pytest.mark.parametrize("mode", MODES)
def test_entries_with_threshold_infinity_are_padding(mode: str) -> None:
    """Also beside a real entry for the latent that the padding names."""
    weights, W_dec = random_weights(7, 30, torch.float32)
    x = random_tokens(50, 7, dtype=torch.float32)
    entries = selection(30, n=30, dtype=torch.float32)
    padding = torch.zeros(9, dtype=torch.long), torch.full((9,), torch.inf), torch.ones(9)
    padded = [torch.cat([pad, entry, pad]) for pad, entry in zip(padding, entries, strict=True)]
    want = erase(x, *weights, W_dec, 8, *entries, mode)
    assert same_bits(erase(x, *weights, W_dec, 8, *padded, mode), want)
    nothing = erase(x, *weights, W_dec, 8, *padding, mode)
    x_hat = ops.decode(*ops.encode_topk(x, *weights, 8), W_dec, weights.b_dec)
    assert same_bits(nothing, {"exact": x, "released": 2 * x_hat - x, "reconstruct": x_hat}[mode])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("mode", MODES)
def test_a_bad_token_becomes_nan_and_touches_no_other(mode: str, bad: float) -> None:
    """SPEC 7.1."""
    weights, W_dec = random_weights(7, 30, torch.float32)
    x = random_tokens(6, 7, dtype=torch.float32)
    entries = selection(20, n=30, dtype=torch.float32)
    clean = erase(x, *weights, W_dec, 8, *entries, mode)
    x[2, 4] = bad
    erased = erase(x, *weights, W_dec, 8, *entries, mode)
    assert erased[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert same_bits(erased[others], clean[others])


def test_steers_in_float32_whatever_the_dtype() -> None:
    """SPEC 3.4: factor * z = -2e5 overflows float16, the sum with x_hat's direction 1e-3 does not."""
    x = torch.tensor([[200.0]], dtype=torch.float16)
    one, zero = torch.ones(1, 1, dtype=torch.float16), torch.zeros(1, dtype=torch.float16)
    entry = torch.tensor([0]), torch.tensor([1.0]), torch.tensor([-1000.0])
    got = erase(x, one, zero, zero, one * 1e-3, 1, *entry)
    direction = torch.tensor(1e-3, dtype=torch.float16).double()
    want = 200 + (-1000 - 1) * 200 * direction
    assert got.dtype == torch.float16
    assert got.double().item() == pytest.approx(want.item(), rel=2**-11)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_keeps_the_strides_of_a_unet_activation(memory_format: torch.memory_format) -> None:
    """SPEC 7.2: tokens of [B, C, H, W] are read and written through a permuted view."""
    weights, W_dec = random_weights(6, 30)
    image = random_tokens(2, 6, 3, 4).to(memory_format=memory_format)
    x = image.permute(0, 2, 3, 1)
    entries = selection(2, 12, n=30)
    erased = erase(x, *weights, W_dec, 8, *entries)
    assert erased.stride() == x.stride()
    assert same_bits(erased, erase(x.clone(memory_format=torch.contiguous_format), *weights, W_dec, 8, *entries))


def test_no_tokens() -> None:
    weights, W_dec = random_weights(7, 30)
    assert erase(random_tokens(0, 7), *weights, W_dec, 8, *selection(2, 12, n=30)).shape == (0, 7)


@pytest.mark.parametrize("norm_scaled", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_in_x_weights_and_factors(mode: str, norm_scaled: bool) -> None:
    weights, W_dec = random_weights(4, 12)
    latents, thresholds, factors = selection(2, 6, n=12)
    arguments = tuple(t.requires_grad_() for t in (random_tokens(4, 4), *weights, W_dec, factors))

    def run(*a: Tensor) -> Tensor:
        return OP(*a[:5], 5, latents, thresholds, a[5], mode, norm_scaled, "default")

    _, steered = ops.probe(arguments[0], *weights, 5, latents, thresholds)
    assert steered.any()
    assert torch.autograd.gradcheck(run, arguments)


@pytest.mark.parametrize("mode", MODES)
def test_asking_for_a_gradient_changes_no_bit(mode: str) -> None:
    weights, W_dec = random_weights(7, 30, torch.float16)
    x = random_tokens(50, 7, dtype=torch.float16)
    entries = selection(20, n=30, dtype=torch.float32)
    want = erase(x, *weights, W_dec, 8, *entries, mode)
    with_gradient = erase(x.clone().requires_grad_(), *weights, W_dec, 8, *entries, mode)
    assert with_gradient.requires_grad
    assert same_bits(with_gradient.detach(), want)


# opcheck itself looks at .grad of the intermediate tensors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mode", ["exact", "released"])
def test_opcheck(mode: str, grad: bool) -> None:
    weights, W_dec = random_weights(4, 12, torch.float32)
    x = random_tokens(2, 4, 3, dtype=torch.float32).movedim(1, 2).clone()
    floats = [t.requires_grad_(grad) for t in (x, *weights, W_dec)]
    rest = (5, *selection(2, 6, n=12, dtype=torch.float32), mode, True, "default")
    torch.library.opcheck(OP.default, (*floats, *rest))


@pytest.mark.parametrize("norm_scaled", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_in_place_gives_the_same_bits_over_the_tokens(mode: str, norm_scaled: bool) -> None:
    weights, W_dec = random_weights(6, 30, torch.float32)
    image = random_tokens(2, 6, 5, 4, dtype=torch.float32)
    entries = selection(2, 8, n=30, dtype=torch.float32)
    want = erase(image.permute(0, 2, 3, 1), *weights, W_dec, 5, *entries, mode, norm_scaled)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = image.clone(memory_format=layout).permute(0, 2, 3, 1)
        assert erase(x, *weights, W_dec, 5, *entries, mode, norm_scaled, in_place=True) is x
        assert same_bits(x, want)


def test_in_place_refuses_what_cannot_be_written_over() -> None:
    weights, W_dec = random_weights(6, 30, torch.float32)
    x = random_tokens(1, 6, dtype=torch.float32)
    rest = (*weights, W_dec, 5, *selection(8, n=30, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"in_place: expected x whose elements lie apart, got strides \[0, 1\]"):
        erase(x.expand(4, 6), *rest, in_place=True)
    with pytest.raises(ValueError, match="in_place: expected x without a gradient"):
        erase(x.requires_grad_(), *rest, in_place=True)
    with torch.no_grad():
        erase(x, *rest, in_place=True)


def test_in_place_compiles_as_one_graph() -> None:
    weights, W_dec = random_weights(6, 30, torch.float32)
    x = random_tokens(7, 6, dtype=torch.float32)
    rest = (*weights, W_dec, 5, *selection(8, n=30, dtype=torch.float32))
    want = erase(x, *rest)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: Tensor) -> Tensor:
        y = x + 0
        return erase(y, *rest, in_place=True)

    assert same_bits(compiled(x), want)


def test_exact_precision_overrules_a_setting_to_round_float32_products() -> None:
    weights, W_dec = random_weights(6, 30, torch.float32)
    x = random_tokens(3, 6, dtype=torch.float32)
    entries = tuple(t[None] for t in selection(8, n=30, dtype=torch.float32))
    seen = []

    def spy(tokens: Tensor, *arguments: object) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return tokens

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        for precision in ("default", "exact"):
            eager_backend.erase(x, *weights, W_dec, 5, *entries, "exact", False, precision, definition=spy)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["medium", "highest"]


def test_unknown_precision_is_named() -> None:
    weights, W_dec = random_weights(6, 30, torch.float32)
    with pytest.raises(ValueError, match="precision: expected one of default, exact, got 'fast'"):
        erase(random_tokens(3, 6), *weights, W_dec, 5, *selection(8, n=30), precision="fast")


def test_compiles_as_one_graph() -> None:
    weights, W_dec = random_weights(4, 12)
    entries = selection(2, 6, n=12)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: Tensor, *entries: Tensor) -> Tensor:
        return erase(x, *weights, W_dec, 5, *entries, "released") + 1

    x = random_tokens(4, 4)
    assert same_bits(compiled(x, *entries), erase(x, *weights, W_dec, 5, *entries, "released") + 1)


def test_bad_arguments_are_named() -> None:
    """SPEC 7.1."""
    weights, W_dec = random_weights(4, 12)
    x = random_tokens(6, 4)
    latents, thresholds, factors = selection(2, 5, n=12)
    good = (x, *weights, W_dec, 5, latents, thresholds, factors, "exact")
    cases: list[tuple[int, object, type[Exception], str]] = [
        (4, W_dec.T, ValueError, r"W_dec: expected \[N, d\] = \[12, 4\] to match .* got \[4, 12\]"),
        (6, latents.float(), TypeError, r"latents: expected int32 or int64, got torch.float32"),
        (6, latents + 12, ValueError, r"latents: expected indices in \[0, N=12\)"),
        (6, latents[None], ValueError, r"latents: expected \[S\] or \[G, S\] with G >= 1, got \[1, 2, 5\]"),
        (
            7,
            thresholds[0],
            ValueError,
            r"thresholds: expected \[S\] or \[G, S\] = \[2, 5\] to match .* got \[5\]",
        ),
        (8, factors.int(), TypeError, r"factors: expected a floating-point tensor, got torch.int32"),
        (9, "exakt", ValueError, r"mode: expected one of exact, released, reconstruct, got 'exakt'"),
        (0, x[:5], ValueError, r"latents: expected \[G, S\] with G dividing the M = 5 tokens of x, got \[2, 5\]"),
    ]
    for position, value, kind, message in cases:
        with pytest.raises(kind, match=message):
            erase(*good[:position], value, *good[position + 1 :])
