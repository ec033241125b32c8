"""Hook points of a UNet, and reading what leaves them (SPEC 3.6, 3.9)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipelines import CHANNELS, HOOK_POINTS, generate, tiny_sd, tiny_sd2, tiny_sd_to_compile, tiny_sdxl, tiny_unet
from saemnesia_fast.hookpoints import STREAMS, capture, find_hook_point, get_unet, list_hook_points

IGNORE_JIT_WARNING = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
BUILDERS = [tiny_sd, tiny_sd2, tiny_sdxl]


def run_by_hand(pipe, sample, timestep, prompt_states):
    """Block outputs and inputs {name: [B, C, H, W]} of one UNet call, read by patching the blocks' forward."""
    seen = {}
    for name in HOOK_POINTS:
        block = find_hook_point(pipe, name)
        original = block.forward

        def forward(hidden_states, *args, original=original, name=name, **kwargs):
            output = original(hidden_states, *args, **kwargs)
            seen[name] = (hidden_states, output[0])
            return output

        block.forward = forward
    with torch.no_grad():
        pipe.unet(sample, timestep, encoder_hidden_states=prompt_states)
    for name in HOOK_POINTS:
        del find_hook_point(pipe, name).forward
    return seen


@pytest.mark.parametrize("build", BUILDERS)
def test_hook_points_are_the_transformer_blocks_spec_3_6(build):
    names = list_hook_points(build())
    assert set(HOOK_POINTS) < set(names)
    assert names[0] == "down_blocks.0.attentions.0"
    assert "mid_block.attentions.0" in names


@IGNORE_JIT_WARNING
def test_names_with_and_without_unet_find_the_same_block():
    pipe = tiny_sd()
    block = pipe.unet.get_submodule("up_blocks.0.attentions.1")
    assert find_hook_point(pipe, "unet.up_blocks.0.attentions.1") is block
    assert find_hook_point(pipe.unet, "up_blocks.0.attentions.1") is block
    assert find_hook_point(torch.compile(pipe.unet), "up_blocks.0.attentions.1") is block


@IGNORE_JIT_WARNING
def test_compiled_unet_and_compiled_block_are_unwrapped():
    unet = tiny_unet()
    assert get_unet(torch.compile(unet)) is unet
    block = unet.get_submodule("up_blocks.0.attentions.1")
    wrapper: Any = torch.compile(block)
    unet.set_submodule("up_blocks.0.attentions.1", wrapper)
    assert find_hook_point(unet, "up_blocks.0.attentions.1") is block


def test_unknown_hook_point_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no 'up_blocks\.9'; its hook points are .*up_blocks\.0\.attentions\.1"):
        find_hook_point(tiny_unet(), "up_blocks.9")
    with pytest.raises(TypeError, match="expected a pipeline with a UNet"):
        list_hook_points(object())


@pytest.mark.parametrize("stream", ["output", "residual", {name: STREAMS[n % 2] for n, name in enumerate(HOOK_POINTS)}])
def test_capture_hands_over_what_the_block_returned(stream):
    pipe = tiny_sd()
    sample, states = torch.randn(2, 4, 8, 6), torch.randn(2, 16, 32)
    expected = run_by_hand(pipe, sample, 261, states)
    seen = {}
    with capture(pipe, HOOK_POINTS, lambda *call: seen.update({call[0]: call[1:]}), stream=stream), torch.no_grad():
        pipe.unet(sample, 261, encoder_hidden_states=states)
    assert set(seen) == set(HOOK_POINTS)
    for name, (activation, timestep) in seen.items():
        given, output = expected[name]
        reads = stream if isinstance(stream, str) else stream[name]
        assert torch.equal(activation, output - given if reads == "residual" else output)
        assert activation.shape[1] == CHANNELS[name]
        assert timestep.dtype == torch.int64
        assert timestep.shape == ()
        assert timestep == 261


@pytest.mark.parametrize("build", BUILDERS)
def test_capture_sees_every_call_with_its_timestep_and_changes_nothing(build):
    pipe = build()
    plain = generate(pipe)
    seen = []
    with capture(pipe, HOOK_POINTS[:1], lambda name, activation, t: seen.append((int(t), len(activation)))):
        captured = generate(pipe)
    assert seen == [(751, 2), (501, 2), (251, 2), (1, 2)]
    assert torch.equal(captured, plain)


def test_capture_leaves_no_hook_after_an_exception():
    pipe = tiny_sd()

    def fail(*call):
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"), capture(pipe, HOOK_POINTS, fail):
        generate(pipe)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())


@IGNORE_JIT_WARNING
def test_capture_works_on_a_unet_that_was_compiled_and_called_before():
    """A compiled graph ignores plain forward hooks, so capturing runs the UNet eagerly (SPEC 3.10)."""
    torch._dynamo.reset()
    pipe = tiny_sd_to_compile()
    pipe.unet.compile(backend="eager")
    expected = generate(pipe, num_inference_steps=2)
    seen = []
    with capture(pipe, HOOK_POINTS[:1], lambda name, activation, t: seen.append(int(t))):
        assert torch.equal(generate(pipe, num_inference_steps=2), expected)
    assert seen == [501, 1]


def test_capture_refuses_rows_at_different_timesteps():
    unet = tiny_unet()
    sample, states = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 32)
    with capture(unet, HOOK_POINTS, lambda *call: None), torch.no_grad():
        unet(sample, torch.tensor([5, 5]), encoder_hidden_states=states)
        with pytest.raises(ValueError, match=r"expected one timestep per UNet call, got \[5, 9\]"):
            unet(sample, torch.tensor([5, 9]), encoder_hidden_states=states)


@pytest.mark.parametrize("stream", ["both", {HOOK_POINTS[0]: "both"}, {HOOK_POINTS[1]: "output"}])
def test_capture_refuses_an_unknown_stream(stream):
    refused = pytest.raises(ValueError, match=f"stream: expected one of .* at {HOOK_POINTS[0]}, got")
    with refused, capture(tiny_unet(), HOOK_POINTS[:1], print, stream=stream):
        pass
