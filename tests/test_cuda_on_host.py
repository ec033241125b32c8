"""The kernels of csrc/cuda, run on the host: SPEC 4.1, 4.3."""

import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cuda_on_host
from pairs import random_terms
from saemnesia_fast.ops import (
    DenseRows,
    EightBit,
    LatentGradients,
    LatentMoments,
    PairTerms,
    cpu_backend,
    eager_backend,
    reference,
)
from saemnesia_fast.ops.backend import Refusal
from saemnesia_fast.ops.eight_bit import parts
from saemnesia_fast.ops.gradients import GradientSlots
from weights import random_tokens, random_weights, same_bits

if sys.platform != "linux" or not shutil.which("g++"):
    pytest.skip("needs g++ on Linux", allow_module_level=True)


@pytest.fixture(scope="module")
def slots(tmp_path_factory: pytest.TempPathFactory) -> GradientSlots:
    torch.ops.load_library(str(cuda_on_host.build(tmp_path_factory.mktemp("cuda"))))
    return GradientSlots(torch.ops.saemnesia_fast_cuda_on_host, widens=False)


@pytest.fixture
def _poisoned_memory() -> Iterator[None]:
    """New memory holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def flat(terms: list[PairTerms]) -> list[PairTerms]:
    """Of tokens [M, d], as the reference takes them."""
    return [term._replace(indices=term.indices.long()) for term in terms]


@pytest.mark.usefixtures("_poisoned_memory")
@settings(max_examples=40)
@given(
    st.integers(0, 40),
    st.integers(1, 30),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.sampled_from([1, 4, 127, 150]),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    st.booleans(),
)
def test_whole_numbers_are_exact(
    slots: GradientSlots,
    m: int,
    n: int,
    widths: list[int],
    d: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    accumulate: bool,
) -> None:
    weights, W_dec = random_weights(d, n, weight_dtype, integer=True)
    x = random_tokens(m, d, dtype=dtype, integer=True)
    terms = random_terms(x, n, tuple(widths), integer=True)
    want = reference.latent_gradients(flat(terms), x, W_dec, weights.b_dec, weights.W_enc)
    out = LatentGradients(*(torch.ones_like(gradient) for gradient in want)) if accumulate else None
    got = slots.latent_gradients(terms, x, W_dec, weights.b_dec, weights.W_enc, out)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs + accumulate)
    values, indices, grad = terms[0][:3]
    assert torch.equal(
        slots.gather_dot(indices, W_dec, grad),
        (grad.to(want[0].dtype) @ W_dec.to(want[0].dtype).T).gather(1, indices.long()),
    )
    assert torch.equal(
        slots.decoder_gradient(values, indices, grad, n),
        reference.sum_by_latent(values.to(want[0].dtype), indices, grad.to(want[0].dtype), n),
    )
    encoder = slots.encoder_gradients(values, indices, x, weights.b_dec, n)
    for ours, theirs in zip(encoder, reference.encoder_gradients(values, indices, x, weights.b_dec, n), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("count", [64, 65, 700])
def test_sums_have_the_bits_of_the_host(slots: GradientSlots, count: int) -> None:
    """Of random numbers, of a latent with more pairs than a block takes in a round, and of sums over 128 rows and more:
    the order is the same."""
    module = cpu_backend.extension()
    if isinstance(module, Refusal) or module.build_config()["instruction_set"] == "baseline":
        pytest.skip("needs the C++ extension on a processor with fused multiplication and addition")
    weights, W_dec = random_weights(132, 300, torch.float32)
    x = random_tokens(count, 132, dtype=torch.float32)
    terms = random_terms(x, 300, (2, 1))
    for term in terms:
        term.indices[:, 0] = 7
    arguments = (terms, x, W_dec, weights.b_dec, weights.W_enc)
    device = slots.latent_gradients(*arguments)
    host = GradientSlots(torch.ops.saemnesia_fast_cpu, widens=True).latent_gradients(*arguments)
    for ours, theirs in zip(device, host, strict=True):
        assert same_bits(ours, theirs)


def test_an_index_beyond_the_latents_is_left_out(slots: GradientSlots) -> None:
    """On a device nothing looks at indices beforehand: they must not reach other memory."""
    x = random_tokens(6, 8, dtype=torch.float32)
    (term,) = random_terms(x, 20, (3,))
    wild = term.indices.clone()
    wild[2, 1], wild[4, 0] = 20, -1
    kept = (wild >= 0) & (wild < 20)
    got = slots.decoder_gradient(term.values, wild, x, 20)
    want = reference.sum_by_latent(torch.where(kept, term.values, 0), wild.clamp(0, 19), x, 20)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("d", [24, 320, 512])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adam_latents(slots: GradientSlots, dtype: torch.dtype, d: int) -> None:
    """With moments in the weights' dtype, or with d of 320 and 512 in 8 bits, in blocks of 64 and of 256."""
    weights, W_dec = random_weights(d, 30, dtype)
    x = random_tokens(9, d, dtype=dtype)
    dense = DenseRows(torch.tensor([4, 29]), W_dec[:2], W_dec[:2, 0], W_dec[2:4])
    results = []
    for module in (slots, eager_backend):
        W_enc, unit = weights.W_enc.clone(), W_dec.clone()
        zeros = torch.zeros_like if d == 24 else EightBit.zeros_like
        moments = LatentMoments(*(zeros(unit) for _ in range(4)))
        gradients = module.sparse_gradients(random_terms(x, 30, (5, 2)), x, unit, weights.b_dec, dense)
        for step in (1, 2):
            gradients.adam(W_enc, unit, moments, None, None, True, step, 1e-2, 0.9, 0.999, 1e-5)
        tensors = (part for moment in moments for part in parts(moment))
        results.append((gradients.squared_norm, gradients.db_enc, W_enc, unit, *tensors))
    for ours, theirs in zip(*results, strict=True):
        if ours.dtype == torch.uint8:
            assert (ours != theirs).double().mean() < 1e-3
            continue
        # Where a last bit decides between two codes, or between no first moment and one, an element is off.
        rtol = 1e-4 if dtype == torch.float32 else 1e-10 if d == 24 else 1e-6
        apart = (ours - theirs).abs() > 2e-5 + rtol * theirs.abs()
        assert apart.double().mean() <= (0 if d == 24 else 1e-3)


def adam(
    run: Any, dtype: torch.dtype, moments: torch.dtype, shape: tuple[int, int], shadow: torch.dtype
) -> list[Tensor]:
    W, grad = random_tokens(*shape, dtype=dtype), random_tokens(*shape, dtype=dtype, seed=2)
    W[1] = 0
    state = [torch.zeros(shape, dtype=moments), torch.ones(shape, dtype=moments)]
    short = torch.empty(shape, dtype=shadow)
    for step, scale in ((1, 0.5), (2, torch.nan), (2, 0.5)):
        run(W, grad, *state, torch.tensor(scale, dtype=dtype), short, step, 1e-2, 0.9, 0.999, 1e-9, True, True)
    return [W, *state, short]


@pytest.mark.parametrize("shape", [(5, 260), (3, 7)])
@pytest.mark.parametrize(
    ("dtype", "moments", "shadow"),
    [
        (torch.float64, torch.float64, torch.float16),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float16),
    ],
)
def test_adam_rows(
    slots: GradientSlots, dtype: torch.dtype, moments: torch.dtype, shadow: torch.dtype, shape: tuple[int, int]
) -> None:
    got = adam(slots.adam_rows, dtype, moments, shape, shadow)
    want = adam(reference.adam_rows, dtype, moments, shape, shadow)
    assert torch.equal(got[3], got[0].to(shadow))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5 if moments == dtype else 1e-2 / 64
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=tolerance)
    for ours, theirs in zip(got[1:3], want[1:3], strict=True):
        torch.testing.assert_close(
            ours.double(), theirs.double(), rtol=1e-2 if moments == torch.bfloat16 else 1e-5, atol=1e-6
        )
