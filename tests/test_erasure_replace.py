"""`mode="replace"` (SPEC 3.8): token by token against a loop, and through pipelines."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from erasing import HOOK_POINT, OTHER_HOOK_POINT, STRONG, random_sae, random_table, sae_and_table, unet_call
from pipelines import generate, tiny_sd, tiny_sd_to_compile, tiny_unet
from saemnesia_fast.concepts import ConceptTable
from saemnesia_fast.erasure import apply_erasure
from saemnesia_fast.erasure.replace import replace_tokens
from saemnesia_fast.hookpoints import find_hook_point

FEW = STRONG | {"num_latents": 3}


def naive(x: Tensor, detected: Tensor) -> Tensor:
    """Tokens [B, H, W, d], one after the other."""
    out = x.clone()
    images, height, width = detected.shape
    places = [(i, j) for i in range(height) for j in range(width)]
    for b in range(images):
        usable = [p for p in places if not detected[b][p] and x[b][p].isfinite().all()]
        for i, j in places:
            if detected[b, i, j] and usable:
                nearest = min(usable, key=lambda p: (p[0] - i) ** 2 + (p[1] - j) ** 2)  # the first of equals
                out[b, i, j] = x[b][nearest]
    return out


@given(
    images=st.integers(1, 3),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    share=st.sampled_from([0.0, 0.3, 0.7, 0.95, 1.0]),
    broken=st.booleans(),
    channels_first=st.booleans(),
    seed=st.integers(0, 999),
)
def test_tokens_come_from_the_nearest_undetected_place(images, height, width, share, broken, channels_first, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, height, width, 3, generator=generator)
    if channels_first:
        x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    detected = torch.rand(images, height, width, generator=generator) < share
    if broken:
        x[-1, -1, -1, 0], x[0, 0, 0, 2] = math.nan, math.inf
    out = replace_tokens(x, detected)
    torch.testing.assert_close(out, naive(x, detected), rtol=0, atol=0, equal_nan=True)


def test_its_gradient_goes_to_the_tokens_that_were_taken():
    x = torch.randn(1, 1, 4, 2, dtype=torch.float64, requires_grad=True)
    replace_tokens(x, torch.tensor([[[False, True, True, False]]])).sum().backward()
    assert x.grad is not None and x.grad[0, 0, :, 0].tolist() == [2, 0, 0, 2]


def tokens(block: Tensor) -> Tensor:
    return block.permute(0, 2, 3, 1)


def changed(block: Tensor, plain: Tensor) -> Tensor:
    return (tokens(block) != tokens(plain)).any(-1)


@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
def test_the_tokens_that_exact_mode_steers_are_overwritten_whatever_the_strength(size, each_backend):
    unet = tiny_unet()
    sae, table = sae_and_table()
    plain = unet_call(unet, size=size)
    with apply_erasure(unet, sae, table, "cat", **FEW):
        detected = changed(unet_call(unet, size=size), plain)
    assert 0 < detected.sum() < detected.numel()
    for strength in (-1.0, -100.0):
        with apply_erasure(unet, sae, table, "cat", mode="replace", **(FEW | {"strength": strength})) as erasure:
            assert "probe on cpu" in erasure.explain() and "erase on cpu" not in erasure.explain()
            replaced = unet_call(unet, size=size)
        assert torch.equal(tokens(replaced), naive(tokens(plain), detected))
        assert replaced.stride() == plain.stride()


def test_a_map_that_is_detected_as_a_whole_stays_as_it_is():
    sae, table = sae_and_table()
    with torch.no_grad():
        sae.encoder.bias.add_(100 * torch.nn.functional.one_hot(table.select("cat").latents[0, 0], sae.num_latents))
    table = ConceptTable(table.mu, table.timesteps, table.concepts, table.kinds, table.hook_point, sae.content_hash())
    unet = tiny_unet()
    plain = unet_call(unet, timestep=751)
    with apply_erasure(unet, sae, table, "cat", mode="replace"):
        assert torch.equal(unet_call(unet, timestep=751), plain)
    with apply_erasure(unet, sae, table, "cat"):
        assert changed(unet_call(unet, timestep=751), plain).all()


def test_the_residual_stream_keeps_the_blocks_input():
    """out' = in + (out - in at the token that was taken)."""
    unet = tiny_unet()
    sae, table = sae_and_table()
    plain = unet_call(unet)
    given: dict[str, Tensor] = {}
    hook = find_hook_point(unet, HOOK_POINT).register_forward_pre_hook(lambda m, args: given.update(base=args[0]))
    unet_call(unet)
    hook.remove()
    with apply_erasure(unet, sae, table, "cat", stream="residual", **FEW):
        detected = changed(unet_call(unet), plain)
    assert 0 < detected.sum() < detected.numel()
    with apply_erasure(unet, sae, table, "cat", mode="replace", stream="residual", **FEW):
        replaced = unet_call(unet)
    expected = tokens(given["base"]) + naive(tokens(plain - given["base"]), detected)
    assert torch.equal(changed(replaced, plain), detected)
    torch.testing.assert_close(tokens(replaced)[detected], expected[detected], rtol=1e-5, atol=1e-5)


def test_a_unit_norm_sae_looks_at_normalised_tokens_and_the_given_ones_are_moved():
    sae = random_sae(input_unit_norm=True)
    _, table = sae_and_table()
    table = ConceptTable(table.mu, table.timesteps, table.concepts, table.kinds, table.hook_point, sae.content_hash())
    unet = tiny_unet()
    plain = unet_call(unet)
    with apply_erasure(unet, sae, table, "cat", **FEW):
        detected = changed(unet_call(unet), plain)
    assert 0 < detected.sum() < detected.numel()
    with apply_erasure(unet, sae, table, "cat", mode="replace", **FEW):
        assert torch.equal(tokens(unet_call(unet)), naive(tokens(plain), detected))


def test_a_pipeline_is_erased_reported_paused_and_left_as_it_was():
    pipe = tiny_sd()
    sae, table = sae_and_table()
    prompts = ["a cat", "a dog"]
    before = generate(pipe, prompts)
    with apply_erasure(pipe, sae, table, [["cat"], []], mode="replace", record=True, **FEW) as erasure:
        erased = generate(pipe, prompts)
        (report,) = erasure.report()
        assert report.concept == "cat" and report.image == 0 and 0 < report.steered < report.tokens
        assert not torch.equal(erased[0], before[0])
        torch.testing.assert_close(erased[1], before[1], rtol=0, atol=0)
        with erasure.paused():
            assert torch.equal(generate(pipe, prompts), before)
    assert torch.equal(generate(pipe, prompts), before)


def test_a_compiled_unet_replaces_in_one_graph():
    unet = tiny_sd_to_compile().unet
    sae = random_sae(OTHER_HOOK_POINT)
    plain = unet_call(unet)
    with apply_erasure(unet, sae, random_table(sae, HOOK_POINT), "cat", mode="replace", **FEW):
        replaced = unet_call(unet)
        compiled = torch.compile(unet, backend="eager", fullgraph=True)
        sample, states = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 32)
        with torch.no_grad():
            expected = unet(sample, 501, encoder_hidden_states=states).sample
            torch.testing.assert_close(compiled(sample, 501, encoder_hidden_states=states).sample, expected)
    assert 0 < changed(replaced, plain).sum() < changed(replaced, plain).numel()


def test_gradients_pass_through_a_pipelines_replaced_block():
    unet = tiny_unet().to(torch.float64)
    sae, table = sae_and_table()
    sample = torch.randn(1, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    states = torch.randn(1, 16, 32, dtype=torch.float64)
    with apply_erasure(unet, sae, table, "cat", mode="replace", **FEW):
        unet(sample, 501, encoder_hidden_states=states).sample.square().sum().backward()
        with torch.no_grad():
            step = 1e-6 * torch.randn(1, 4, 8, 8, dtype=torch.float64)
            ahead, behind = (
                unet(sample + sign * step, 501, encoder_hidden_states=states).sample.square().sum() for sign in (1, -1)
            )
    assert sample.grad is not None
    torch.testing.assert_close((sample.grad * step).sum(), (ahead - behind) / 2, rtol=1e-4, atol=1e-9)
