"""The 16-bit screen of the `cpu` backend (csrc/cpu/screen.h): the bits of float32, whatever the numbers."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saemnesia_fast.ops import cpu_backend
from saemnesia_fast.ops.backend import Refusal
from weights import Weights, random_tokens, random_weights, same_bits, threads

EXTENSION = cpu_backend.extension()
if isinstance(EXTENSION, Refusal):
    pytest.skip(EXTENSION.reason, allow_module_level=True)
if EXTENSION.build_config()["instruction_set"] != "avx512vnni":
    pytest.skip("needs AVX512-VNNI", allow_module_level=True)

CPP = torch.ops.saemnesia_fast_cpu


@pytest.fixture(autouse=True, scope="module")
def _restored() -> Iterator[None]:
    yield
    EXTENSION.use_instruction_set("avx512vnni")


class Case(NamedTuple):
    """Enough tokens and latents to be screened."""

    x: Tensor
    weights: Weights
    k: int


def both_encode(case: Case) -> None:
    """With the screen and without: the same values and indices, bit for bit."""
    results = []
    for name in ("avx512vnni", "avx512"):
        EXTENSION.use_instruction_set(name)
        results.append(CPP.encode_topk(case.x, *case.weights, case.k))
    for got, want in zip(*results, strict=True):
        assert same_bits(got, want)


def latents_for(k: int, d: int) -> int:
    """So many that the screen pays: csrc/cpu/screened.cpp."""
    return 2**18 * k // d + 1


def powers(count: int, most: int, seed: int) -> Tensor:
    exponents = torch.randint(-most, most + 1, (count, 1), generator=torch.Generator().manual_seed(seed))
    return torch.exp2(exponents.float())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Random numbers, then what makes a bound hard: ties, scales, zeros, outliers, rows that nearly agree."""
    seed, k = draw(st.integers(0, 999)), draw(st.integers(1, 5))
    d = draw(st.sampled_from([64, 65, 127, 128, 129, 255, 300, 641]))
    n, m = latents_for(k, d) + draw(st.integers(0, 60)), draw(st.integers(96, 130))
    weights, _ = random_weights(d, n, draw(st.sampled_from([torch.float32, torch.float16])), draw(st.booleans()), seed)
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    x = random_tokens(m, d, dtype=dtype, integer=draw(st.booleans()), seed=seed)
    W, b_enc, b_dec = weights
    for what in draw(st.sets(st.sampled_from(["copies", "near", "scales", "zeros", "outlier", "biases", "same"]))):
        if what == "copies":
            W = W[torch.arange(n) % draw(st.sampled_from([1, 7, 100]))]
            b_enc = b_enc[:1].expand(n)
        elif what == "near":
            W = (W[:1] + (W.float() * 2.0**-18).to(W.dtype)).contiguous()
        elif what == "scales":
            W, x = W.float() * powers(n, draw(st.sampled_from([2, 20, 60])), seed), x.float() * powers(m, 20, seed + 1)
        elif what == "zeros":
            W, x = W.clone(), x.clone()
            W[::3], x[::2] = 0, b_dec.to(x.dtype)
        elif what == "outlier":
            W, x = W.clone(), x.clone()
            W[:, 3], x[:, draw(st.sampled_from([3, 60]))] = 300, 999
        elif what == "biases":
            b_enc = b_enc.float() * 10.0 ** draw(st.sampled_from([-44, -30, 3, 20]))
        else:
            x = x[:1].expand(m, d)
    return Case(x, Weights(W, b_enc, b_dec), k)


@given(cases())
def test_screened_is_float32_bit_for_bit(case: Case) -> None:
    both_encode(case)


def rounded_one_way(d: int) -> tuple[Tensor, Tensor]:
    """(v, direction) with <v, direction> just above 0, and v / scale 0.49 off a whole number along the direction.

    Three channels make the screen's scale of v (csrc/cpu/avx512vnni.cpp) one; the direction does not see them.
    """
    direction = torch.randint(0, 2, (d,), generator=torch.Generator().manual_seed(d)) * 2.0 - 1
    direction[:3] = 0
    v = 0.49 * direction
    v[3 : 3 + int(0.49 * (d - 3))] -= direction[3 : 3 + int(0.49 * (d - 3))]
    v[:3] = ((((46000 - d**0.5) / (1 + 2**-9)) ** 2 - v.square().sum()) / 3) ** 0.5
    return v, direction


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("rounded", ["token", "latents"])
@pytest.mark.parametrize("d", [640, 1280])
def test_roundings_that_all_point_one_way(d: int, rounded: str, first: bool) -> None:
    """The smaller of two pre-activations is screened as the larger, by more than half of the bound."""
    v, direction = rounded_one_way(d)
    x, w = (v, direction) if rounded == "token" else (direction, v)
    n = latents_for(1, d)
    W, b_enc = torch.zeros(n, d), torch.zeros(n)
    larger, smaller = (3, 200) if first else (200, 3)
    W[larger], W[smaller], b_enc[larger], b_enc[smaller] = w, -w, 1000, 1000
    case = Case(x.expand(96, d), Weights(W, b_enc, torch.zeros(d)), 1)
    both_encode(case)
    EXTENSION.use_instruction_set("avx512vnni")
    assert (CPP.encode_topk(case.x, *case.weights, 1)[1] == larger).all()


@pytest.mark.parametrize("d", [64, 65, 1280])
def test_tokens_along_latents(d: int) -> None:
    """The largest sums there can be: those of a row with itself and its negative."""
    half = latents_for(4, d) // 2 + 1
    W = random_tokens(half, d, dtype=torch.float32)
    W[::2] = W[::2].sign()
    x = torch.cat([W[:100], -W[100:200]]) * powers(200, 9, 0)
    both_encode(Case(x, Weights(torch.cat([W, -W]), torch.zeros(2 * half), torch.zeros(d)), 4))


@pytest.mark.parametrize("k", [1, 16])
@pytest.mark.parametrize(("m", "d", "n"), [(100, 1280, 4096), (1200, 320, 13200), (96, 8192, 600), (96, 8200, 600)])
def test_at_the_sizes_of_a_sae(m: int, d: int, n: int, k: int) -> None:
    weights, _ = random_weights(d, n, torch.float32)
    both_encode(Case(random_tokens(m, d, dtype=torch.float32), weights, k))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38, 1e30, 2.0**40, 1e13])
@pytest.mark.parametrize("where", ["x", "W_enc", "b_enc"])
def test_what_cannot_be_screened(bad: float, where: str) -> None:
    """NaN, infinity and numbers whose products overflow, in one token, one latent or one bias."""
    (W, b_enc, b_dec), _ = random_weights(200, 5300, torch.float32)
    x = random_tokens(130, 200, dtype=torch.float32)
    {"x": x[77], "W_enc": W[901], "b_enc": b_enc[901:]}[where][0] = bad
    both_encode(Case(x, Weights(W, b_enc, b_dec), 4))
    both_encode(Case(1e18 * x, Weights(W, b_enc, 1e18 * b_dec), 4))


def test_same_bits_over_threads_and_batch_splits() -> None:
    weights, _ = random_weights(256, 4100, torch.float32)
    x = random_tokens(1200, 256, dtype=torch.float32)
    EXTENSION.use_instruction_set("avx512vnni")
    with threads(1):
        want = CPP.encode_topk(x, *weights, 4)
    for count in (1, 2, 3):
        with threads(count):
            for some in (slice(None), slice(1, 120), slice(90, 1150)):
                for got, whole in zip(CPP.encode_topk(x[some], *weights, 4), want, strict=True):
                    assert same_bits(got, whole[some])


@given(st.integers(0, 99), st.sampled_from([96, 200]), st.booleans(), st.floats(0, 0.9))
def test_erase_and_probe_with_a_screen(seed: int, m: int, integer: bool, part: float) -> None:
    """Thresholds that flag all tokens or some, pre-activations that meet them, ceilings soon reached or never."""
    weights, W_dec = random_weights(96, 8200, torch.float32, integer, seed)
    x = random_tokens(m, 96, dtype=torch.float32, integer=integer, seed=seed + 1)
    latents = torch.randperm(8200, generator=torch.Generator().manual_seed(seed))[None, :40]
    pre = torch.relu((x - weights.b_dec) @ weights.W_enc[latents[0]].T + weights.b_enc[latents[0]])
    thresholds = pre.quantile(part, 0)[None].contiguous()
    results = []
    for name in ("avx512vnni", "avx512"):
        EXTENSION.use_instruction_set(name)
        out = x.clone()
        CPP.erase(x, *weights, W_dec, 3, latents, thresholds, torch.zeros_like(thresholds), out)
        results.append((out, *CPP.probe(x, *weights, 3, latents, thresholds)))
    for got, want in zip(*results, strict=True):
        assert same_bits(got, want)
