"""The `cpu` backend: SPEC 1.2, 3.1 - 3.5, 7.1, 7.2, on every instruction set of this machine."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import naive
from saemnesia_fast import ops
from saemnesia_fast.ops import cpu_backend, reference
from saemnesia_fast.ops.backend import Refusal
from weights import random_tokens, random_weights, same_bits, threads

EXTENSION = cpu_backend.extension()
if isinstance(EXTENSION, Refusal):
    pytest.skip(EXTENSION.reason, allow_module_level=True)

CPP = torch.ops.saemnesia_fast_cpu
MODES = ["exact", "released", "reconstruct"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Less than a vector and than a block of d, and neither a multiple of them.
SIZES = [(7, 40, 6, 9), (300, 1000, 32, 130), (1280, 2048, 64, 70)]


def available(module: ModuleType) -> list[str]:
    names = []
    for name in module.build_config()["instruction_sets"]:
        try:
            module.use_instruction_set(name)
        except ValueError:
            continue
        names.append(name)
    module.use_instruction_set(names[0])
    return names


INSTRUCTION_SETS = available(EXTENSION)


@pytest.fixture(params=INSTRUCTION_SETS, autouse=True, scope="module")
def _instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    EXTENSION.use_instruction_set(request.param)
    with ops.use_backend("cpu"):
        yield
    EXTENSION.use_instruction_set(INSTRUCTION_SETS[0])


def selection(groups: int, entries: int, n: int, seed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """[G, S] latents, thresholds around 0.5 and factors."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.stack([torch.randperm(n, generator=generator)[:entries] for _ in range(groups)])
    thresholds, factors = torch.rand(2, groups, entries, generator=generator)
    return latents, thresholds, -5 * factors


def within_twice(got: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """KERNELS.md 4: at most twice the error of the eager op in the same dtype, and a rounding of the largest number."""
    floor = torch.finfo(dtype).eps * exact.abs().max()
    ours, theirs = ((t.double() - exact).abs().max() for t in (got, eager))
    assert ours <= 2 * theirs + floor


def as_double(*tensors: Tensor) -> list[Tensor]:
    return [t.double() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "n", "k", "m"), SIZES)
def test_encode_topk_errs_no_more_than_eager(d: int, n: int, k: int, m: int, dtype: torch.dtype) -> None:
    weights, _ = random_weights(d, n, dtype)
    x = random_tokens(m, d, dtype=dtype)
    values, indices = ops.encode_topk(x, *weights, k)
    pre = reference.pre_activations(*as_double(x, *weights))
    within_twice(values, reference.encode_topk(x, *weights, k)[0], pre.topk(k).values, dtype)
    within_twice(values, values, pre.gather(1, indices.long()), dtype)
    assert (indices.sort(1).values.diff(dim=1) > 0).all()
    assert (values.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "n", "k", "m"), SIZES)
def test_decode_errs_no_more_than_eager(d: int, n: int, k: int, m: int, dtype: torch.dtype) -> None:
    (_, _, b_dec), W_dec = random_weights(d, n, dtype)
    values, indices = random_tokens(m, k, dtype=dtype).relu(), torch.randint(n, (m, k))
    want = reference.decode(values.double(), indices, *as_double(W_dec, b_dec))
    within_twice(
        ops.decode(values, indices, W_dec, b_dec), reference.decode(values, indices, W_dec, b_dec), want, dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("d", "n", "k", "m"), SIZES)
def test_erase_errs_no_more_than_eager(d: int, n: int, k: int, m: int, mode: str, dtype: torch.dtype) -> None:
    weights, W_dec = random_weights(d, n, dtype)
    x = random_tokens(m, d, dtype=dtype)
    entries = selection(1, 5, n)
    for norm_scaled in (False, True):
        arguments = (k, *entries, mode, norm_scaled)
        want = reference.erase(*as_double(x, *weights, W_dec), *arguments)
        eager = reference.erase(x, *weights, W_dec, *arguments)
        within_twice(ops.erase(x, *weights, W_dec, *arguments), eager, want, dtype)


@given(st.integers(1, 3), st.integers(0, 20), st.integers(2, 70), st.data(), st.sampled_from(MODES), st.integers(0, 99))
def test_whole_numbers_are_exact(
    groups: int, per_group: int, n: int, data: st.DataObject, mode: str, seed: int
) -> None:
    """Ties, k = N, thresholds met exactly, no tokens, no entries: SPEC 1.2, 3.1."""
    k, d = data.draw(st.integers(1, n)), data.draw(st.sampled_from([1, 3, 150]))
    dtype = data.draw(st.sampled_from([torch.float64, *DTYPES]))
    weights, W_dec = random_weights(d, n, data.draw(st.sampled_from([torch.float32, torch.float16])), True, seed)
    x = random_tokens(groups * per_group, d, dtype=dtype, integer=True, seed=seed + 1)
    values, indices = CPP.encode_topk(x, *weights, k)
    want_values, want_indices = naive.encode_topk(x, *weights, k)
    assert torch.equal(values, want_values.to(dtype))
    assert torch.equal(indices, want_indices)
    latents, thresholds, factors = selection(groups, data.draw(st.integers(0, n)), n, seed)
    entries = (latents, (8 * thresholds).round(), factors.round())
    got = ops.erase(x, *weights, W_dec, k, *entries, mode)
    assert torch.equal(got, naive.erase(x, *weights, W_dec, k, *entries, mode).to(dtype))
    activations, steered = ops.probe(x, *weights, k, *entries[:2])
    want = reference.probe(x, *weights, k, *entries[:2])
    assert torch.equal(activations, want[0])
    assert torch.equal(steered, want[1])


def composed(x: Tensor, *arguments: object) -> Tensor:
    """`erase` as encode, look up and decode, in C++ where the op is."""
    erased = reference.erase(x, *arguments, "exact", False, encode=CPP.encode_topk, decode=CPP.decode)  # type: ignore[arg-type]
    return erased


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize(("groups", "entries", "k"), [(1, 1, 600), (1, 6, 8), (3, 40, 32), (2, 700, 16)])
def test_exact_is_the_full_encoder_bit_for_bit(groups: int, entries: int, k: int, dtype: torch.dtype) -> None:
    """What tokens without a candidate, and those given up early, are not looked at for (SPEC 3.3)."""
    weights, W_dec = random_weights(90, 3000, dtype)
    x = random_tokens(180, 90, dtype=dtype)
    lines = selection(groups, entries, 3000)
    arguments = (*weights, W_dec, k, *lines)
    erased = ops.erase(x, *arguments)
    assert same_bits(erased, composed(x, *arguments))
    touched = ops.probe(x, *weights, k, *lines[:2])[1].any(-1)
    assert touched.any()
    assert same_bits(erased[~touched], x[~touched])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["permuted", "channels_last", "sliced", "expanded", "one token", "vector"])
def test_reads_and_keeps_any_strides(layout: str, dtype: torch.dtype) -> None:
    """SPEC 7.2."""
    weights, W_dec = random_weights(6, 50, dtype)
    image = random_tokens(2, 6, 5, 8, dtype=dtype)
    x = {
        "permuted": image.permute(0, 2, 3, 1),
        "channels_last": image.to(memory_format=torch.channels_last).permute(0, 2, 3, 1),
        "sliced": random_tokens(3, 5, 8, 18, dtype=dtype)[1:, :, ::2, 3:15:2],
        "expanded": random_tokens(2, 1, 6, dtype=dtype).expand(2, 7, 6),
        "one token": image.permute(0, 2, 3, 1)[:1, :1, :1],
        "vector": image.permute(0, 2, 3, 1)[1, 2, 3],
    }[layout]
    dense = x.clone(memory_format=torch.contiguous_format)
    for mode in MODES:
        arguments = (*weights, W_dec, 8, *selection(1, 12, 50), mode)
        erased = ops.erase(x, *arguments)
        assert erased.stride() == torch.empty_like(x).stride()
        assert same_bits(erased, ops.erase(dense, *arguments))
    for got, want in zip(ops.encode_topk(x, *weights, 8), ops.encode_topk(dense, *weights, 8), strict=True):
        assert torch.equal(got, want) and got.is_contiguous()


def test_reads_weights_by_their_strides() -> None:
    weights, W_dec = random_weights(6, 50, torch.float32)
    x = random_tokens(9, 6, dtype=torch.float32)
    strided = [torch.stack([w, w], -1)[..., 0] for w in (*weights, W_dec)]
    lines = [t.expand(3, -1) for t in selection(1, 12, 50)]
    want = ops.erase(x, *weights, W_dec, 8, *(t[0] for t in lines), "released")
    assert same_bits(ops.erase(x, *strided, 8, *lines, "released"), want)
    assert same_bits(ops.erase(x, *strided, 8, *lines), ops.erase(x, *weights, W_dec, 8, *(t[0] for t in lines)))


def runs() -> dict[str, Callable[[Tensor, slice], tuple[Tensor, ...]]]:
    """Each op on some of 600 tokens: large enough that threads share the work, and that tokens come in blocks."""
    weights, W_dec = random_weights(160, 2500, torch.float32)
    lines = selection(1, 6, 2500)
    values, indices = ops.encode_topk(random_tokens(600, 160, dtype=torch.float32), *weights, 16)
    return {
        "encode_topk": lambda x, some: ops.encode_topk(x[some], *weights, 16),
        "decode": lambda x, some: (ops.decode(values[some], indices[some], W_dec, weights.b_dec),),
        "decode_error": lambda x, some: ops.decode_error(
            values[some], indices[some], W_dec, weights.b_dec, x[some], torch.tensor(0.7)
        ),
        "erase": lambda x, some: (ops.erase(x[some], *weights, W_dec, 16, *lines),),
        "released": lambda x, some: (ops.erase(x[some], *weights, W_dec, 16, *lines, "released", True),),
        "probe": lambda x, some: ops.probe(x[some], *weights, 16, *lines[:2]),
    }


@pytest.mark.parametrize("op", ["encode_topk", "decode", "decode_error", "erase", "released", "probe"])
def test_same_bits_over_runs_threads_and_batch_splits(op: str) -> None:
    run, x = runs()[op], random_tokens(600, 160, dtype=torch.float32)
    with threads(1):
        want = run(x, slice(None))
    for count in (1, 2, 3):
        with threads(count):
            for some in (slice(None), slice(0, 1), slice(1, 34), slice(34, 599)):
                for got, whole in zip(run(x, some), want, strict=True):
                    assert same_bits(got, whole[some])


@pytest.mark.skipif(not {"avx512", "avx2"} <= set(INSTRUCTION_SETS), reason="needs two sets that fuse multiply and add")
def test_width_of_the_vectors_changes_no_bit() -> None:
    before = EXTENSION.build_config()["instruction_set"]
    results = []
    for name in ("avx512", "avx2"):
        EXTENSION.use_instruction_set(name)
        some = slice(0, 100)
        results.append([run(random_tokens(600, 160, dtype=torch.float32), some) for run in runs().values()])
    EXTENSION.use_instruction_set(before)
    for wide, narrow in zip(*results, strict=True):
        assert all(same_bits(a, b) for a, b in zip(wide, narrow, strict=True))


def test_order_of_entries_and_padding_change_no_bit() -> None:
    """SPEC 3.5."""
    weights, W_dec = random_weights(7, 60, torch.float32)
    x = random_tokens(50, 7, dtype=torch.float32)
    entries = selection(2, 25, 60)
    want = ops.erase(x, *weights, W_dec, 12, *entries)
    assert not same_bits(want, x)
    order = torch.randperm(25)
    assert same_bits(ops.erase(x, *weights, W_dec, 12, *(e[:, order] for e in entries)), want)
    padding = torch.zeros(2, 3, dtype=torch.long), torch.full((2, 3), torch.inf), torch.ones(2, 3)
    padded = [torch.cat([pad, entry, pad], 1) for pad, entry in zip(padding, entries, strict=True)]
    assert same_bits(ops.erase(x, *weights, W_dec, 12, *padded), want)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_bad_tokens_become_nan_and_touch_no_other(bad: float) -> None:
    """SPEC 7.1; 3e38 is finite, its products are not. Whether or not the token has a candidate."""
    (W_enc, b_enc, b_dec), W_dec = random_weights(5, 80, torch.float32)
    W_enc, x = 3 * W_enc, random_tokens(40, 5, dtype=torch.float32)
    lines = selection(1, 3, 80)
    for thresholds in (lines[1], lines[1] + 1e30):
        arguments = (W_enc, b_enc, b_dec, W_dec, 4, lines[0], thresholds, lines[2])
        clean = ops.erase(x, *arguments)
        spoilt = x.clone()
        spoilt[::3, 2] = bad
        erased = ops.erase(spoilt, *arguments)
        assert erased[::3].isnan().all()
        assert same_bits(erased[1::3], clean[1::3])
        assert same_bits(erased, composed(spoilt, *arguments))
        activations, steered = ops.probe(spoilt, W_enc, b_enc, b_dec, 4, lines[0], thresholds)
        assert activations[::3].isnan().all()
        assert not steered[::3].any()


@given(st.integers(0, 3), st.sampled_from([1, 31, 300, 1200]), st.data(), st.booleans(), st.integers(0, 99))
def test_select_topk(m: int, n: int, data: st.DataObject, integer: bool, seed: int) -> None:
    """Rows too short for group maxima, and rows with columns left over from the groups."""
    k = data.draw(st.integers(1, n))
    pre = random_tokens(m, n, dtype=torch.float32, integer=integer, seed=seed).relu()
    values, indices = CPP.select_topk(pre, k)
    want_values, want_indices = reference.top_columns(pre, k)
    assert torch.equal(values, want_values)
    assert torch.equal(indices.long(), want_indices)


@pytest.mark.parametrize("at", [0, 17, 1199])
def test_select_topk_makes_a_row_with_nan_or_infinity_nan(at: int) -> None:
    pre = random_tokens(3, 1200, dtype=torch.float32).relu()
    want = CPP.select_topk(pre, 8)
    pre[1, at], pre[2, at] = torch.nan, torch.inf
    values, _ = CPP.select_topk(pre, 8)
    assert values[1:].isnan().all()
    assert same_bits(values[0], want[0][0])


MEMORY = """
import re, sys, torch
from pathlib import Path
from saemnesia_fast import ops

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

d, n, mode = 16, 65536, sys.argv[1]
W, b, shift = torch.randn(n, d), torch.randn(n), torch.zeros(d)
lines = torch.tensor([[3, 9]]), torch.zeros(1, 2), torch.tensor([[-3.0, -2.0]])
with ops.use_backend(sys.argv[2]):
    ops.erase(torch.randn(2, d), W, b, shift, W, 32, *lines, mode)
    before = peak()
    ops.erase(torch.randn(2048, d), W, b, shift, W, 32, *lines, mode)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize(
    ("mode", "backend", "most"), [("exact", "cpu", 20), ("released", "cpu", 20), ("exact", "eager", 200)]
)
def test_no_pre_activations_of_all_latents_and_tokens_are_held(mode: str, backend: str, most: int) -> None:
    """[M, N] in float32 would be 512 MiB here; the eager reference takes 128 tokens, 32 MiB, at a time."""
    if EXTENSION.build_config()["instruction_set"] != INSTRUCTION_SETS[0]:
        pytest.skip("a new process runs the widest instruction set")
    command = [sys.executable, "-P", "-c", MEMORY, mode, backend]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < most * 1024


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_opcheck(dtype: torch.dtype) -> None:
    """The ops' schemas, fakes and strides hold for what the C++ returns."""
    weights, W_dec = random_weights(4, 12, dtype)
    x = random_tokens(2, 4, 3, dtype=dtype).movedim(1, 2)
    values, indices = ops.encode_topk(x, *weights, 5)
    lines = selection(2, 6, 12)
    for op, arguments in {
        "encode_topk": (x, *weights, 5, "default"),
        "decode": (values, indices, W_dec, weights.b_dec),
        "erase": (x, *weights, W_dec, 5, *lines, "exact", False, "default"),
        "probe": (x, *weights, 5, *lines[:2], "default"),
    }.items():
        torch.library.opcheck(getattr(torch.ops.saemnesia_fast, op).default, arguments)
