"""The parts that MiniCanvas is made of."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saemnesia_fast.minicanvas import autoencoder, drawing, text
from saemnesia_fast.minicanvas.canvas import kind_of, requests
from saemnesia_fast.minicanvas.loop import Average, fit
from saemnesia_fast.minicanvas.settings import HOOK_POINTS, SETTINGS
from saemnesia_fast.minicanvas.unet import build_unet


def test_pictures_are_seeded_distinct_and_of_eight_bits():
    first = drawing.draw("fish", "neon", 3, seed=4)
    assert torch.equal(first, drawing.draw("fish", "neon", 3, seed=4))
    assert torch.equal((first * 255).round() / 255, first)
    assert first.min() >= 0 and first.max() <= 1
    others = [drawing.draw(o, s, 3, seed=4) for o, s in (("fish", "sketch"), ("moon", "neon"))]
    others.append(drawing.draw("fish", "neon", 3, seed=5))
    assert all((first - other).abs().mean() > 0.01 for other in others)


def test_an_unknown_object_or_style_is_named():
    with pytest.raises(ValueError, match="'cube'"):
        drawing.draw("cube", "neon", 1, seed=0)
    with pytest.raises(ValueError, match="'cube'"):
        kind_of("cube")
    assert kind_of("fish") == "object" and kind_of("pop art") == "style"


@pytest.mark.parametrize("offset", [(0.0, 0.0), (0.3, -0.2)])
def test_polygon_distance_is_exact_on_a_square(offset):
    axis = torch.linspace(-2, 2, 41)
    x, y = axis[None, None, :] - offset[0], axis[None, :, None] - offset[1]
    x, y = torch.broadcast_tensors(x, y)
    square = [(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)]
    found, expected = drawing._polygon(x, y, square), drawing._box(x, y, 0, 0, 0.75, 0.75)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_the_autoencoder_starts_as_average_pooling():
    torch.manual_seed(0)
    model = autoencoder.build_autoencoder()
    images = drawing.draw("house", "watercolor", 2, seed=1)
    coarse = F.avg_pool2d(images, 8)
    latents = autoencoder.encode(model, images)
    torch.testing.assert_close(latents[:, :3] / 3 + 0.5, coarse, atol=1e-5, rtol=0)
    for part in model.decoder.layers:
        if isinstance(part, nn.Conv2d):
            part.weight.data[:3, 3:] = 0
    bounded = torch.tanh(latents / 3) * 3
    expected = F.interpolate(bounded[:, :3] / 3 + 0.5, scale_factor=8).clamp(0, 1)
    torch.testing.assert_close(autoencoder.decode(model, latents), expected, atol=1e-5, rtol=0)


def test_every_word_of_the_prompts_is_one_token():
    tokenizer = text.build_tokenizer()
    for template in range(len(drawing.PROMPT_TEMPLATES)):
        prompt = drawing.prompt_for("mushroom", "pop art", template)
        ids = text.tokenize(tokenizer, [prompt])
        assert ids.shape == (1, text.PROMPT_LENGTH)
        words = prompt.replace(",", " ,").split()
        assert tokenizer.tokenize(prompt) == [word + "</w>" for word in words]
    assert text.tokenize(tokenizer, [""])[0, 1:].eq(tokenizer.eos_token_id).all()


def test_requests_cover_all_combinations_with_distinct_seeds():
    wanted = requests(2, seed=10)
    assert len({one.seed for one in wanted}) == len(wanted) == 96
    assert len({(one.object, one.style) for one in wanted}) == 48
    assert wanted[0].prompt == "a painting of a star in sketch style"


def _run(folder, stop_at=None):
    """Fits a line; `stop_at` interrupts after that many steps, with a state saved just before."""
    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)

    def loss(step, generator):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=generator)
        return (module(x) - x.sum(1, keepdim=True)).square().mean()

    fit(
        "line",
        module,
        loss,
        steps=40,
        optimizer=optimizer,
        schedule=schedule,
        folder=folder,
        seed=3,
        average=Average(module, 0.9),
        progress=False,
    )
    return module


def test_an_interrupted_fit_goes_on_bit_for_bit(tmp_path, monkeypatch):
    whole = _run(tmp_path / "a")
    monkeypatch.setattr("saemnesia_fast.minicanvas.loop.SAVE_EVERY_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "b", stop_at=17)
    resumed = _run(tmp_path / "b")
    assert torch.equal(whole.weight, resumed.weight) and torch.equal(whole.bias, resumed.bias)
    assert not list((tmp_path / "b").iterdir())


def test_objects_and_styles_are_erased_at_different_hook_points():
    """Else erasing both at once would have the second erasure replace the first."""
    assert not set(SETTINGS["object"].strength) & set(SETTINGS["style"].strength)
    assert set(HOOK_POINTS) == {point for setting in SETTINGS.values() for point in setting.strength}


def test_text_does_not_reach_the_last_attention_block():
    """So that every hook point through which a concept enters has layers after it."""
    unet = build_unet()
    sample, timestep = torch.randn(2, 8, 8, 8), torch.tensor(500)
    seen = []
    block = unet.up_blocks[1].attentions[1].transformer_blocks[0]
    block.attn2.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        unet(sample, timestep, torch.randn(2, 16, 64))
    assert seen[0].eq(0).all()
    assert not any(p.requires_grad for p in block.attn2.to_out[0].parameters())
