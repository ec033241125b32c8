"""An image is erased or the call raises, compiled or not (SPEC 3.10, 3.11)."""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks import HookRegistry

from erasing import CONCEPTS, HOOK_POINT, OTHER_HOOK_POINT, STRONG, random_sae, random_table, sae_and_table, unet_call
from pipelines import generate, tiny_sd, tiny_sd_to_compile, tiny_unet
from saemnesia_fast.concepts import ConceptTable
from saemnesia_fast.erasure import apply_erasure
from saemnesia_fast.hookpoints import find_hook_point
from saemnesia_fast.sae import TopKSAE

ignore_jit_warning = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")


class CountingBackend:
    """Runs graphs as they are, and counts how many there were."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph


def narrow_sae_and_table() -> tuple[TopKSAE, ConceptTable]:
    """For `HOOK_POINT` of the pipeline that is quick to compile."""
    sae = random_sae(OTHER_HOOK_POINT)
    return sae, random_table(sae, HOOK_POINT)


@ignore_jit_warning
def test_applied_after_compiling_then_changed_without_recompiling_spec_3_11():
    pipe = tiny_sd_to_compile()
    plain = generate(pipe)
    with apply_erasure(pipe, *narrow_sae_and_table(), "dog", strength=-3.0, num_latents=5):
        changed = generate(pipe, num_inference_steps=3)

    unet, backend = pipe.unet, CountingBackend()
    pipe.unet = torch.compile(unet, backend=backend, fullgraph=True)
    assert torch.equal(generate(pipe), plain)
    with apply_erasure(pipe, *narrow_sae_and_table(), "cat", num_latents=5, max_latents=16) as erasure:
        generate(pipe)
        assert backend.graphs == 2
        erasure.set("dog", strength=-3.0)
        assert torch.equal(generate(pipe, num_inference_steps=3), changed)
        with erasure.paused():
            assert torch.equal(generate(pipe), plain)
        assert backend.graphs == 2
    assert torch.equal(generate(pipe), plain)


@ignore_jit_warning
@pytest.mark.parametrize("way", [pytest.param("torch.compile", marks=pytest.mark.slow), "module.compile"])
def test_applied_before_compiling(way):
    torch._dynamo.reset()
    pipe = tiny_sd_to_compile()
    with apply_erasure(pipe, *narrow_sae_and_table(), "cat", mode="released", halves="cond", **STRONG):
        expected = generate(pipe)
        if way == "torch.compile":
            pipe.unet = torch.compile(pipe.unet, backend="aot_eager", fullgraph=True)
        else:
            pipe.unet.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(generate(pipe), expected, rtol=1e-5, atol=1e-5)


@ignore_jit_warning
def test_a_compiled_bare_unet_is_checked_from_outside_its_graph():
    unet = tiny_sd_to_compile().unet
    compiled = torch.compile(unet, backend=CountingBackend(), fullgraph=True)
    sample, states = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 32)
    timestep = torch.tensor(501)
    with torch.no_grad():
        plain = unet(sample, timestep, encoder_hidden_states=states).sample
        with apply_erasure(compiled, *narrow_sae_and_table(), "cat", **STRONG) as erasure:
            erased = compiled(sample, timestep, encoder_hidden_states=states).sample
            assert not torch.equal(erased, plain)
            erasure._clock.calls.on_device.add_(1)  # as if the graph of one call had left the block's hook out
            with pytest.raises(RuntimeError, match=r"ran in 0 of 1 UNet calls"):
                erasure.verify()


def test_an_exchanged_unet_raises():
    pipe = tiny_sd()
    with apply_erasure(pipe, *sae_and_table(), "cat", **STRONG) as erasure:
        generate(pipe)
        pipe.unet = tiny_unet()
        with pytest.raises(RuntimeError, match="was not called"):
            generate(pipe)
    assert erasure.hook_points == ()
    assert generate(pipe).isfinite().all()


def test_a_hook_torn_out_raises():
    pipe = tiny_sd()
    with apply_erasure(pipe, *sae_and_table(), "cat", **STRONG):
        registry = HookRegistry.check_if_exists_or_initialize(find_hook_point(pipe, HOOK_POINT))
        registry.remove_hook(next(iter(registry.hooks)), recurse=False)
        with pytest.raises(RuntimeError, match=rf"hook at {HOOK_POINT} was taken out"):
            generate(pipe)
    with apply_erasure(pipe, *sae_and_table(), "cat", **STRONG):
        registry = HookRegistry.check_if_exists_or_initialize(pipe.unet.time_proj)
        registry.remove_hook(next(iter(registry.hooks)), recurse=False)
        with pytest.raises(RuntimeError, match="hook at time_proj was taken out"):
            generate(pipe)


@pytest.mark.parametrize("bypass", ["forward", "block"])
def test_a_bypassed_hook_raises(bypass):
    pipe = tiny_sd()
    blocks = pipe.unet.up_blocks[0].attentions
    with apply_erasure(pipe, *sae_and_table(), "cat", **STRONG):
        if bypass == "forward":
            del blocks[1].forward
        else:
            blocks[1] = tiny_sd().unet.up_blocks[0].attentions[1]
        with pytest.raises(RuntimeError, match=rf"the erasure at {HOOK_POINT} ran in 0 of 4 UNet calls"):
            generate(pipe)


def test_a_replaced_scheduler_and_another_number_of_steps_pass():
    pipe = tiny_sd()
    with apply_erasure(pipe, *sae_and_table(), "cat", **STRONG):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
        assert generate(pipe, num_inference_steps=2).isfinite().all()


def test_a_bare_unet_is_checked_at_each_new_shape_and_for_missing_hooks():
    unet = tiny_unet()
    block = unet.up_blocks[0].attentions[1]
    with apply_erasure(unet, *sae_and_table(), "cat", **STRONG):
        unet_call(unet)
        wrapper = block.__dict__.pop("forward")
        with pytest.raises(RuntimeError, match="ran in 0 of 1 UNet calls"):
            unet_call(unet, rows=3)
        block.forward = wrapper
        unet_call(unet, rows=3)
        del block._diffusers_hook
        with pytest.raises(RuntimeError, match="was taken out"):
            unet_call(unet)


def test_a_block_called_outside_the_unet_raises():
    unet = tiny_unet()
    block = unet.up_blocks[0].attentions[1]
    hidden, states = torch.randn(1, 64, 4, 4), torch.randn(1, 16, 32)
    with apply_erasure(unet, *sae_and_table(), "cat"), pytest.raises(RuntimeError, match="outside a UNet call"):
        block(hidden, encoder_hidden_states=states, return_dict=False)


@pytest.mark.filterwarnings("ignore:`Transformer2DModelOutput`:FutureWarning")
def test_both_return_types_of_a_block_are_erased_spec_3_9():
    unet = tiny_unet()
    block = unet.up_blocks[0].attentions[1]
    hidden, states = torch.randn(2, 64, 4, 4), torch.randn(2, 16, 32)
    with torch.no_grad(), apply_erasure(unet, *sae_and_table(), "cat", **STRONG) as erasure:
        unet_call(unet)
        as_output = block(hidden, encoder_hidden_states=states)
        as_tuple = block(hidden, encoder_hidden_states=states, return_dict=False)
        erasure.remove()
        plain = block(hidden, encoder_hidden_states=states)
    assert type(as_output) is type(plain)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == 1
    assert torch.equal(as_tuple[0], as_output.sample)
    assert not torch.equal(as_output.sample, plain.sample)


def test_a_bare_unet_that_does_not_say_its_halves_is_refused():
    sae, table = sae_and_table()
    for arguments in ({"concepts": "cat", "halves": "cond"}, {"concepts": [["cat"], ["dog"]]}):
        with pytest.raises(ValueError, match="cfg: expected True or False"):
            apply_erasure(tiny_unet(), sae, table, **arguments)


def test_another_pipeline_on_the_same_unet_cannot_guess_the_halves():
    """Without the erased pipeline's word on guidance, a call that depends on it raises."""
    pipe = tiny_sd()
    other = type(pipe)(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    with apply_erasure(pipe, *sae_and_table(), "cat", halves="cond"):
        generate(pipe)
        with pytest.raises(RuntimeError, match="two guidance halves is unknown"):
            generate(other)
    with apply_erasure(pipe, *sae_and_table(), "cat", **STRONG):
        assert torch.equal(generate(other), generate(pipe))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"concepts": "horse"}, rf"\['horse'\] not in the table, which has \['{CONCEPTS[0]}'"),
        ({"concepts": []}, "concepts: expected at least one name"),
        ({"mode": "exactly"}, "mode: expected one of"),
        ({"halves": "uncond"}, "halves: expected one of both, cond"),
        ({"stream": "input"}, "stream: expected one of output, residual"),
        ({"start": 0.5, "stop": 0.5}, "start, stop: expected 0 <= start < stop <= 1"),
        ({"max_latents": 0}, "max_latents: expected >= 1"),
        ({"num_latents": 9, "max_latents": 8}, "selected 9 latents a step, expected at most max_latents=8"),
        ({"scale": "median"}, "scale: expected one of"),
    ],
)
def test_options_out_of_range_raise_spec_7_1(change, message):
    sae, table = sae_and_table()
    with pytest.raises(ValueError, match=message):
        apply_erasure(tiny_unet(), sae, table, **({"concepts": "cat"} | change))


def test_names_and_lists_do_not_mix():
    with pytest.raises(TypeError, match="one list of names for each prompt"):
        apply_erasure(tiny_sd(), *sae_and_table(), ["cat", ["dog"]])


def test_sae_table_and_hook_point_must_fit_together():
    sae, table = sae_and_table()
    unet = tiny_unet()
    with pytest.raises(
        ValueError, match=r"expected d = 64 to match the channels of up_blocks.0.attentions.1, got d = 32"
    ):
        apply_erasure(unet, random_sae(OTHER_HOOK_POINT), table, "cat")
    with pytest.raises(ValueError, match="table was made with SAE"):
        apply_erasure(unet, random_sae(seed=5), table, "cat")
    with pytest.raises(ValueError, match="expected one made at up_blocks.0.attentions.0"):
        apply_erasure(unet, sae, {"up_blocks.0.attentions.0": table}, "cat")
    with pytest.raises(ValueError, match="expected the same hook points"):
        apply_erasure(unet, {OTHER_HOOK_POINT: sae}, table, "cat")
    table.sampler["stream"] = "residual"
    with pytest.raises(ValueError, match="stream: expected 'residual' as in the table"):
        apply_erasure(unet, sae, table, "cat", stream="output")
    table.sampler["stream"] = "Residual"
    with pytest.raises(ValueError, match="table: expected one of output, residual as its stream, got 'Residual'"):
        apply_erasure(unet, sae, table, "cat")
