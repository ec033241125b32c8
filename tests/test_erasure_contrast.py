"""`mode="contrast"`: token by token against a loop, and through pipelines."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from erasing import HOOK_POINT, OTHER_HOOK_POINT, STRONG, random_sae, random_table, sae_and_table, unet_call
from pipelines import generate, tiny_sd, tiny_unet
from saemnesia_fast.concepts import ConceptTable
from saemnesia_fast.erasure import apply_erasure
from saemnesia_fast.erasure.contrast import Contrast
from saemnesia_fast.evaluation import ContrastErasure, Setting
from saemnesia_fast.hookpoints import find_hook_point

DETECTING: dict[str, Any] = {"num_latents": 3, "cfg": True}
FEW = STRONG | DETECTING | {"scale": "constant"}


def tokens(block: Tensor) -> Tensor:
    return block.permute(0, 2, 3, 1)


def changed(block: Tensor, plain: Tensor) -> Tensor:
    return (tokens(block) != tokens(plain)).any(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("one_time", [False, True])
def test_every_detected_conditional_token_moves_and_no_other(dtype, anchored, one_time):
    generator = torch.Generator().manual_seed(0)
    images, height, width, d, slots = 3, 2, 5, 4, 3
    x = torch.randn(2 * images, height, width, d, generator=generator).to(dtype)
    activations = torch.rand(images, height, width, slots, generator=generator)
    steered = torch.rand(images, height, width, slots, generator=generator) < 0.4
    strengths = -2 * torch.rand(images, slots, generator=generator)
    stored = torch.tensor([900, 500, 100])
    anchor = torch.randn(3, d, generator=generator)
    times = torch.tensor([480.0]) if one_time else torch.tensor([999.0, 640.0, 300.0] * 2)
    scale = torch.rand(images, height, width, 1, generator=generator)
    scale = scale.to(torch.promote_types(dtype, torch.float32))

    out = Contrast(stored, anchor if anchored else None)(x, activations, steered, strengths, times, scale)

    assert out.dtype == dtype and torch.equal(out[:images], x[:images])
    for b in range(images):
        row = {999.0: 0, 640.0: 1, 480.0: 1, 300.0: 1}[float(times[0 if one_time else b])]  # 300: the noisier one
        for i in range(height):
            for j in range(width):
                c, u = x[images + b, i, j].double(), x[b, i, j].double()
                on = [s for s in range(slots) if steered[b, i, j, s]]
                if not on:
                    assert torch.equal(out[images + b, i, j], x[images + b, i, j])
                    continue
                strongest = max(on, key=lambda s: activations[b, i, j, s])
                added = c - u
                if anchored:
                    added -= anchor[row].double() * scale[b, i, j].double()
                expected = c + strengths[b, strongest].double() * added
                torch.testing.assert_close(out[images + b, i, j], expected.to(dtype), rtol=1e-2, atol=1e-2)
                if dtype != torch.bfloat16:
                    torch.testing.assert_close(out[images + b, i, j].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_broken_token_breaks_its_partner_alone_and_only_where_it_is_detected():
    x = torch.randn(2, 1, 3, 2)
    x[0, 0, :2] = math.nan
    steered = torch.tensor([True, False, False]).view(1, 1, 3, 1)
    out = Contrast(torch.tensor([1]), None)(x, torch.ones(1, 1, 3, 1), steered, -torch.ones(1, 1), torch.tensor([1.0]))
    assert out[1, 0, 0].isnan().all() and torch.equal(out[1, 0, 1:], x[1, 0, 1:])


@pytest.mark.parametrize("stream", ["output", "residual"])
def test_the_tokens_that_exact_mode_steers_are_moved_by_the_formula(stream, each_backend):
    """Strength -1 leaves the unconditional token, whatever the scale."""
    unet = tiny_unet()
    sae, table = sae_and_table()
    given: dict[str, Tensor] = {}
    hook = find_hook_point(unet, HOOK_POINT).register_forward_pre_hook(lambda m, args: given.update(base=args[0]))
    plain = unet_call(unet, rows=4)
    hook.remove()
    with apply_erasure(unet, sae, table, "cat", stream=stream, halves="cond", **FEW):
        detected = changed(unet_call(unet, rows=4), plain)
    assert 0 < detected[2:].sum() < detected[2:].numel() and not detected[:2].any()
    read = tokens(plain - given["base"] if stream == "residual" else plain)
    for strength in (-1.0, -1.5):
        options = {"mode": "contrast", "stream": stream, "strength": strength} | DETECTING
        with apply_erasure(unet, sae, table, "cat", **options) as erasure:
            assert "probe on cpu" in erasure.explain() and "halves='cond'" in erasure.explain()
            moved = unet_call(unet, rows=4)
        expected = read[2:] + strength * (read[2:] - read[:2])
        if stream == "residual":
            expected = expected + tokens(given["base"])[2:]
        assert torch.equal(changed(moved, plain), detected) and moved.stride() == plain.stride()
        torch.testing.assert_close(tokens(moved)[2:][detected[2:]], expected[detected[2:]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unit_norm", [False, True])
def test_an_anchor_takes_the_place_of_what_is_removed(unit_norm):
    sae = random_sae(input_unit_norm=unit_norm)
    table = random_table(sae)
    unet = tiny_unet()
    plain = unet_call(unet, timestep=501)
    with apply_erasure(unet, sae, table, "cat", mode="contrast", strength=-1.5, **DETECTING):
        without = unet_call(unet, timestep=501)
    with apply_erasure(unet, sae, table, "cat", mode="contrast", strength=-1.5, anchor="dog", **DETECTING):
        with_anchor = unet_call(unet, timestep=501)
    detected = changed(without, plain)
    assert detected.any() and torch.equal(changed(with_anchor, plain), detected)
    mean = (table.mu[1, 1] - table.mu[:2, 1].mean(0)) @ sae.W_dec.detach()  # the two objects, of which one is a dog
    shift = 1.5 * mean.expand_as(tokens(plain))
    if unit_norm:
        shift = shift * (tokens(plain).std(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(tokens(with_anchor - without)[detected], shift[detected].detach(), rtol=1e-3, atol=1e-5)


def test_it_needs_guidance_and_an_anchor_that_is_not_erased():
    pipe = tiny_sd()
    sae, table = sae_and_table()
    with pytest.raises(ValueError, match=r"cfg: expected True or False with .* mode='contrast'"):
        apply_erasure(pipe.unet, sae, table, "cat", mode="contrast")
    with pytest.raises(ValueError, match="cfg: expected guidance with mode='contrast', got False"):
        apply_erasure(pipe.unet, sae, table, "cat", mode="contrast", cfg=False)
    with pytest.raises(ValueError, match="anchor: expected none with mode='exact', got 'dog'"):
        apply_erasure(pipe, sae, table, "cat", anchor="dog")
    with pytest.raises(ValueError, match=r"concepts: \['wolf'\] not in the table"):
        apply_erasure(pipe, sae, table, "cat", mode="contrast", anchor="wolf")
    with pytest.raises(ValueError, match="concepts: expected others than the anchor 'cat'"):
        apply_erasure(pipe, sae, table, "cat", mode="contrast", anchor="cat")
    before, unguided = generate(pipe), generate(pipe, guidance_scale=1.0)
    with apply_erasure(pipe, sae, table, "cat", mode="contrast", anchor="dog") as erasure:
        with pytest.raises(RuntimeError, match="mode 'contrast' needs guidance"):
            generate(pipe, guidance_scale=1.0)
        with erasure.paused():
            assert torch.equal(generate(pipe, guidance_scale=1.0), unguided)
        with pytest.raises(ValueError, match="concepts: expected others than the anchor 'dog'"):
            erasure.set(["dog"])
    assert torch.equal(generate(pipe), before)


def test_a_pipeline_is_erased_reported_changed_paused_and_left_as_it_was():
    pipe = tiny_sd()
    sae, table = sae_and_table()
    prompts = ["a cat", "a dog"]
    before = generate(pipe, prompts)
    options = {"mode": "contrast", "strength": -1.5, "num_latents": 3}
    several = generate(pipe, prompts, num_images_per_prompt=2)
    with apply_erasure(pipe, sae, table, [["cat"], []], **options):
        erased = generate(pipe, prompts, num_images_per_prompt=2)
        assert [torch.equal(one, other) for one, other in zip(erased, several, strict=True)] == [
            False,
            False,
            True,
            True,
        ]
    options["record"] = True
    with apply_erasure(pipe, sae, table, [["cat"], []], **options) as erasure:
        erased = generate(pipe, prompts)
        (report,) = erasure.report()
        assert report.concept == "cat" and report.image == 0 and 0 < report.steered < report.tokens
        assert not torch.equal(erased[0], before[0])
        torch.testing.assert_close(erased[1], before[1], rtol=0, atol=0)
        erasure.set(strength=-3.0)
        assert not torch.equal(generate(pipe, prompts)[0], erased[0])
        with erasure.paused():
            assert torch.equal(generate(pipe, prompts), before)
    assert torch.equal(generate(pipe, prompts), before)


def test_each_concept_has_its_strength_and_steps_outside_the_window_stay():
    """Where two concepts are detected, the more active latent's goes."""
    unet = tiny_unet()
    sae, table = sae_and_table()
    plain = {t: unet_call(unet, timestep=t) for t in (501, 251)}
    options: dict[str, Any] = {"mode": "contrast", "num_latents": 12, "cfg": True}
    seen = {}
    for names, strength in ((["cat"], -1.0), (["dog"], -2.0), (["cat", "dog"], {"cat": -1.0, "dog": -2.0})):
        with apply_erasure(unet, sae, table, names, strength=strength, **options):
            seen[len(names), names[-1]] = unet_call(unet, timestep=501)
    cat, dog, both = seen.values()
    moved = changed(both, plain[501])
    close = [(tokens(both) - tokens(one)).abs().amax(-1)[moved] < 1e-5 for one in (cat, dog)]
    assert (
        moved.any() and (close[0] | close[1]).all() and all((one & ~other).any() for one, other in (close, close[::-1]))
    )
    with apply_erasure(unet, sae, table, "dog", strength=-2.0, start=0.6, **options):
        assert torch.equal(unet_call(unet, timestep=501), plain[501])
        assert not torch.equal(unet_call(unet, timestep=251), plain[251])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_moved_as_float32_is(dtype):
    """But for tokens whose detection tips over."""
    sae, table = sae_and_table()
    unet = tiny_unet()
    half = torch.nn.Module.to(deepcopy(unet), dtype)
    blocks = []
    options: dict[str, Any] = {"mode": "contrast", "strength": -1.5, "num_latents": 12, "cfg": True}
    for one in (unet, half):
        with apply_erasure(one, sae, table, "cat", anchor="dog", **options):
            blocks.append(unet_call(one, rows=16))
    moved = changed(blocks[0], unet_call(unet, rows=16))
    near = (tokens(blocks[1]).float() - tokens(blocks[0])).abs().amax(-1)[moved] < 0.05
    assert blocks[1].dtype == dtype and moved.sum() >= 10 and near.float().mean() > 0.8


def test_the_table_knows_how_a_concept_departs():
    mu = torch.rand(4, 2, 5)
    names, kinds = ["cat", "dog", "neon", "wolf"], ["object", "object", "style", "object"]
    table = ConceptTable(mu, torch.tensor([2, 1]), names, kinds, HOOK_POINT, "0")
    W_dec = torch.randn(5, 3)
    torch.testing.assert_close(table.departure("dog", W_dec), (mu[1] - mu[[0, 1, 3]].mean(0)) @ W_dec)
    with pytest.raises(ValueError, match=r"concepts: \['e'\] not in the table"):
        table.departure("e", W_dec)
    with pytest.raises(ValueError, match="concept: expected one beside others of its kind, got 'neon'"):
        table.departure("neon", W_dec)


def test_an_evaluations_anchor_is_the_next_concept_of_the_kind_that_stays():
    """At all hook points and whatever the order of the erased; a concept alone in its kind has none."""
    points = (HOOK_POINT, OTHER_HOOK_POINT)
    saes = {point: random_sae(point) for point in points}
    names, kinds = ["cat", "sketch", "dog", "wolf", "cow"], ["object", "style", "object", "object", "object"]
    tables = {
        point: ConceptTable(
            torch.rand(5, 1, sae.num_latents), torch.tensor([1]), names, kinds, point, sae.content_hash()
        )
        for point, sae in saes.items()
    }
    settings = {
        "object": Setting(dict.fromkeys(points, -1.5), num_latents=1, mode="contrast"),
        "style": Setting({HOOK_POINT: -1.0}, num_latents=1, mode="contrast"),
    }
    method = ContrastErasure("contrast", "this test", saes, tables, settings)

    def anchors(*erased: str) -> list[str]:
        with method.handles(tiny_sd(), erased) as handles:
            return [one.explain().partition("anchor=")[2].split(",")[0] for one in handles]

    assert anchors("cat") == ["'dog'"] * 2 and anchors("cow") == ["'cat'"] * 2
    assert anchors("cat", "dog") == ["'wolf'"] * 2 and anchors("cow", "dog") == ["'cat'"] * 2
    for erased in (("cat", "wolf"), ("wolf", "cat")):
        assert anchors(*erased) == ["'cow'"] * 2
    assert anchors("sketch") == ["None"] == anchors("cat", "dog", "wolf", "cow")[:1]
    with pytest.raises(ValueError, match="strength: expected one for contrast"):
        replace(method, stored=True)
