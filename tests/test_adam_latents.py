"""ops.sparse_gradients and ops.adam_latents: SPEC 4.1, 4.3."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pairs import random_terms
from saemnesia_fast import ops
from saemnesia_fast.ops import DenseRows, EightBit, LatentGradients, LatentMoments, PairTerms, eight_bit, reference
from saemnesia_fast.training.optim import normalize_rows, remove_parallel_gradient
from weights import random_tokens, random_weights, same_bits, threads

pytestmark = pytest.mark.usefixtures("each_backend")
LR = 1e-2


class State:
    """Weights, moments (uint8: in 8 bits) and shadow [N, d] of a latent layer."""

    def __init__(self, n: int, d: int, dtype: torch.dtype, moments: torch.dtype | None = None) -> None:
        weights, self.W_dec = random_weights(d, n, dtype)
        self.W_enc, self.b_dec = weights.W_enc, weights.b_dec
        self.moments = LatentMoments(
            *(
                EightBit.zeros_like(W) if moments == torch.uint8 else torch.zeros_like(W, dtype=moments)
                for W in 4 * [self.W_dec]
            )
        )
        self.shadow = torch.zeros(n, d, dtype=torch.bfloat16)

    def tensors(self) -> tuple[Tensor, ...]:
        moments = [part for moment in self.moments for part in eight_bit.parts(moment)]
        return self.W_enc, self.W_dec, *moments, self.shadow

    def step(
        self, terms: list[PairTerms], x: Tensor, number: int = 1, dense: DenseRows | None = None, **more: Any
    ) -> Any:
        gradients = ops.sparse_gradients(terms, x, self.W_dec, self.b_dec, dense)
        ops.adam_latents(gradients, self.W_enc, self.W_dec, self.moments, number, LR, shadow=self.shadow, **more)
        return gradients


def dense_rows(latents: list[int], d: int, dtype: torch.dtype = torch.float64) -> DenseRows:
    count = len(latents)
    rows = [
        random_tokens(*shape, dtype=dtype, seed=60 + i) for i, shape in enumerate([(count, d), (count,), (count, d)])
    ]
    return DenseRows(torch.tensor(latents, dtype=torch.int64), *rows)


def gradients_of(
    terms: list[PairTerms], x: Tensor, W_dec: Tensor, b_dec: Tensor, dense: DenseRows | None
) -> LatentGradients:
    """By `latent_gradients`: the sums begin at the dense rows."""
    first, dtype = terms[0], reference.compute_dtype(x)
    out = LatentGradients(*(torch.zeros(shape, dtype=dtype) for shape in LatentGradients.shapes(W_dec)))
    if dense is not None:
        out.dW_enc[dense.latents] = dense.dW_enc
        out.dW_dec[dense.latents] = dense.dW_dec
    total = ops.latent_gradients(*first[:3], x, W_dec, b_dec, None, first.extra_d_value, terms[1:], out)
    if dense is not None:
        total.db_enc[dense.latents] += dense.db_enc
    return total


def pairs_of(values: Tensor, indices: Tensor, x: Tensor) -> list[PairTerms]:
    return [PairTerms(values, indices, random_tokens(*x.shape, dtype=x.dtype, seed=5))]


def cases() -> dict[str, tuple[Tensor, list[PairTerms], DenseRows | None]]:
    """name -> (x [..., d=70], terms over 40 latents, dense rows)."""
    x, tall = random_tokens(3, 8, 70), random_tokens(1500, 70)
    everywhere = torch.stack([torch.full((1500,), 7), torch.arange(1500) % 5 + 20], 1)
    several = random_terms(x, 40, (8, 3, 11))
    return {
        "plain": (x, random_terms(x, 40, (8,)), None),
        "k of 1": (x, random_terms(x, 40, (1,)), None),
        "groups and extra terms": (x, several, None),
        "dense rows": (x, several, dense_rows([39, 0, 7, 12], 70)),
        "dense rows of latents without pairs": (
            x,
            [several[0]._replace(values=several[0].values * 0)],
            dense_rows([3], 70),
        ),
        "no dense rows": (x, several, dense_rows([], 70)),
        "a latent of every token": (
            tall,
            pairs_of(random_tokens(1500, 2).abs(), everywhere, tall),
            dense_rows([7, 8], 70),
        ),
        "zeros of relu": (x, pairs_of(torch.zeros(3, 8, 4), torch.zeros(3, 8, 4, dtype=torch.int32), x), None),
        "no tokens": (x[:0], random_terms(x[:0], 40, (4,)), None),
    }


@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("name", cases())
def test_equals_adam_of_torch(name: str, scale: float | None) -> None:
    """On latent_gradients in float64: clip, remove the parallel part, Adam, unit norm."""
    x, terms, dense = cases()[name]
    state = State(40, 70, torch.float64)
    theirs = [torch.nn.Parameter(W.clone()) for W in (state.W_enc, state.W_dec)]
    optimizer = torch.optim.Adam(theirs, lr=LR, eps=6.25e-10)
    for number in (1, 2, 3):
        want = gradients_of(terms, x, theirs[1].detach(), state.b_dec, dense)
        for parameter, gradient in zip(theirs, (want.dW_enc, want.dW_dec), strict=True):
            parameter.grad = gradient * (1 if scale is None else scale)
        remove_parallel_gradient(theirs[1], theirs[1].grad)
        optimizer.step()
        normalize_rows(theirs[1])
        factor = None if scale is None else torch.tensor(scale, dtype=torch.float64)
        got = state.step(terms, x, number, dense, scale=factor)
        norm = want.dW_enc.square().sum() + want.dW_dec.square().sum()
        torch.testing.assert_close(got.squared_norm, norm, rtol=1e-12, atol=0)
        torch.testing.assert_close(got.db_enc, want.db_enc, rtol=1e-12, atol=1e-12)
        assert got.shape == (40, 70)
        for W, parameter in zip((state.W_enc, state.W_dec), theirs, strict=True):
            torch.testing.assert_close(W, parameter.detach(), rtol=1e-9, atol=1e-11)
        assert torch.equal(state.shadow, state.W_enc.bfloat16())


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("name", cases())
def test_has_the_bits_of_latent_gradients_and_adam_rows(name: str, unit_norm: bool, moments: torch.dtype) -> None:
    x, terms, dense = cases()[name]
    x, terms, dense = single(x, terms, dense)
    state, other = (State(40, 70, torch.float32, moments) for _ in range(2))
    scale = torch.tensor(0.5)
    for number in (1, 2):
        got = state.step(terms, x, number, dense, scale=scale, unit_norm=unit_norm)
        want = gradients_of(terms, x, other.W_dec, other.b_dec, dense)
        torch.testing.assert_close(
            got.squared_norm, want.dW_enc.square().sum() + want.dW_dec.square().sum(), rtol=1e-5, atol=0
        )
        torch.testing.assert_close(got.db_enc, want.db_enc, rtol=1e-5, atol=1e-5)
        m = other.moments
        ops.adam_rows(other.W_enc, want.dW_enc, m[0], m[1], number, LR, scale=scale, shadow=other.shadow)
        ops.adam_rows(
            other.W_dec,
            want.dW_dec,
            m[2],
            m[3],
            number,
            LR,
            scale=scale,
            remove_parallel=unit_norm,
            unit_norm=unit_norm,
        )
        for ours, theirs in zip(state.tensors(), other.tensors(), strict=True):
            assert same_bits(ours, theirs) or (name.startswith("dense") and ops.current_backend() == "eager")


def single(
    x: Tensor, terms: list[PairTerms], dense: DenseRows | None
) -> tuple[Tensor, list[PairTerms], DenseRows | None]:
    """All in float32."""

    def narrow(tensor: Any) -> Any:
        return tensor.float() if isinstance(tensor, Tensor) and tensor.is_floating_point() else tensor

    narrowed = None if dense is None else DenseRows(*map(narrow, dense))
    return x.float(), [PairTerms(*map(narrow, term)) for term in terms], narrowed


@settings(max_examples=30)
@given(
    st.integers(0, 70),
    st.integers(1, 40),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.sampled_from([1, 3, 127, 300]),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    st.booleans(),
)
def test_the_norm_of_whole_numbers_is_exact(
    m: int, n: int, widths: list[int], d: int, dtype: torch.dtype, with_dense: bool
) -> None:
    weights, W_dec = random_weights(d, n, torch.float32, integer=True)
    x = random_tokens(m, d, dtype=dtype, integer=True)
    terms = random_terms(x, n, tuple(widths), integer=True)
    wide = reference.compute_dtype(x)
    latents = torch.arange(n)[:: 3 if with_dense else n + 1][int(not with_dense) :].flip(0)
    count = len(latents)
    ones = DenseRows(latents, torch.ones(count, d), torch.ones(count), torch.ones(count, d))
    got = ops.sparse_gradients(terms, x, W_dec, weights.b_dec, ones)
    want = ops.latent_gradients(*terms[0][:3], x, W_dec, weights.b_dec, None, terms[0].extra_d_value, terms[1:])
    for total in want[:3]:
        total[latents] += 1
    assert got.squared_norm.dtype == got.db_enc.dtype == wide
    assert torch.equal(got.db_enc, want.db_enc)
    exact = want.dW_enc.double().square().sum() + want.dW_dec.double().square().sum()
    torch.testing.assert_close(got.squared_norm.double(), exact, rtol=1e-6 if wide == torch.float32 else 1e-14, atol=0)


def test_a_scale_of_nan_leaves_everything_as_it_is() -> None:
    x, terms, _ = single(*cases()["groups and extra terms"])
    for moments in (torch.float32, torch.bfloat16, torch.uint8):
        state = State(40, 70, torch.float32, moments)
        state.step(terms, x)
        before = [tensor.clone() for tensor in state.tensors()]
        state.step(terms, x, 2, scale=torch.tensor(torch.nan))
        assert all(same_bits(a, b) for a, b in zip(state.tensors(), before, strict=True))


def test_nan_reaches_its_latents_and_the_norm() -> None:
    x, terms, _ = cases()["plain"]
    clean, state = (State(40, 70, torch.float64) for _ in range(2))
    clean.step(terms, x)
    values = terms[0].values.clone()
    values[1, 2, 3] = torch.nan
    got = state.step([terms[0]._replace(values=values)], x)
    hit = torch.arange(40) == terms[0].indices[1, 2, 3]
    assert got.squared_norm.isnan()
    assert state.W_dec[hit].isnan().all()
    assert same_bits(state.W_dec[~hit], clean.W_dec[~hit])
    assert same_bits(state.W_enc[~hit], clean.W_enc[~hit])


@pytest.mark.parametrize("moments", [torch.bfloat16, torch.uint8])
def test_results_depend_neither_on_threads_nor_on_the_run(moments: torch.dtype) -> None:
    x, terms, dense = single(*cases()["a latent of every token"])
    results = []
    for count in (1, 2, 2):
        state = State(40, 70, torch.float32, moments)
        with threads(count):
            got = state.step(terms, x, 1, dense)
        results.append((got.squared_norm[None], got.db_enc, *state.tensors()))
    for result in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(result, results[0], strict=True))


def test_more_long_latents_than_rows_are_kept(each_backend: str) -> None:
    """Every latent has 1100 pairs, which several threads share, and there are more latents than tokens."""
    if each_backend != "cpu":
        pytest.skip("one of the cpu backend")
    x = random_tokens(1100, 2, dtype=torch.float32)
    indices = torch.arange(1200, dtype=torch.int32).expand(1100, -1)
    terms = pairs_of(random_tokens(1100, 1200, dtype=torch.float32).abs(), indices, x)
    states = [State(1200, 2, torch.float32) for _ in range(2)]
    for state, count in zip(states, (1, 2), strict=True):
        with threads(count):
            want = gradients_of(terms, x, state.W_dec, state.b_dec, None)
            before = state.W_enc.clone()
            state.step(terms, x)
            moments = torch.zeros(2, 1200, 2)
            ops.adam_rows(before, want.dW_enc, *moments, 1, LR)
        assert same_bits(state.W_enc, before)
    assert all(same_bits(a, b) for a, b in zip(states[0].tensors(), states[1].tensors(), strict=True))


def test_b_dec_may_change_in_between() -> None:
    x, terms, _ = cases()["plain"]
    states = [State(40, 70, torch.float64) for _ in range(2)]
    for number, state in enumerate(states):
        gradients = ops.sparse_gradients(terms, x, state.W_dec, state.b_dec)
        state.b_dec += number
        ops.adam_latents(gradients, state.W_enc, state.W_dec, state.moments, 1, LR)
    assert same_bits(states[0].W_enc, states[1].W_enc)


@pytest.mark.parametrize("moments", [torch.float32, torch.uint8])
def test_nothing_of_n_by_d_is_allocated(each_backend: str, moments: torch.dtype) -> None:
    """On the cpu backend, where this is what the ops are for."""
    if each_backend != "cpu":
        pytest.skip("one of the cpu backend")
    n, d = 3000, 64
    state = State(n, d, torch.float32, moments)
    x = random_tokens(50, d, dtype=torch.float32)
    terms = random_terms(x, n, (4,))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        state.step(terms, x)
    allocated = [event.cpu_memory_usage for event in profile.events()]
    assert max(allocated) > 0
    assert sum(size for size in allocated if size > 0) < n * d


def test_autograd_sees_that_the_weights_changed() -> None:
    x, terms, _ = cases()["plain"]
    state = State(40, 70, torch.float64)
    for W in (state.W_enc, state.W_dec):
        W.requires_grad_()
    losses = [state.W_enc.square().sum(), state.W_dec.square().sum()]
    assert not state.step(terms, x).squared_norm.requires_grad
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_bad_arguments_are_named() -> None:
    """SPEC 7.1."""
    x, terms, _ = cases()["groups and extra terms"]
    state = State(40, 70, torch.float64)
    bad_term = terms[1]._replace(indices=terms[1].indices[:2])
    rows = dense_rows([1, 2], 70)
    sparse: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        (([], x, state.W_dec, state.b_dec), ValueError, "terms: expected at least one"),
        (([terms[0], bad_term], x, state.W_dec, state.b_dec), ValueError, r"terms\[1\].indices: expected"),
        ((terms, x, state.W_dec[:, :9], state.b_dec), ValueError, r"W_dec: expected \[N, d\] = \[N, 70\]"),
        ((terms, x, state.W_dec[:5], state.b_dec), ValueError, r"indices: expected indices in \[0, N=5\)"),
    ]
    for dense, kind, message in (
        (rows._replace(latents=torch.tensor([1, 1])), ValueError, "dense.latents: expected each latent once"),
        (rows._replace(latents=torch.tensor([1, 40])), ValueError, r"dense.latents: expected indices in \[0, N=40\)"),
        (rows._replace(latents=torch.tensor([1.0, 2.0])), TypeError, "dense.latents: expected int32 or int64"),
        (rows._replace(db_enc=torch.ones(3)), ValueError, r"dense.db_enc: expected \[C\] = \[2\]"),
        (rows._replace(dW_dec=torch.ones(2, 9)), ValueError, r"dense.dW_dec: expected \[C, d\] = \[2, 70\]"),
    ):
        sparse.append(((terms, x, state.W_dec, state.b_dec, dense), kind, message))
    for arguments, kind, message in sparse:
        with pytest.raises(kind, match=message):
            ops.sparse_gradients(*arguments)
    gradients = ops.sparse_gradients(terms, x, state.W_dec, state.b_dec)
    good = {"W_enc": state.W_enc, "W_dec": state.W_dec, "moments": state.moments, "step": 1, "lr": LR}
    adam: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"W_enc": state.W_enc[:9]}, ValueError, r"W_enc: expected \[N, d\] = \[40, 70\] to match the gradients"),
        ({"W_enc": state.W_enc.float()}, TypeError, "W_enc: expected torch.float64, got torch.float32"),
        ({"W_dec": state.W_dec[:9]}, ValueError, r"W_dec: expected \[40, 70\] contiguous as W_enc, got \[9, 70\]"),
        (
            {"moments": state.moments._replace(exp_avg_sq_dec=state.W_dec.bfloat16())},
            TypeError,
            "moments.exp_avg_sq_dec: expected torch.float64, got torch.bfloat16",
        ),
        ({"shadow": state.W_enc}, TypeError, "shadow: expected torch.float16 or torch.bfloat16"),
        ({"scale": torch.ones(2)}, ValueError, "scale: expected one number"),
        ({"step": 0}, ValueError, "step: expected at least 1, got 0"),
    ]
    for wrong, kind, message in adam:
        with pytest.raises(kind, match=message):
            ops.adam_latents(gradients, **(good | wrong))
