"""What an erasure computes, against dense re-expressions of SPEC 3 (modes, halves, prompts, timesteps, streams)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler, UNet2DConditionModel
from torch import Tensor

from erasing import (
    HOOK_POINT,
    OTHER_HOOK_POINT,
    STRONG,
    activations,
    random_sae,
    random_table,
    sae_and_table,
    unet_call,
)
from oracles import dense_erasure, released_hook
from pipelines import HOOK_POINTS, generate, tiny_sd, tiny_sd2, tiny_sdxl, tiny_unet
from saemnesia_fast.concepts import ConceptTable
from saemnesia_fast.erasure import apply_erasure
from saemnesia_fast.hookpoints import find_hook_point

MODES = ["exact", "released", "reconstruct"]


def line(
    table: ConceptTable, concepts: str | list[str], timestep: float, **choice: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """[S] latents, thresholds and factors at one timestep."""
    selection = table.select(concepts, **(STRONG | choice))
    row = selection.row(timestep)
    return selection.latents[row], selection.thresholds[row], selection.factors[row]


@pytest.mark.parametrize("build", [tiny_sd, tiny_sd2, tiny_sdxl])
def test_released_mode_is_the_released_hook_through_a_whole_pipeline_spec_3_2(build):
    pipe = build().to(torch.float64)
    sae, table = sae_and_table()
    plain = generate(pipe, ["a cat", "a dog"])
    with apply_erasure(pipe, sae, table, "cat", mode="released", **STRONG):
        ours = generate(pipe, ["a cat", "a dog"])

    block = find_hook_point(pipe, HOOK_POINT)
    original, calls = block.forward, iter((751, 501, 251, 1))
    weights = [p.detach().double() for p in (sae.W_enc, sae.b_enc, sae.b_dec, sae.W_dec)]

    def forward(*args, **kwargs):
        (output,) = original(*args, **kwargs)
        W_enc, b_enc, b_dec, W_dec = weights
        return (released_hook(output, W_enc, b_enc, b_dec, W_dec, sae.k, *line(table, "cat", next(calls))),)

    block.forward = forward
    theirs = generate(pipe, ["a cat", "a dog"])
    assert (ours - plain).abs().mean() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
def test_block_output_is_spec_3_2(mode, size):
    unet = tiny_unet()
    sae, table = sae_and_table()
    plain = unet_call(unet, size=size)
    expected = dense_erasure(plain, sae, *line(table, "cat", 501), mode=mode)
    with apply_erasure(unet, sae, table, "cat", mode=mode, **STRONG):
        erased = unet_call(unet, size=size)
    assert (erased - plain).abs().max() > 0.1
    assert erased.is_contiguous()
    torch.testing.assert_close(erased.double(), expected, rtol=1e-5, atol=1e-5)


def test_untouched_tokens_are_bit_identical_spec_3_3():
    unet = tiny_unet()
    sae, table = sae_and_table()
    plain = unet_call(unet)
    steered = (dense_erasure(plain, sae, *line(table, "cat", 501, num_latents=2), mode="exact") != plain.double()).any(
        1
    )
    with apply_erasure(unet, sae, table, "cat", **(STRONG | {"num_latents": 2})):
        erased = unet_call(unet)
    assert 0 < steered.sum() < steered.numel()
    assert torch.equal((erased != plain).any(1), steered)


def test_channels_last_activations_stay_channels_last_spec_7_2():
    sae, table = sae_and_table()
    unet = tiny_unet().to(memory_format=torch.channels_last)
    plain = unet_call(unet)
    with apply_erasure(unet, sae, table, "cat", **STRONG):
        erased = unet_call(unet)
    expected = dense_erasure(plain, sae, *line(table, "cat", 501), mode="exact")
    torch.testing.assert_close(erased.double(), expected, rtol=1e-5, atol=1e-5)
    assert erased.stride() == plain.stride()


@pytest.mark.parametrize(("mode", "told_by"), [("exact", "table"), *((mode, "argument") for mode in MODES)])
def test_residual_stream_edits_output_minus_input(mode, told_by):
    """SPEC 3.6: out' = out + Delta, and in + x' for the other modes, with x = out - in."""
    unet = tiny_unet()
    sae, table = sae_and_table()
    plain = unet_call(unet)
    given: dict[str, Tensor] = {}
    block = find_hook_point(unet, HOOK_POINT)
    handle = block.register_forward_pre_hook(lambda module, args: given.update(base=args[0].clone()))
    unet_call(unet)
    handle.remove()
    base = given["base"].double()
    expected = base + dense_erasure(plain.double() - base, sae, *line(table, "cat", 501), mode=mode)
    if told_by == "table":
        table.sampler["stream"] = "residual"
    stream = "residual" if told_by == "argument" else None
    with apply_erasure(unet, sae, table, "cat", mode=mode, stream=stream, **STRONG):
        erased = unet_call(unet)
    torch.testing.assert_close(erased.double(), expected, rtol=1e-5, atol=1e-5)
    if mode == "exact":
        untouched = (expected - plain.double()).abs().amax(1) < 1e-12
        assert untouched.sum() > 0
        assert torch.equal(erased.permute(0, 2, 3, 1)[untouched], plain.permute(0, 2, 3, 1)[untouched])


@pytest.mark.parametrize("mode", MODES)
def test_input_unit_norm_is_mapped_back_spec_1_4(mode):
    unet = tiny_unet()
    sae = random_sae(input_unit_norm=True)
    table = random_table(sae)
    plain = unet_call(unet)
    x = plain.double()
    mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-5
    whitened = (x - mean) / std
    edited = dense_erasure(whitened, sae, *line(table, "cat", 501), mode=mode)
    with apply_erasure(unet, sae, table, "cat", mode=mode, **STRONG):
        erased = unet_call(unet)
    torch.testing.assert_close(erased.double(), edited * std + mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_conditional_half_alone_leaves_the_first_half_spec_3_4(mode):
    pipe = tiny_sd()
    sae, table = sae_and_table()
    (_, plain), *_ = activations(pipe)
    with apply_erasure(pipe, sae, table, "cat", mode=mode, halves="cond", **STRONG):
        (timestep, erased), *_ = activations(pipe)
        ((_, alone), *_) = activations(pipe, guidance_scale=1.0)
    expected = dense_erasure(plain, sae, *line(table, "cat", timestep), mode=mode)
    assert torch.equal(erased[:1], plain[:1])
    torch.testing.assert_close(erased[1:].double(), expected[1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone.double(), expected[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_each_prompt_has_its_own_concepts_spec_3_4(mode):
    """Two images a prompt, kept together in each half; an empty list leaves the prompt's images as they are."""
    pipe = tiny_sd()
    sae, table = sae_and_table()
    prompts, lists = ["a cat", "a dog", "a bird"], [["cat", "sketch"], [], ["dog"]]
    (_, plain), *_ = activations(pipe, prompt=prompts, num_images_per_prompt=2)
    with apply_erasure(pipe, sae, table, lists, mode=mode, **STRONG):
        (timestep, erased), *_ = activations(pipe, prompt=prompts, num_images_per_prompt=2)
    for half in (0, 6):
        for prompt, names in enumerate(lists):
            rows = slice(half + 2 * prompt, half + 2 * prompt + 2)
            if names:
                expected = dense_erasure(plain[rows], sae, *line(table, names, timestep), mode=mode)
                torch.testing.assert_close(erased[rows].double(), expected, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(erased[rows], plain[rows])


def test_rows_that_prompts_do_not_divide_raise_spec_3_10():
    pipe = tiny_sd()
    with (
        apply_erasure(pipe, *sae_and_table(), [["cat"], ["dog"]]),
        pytest.raises(ValueError, match="multiple of 2 halves x 2 prompts, got 6 rows"),
    ):
        generate(pipe, ["a cat", "a dog", "a bird"])


@pytest.mark.parametrize("steps", [2, 3, 8])
def test_the_nearest_stored_timestep_decides_not_the_number_of_calls_spec_2_4(steps):
    pipe = tiny_sd()
    sae, table = sae_and_table()
    block = find_hook_point(pipe, HOOK_POINT)
    original, given = block.forward, []

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        given.append(output[0].clone())
        return output

    block.forward = forward
    with apply_erasure(pipe, sae, table, "cat", **STRONG):
        erased = activations(pipe, num_inference_steps=steps)
    assert len(given) == len(erased) == steps
    for (timestep, after), before in zip(erased, given, strict=True):
        expected = dense_erasure(before, sae, *line(table, "cat", timestep), mode="exact")
        torch.testing.assert_close(after.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("timestep", [999, 700, 640, 260, 0, 376.5, torch.tensor(130)])
def test_any_timestep_takes_the_nearest_row_spec_2_4(timestep):
    unet = tiny_unet()
    sae, table = sae_and_table()
    plain = unet_call(unet, timestep)
    with apply_erasure(unet, sae, table, "cat", **STRONG):
        erased = unet_call(unet, timestep)
    expected = dense_erasure(plain, sae, *line(table, "cat", float(timestep)), mode="exact")
    torch.testing.assert_close(erased.double(), expected, rtol=1e-5, atol=1e-5)


def test_rows_at_different_timesteps_take_their_own_lines():
    unet = tiny_unet()
    sae, table = sae_and_table()
    block = find_hook_point(unet, HOOK_POINT)
    sample, states = torch.randn(4, 4, 8, 8), torch.randn(4, 16, 32)
    timesteps = torch.tensor([10, 900, 500, 240])
    seen = []
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
    with torch.no_grad():
        unet(sample, timesteps, encoder_hidden_states=states)
        with apply_erasure(unet, sae, table, [["cat"], ["dog"]], cfg=True, **STRONG):
            unet(sample, timesteps, encoder_hidden_states=states)
    handle.remove()
    plain, erased = seen
    for row, (timestep, name) in enumerate(zip(timesteps.tolist(), ["cat", "dog", "cat", "dog"], strict=True)):
        expected = dense_erasure(plain[row : row + 1], sae, *line(table, name, timestep), mode="exact")
        torch.testing.assert_close(erased[row : row + 1].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_outside_the_window_everything_stays_spec_3_4(mode):
    """start 0.3, stop 0.7: timesteps 700 to 300, by the UNet's timestep, not by the stored one."""
    unet = tiny_unet()
    sae, table = sae_and_table()
    plain = {t: unet_call(unet, t) for t in (701, 700, 501, 300, 299)}
    with apply_erasure(unet, sae, table, "cat", mode=mode, start=0.3, stop=0.7, **STRONG):
        erased = {t: unet_call(unet, t) for t in plain}
    assert [t for t in plain if torch.equal(erased[t], plain[t])] == [701, 299]
    expected = dense_erasure(plain[300], sae, *line(table, "cat", 300), mode=mode)
    torch.testing.assert_close(erased[300].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_pipeline_may_change_its_dtype(dtype):
    pipe = tiny_sd()
    sae, table = sae_and_table()
    with apply_erasure(pipe, sae, table, "cat", **STRONG) as erasure:
        generate(pipe)
        pipe.to(dtype)
        erased = activations(pipe)[0][1]
        with erasure.paused():
            timestep, plain = activations(pipe)[0]
    expected = dense_erasure(plain, sae, *line(table, "cat", timestep), mode="exact")
    assert erased.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(erased, expected, rtol=1e-12, atol=1e-12)
    else:
        torch.testing.assert_close(erased, expected.to(dtype), rtol=2**-7, atol=0)


def test_norm_scale_multiplies_by_the_norm_of_the_kept_latents_spec_3_1():
    unet = tiny_unet()
    sae, table = sae_and_table()
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, sae.num_latents)[:, None])
    table.sae_hash = sae.content_hash()
    plain = unet_call(unet)
    x = plain.double().permute(0, 2, 3, 1)
    kept = torch.relu((x - sae.b_dec) @ sae.W_enc.double().T + sae.b_enc).topk(sae.k).values.norm(dim=-1)
    norms = sae.W_dec.detach().norm(dim=1)
    latents, thresholds, factors = line(table, "cat", 501, strength=-3.0, scale="norm", decoder_norms=norms)
    torch.testing.assert_close(factors, -3.0 / norms[latents])
    with apply_erasure(unet, sae, table, "cat", scale="norm", strength=-3.0, num_latents=12):
        erased = unet_call(unet)
    for b, h, w in ((0, 0, 0), (1, 2, 3), (0, 3, 1)):
        token = plain[b : b + 1, :, h : h + 1, w : w + 1]
        expected = dense_erasure(token, sae, latents, thresholds, factors.double() * kept[b, h, w], mode="exact")
        torch.testing.assert_close(erased[b, :, h, w].double(), expected[0, :, 0, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_heun_calls_the_unet_twice_per_step_at_its_own_timesteps():
    pipe = tiny_sd()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    sae, table = sae_and_table()
    with apply_erasure(pipe, sae, table, "cat", **STRONG) as erasure:
        erased = activations(pipe, num_inference_steps=3)
        with erasure.paused():
            plain = activations(pipe, num_inference_steps=3)
    assert len(erased) == 5
    timestep, first = erased[0]
    expected = dense_erasure(plain[0][1], sae, *line(table, "cat", timestep), mode="exact")
    torch.testing.assert_close(first.double(), expected, rtol=1e-5, atol=1e-5)


def test_several_hook_points_at_once_spec_3_6():
    pipe = tiny_sd()
    saes = {name: random_sae(name) for name in HOOK_POINTS}
    tables = {f"unet.{name}": random_table(sae, name) for name, sae in saes.items()}
    with apply_erasure(pipe, saes, tables, "cat", **STRONG):
        both = generate(pipe)
    with apply_erasure(pipe, saes[HOOK_POINT], tables[f"unet.{HOOK_POINT}"], "cat", **STRONG):
        one = generate(pipe)
        with apply_erasure(pipe, saes[OTHER_HOOK_POINT], tables[f"unet.{OTHER_HOOK_POINT}"], "cat", **STRONG):
            nested = generate(pipe)
        assert torch.equal(generate(pipe), one)
    assert torch.equal(both, nested)
    assert not torch.equal(both, one)


def test_order_of_concepts_does_not_matter_spec_3_5():
    pipe = tiny_sd()
    sae, table = sae_and_table()
    strength = {"cat": -40.0, "sketch": -10.0}
    with apply_erasure(pipe, sae, table, ["cat", "sketch"], strength, num_latents=12):
        first = generate(pipe)
    with apply_erasure(pipe, sae, table, ["sketch", "cat"], strength, num_latents=12):
        assert torch.equal(generate(pipe), first)


def test_gradient_flows_through_an_erased_block():
    """An honest attack differentiates through the erasure (SPEC 5.4)."""
    unet = tiny_unet().double()
    sae, table = sae_and_table()
    sample = torch.randn(1, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    states = torch.randn(1, 16, 32, dtype=torch.float64)
    direction = torch.randn_like(sample)
    with apply_erasure(unet, sae, table, "cat", **STRONG):

        def loss(shift):
            return unet(sample + shift * direction, 501, encoder_hidden_states=states).sample.square().sum()

        (gradient,) = torch.autograd.grad(loss(0.0), sample)
        with torch.no_grad():
            difference = (loss(1e-6) - loss(-1e-6)) / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_full_size_sd15_unet():
    """d = 1280, N = 20480, k = 32 at up_blocks.1.attentions.1 of an SD 1.5 UNet with random weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=768,
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=8,
        )
    unet = unet.to_empty(device="cpu").eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 and "norm" in name else parameter.normal_(0, 0.02)
    hook_point = "up_blocks.1.attentions.1"
    sae = type(random_sae()).init(1280, 20480, 32)
    table = ConceptTable(
        mu=0.01 + 0.02 * torch.rand(2, 2, 20480),
        timesteps=torch.tensor([751, 251]),
        concepts=["cat", "dog"],
        kinds=["object", "object"],
        hook_point=hook_point,
        sae_hash=sae.content_hash(),
    )
    sample, states = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 768)
    seen = []
    block = find_hook_point(unet, hook_point)
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
    with torch.no_grad():
        plain = unet(sample, 700, encoder_hidden_states=states).sample
        with apply_erasure(unet, sae, table, "cat", strength=-40.0, num_latents=2000):
            erased = unet(sample, 700, encoder_hidden_states=states).sample
    handle.remove()
    expected = dense_erasure(seen[0], sae, *line(table, "cat", 700, num_latents=2000), mode="exact")
    assert (expected - seen[0]).abs().max() > 0.1
    torch.testing.assert_close(seen[1].double(), expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(erased, plain)
