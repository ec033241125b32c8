"""The handle: reversible, replaceable, changeable while live, beside other libraries' hooks (SPEC 3.11, 7.4, 8)."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from peft import LoraConfig

from erasing import HOOK_POINT, STRONG, activations, random_sae, random_table, sae_and_table, unet_call
from pipelines import generate, tiny_sd, tiny_unet
from saemnesia_fast import ops
from saemnesia_fast.erasure import apply_erasure
from saemnesia_fast.hookpoints import find_hook_point


def traces(pipe):
    """Everything that an erasure may have left on a pipeline."""
    modules = dict(pipe.unet.named_modules())
    left = {f"{name}.{key}" for name, m in modules.items() for key in ("_diffusers_hook", "forward") if key in vars(m)}
    left |= {name for name, m in modules.items() if m._forward_hooks or m._forward_pre_hooks}
    left |= {key for key in vars(pipe) if "saemnesia" in key}
    return left if type(pipe) is StableDiffusionPipeline else left | {"class"}


def test_removal_leaves_the_pipeline_as_it_was_spec_7_4():
    pipe = tiny_sd()
    before, state = generate(pipe), {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    erasure = apply_erasure(pipe, *sae_and_table(), "cat", **STRONG)
    assert not torch.equal(generate(pipe), before)
    assert pipe.unet.state_dict().keys() == state.keys()
    erasure.remove()
    erasure.remove()
    assert traces(pipe) == set()
    assert all(torch.equal(value, state[key]) for key, value in pipe.unet.state_dict().items())
    assert torch.equal(generate(pipe), before)


def test_an_exception_inside_removes_the_erasure_too():
    pipe = tiny_sd()
    before = generate(pipe)

    def fail(*args):
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"), apply_erasure(pipe, *sae_and_table(), "cat"):
        generate(pipe, callback_on_step_end=fail)
    assert traces(pipe) == set()
    assert torch.equal(generate(pipe), before)


def test_refused_arguments_leave_the_pipeline_and_an_earlier_erasure_alone():
    pipe = tiny_sd()
    sae, table = sae_and_table()
    with pytest.raises(ValueError, match="concepts"):
        apply_erasure(pipe, sae, table, "horse")
    assert traces(pipe) == set()
    with apply_erasure(pipe, sae, table, "cat", **STRONG):
        erased = generate(pipe)
        with pytest.raises(ValueError, match="concepts"):
            apply_erasure(pipe, sae, table, "horse")
        assert torch.equal(generate(pipe), erased)


def test_a_pipeline_with_an_erasure_is_still_one_of_its_class(tmp_path):
    pipe = tiny_sd()
    with apply_erasure(pipe, *sae_and_table(), "cat", **STRONG):
        assert isinstance(pipe, StableDiffusionPipeline)
        assert type(pipe).__qualname__ == "StableDiffusionPipeline"
        pipe.save_pretrained(tmp_path)
        erased = generate(pipe)
        image_to_image = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
        assert image_to_image.unet is pipe.unet
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    again = StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    again.set_progress_bar_config(disable=True)
    plain = generate(pipe)
    assert torch.equal(generate(again), plain)
    assert not torch.equal(erased, plain)


def test_applying_again_replaces_the_earlier_erasure():
    pipe = tiny_sd()
    sae, table = sae_and_table()
    before = generate(pipe)
    first = apply_erasure(pipe, sae, table, "cat", **STRONG)
    second = apply_erasure(pipe, sae, table, "dog", **STRONG)
    replaced = generate(pipe)
    assert first.hook_points == ()
    with pytest.raises(RuntimeError, match="not in effect"):
        first.set("dog")
    first.remove()
    assert torch.equal(generate(pipe), replaced)
    second.remove()
    with apply_erasure(pipe, sae, table, "dog", **STRONG):
        assert torch.equal(generate(pipe), replaced)
    assert traces(pipe) == set()
    assert torch.equal(generate(pipe), before)


def test_removal_in_any_order():
    pipe = tiny_sd()
    names = ["up_blocks.0.attentions.0", "up_blocks.0.attentions.1"]
    saes = {name: random_sae(HOOK_POINT) for name in names}
    handles = [apply_erasure(pipe, saes[name], random_table(saes[name], name), "cat", **STRONG) for name in names]
    generate(pipe)
    handles[0].remove()
    with_second = generate(pipe)
    handles[1].remove()
    assert traces(pipe) == set()
    with apply_erasure(pipe, saes[names[1]], random_table(saes[names[1]], names[1]), "cat", **STRONG):
        assert torch.equal(generate(pipe), with_second)


def test_set_equals_applying_anew_and_paused_equals_nothing_spec_3_11():
    pipe = tiny_sd()
    sae, table = sae_and_table()
    before = generate(pipe)
    with apply_erasure(pipe, sae, table, ["dog", "sketch"], strength=-9.0, num_latents=3):
        expected = generate(pipe)
    for mode in ("exact", "released", "reconstruct"):
        with apply_erasure(pipe, sae, table, "cat", strength=-40.0, num_latents=3, mode=mode) as erasure:
            first = generate(pipe)
            erasure.set(["dog", "sketch"], strength=-9.0)
            changed = generate(pipe)
            if mode == "exact":
                assert torch.equal(changed, expected)
            erasure.set("cat")
            erasure.set(strength=-40.0)
            assert torch.equal(generate(pipe), first)
            with erasure.paused():
                assert torch.equal(generate(pipe), before)
            assert torch.equal(generate(pipe), first)


def test_set_needs_room_and_the_same_number_of_prompts():
    pipe = tiny_sd()
    sae, table = sae_and_table()
    with apply_erasure(pipe, sae, table, ["cat"], num_latents=4, max_latents=6) as erasure:
        before = generate(pipe)
        with pytest.raises(ValueError, match=r"selected (7|8) latents a step, expected at most max_latents=6"):
            erasure.set(["cat", "dog"])
        with pytest.raises(ValueError, match="one for each of 1 prompts"):
            erasure.set([["cat"], ["dog"]])
        with pytest.raises(ValueError, match="horse"):
            erasure.set("horse")
        assert erasure.concepts == ["cat"]
        assert torch.equal(generate(pipe), before)
    with apply_erasure(pipe, sae, table, ["cat"], num_latents=9) as erasure:
        assert "room for 16" in erasure.explain()


def test_one_list_set_on_prompts_goes_to_all_of_them():
    pipe = tiny_sd()
    sae, table = sae_and_table()
    prompts = ["a cat", "a dog"]
    with apply_erasure(pipe, sae, table, "dog", **STRONG):
        expected = generate(pipe, prompts)
    with apply_erasure(pipe, sae, table, [["cat"], []], **STRONG) as erasure:
        erasure.set("dog")
        assert torch.equal(generate(pipe, prompts), expected)


@pytest.mark.parametrize("lora_first", [True, False])
def test_lora_wrapped_blocks(lora_first):
    pipe = tiny_sd()
    sae, table = sae_and_table()
    lora = LoraConfig(r=2, target_modules=["to_q", "to_v", "proj_in"], init_lora_weights="gaussian")
    if lora_first:
        pipe.unet.add_adapter(lora)
    with apply_erasure(pipe, sae, table, "cat", record=True, **STRONG) as erasure:
        erased = generate(pipe)
        if not lora_first:
            pipe.unet.add_adapter(lora)
            assert torch.equal(generate(pipe), erased)  # a new adapter adds zero
        assert sum(report.steered for report in erasure.report()) > 0
    assert not torch.equal(generate(pipe), erased)


@pytest.mark.parametrize("offload_first", [True, False])
def test_accelerate_offloading(offload_first):
    pipe = tiny_sd()
    sae, table = sae_and_table()
    plain = generate(pipe)
    with apply_erasure(pipe, sae, table, "cat", **STRONG):
        expected = generate(pipe)
    if offload_first:
        cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    erasure = apply_erasure(pipe, sae, table, "cat", **STRONG)
    if not offload_first:
        cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    assert torch.equal(generate(pipe), expected)
    erasure.remove()
    assert torch.equal(generate(pipe), plain)
    remove_hook_from_module(pipe.unet, recurse=True)
    assert torch.equal(generate(pipe), plain)


def test_a_wrapper_that_came_later_survives_the_removal():
    """accelerate restores the `forward` that it found: an erasure removed meanwhile must not come back with it."""
    pipe = tiny_sd()
    plain = generate(pipe)
    block, calls = find_hook_point(pipe, HOOK_POINT), []

    class Count(AccelerateHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    erasure = apply_erasure(pipe, *sae_and_table(), "cat", **STRONG)
    add_hook_to_module(block, Count())
    assert not torch.equal(generate(pipe), plain)
    erasure.remove()
    assert torch.equal(generate(pipe), plain)
    assert calls == [block] * 8
    remove_hook_from_module(block)
    assert torch.equal(generate(pipe), plain)
    with apply_erasure(pipe, *sae_and_table(), "cat", **STRONG):
        assert not torch.equal(generate(pipe), plain)


def test_another_diffusers_hook_on_the_block_survives_the_removal():
    pipe = tiny_sd()
    block, calls = find_hook_point(pipe, HOOK_POINT), []

    class Skip(ModelHook):
        def new_forward(self, module, *args, **kwargs):
            calls.append(module)
            return self.fn_ref.original_forward(*args, **kwargs)

    plain = generate(pipe)
    erasure = apply_erasure(pipe, *sae_and_table(), "cat", **STRONG)
    HookRegistry.check_if_exists_or_initialize(block).register_hook(Skip(), "skip")
    erased = generate(pipe)
    erasure.remove()
    assert not torch.equal(erased, plain)
    assert torch.equal(generate(pipe), plain)
    assert calls == [block] * 8


def test_report_counts_what_the_sae_says_spec_8():
    pipe = tiny_sd()
    sae, table = sae_and_table()
    lists = [["cat", "dog"], ["sketch"]]
    prompts = ["a cat", "a dog"]
    with apply_erasure(pipe, sae, table, lists, strength=1.0, scale="constant", num_latents=5, record=True) as erasure:
        seen = activations(pipe, prompt=prompts)  # strength 1 changes nothing, so this is what the SAE sees
        reports = erasure.report()
    assert [(r.image, r.concept) for r in reports] == [(0, "cat"), (0, "dog"), (1, "sketch")]
    for report in reports:
        selection = table.select(lists[report.image], strength=1.0, scale="constant", num_latents=5)
        owner = selection.concepts.index(report.concept)
        flagged, steered = torch.tensor(0), torch.tensor(0)
        heat = torch.zeros(4, 4, dtype=torch.float64)
        for timestep, activation in seen:
            x = activation[2 + report.image].double().permute(1, 2, 0)
            pre = torch.relu((x - sae.b_dec) @ sae.W_enc.double().T + sae.b_enc)
            kth = pre.topk(sae.k).values[..., -1:]
            row = selection.row(timestep)
            mine = selection.owners[row] == owner
            values, m = pre[..., selection.latents[row][mine]], selection.thresholds[row][mine]
            flagged += (values > m).any(-1).sum()
            steered += ((values > m) & (values >= kth)).any(-1).sum()
            heat += values.sum(-1)
        assert report.hook_point == HOOK_POINT
        assert report.tokens == 4 * 16
        assert report.flagged == flagged
        assert report.steered == steered
        torch.testing.assert_close(report.heat_map.double(), heat / 4, rtol=1e-5, atol=1e-6)
        assert report.mean_activation == pytest.approx(heat.mean().item() / 4, rel=1e-5)


def test_report_is_of_the_last_call_and_of_the_window():
    pipe = tiny_sd()
    with apply_erasure(pipe, *sae_and_table(), "cat", stop=0.6, record=True) as erasure:
        generate(pipe, ["a", "b"])
        generate(pipe)
        (report,) = erasure.report()
        assert report.tokens == 2 * 16  # timesteps 751 and 501 of 751, 501, 251, 1
    with apply_erasure(pipe, *sae_and_table(), "cat") as erasure, pytest.raises(RuntimeError, match="record=True"):
        erasure.report()


def test_explain_names_concepts_latents_and_backend():
    unet = tiny_unet()
    with apply_erasure(unet, *sae_and_table(), ["sketch", "cat"], num_latents=2, mode="released") as erasure:
        text = erasure.explain()
    assert "mode='released'" in text
    assert f"{HOOK_POINT}: cat, sketch" in text
    (choice,) = [choice for choice in ops.backend_report() if choice.op == "erase"]
    assert f"erase on cpu: {choice.backend} ({choice.why})" in text
    assert "steering_lines on cpu: " in text
    assert "not in effect" in erasure.explain()


def test_the_sae_given_is_neither_moved_nor_trained():
    unet = tiny_unet()
    sae, table = sae_and_table()
    parameters = {name: (value, value.clone()) for name, value in sae.named_parameters()}
    with apply_erasure(unet, sae, table, "cat", **STRONG):
        unet_call(unet)
    for name, value in sae.named_parameters():
        assert value is parameters[name][0]
        assert value.requires_grad
        assert torch.equal(value, parameters[name][1])


def test_applied_in_inference_mode_used_outside():
    pipe = tiny_sd()
    with torch.inference_mode():
        erasure = apply_erasure(pipe, *sae_and_table(), "cat", **STRONG)
        inside = generate(pipe)
    assert torch.equal(generate(pipe), inside)
    erasure.set("dog")
    with torch.inference_mode():
        erasure.set("cat")
        assert torch.equal(generate(pipe), inside)
    erasure.remove()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("record", [False, True])
def test_warmup_runs_the_edit_as_a_call_would_and_leaves_no_trace(monkeypatch, memory_format, record):
    pipe = tiny_sd()
    pipe.unet.to(torch.float16).to(memory_format=memory_format)
    unet = pipe.unet
    sae, table = sae_and_table()
    with apply_erasure(unet, sae, table, "cat", record=record, **STRONG) as erasure:
        before = unet_call(unet)
        reports = erasure.report() if record else []
        seen = []
        point = erasure._points[HOOK_POINT]
        edit = point._erase

        def spy(x, *arguments, **options):
            seen.append((x.dtype, x.shape[-1], x.permute(0, 3, 1, 2).is_contiguous(memory_format=memory_format)))
            return edit(x, *arguments, **options)

        monkeypatch.setattr(point, "_erase", spy)
        erasure.warmup()
        assert seen == [(torch.float16, sae.d, True)] * 2
        assert [counter.take() for counter in erasure._counters()] == [0, 0]
        again = erasure.report() if record else []
        assert [(r.tokens, r.steered) for r in again] == [(r.tokens, r.steered) for r in reports]
        assert torch.equal(unet_call(unet), before)
    with pytest.raises(RuntimeError, match="not in effect"):
        erasure.warmup()


@pytest.mark.parametrize(("options", "over"), [({}, True), ({"mode": "released"}, False), ({"record": True}, False)])
def test_the_edit_is_written_over_the_blocks_own_output_where_nobody_needs_it(monkeypatch, options, over):
    unet = tiny_unet()
    with apply_erasure(unet, *sae_and_table(), "cat", **STRONG, **options) as erasure:
        point, seen = erasure._points[HOOK_POINT], []
        edit = point._erase

        def spy(x, *arguments, in_place=False):
            given = x.clone()
            erased = edit(x, *arguments, in_place=in_place)
            seen.append((in_place, torch.equal(x, given), erased.data_ptr() == x.data_ptr()))
            return erased

        monkeypatch.setattr(point, "_erase", spy)
        unet_call(unet)
    assert seen == [(over, not over, over)]


def test_an_output_that_a_wrapper_keeps_to_return_again_is_not_written_over(monkeypatch):
    """As caches of features between steps do."""
    unet = tiny_unet()
    block = find_hook_point(unet, HOOK_POINT)
    kept = []
    inner = block.forward

    def forward(*args, **kwargs):
        if not kept:
            kept.append(inner(*args, **kwargs)[0])
        return (kept[0],)

    monkeypatch.setattr(block, "forward", forward)
    with apply_erasure(unet, *sae_and_table(), "cat", **STRONG):
        first = unet_call(unet)
        as_made = kept[0].clone()
        assert torch.equal(unet_call(unet), first)
    assert torch.equal(kept[0], as_made)
    assert not torch.equal(first, as_made)


def test_a_block_that_returns_its_input_is_not_written_over(monkeypatch):
    unet = tiny_unet()
    block = find_hook_point(unet, HOOK_POINT)
    given = []

    def forward(hidden_states, *args, **kwargs):
        given.append((hidden_states, hidden_states.clone()))
        return (hidden_states,)

    monkeypatch.setattr(block, "forward", forward)
    with apply_erasure(unet, *sae_and_table(), "cat", **STRONG):
        erased = unet_call(unet)
    states, as_given = given.pop()
    assert torch.equal(states, as_given)
    assert not torch.equal(erased, states)


def test_the_backend_is_decided_when_the_erasure_is_applied():
    unet = tiny_unet()
    with ops.use_backend("eager"):
        erasure = apply_erasure(unet, *sae_and_table(), "cat", **STRONG)
    assert "erase on cpu: eager ('eager' was chosen)" in erasure.explain()
    eager = unet_call(unet)
    with ops.use_backend("triton"):
        assert torch.equal(unet_call(unet), eager)
    erasure.remove()
    with pytest.raises(RuntimeError, match="'triton' was chosen"), ops.use_backend("triton"):
        apply_erasure(unet, *sae_and_table(), "cat", **STRONG)
