"""Adam's moments in 8 bits: the format, and ops.adam_latents with it."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pairs import random_terms
from saemnesia_fast import ops
from saemnesia_fast.ops import EightBit, LatentMoments, cpu_backend, eight_bit
from saemnesia_fast.ops.backend import Refusal
from test_adam_latents import State
from weights import random_tokens, same_bits

CPU = torch.device("cpu")
SIGNS = (True, False)
EPS = 1e-6
AT_A_BORDER = 1e-6
"""Of a number: so near to where codes change, float32's rounding decides."""


def far_from_borders(numbers: Tensor, signed: bool) -> Tensor:
    entries = eight_bit.code_map(signed, CPU).double()
    borders = (entries[:-1] + entries[1:]) / 2
    nearest = (numbers.double()[..., None] - borders).abs().amin(-1)
    return nearest > AT_A_BORDER * numbers.double().abs()


@pytest.mark.parametrize("signed", SIGNS)
def test_map(signed: bool) -> None:
    """Seven decades, the highest of 64 parts for each sign or of 128; 0 and 1."""
    entries = eight_bit.code_map(signed, CPU)
    assert len(entries.unique()) == 256
    assert torch.equal(entries, entries.sort().values)
    assert {0.0, 1.0} <= set(entries.tolist())
    assert ((entries > 0.1) & (entries < 1)).sum() == (64 if signed else 128)
    assert entries[entries > 0].min().item() == pytest.approx(5.5e-7 if signed else 3.25e-7, rel=1e-6)
    if signed:
        assert torch.equal(entries[:127], -entries[128:255].flip(0))


@pytest.mark.parametrize("signed", SIGNS)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=50), st.sampled_from([1.0, 1e-3, 1e-6]))
def test_encode_finds_the_nearest(signed: bool, numbers: list[float], scale: float) -> None:
    x = torch.tensor(numbers) * scale
    x = torch.cat([x, -x]) if signed else x
    entries = eight_bit.code_map(signed, CPU).double()
    nearest = (x.double()[:, None] - entries).abs().argmin(1)
    sure = far_from_borders(x, signed)
    assert torch.equal(eight_bit.encode(x, signed)[sure].long(), nearest[sure])


@pytest.mark.parametrize("signed", SIGNS)
def test_the_format_is_torchao_s(signed: bool) -> None:
    """The map, the codes, also where a number is on a border, and the scales of blocks."""
    pytest.importorskip("torchao")
    from torchao.optim import subclass_8bit

    theirs = subclass_8bit.OptimState8bit.zeros((4, 512), signed, 256)
    assert same_bits(eight_bit.code_map(signed, CPU), theirs.qmap)
    entries = theirs.qmap
    borders = [(entries[:-1] + entries[1:]) / 2]
    borders += [torch.nextafter(borders[0], torch.tensor(end)) for end in (-2.0, 2.0)]
    numbers = torch.cat([*borders, random_tokens(2048 - 3 * 255, dtype=torch.float32) * 0.3]).view(4, 512)
    numbers = numbers if signed else numbers.abs()
    theirs.copy_(numbers)
    ours = eight_bit.quantized(numbers, 2, signed)
    assert same_bits(ours.codes, theirs.codes)
    assert same_bits(ours.scale.flatten(), theirs.scale)
    assert same_bits(eight_bit.widened(ours, signed), theirs.dequantize())


def steps(state: State, d: int, count: int, **more: Any) -> State:
    x = random_tokens(24, d, dtype=torch.float32)
    for number in range(1, count + 1):
        terms = random_terms(x, len(state.W_enc), (8, 3))
        state.step(terms, x, number, scale=torch.tensor(0.5 / number), eps=EPS, **more)
    return state


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("signed", SIGNS)
def test_every_code_is_understood(signed: bool) -> None:
    """A step without gradient, of weights 0: from exp_avg of all codes and exp_avg_sq of the map's 1, or vice versa."""
    state = State(256, 256, torch.float32, torch.uint8)
    x = random_tokens(1, 256, dtype=torch.float32)
    (term,) = random_terms(x, 256, (1,))
    scales = 10.0 ** torch.arange(-8, 8).float()
    for m, v in (state.moments[:2], state.moments[2:]):
        for moment, varied in ((m, signed), (v, not signed)):
            assert isinstance(moment, EightBit)
            moment.codes.copy_(torch.arange(256) if varied else torch.tensor(255))
            moment.scale.copy_(scales.repeat(16)[:, None])
    wide = [eight_bit.widened(moment, i % 2 == 0).double() for i, moment in enumerate(state.moments)]
    state.W_enc.zero_()
    state.step([term._replace(values=term.values * 0)], x, 1, eps=EPS, unit_norm=False)
    m, v = 0.9 * wide[0], 0.999 * wide[1]
    want = -1e-2 * m / 0.1 / ((v / 0.001).sqrt() + EPS)
    torch.testing.assert_close(state.W_enc.double(), want, rtol=2e-6, atol=0)


@pytest.mark.usefixtures("each_backend")
@settings(max_examples=20)
@given(
    st.sampled_from([64, 70, 256, 320, 640]),
    st.integers(1, 12),
    st.sampled_from([1.0, 1e-3, 1e-6, 1e-9]),
    st.booleans(),
)
def test_a_first_step_leaves_the_codes_of_its_gradient(d: int, n: int, size: float, double: bool) -> None:
    """exp_avg = 0.1 g and exp_avg_sq = 0.001 g^2, each block by its largest."""
    x = random_tokens(24, d, dtype=torch.float64 if double else torch.float32)
    state = State(n, d, x.dtype, torch.uint8)
    terms = [term._replace(grad_x_hat=term.grad_x_hat * size) for term in random_terms(x, n, (4,))]
    gradients = ops.latent_gradients(*terms[0][:3], x, state.W_dec, state.b_dec)
    state.step(terms, x, 1, eps=EPS, unit_norm=False)
    blocks = state.moments[0].scale.shape[1]
    assert d // blocks == {64: 64, 70: 2, 256: 256, 320: 64, 640: 128}[d]
    for moment, g in zip(state.moments[::2], (gradients.dW_enc, gradients.dW_dec), strict=True):
        _check_codes(moment, 0.1 * g.double(), signed=True)
    for moment, g in zip(state.moments[1::2], (gradients.dW_enc, gradients.dW_dec), strict=True):
        _check_codes(moment, 0.001 * g.double().square(), signed=False)


def _check_codes(moment: Any, wide: Tensor, signed: bool) -> None:
    n, blocks = moment.scale.shape
    blockwise = wide.view(n, blocks, -1)
    scale = blockwise.abs().amax(2).clamp_min(1e-12)
    torch.testing.assert_close(moment.scale.double(), scale, rtol=1e-4, atol=0)
    parts = (blockwise / moment.scale[..., None].double()).view(wide.shape)
    entries = eight_bit.code_map(signed, CPU).double()
    found = (entries[moment.codes.long()] - parts).abs()
    nearest = (parts[..., None] - entries).abs().amin(-1)
    assert (found <= nearest + 1e-4 * parts.abs() + 1e-6).all()


def test_backends_agree() -> None:
    """After five steps, but where a last bit of a sum decides between two codes."""
    states = []
    for name in ("cpu", "eager"):
        if isinstance(cpu_backend.extension(), Refusal):
            pytest.skip("needs the C++ extension")
        with ops.use_backend(name):
            states.append(steps(State(40, 320, torch.float32, torch.uint8), 320, 5))
    for ours, theirs in zip(*(state.moments for state in states), strict=True):
        assert (ours.codes != theirs.codes).float().mean() < 1e-3
        torch.testing.assert_close(ours.scale, theirs.scale, rtol=1e-3, atol=0)
    for ours, theirs in zip(states[0].tensors()[:2], states[1].tensors()[:2], strict=True):
        assert ((ours - theirs).abs() > 1e-5).float().mean() < 1e-3


def test_vectors_of_any_width_give_the_same_bits() -> None:
    module = cpu_backend.extension()
    if isinstance(module, Refusal):
        pytest.skip("needs the C++ extension")
    before, found = module.build_config()["instruction_set"], []
    try:
        for name in module.build_config()["instruction_sets"]:
            try:
                module.use_instruction_set(name)
            except ValueError:
                continue
            if name != "baseline":
                found.append(steps(State(20, 320, torch.float32, torch.uint8), 320, 3).tensors())
    finally:
        module.use_instruction_set(before)
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.usefixtures("each_backend")
def test_a_block_of_zeros_and_nan_in_a_row() -> None:
    x = random_tokens(8, 64, dtype=torch.float32)
    (term,) = random_terms(x, 20, (4,))
    clean, state = (State(20, 64, torch.float32, torch.uint8) for _ in range(2))
    clean.step([term], x, eps=EPS)
    idle = ~torch.isin(torch.arange(20), term.indices[term.values > 0].long())
    assert 0 < idle.sum() < 20
    for moment, zero in zip(clean.moments, (127, 0, 127, 0), strict=True):
        assert (moment.codes[idle] == zero).all()
        assert (moment.scale[idle] == 1e-12).all()
    values = term.values.clone()
    values[1, 2] = torch.nan
    state.step([term._replace(values=values)], x, eps=EPS)
    hit = torch.arange(20) == term.indices[1, 2]
    assert state.moments.exp_avg_dec.scale[hit].isnan().all()
    for ours, theirs in zip(state.tensors(), clean.tensors(), strict=True):
        assert same_bits(ours[~hit], theirs[~hit])


def test_bad_moments_are_named() -> None:
    """SPEC 7.1."""
    state = State(8, 64, torch.float32, torch.uint8)
    x = random_tokens(3, 64, dtype=torch.float32)
    good = state.moments[0]
    assert isinstance(good, EightBit)
    cases: list[tuple[Any, type[Exception], str]] = [
        (torch.zeros(8, 64), TypeError, "moments.exp_avg_dec: expected EightBit as the first, got Tensor"),
        (
            good._replace(codes=good.codes.int()),
            TypeError,
            "moments.exp_avg_dec.codes: expected torch.uint8, got torch.i",
        ),
        (good._replace(codes=good.codes[:7]), ValueError, r"exp_avg_dec.codes: expected \[8, 64\] contiguous as W_enc"),
        (good._replace(scale=good.scale.double()), ValueError, r"exp_avg_dec.scale: expected \[N=8, B\] contiguous"),
        (good._replace(scale=torch.zeros(8, 3)), ValueError, r"exp_avg_dec.scale: .* numbers, got \[8, 3\]"),
        (good._replace(scale=torch.zeros(8)), ValueError, r"exp_avg_dec.scale: .* numbers, got \[8\]"),
    ]
    for moment, kind, message in cases:
        state.moments = LatentMoments(good, good, moment, good)
        with pytest.raises(kind, match=message):
            state.step(random_terms(x, 8, (2,)), x)
