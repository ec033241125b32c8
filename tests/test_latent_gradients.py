"""ops.latent_gradients: SPEC 4.3."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import naive
from pairs import call, random_terms
from saemnesia_fast import ops
from saemnesia_fast.ops import LatentGradients, PairTerms, cpu_backend
from saemnesia_fast.ops.backend import Refusal, select
from weights import random_tokens, random_weights, same_bits, threads

OP = torch.ops.saemnesia_fast.latent_gradients
latent_gradients: Callable[..., LatentGradients] = ops.latent_gradients
pytestmark = pytest.mark.usefixtures("each_backend")


def step(*shape: int, n: int = 30, k: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """(values, indices, grad_x_hat, x, W_dec, b_dec, W_enc, extra_d_value) of tokens [*shape, d=7]."""
    weights, W_dec = random_weights(7, n, dtype)
    x, grad = random_tokens(*shape, 7, dtype=dtype), random_tokens(*shape, 7, dtype=dtype, seed=5)
    values, indices = ops.encode_topk(x, *weights, k)
    extra = random_tokens(*shape, k, dtype=dtype, seed=6)
    return values, indices, grad, x, W_dec, weights.b_dec, weights.W_enc, extra


def looped(terms: list[PairTerms], x: Tensor, W_dec: Tensor, b_dec: Tensor, W_enc: Tensor) -> list[Tensor]:
    """The same by loops: of each terms' gradients the sum."""
    totals = [torch.zeros(shape, dtype=torch.float64) for shape in LatentGradients.shapes(W_dec)]
    for term in terms:
        own = naive.latent_gradients(*term[:3], x, W_dec, b_dec, W_enc, term.extra_d_value)
        for total, gradient in zip(totals, own, strict=True):
            total += gradient
        if not term.adds_b_dec:
            totals[3] -= term.grad_x_hat.double().reshape(-1, x.shape[-1]).sum(0)
    return totals


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


def test_further_terms_share_the_pass() -> None:
    """AuxK without b_dec, multi-TopK with it, and terms with neither value nor row (SPEC 4.1, 4.2)."""
    weights, W_dec = random_weights(7, 30)
    x = random_tokens(2, 9, 7)
    terms = random_terms(x, 30, (8, 3, 11))
    supervised = random_tokens(2, 9, 2, seed=7)
    rows = torch.full_like(x, torch.nan)
    terms.append(PairTerms(torch.zeros_like(supervised), torch.tensor([4, 9]).expand(2, 9, 2), rows, supervised, False))
    got = call(terms, x, W_dec, weights.b_dec, weights.W_enc)
    terms[-1] = terms[-1]._replace(grad_x_hat=torch.zeros_like(x))
    for ours, loops in zip(got, looped(terms, x, W_dec, weights.b_dec, weights.W_enc), strict=True):
        torch.testing.assert_close(ours, loops, rtol=1e-12, atol=1e-12)


@given(
    st.integers(0, 70),
    st.integers(1, 40),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.sampled_from([1, 3, 4, 127, 150, 300]),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([torch.float32, torch.float16]),
)
def test_whole_numbers_are_exact(
    m: int, n: int, widths: list[int], d: int, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    """Any number of tokens, latents and terms, rows that fill no vector, tokens and weights of different types."""
    weights, W_dec = random_weights(d, n, weight_dtype, integer=True)
    x = random_tokens(m, d, dtype=dtype, integer=True)
    terms = random_terms(x, n, tuple(widths), integer=True)
    got = call(terms, x, W_dec, weights.b_dec, weights.W_enc)
    for ours, loops in zip(got, looped(terms, x, W_dec, weights.b_dec, weights.W_enc), strict=True):
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(ours.double(), loops)


@pytest.mark.parametrize("count", [63, 64, 65, 128, 129, 1024, 1025, 2500])
def test_a_latent_of_many_pairs_loses_none(count: int) -> None:
    """Segments of 64 pairs, and latents that several threads share, beside others of few pairs."""
    weights, W_dec = random_weights(130, 5, torch.float32, integer=True)
    x = random_tokens(count, 130, dtype=torch.float32, integer=True)
    (term,) = random_terms(x, 5, (2,), integer=True)
    values, indices = term.values.clone(), term.indices.clone()
    values[:, 0], indices[:, 0] = 1, 3
    indices[:, 1] = indices[:, 1] % 3
    with threads(2):
        got = latent_gradients(values, indices, term.grad_x_hat, x, W_dec, weights.b_dec)
    dense = torch.zeros(count, 5).scatter_add(1, indices.long(), values)
    assert torch.equal(got.dW_dec, dense.T @ term.grad_x_hat)
    d_value = torch.where(values > 0, (term.grad_x_hat @ W_dec.T).gather(1, indices.long()), 0)
    slopes = torch.zeros(count, 5).scatter_add(1, indices.long(), d_value)
    assert torch.equal(got.dW_enc, slopes.T @ (x - weights.b_dec))
    assert torch.equal(got.db_enc, slopes.sum(0))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("d", "n", "k", "m"), [(7, 40, 6, 9), (300, 500, 32, 130), (1280, 600, 16, 70)])
def test_errs_no_more_than_eager(d: int, n: int, k: int, m: int, dtype: torch.dtype) -> None:
    """KERNELS.md 4."""
    weights, W_dec = random_weights(d, n, dtype)
    x = random_tokens(m, d, dtype=dtype)
    terms = random_terms(x, n, (k, 3))
    got = call(terms, x, W_dec, weights.b_dec, weights.W_enc)
    with ops.use_backend("eager"):
        eager = call(terms, x, W_dec, weights.b_dec, weights.W_enc)
        doubled = [
            term._replace(
                values=term.values.double(),
                grad_x_hat=term.grad_x_hat.double(),
                extra_d_value=None if term.extra_d_value is None else term.extra_d_value.double(),
            )
            for term in terms
        ]
        exact = call(doubled, x.double(), W_dec.double(), weights.b_dec.double(), weights.W_enc.double())
    for ours, theirs, want in zip(got, eager, exact, strict=True):
        floor = torch.finfo(torch.float32).eps * want.abs().max()
        assert (ours - want).abs().max() <= 2 * (theirs - want).abs().max() + floor


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


def test_accumulates_over_micro_batches() -> None:
    """SPEC 4.3: what is given is added to and returned, and the parts sum to the whole."""
    *arguments, W_enc, extra = step(24, k=12)
    whole = latent_gradients(*arguments, W_enc, extra)
    out = LatentGradients(*(torch.ones_like(gradient) for gradient in whole))
    for part in torch.arange(24).chunk(3):
        some = [tensor[part] for tensor in arguments[:4]]
        assert latent_gradients(*some, *arguments[4:], W_enc, extra[part], out=out) is out
    for total, gradient in zip(out, whole, strict=True):
        torch.testing.assert_close(total, 1 + gradient, rtol=1e-12, atol=1e-12)


@pytest.fixture
def _poisoned_memory() -> Iterator[None]:
    """New memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_poisoned_memory")
def test_a_latent_without_pairs_has_gradients_of_zero() -> None:
    *arguments, W_enc, _ = step(3, n=200)
    unused = torch.ones(200, dtype=torch.bool)
    unused[arguments[1][arguments[0] > 0].long()] = False
    got = latent_gradients(*arguments, W_enc)
    assert unused.sum() > 150
    assert all((gradient[unused] == 0).all() for gradient in got[:3])
    assert all(gradient.isfinite().all() for gradient in got)


def test_nan_reaches_the_latents_of_its_token_only() -> None:
    """SPEC 7.1; and a value of 0 reaches nothing."""
    *arguments, _, _ = step(6)
    values, indices, grad, x = (tensor.clone() for tensor in arguments[:4])
    clean = latent_gradients(values, indices, grad, x, *arguments[4:])
    values[2], x[2], grad[2] = torch.nan, torch.nan, torch.nan
    values[4], x[4], grad[4] = 0, torch.inf, torch.nan
    hit = torch.zeros(30, dtype=torch.bool)
    hit[indices[2].long()] = True
    lost = torch.zeros(30, dtype=torch.bool)
    lost[indices[4].long()] = True
    got = latent_gradients(values, indices, grad, x, *arguments[4:])
    assert got.dW_dec[hit].isnan().all()
    for gradient, before in zip(got[:3], clean[:3], strict=True):
        assert gradient[~hit].isfinite().all()
        assert same_bits(gradient[~hit & ~lost], before[~hit & ~lost])


def test_reads_tokens_by_their_strides() -> None:
    """SPEC 7.2."""
    x, grad = (random_tokens(2, 7, 3, 3, seed=seed).permute(0, 2, 3, 1) for seed in (1, 2))
    weights, W_dec = random_weights(7, 30)
    values, indices = ops.encode_topk(x, *weights, 8)
    got = latent_gradients(values, indices.long(), grad, x, W_dec, weights.b_dec)
    dense = latent_gradients(values, indices, grad.contiguous(), x.contiguous(), W_dec, weights.b_dec)
    assert all(same_bits(a, b) for a, b in zip(got, dense, strict=True))


def test_no_tokens_gives_zeros() -> None:
    for gradient in latent_gradients(*step(0)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,)])
def test_opcheck(shape: tuple[int, ...]) -> None:
    weights, W_dec = random_weights(7, 30, torch.float32)
    x = random_tokens(*shape, 7, dtype=torch.float32)
    columns = [list(column) for column in zip(*random_terms(x, 30, (4, 2)), strict=True)]
    torch.library.opcheck(OP.default, (*columns, x, W_dec, weights.b_dec, weights.W_enc))


@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,)])
def test_opcheck_of_its_parts(shape: tuple[int, ...]) -> None:
    library = torch.ops.saemnesia_fast
    values, indices, grad, x, W_dec, b_dec, _, extra = step(*shape, dtype=torch.float32)
    torch.library.opcheck(library.encoder_gradients.default, (extra, indices, x, b_dec, 30))
    torch.library.opcheck(library.decoder_gradient.default, (values, indices, grad, 30))
    torch.library.opcheck(library.gather_dot.default, (indices, W_dec, grad))


def test_accumulation_can_be_compiled() -> None:
    *arguments, W_enc, extra = step(9)
    want = latent_gradients(*arguments, W_enc, extra)
    out = LatentGradients(*(torch.ones_like(gradient) for gradient in want))
    torch.compile(latent_gradients, backend="aot_eager", fullgraph=True)(*arguments, W_enc, extra, out=out)
    for total, gradient in zip(out, want, strict=True):
        torch.testing.assert_close(total, 1 + gradient, rtol=1e-12, atol=1e-12)


def test_every_instruction_set_sums_in_the_same_order(each_backend: str) -> None:
    """So those that round a product and its sum once have the same bits; the baseline may round twice."""
    module = cpu_backend.extension()
    if each_backend != "cpu" or isinstance(module, Refusal):
        pytest.skip("one of the cpu backend")
    weights, W_dec = random_weights(200, 50, torch.float32)
    x = random_tokens(90, 200, dtype=torch.float32)
    terms = random_terms(x, 50, (6, 2))
    results = {}
    best = module.build_config()["instruction_set"]
    for name in module.build_config()["instruction_sets"]:
        try:
            module.use_instruction_set(name)
        except ValueError:
            continue
        results[name] = call(terms, x, W_dec, weights.b_dec, weights.W_enc)
    module.use_instruction_set(best)
    for name, result in results.items():
        for ours, widest in zip(result, results[best], strict=True):
            if name == "baseline":
                torch.testing.assert_close(ours, widest, rtol=0, atol=float(4e-7 * widest.abs().max()))
            else:
                assert same_bits(ours, widest)


def test_a_backend_chosen_by_name_is_the_one_that_computes(each_backend: str) -> None:
    for op in ("latent_gradients", "encoder_gradients", "decoder_gradient", "gather_dot"):
        module = select(op, torch.device("cpu")).__module__.rpartition(".")[2]
        assert module == {"eager": "eager_backend", "cpu": "gradients"}[each_backend]


def test_bad_arguments_are_named() -> None:
    """SPEC 7.1."""
    good = step(5)
    cases: list[tuple[int, Tensor, type[Exception], str]] = [
        (0, good[0][:4], ValueError, r"indices: expected \[\.\.\., k\] = \[4, 8\] to match values, got \[5, 8\]"),
        (1, good[1] + 30, ValueError, r"indices: expected indices in \[0, N=30\), got"),
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
    more = [PairTerms(*good[:3]), PairTerms(good[0], good[1].double(), good[2])]
    with pytest.raises(TypeError, match=r"more\[1\].indices: expected int32 or int64, got torch.float64"):
        latent_gradients(*good, more)
    out = latent_gradients(*good)
    for name, wrong, message in (
        ("dW_enc", out.dW_enc[:4], r"out.dW_enc: expected \[30, 7\] contiguous, torch.float64, got \[4, 7\]"),
        (
            "db_dec",
            out.db_dec.float(),
            r"out.db_dec: expected \[7\] contiguous, torch.float64, got \[7\], torch.float32",
        ),
        (
            "dW_dec",
            out.dW_dec.T.contiguous().T,
            r"out.dW_dec: expected .* got \[30, 7\], torch.float64, strides \[1, 30\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            latent_gradients(*good, out=out._replace(**{name: wrong}))
