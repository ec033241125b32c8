"""The triton backend on a GPU at the size of SD 1.5: SPEC 1.2, 1.6, 3.1 - 3.4, 7.1, 7.2."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from saemnesia_fast import ops
from saemnesia_fast.ops import reference
from triton_cases import MODES, assert_no_worse, doubled, exact_activations, selection
from waiting import no_waiting
from weights import random_tokens, random_weights, same_bits

pytestmark = pytest.mark.gpu

D, N, K = 1280, 20480, 32
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with ops.use_backend("triton"):
        yield


@pytest.fixture(scope="module")
def sae() -> tuple[Tensor, ...]:
    """W_enc, b_enc, b_dec, W_dec in float32, rows of about unit norm."""
    (W_enc, b_enc, b_dec), W_dec = random_weights(D, N, torch.float32)
    return tuple(t.cuda() for t in (W_enc / D**0.5, 0.1 * b_enc, 0.1 * b_dec, W_dec / D**0.5))


def cast(sae: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(t.to(dtype) for t in sae)


def block_output(images: int, dtype: torch.dtype, layout: str = "nchw", seed: int = 1) -> Tensor:
    """Tokens [B, 16, 16, d] as a UNet block leaves them."""
    image = random_tokens(images, D, 16, 16, dtype=torch.float32, seed=seed).to("cuda", dtype)
    if layout == "channels_last":
        image = image.contiguous(memory_format=torch.channels_last)
    tokens = image.permute(0, 2, 3, 1)
    return tokens.contiguous() if layout == "contiguous" else tokens


def lines(
    count: int, entries: int, threshold: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    latents, thresholds, factors = selection(count, entries, n=N)
    return latents.cuda(), torch.full_like(thresholds, threshold).to("cuda", dtype), factors.to("cuda", dtype)


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_encode_topk_is_as_good_as_eager(sae, dtype, weight_dtype, layout):
    arguments = (block_output(2, dtype, layout), *cast(sae, weight_dtype)[:3], K)
    values, indices = (flat(t) for t in ops.encode_topk(*arguments))
    rows = (flat(arguments[0]), *arguments[1:])
    pre = reference.pre_activations(*doubled(*rows[:4]))
    eager, kept = reference.encode_topk(*rows)
    assert_no_worse(values, eager, pre.gather(1, indices.long()))
    exact = pre.topk(K)
    ours = torch.zeros_like(pre, dtype=torch.bool).scatter(1, indices.long(), True)
    wanted = torch.zeros_like(ours).scatter(1, exact.indices, True)
    margin = 2 * (reference.pre_activations(*rows[:4]).double() - pre).abs().max() + 2.0**-20 * pre.max()
    assert (ours.sum(1) == K).all()
    assert ((ours == wanted) | ((pre - exact.values[:, -1:]).abs() <= margin)).all()
    assert (kept.sort().values == indices.sort().values).all(1).double().mean() > 0.9


@pytest.mark.parametrize("k", [1, 32, 64, 65, 128, 129, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_topk_breaks_ties_by_index(dtype, k):
    weights, _ = random_weights(40, 3000, dtype, integer=True)
    weights = [t.cuda() for t in weights]
    x = random_tokens(200, 40, dtype=dtype, integer=True).cuda()
    values, indices = ops.encode_topk(x, *weights, k)
    want_values, want_indices = reference.encode_topk(x.double(), *doubled(*weights), k)
    assert torch.equal(values.double(), want_values)
    assert torch.equal(indices, want_indices)


@pytest.mark.parametrize("dtype", DTYPES)
def test_probe_agrees_bit_for_bit_with_encode_topk(sae, dtype):
    """The same product in the same arithmetic, in tiles of other shapes."""
    x, weights = block_output(2, dtype), cast(sae, dtype)[:3]
    values, indices = ops.encode_topk(x, *weights, K)
    entries = torch.arange(0, N, 40, device="cuda")
    activations, steered = ops.probe(x, *weights, K, entries, torch.zeros(len(entries), device="cuda"))
    z = torch.zeros(*x.shape[:-1], N, dtype=dtype, device="cuda").scatter(-1, indices.long(), values)[..., entries]
    assert (z > 0).any()
    assert same_bits(torch.where(z > 0, activations, 0), z)
    assert torch.equal(steered, z > 0)


@pytest.fixture(params=[False, True])
def _any_tf32(request: pytest.FixtureRequest) -> Iterator[None]:
    """Precision "exact" does not depend on torch's setting."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def near_ties(sae: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Every second row of W_enc is nearly its neighbour: 1e-4 of the norm apart."""
    W_enc, *others = (t.clone() for t in sae)
    W_enc[1::2] = W_enc[::2] + 1e-4 * W_enc[1::2]
    return W_enc, *others


def assert_exact(values: Tensor, indices: Tensor, activations: Tensor) -> None:
    """The largest activations [M, N], in order, but for the last bit that another order of float64 sums may move."""
    want = reference.top_columns(activations, values.shape[1])[0].double()
    ulp = 2.0**-23 * want
    assert ((activations.gather(1, indices.long()).double() - want).abs() <= ulp).all()
    assert ((values.double() - want).abs() <= ulp + torch.finfo(values.dtype).eps / 2 * want).all()
    assert (indices.sort().values.diff() > 0).all()


@pytest.mark.usefixtures("_any_tf32")
@pytest.mark.parametrize(
    ("k", "dtype", "layout"),
    [
        *((K, dtype, "nchw") for dtype in DTYPES),
        (K, torch.float32, "contiguous"),
        (1, torch.float32, "nchw"),
        (256, torch.float16, "nchw"),
    ],
)
def test_exact_encode_topk_keeps_what_float64_sums_say(sae, k, dtype, layout):
    """With pairs of latents that a product of float16 cannot tell apart."""
    x, weights = block_output(2, dtype, layout), near_ties(sae)[:3]
    values, indices = ops.encode_topk(x, *weights, k, precision="exact")
    assert_exact(flat(values), flat(indices), exact_activations(flat(x), *weights))


@pytest.mark.parametrize(("spread", "shift"), [(1e-7, 0.0), (1.0, -30.0), (1e-4, -30.0)])
def test_exact_encode_topk_without_a_long_enough_list(sae, spread, shift):
    """Nearly equal latents, and fewer than k that are active."""
    W_enc, b_enc, b_dec, _ = sae
    W_enc = W_enc[:1] + spread * W_enc
    weights = (W_enc, b_enc * spread + shift * (torch.arange(N, device="cuda") % 1000 > 0), b_dec)
    x = flat(block_output(1, torch.float32, "contiguous"))[:8] + 20 * W_enc[0]
    assert_exact(*ops.encode_topk(x, *weights, K, precision="exact"), exact_activations(x, *weights))


def test_exact_ties_go_to_the_lowest_index(sae):
    W_enc, b_enc, b_dec, _ = sae
    x = flat(block_output(1, torch.float32, "contiguous"))[:8] + 20 * W_enc[0]
    W_enc, zero = W_enc[:1].repeat(N, 1), torch.zeros_like(b_enc)
    values, indices = ops.encode_topk(x, W_enc, zero, b_dec, K, precision="exact")
    assert (values > 0).all()
    assert (values == values[:, :1]).all()
    assert torch.equal(indices, torch.arange(K, dtype=torch.int32, device="cuda").expand(8, K))
    latents = torch.tensor([0, K - 1, K, N - 1], device="cuda")
    _, steered = ops.probe(x, W_enc, zero, b_dec, K, latents, torch.zeros(4, device="cuda"), "exact")
    assert steered.tolist() == [[True, True, False, False]] * 8


@pytest.mark.usefixtures("_any_tf32")
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_probe_and_erase_agree_with_encode_topk(sae, dtype):
    x, weights = block_output(2, dtype), near_ties(sae)
    values, indices = ops.encode_topk(x.float(), *weights[:3], K, precision="exact")
    entries = torch.arange(0, N, 13, device="cuda")
    thresholds, factors = torch.full((2, len(entries)), 0.3, device="cuda").unbind()
    activations, steered = ops.probe(x.float(), *weights[:3], K, entries, thresholds, precision="exact")
    z = torch.zeros(*x.shape[:-1], N, device="cuda").scatter(-1, indices.long(), values)[..., entries]
    assert same_bits(torch.where(steered, activations, 0), torch.where(z > 0.3, z, 0))
    few = entries[:300], thresholds[:300], factors[:300]
    z, hit = flat(z)[:, :300], flat(steered)[:, :300]
    erased = flat(ops.erase(x, *weights, K, *few, precision="exact"))
    assert same_bits(erased[~hit.any(1)], flat(x)[~hit.any(1)])
    want = flat(x).double() + torch.where(hit, (0.3 - 1) * z, 0).double() @ weights[3][few[0]].double()
    assert hit.any()
    assert (erased.double() - want).abs().max() <= 2 * (want.to(dtype).double() - want).abs().max() + 2.0**-20


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_batch_splits_and_runs_agree_bit_for_bit(sae, dtype, mode):
    x, weights = flat(block_output(8, dtype, "contiguous")), near_ties(sae)
    arguments = (*weights, K, *lines(1, 100, 0.3), mode, False, "exact")
    erased = ops.erase(x, *arguments)
    for start, stop in ((0, 2048), (0, 1), (1, 65), (100, 612)):
        assert same_bits(ops.erase(x[start:stop], *arguments), erased[start:stop])


@pytest.mark.parametrize("precision", ["default", "exact"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_in_place_gives_the_same_bits(sae, layout, mode, precision):
    x = block_output(2, torch.float16, layout)
    x[1, 3, 5, 700] = torch.nan
    arguments = (*sae, K, *lines(2, 20, 0.3), mode, False, precision)
    want = ops.erase(x, *arguments)
    assert ops.erase(x, *arguments, in_place=True) is x
    assert same_bits(x, want)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mode", "norm_scaled"), [(mode, norm) for mode in MODES for norm in (False, True)])
def test_erase_is_as_good_as_eager(sae, mode, norm_scaled, dtype, layout):
    x = block_output(2, dtype, layout)
    arguments = (*cast(sae, dtype), K, *lines(2, 300, 0.5), mode, norm_scaled)
    ours = ops.erase(x, *arguments)
    assert ours.stride() == torch.empty_like(x).stride()
    eager, exact = reference.erase(flat(x), *arguments), reference.erase(*doubled(flat(x), *arguments))
    # A latent at the edge of the top k may be steered by one and not by the other: compare where all agree.
    touched = [(t.double() - flat(x).double()).abs().amax(1) > 0 for t in (flat(ours), eager, exact)]
    same = (touched[0] == touched[2]) & (touched[1] == touched[2])
    assert same.double().mean() > 0.99
    errors = [(t.double() - exact).abs().amax(1)[same] for t in (flat(ours), eager)]
    ordinary = [error.quantile(0.9) for error in errors]
    assert ordinary[0] <= 2 * ordinary[1] + 2.0**-22 * exact.abs().max()
    if mode == "exact":
        assert same_bits(flat(ours)[~touched[0]], flat(x)[~touched[0]])
        assert touched[0].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_splits_and_runs_agree_bit_for_bit(sae, dtype, mode):
    x, weights = flat(block_output(8, dtype, "contiguous")), cast(sae, dtype)
    arguments = (*weights, K, *lines(1, 100, 0.3), mode)
    erased, encoded = ops.erase(x, *arguments), ops.encode_topk(x, *weights[:3], K)
    for start, stop in ((0, 2048), (0, 1), (1, 65), (100, 612), (1000, 2048)):
        assert same_bits(ops.erase(x[start:stop], *arguments), erased[start:stop])
        part = ops.encode_topk(x[start:stop], *weights[:3], K)
        assert same_bits(part.values, encoded.values[start:stop])
        assert torch.equal(part.indices, encoded.indices[start:stop])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_token_becomes_nan_and_touches_no_other(sae, bad, mode):
    x, arguments = block_output(2, torch.float16), (*cast(sae, torch.float16), K, *lines(2, 20, 0.3), mode)
    clean = ops.erase(x, *arguments)
    x[1, 3, 5, 700] = bad
    erased = ops.erase(x, *arguments)
    assert erased[1, 3, 5].isnan().all()
    erased[1, 3, 5] = clean[1, 3, 5]
    assert same_bits(erased, clean)


def captured(call: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.parametrize("precision", ["default", "exact"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_captured_erase_follows_its_inputs(sae, mode, in_place, precision):
    """From no token flagged to all, and back, by what the tables say at replay."""
    weights = cast(sae, torch.float16) if precision == "default" else sae
    x, (latents, thresholds, factors) = block_output(2, torch.float16), lines(2, 16, torch.inf)
    arguments = (*weights, K, latents, thresholds, factors, mode, False, precision)
    graph, erased = captured(lambda: ops.erase(x, *arguments, in_place=in_place))
    for seed, threshold in ((1, torch.inf), (2, 0.0), (3, 1.0), (4, torch.inf)):
        x.copy_(block_output(2, torch.float16, seed=seed))
        thresholds.fill_(threshold)
        latents.copy_(torch.randint(N - 16, (2, 1)) + torch.arange(16))
        want = ops.erase(x, *arguments)
        graph.replay()
        assert same_bits(erased, want)
        assert not in_place or erased is x


@pytest.mark.parametrize("precision", ["default", "exact"])
def test_ops_never_wait_for_the_device(sae, precision):
    x, entries = block_output(2, torch.float16), lines(2, 16, 0.3)
    weights = cast(sae, torch.float16) if precision == "default" else sae

    def run() -> None:
        values, indices = ops.encode_topk(x, *weights[:3], K, precision)
        ops.decode(values, indices, weights[3], weights[2])
        ops.probe(x, *weights[:3], K, *entries[:2], precision)
        for mode in MODES:
            ops.erase(x, *weights, K, *entries, mode, precision=precision)

    run()
    with no_waiting():
        run()


@pytest.mark.parametrize("precision", ["default", "exact"])
def test_exact_mode_holds_no_activations_of_all_latents(sae, precision):
    x, entries = block_output(16, torch.float16), lines(2, 16, 0.0)
    weights = cast(sae, torch.float16) if precision == "default" else sae
    arguments = (*weights, K, *entries, "exact", False, precision)
    ops.erase(x, *arguments)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ops.erase(x, *arguments)
    tokens = x.numel() // D
    assert torch.cuda.max_memory_allocated() - before < tokens * N / 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_dot_is_as_good_as_eager(sae, dtype):
    W = sae[3].to(dtype)
    indices = torch.randint(N, (512, K), generator=torch.Generator().manual_seed(4), dtype=torch.int32).cuda()
    grad = random_tokens(512, D, dtype=torch.float32).to("cuda", dtype)
    found = torch.ops.saemnesia_fast.gather_dot(indices, W, grad)
    given = (indices, W.float(), grad.float())
    assert_no_worse(found, reference.gather_dot(*given), reference.gather_dot(*doubled(*given)))


def gradient(x: Tensor, direction: Tensor, *arguments: Any) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad((ops.erase(x, *arguments) * direction).sum(), x)[0]


def choice(x: Tensor, *arguments: Any) -> Tensor:
    """[M, K + S]: which latents a token keeps, and which entries steer it."""
    *weights, _, k, latents, thresholds, _, _ = arguments
    kept = ops.encode_topk(x, *weights, k).indices.sort().values
    return torch.cat([flat(kept), flat(ops.probe(x, *weights, k, latents, thresholds)[1])], 1)


@pytest.mark.parametrize("mode", ["exact", "released"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_through_erase_is_that_of_float64(sae, dtype, mode):
    """To 2^-20 of a token's largest entry and the rounding to x's dtype, where both chose the same latents."""
    x, direction = block_output(2, dtype), block_output(2, dtype, seed=7)
    arguments = (*cast(sae, dtype), K, *lines(2, 300, 0.5), mode)
    found, chosen = gradient(x, direction, *arguments), choice(x.float(), *arguments)
    with ops.use_backend("eager"):
        exact = flat(gradient(*doubled(x, direction, *arguments)))
        wanted = choice(*doubled(x, *arguments))
    same = (chosen == wanted).all(1)
    assert same.double().mean() > 0.99 and wanted[same, K:].any()
    error = (flat(found).double() - exact).abs().amax(1)
    assert found.dtype == dtype
    assert (error <= (torch.finfo(dtype).eps / 2 + 2.0**-20) * exact.abs().amax(1))[same].all()


def test_long_offsets(sae):
    """Tokens beyond 2^31 elements, encoded in many parts; by few latents, as 20480 would take minutes."""
    weights = [t[:512] if len(t) == N else t for t in cast(sae, torch.float16)]
    x = torch.empty(1 << 21, D, dtype=torch.float16, device="cuda")
    x[-200:] = flat(block_output(1, torch.float16, "contiguous"))[:200]
    x[:-200] = 0
    latents, thresholds, factors = (t.cuda() for t in selection(1, 200, n=512))
    entries = latents, torch.full_like(thresholds, 0.3), factors
    tail = x[-200:].clone()
    want = ops.erase(tail, *weights, K, *entries)
    assert same_bits(ops.erase(x, *weights, K, *entries, in_place=True)[-200:], want)
    assert (want != tail).any()
    x[-200:] = tail
    values, indices = ops.encode_topk(x, *weights[:3], K)
    alone = ops.encode_topk(tail, *weights[:3], K)
    assert same_bits(values[-200:], alone.values)
    assert torch.equal(indices[-200:], alone.indices)
