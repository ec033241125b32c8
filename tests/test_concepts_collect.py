"""Streaming collection of concept statistics against the plain computation over stored activations (SPEC 2.1, 2.4)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipelines import CHANNELS, HOOK_POINTS, tiny_sd
from saemnesia_fast import SparseLatents, TopKSAE
from saemnesia_fast.cli.concepts import Concepts
from saemnesia_fast.concepts import ConceptStatistics, ConceptTable, collect_concepts, save_assignment
from saemnesia_fast.hookpoints import capture

DEEP, SHALLOW = HOOK_POINTS
PROMPTS = {"cat": ["a cat", "neon cat"], "dog": ["a dog", "a dog", "neon dog"], "neon": ["neon cat", "neon dog"]}
ROWS = [[0], [0, 2], [1], [1], [1, 2]]  # of the distinct samples, in the order of PROMPTS
SMALL: dict[str, Any] = {"num_inference_steps": 3, "height": 64, "width": 64, "progress": False}


def make_sae(hook_point: str, num_latents: int = 96) -> TopKSAE:
    return TopKSAE.init(CHANNELS[hook_point], num_latents, 8, seed=1)


class Recorder:
    """Every activation of the hook points, as [rows, tokens, d] by timestep."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[int, list[Tensor]]] = {}

    def __call__(self, name: str, activation: Tensor, timestep: Tensor) -> None:
        tokens = activation.flatten(2).transpose(1, 2).clone()
        self.seen.setdefault(name, {}).setdefault(int(timestep), []).append(tokens)


def plain_mu(sae: TopKSAE, images: Tensor, members: list[list[int]]) -> Tensor:
    """[C, N] in float64 from the tokens [prompts, P, d] of one timestep: dense latents, sorted out by concept."""
    pre = torch.relu((images.double() - sae.b_dec.double()) @ sae.W_enc.double().T + sae.b_enc.double())
    kept = pre.topk(sae.k, -1)
    dense = torch.zeros_like(pre).scatter_(-1, kept.indices, kept.values).detach()
    rows = range(1 + max(c for one in members for c in one))
    return torch.stack([dense[[i for i, one in enumerate(members) if c in one]].mean((0, 1)) for c in rows])


MIXED = dict(zip(HOOK_POINTS, ("output", "residual"), strict=True))


@pytest.mark.parametrize(("guidance", "stream"), [(5.0, "output"), (1.0, "output"), (5.0, "residual"), (5.0, MIXED)])
def test_streaming_equals_the_plain_computation_spec_2_1(guidance: float, stream: Any) -> None:
    pipe, saes, recorder = tiny_sd(), {name: make_sae(name) for name in HOOK_POINTS}, Recorder()
    with capture(pipe, HOOK_POINTS, recorder, stream=stream):
        tables = collect_concepts(pipe, saes, PROMPTS, batch_size=2, guidance_scale=guidance, stream=stream, **SMALL)
    for name, table in tables.items():
        assert table.timesteps.tolist() == sorted(recorder.seen[name], reverse=True)
        for t, timestep in enumerate(table.timesteps.tolist()):
            calls = recorder.seen[name][timestep]
            assert [len(call) for call in calls] == ([4, 4, 2] if guidance > 1 else [2, 2, 1]), "each sample once"
            images = torch.cat([call.chunk(2)[1] if guidance > 1 else call for call in calls])
            expected = plain_mu(saes[name], images, ROWS).float()
            torch.testing.assert_close(table.mu[:, t], expected, rtol=1e-5, atol=1e-7)
        assert (table.hook_point, table.sae_hash) == (name, saes[name].content_hash())
        assert table.sampler["stream"] == (stream if isinstance(stream, str) else stream[name])


def test_result_depends_on_neither_batch_size_nor_other_concepts_spec_2_1() -> None:
    pipe, sae = tiny_sd(), make_sae(SHALLOW)
    table = collect_concepts(pipe, sae, PROMPTS, SHALLOW, kinds={"neon": "style"}, batch_size=5, **SMALL)
    assert table.kinds == ["object", "object", "style"]
    reordered = {name: PROMPTS[name] for name in ("neon", "dog")}
    one_by_one = collect_concepts(pipe, sae, reordered, SHALLOW, batch_size=1, **SMALL)
    torch.testing.assert_close(one_by_one.mu, table.mu[[2, 1]], rtol=1e-4, atol=1e-5)
    another_seed = collect_concepts(pipe, sae, reordered, SHALLOW, seed=1, **SMALL)
    assert (another_seed.mu - one_by_one.mu).abs().max() > 0.01


def test_several_hook_points_in_one_pass_equal_separate_passes() -> None:
    pipe, saes = tiny_sd(), {name: make_sae(name) for name in HOOK_POINTS}
    together = collect_concepts(pipe, saes, PROMPTS, batch_size=3, **SMALL)
    for name, sae in saes.items():
        alone = collect_concepts(pipe, sae, PROMPTS, name, batch_size=3, **SMALL)
        assert torch.equal(alone.mu, together[name].mu)


def test_a_scheduler_that_repeats_a_timestep_is_averaged_over_its_calls_spec_2_4() -> None:
    pipe, sae, recorder = tiny_sd(), make_sae(SHALLOW), Recorder()
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    with capture(pipe, [SHALLOW], recorder):
        table = collect_concepts(pipe, sae, {"cat": ["a cat"]}, SHALLOW, **SMALL)
    calls = [recorder.seen[SHALLOW][t] for t in table.timesteps.tolist()]
    assert sorted(map(len, calls)) == [1, 1, 2]
    expected = [torch.stack([plain_mu(sae, call[1:], [[0]]) for call in one]).mean(0) for one in calls]
    torch.testing.assert_close(table.mu, torch.stack(expected, 1).float(), rtol=1e-5, atol=1e-7)


def test_pipeline_is_left_as_it_was_also_after_an_exception() -> None:
    pipe, sae = tiny_sd(), make_sae(SHALLOW)
    pipe.set_progress_bar_config(desc="mine", disable=True)
    with pytest.raises(ValueError, match="height"):
        collect_concepts(pipe, sae, PROMPTS, SHALLOW, **(SMALL | {"height": 65}))
    assert pipe._progress_bar_config == {"desc": "mine", "disable": True}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


def test_no_tensor_of_prompts_times_steps_times_latents_is_made_spec_2_1() -> None:
    pipe, sae = tiny_sd(), make_sae(SHALLOW, num_latents=1024)
    prompts = {"cat": [f"cat {i}" for i in range(24)], "dog": [f"dog {i}" for i in range(24)]}
    options = SMALL | {"height": 32, "width": 32, "num_inference_steps": 2}
    with LargestTensor() as largest:
        collect_concepts(pipe, sae, prompts, SHALLOW, batch_size=4, **options)
    pre_activations, weights = 4 * 16 * 1024, 1024 * CHANNELS[SHALLOW]
    assert largest.numel == max(pre_activations, weights) < 48 * 2 * 1024


def latents(values: Any, indices: Any) -> SparseLatents:
    return SparseLatents(torch.tensor(values), torch.tensor(indices, dtype=torch.int32))


def test_statistics_by_hand_spec_2_1() -> None:
    statistics = ConceptStatistics(2, 4)
    two_images = latents([[[3.0, 1.0], [2.0, 0.0]], [[4.0, 2.0], [6.0, 2.0]]], [[[0, 1], [1, 3]], [[2, 0], [2, 1]]])
    statistics.update(two_images, 981, [[0], [0, 1]])
    statistics.update(latents([[[8.0, 0.0]]], [[[3, 0]]]), 1, [[0, 1]])
    mu, timesteps = statistics.finish()
    assert timesteps.tolist() == [981, 1]
    assert mu.dtype == torch.float32
    assert mu.tolist() == [[[1.25, 1.25, 2.5, 0], [0, 0, 0, 8]], [[1, 1, 5, 0], [0, 0, 0, 8]]]


def test_merged_statistics_equal_one_pass() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = []
    for timestep in (981, 981, 501):
        indices = torch.rand(3, 5, 16, generator=generator).argsort(-1)[..., :4].int()
        parts.append((SparseLatents(torch.rand(3, 5, 4, generator=generator), indices), timestep, [[0], [1], [0, 1]]))
    whole, left, right = (ConceptStatistics(2, 16) for _ in range(3))
    for i, part in enumerate(parts):
        whole.update(*part)
        (left if i == 0 else right).update(*part)
    left.merge(right)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(left.finish(), whole.finish(), strict=True))
    with pytest.raises(ValueError, match=r"expected \[C, N\] = \[2, 16\], got \[2, 15\]"):
        left.merge(ConceptStatistics(2, 15))


def test_many_small_terms_are_not_lost_in_a_large_sum() -> None:
    statistics = ConceptStatistics(1, 1)
    statistics.update(latents([[[2.0**25]]], [[[0]]]), 1, [[0]])
    for _ in range(64):
        statistics.update(latents([[[1.0]]], [[[0]]]), 1, [[0]])
    assert statistics.finish()[0].item() == torch.tensor((2.0**25 + 64) / 65).item()


def test_statistics_refuse_spec_7_1() -> None:
    statistics = ConceptStatistics(2, 4)
    one = latents([[[1.0]]], [[[0]]])
    with pytest.raises(ValueError, match="was the hook point called"):
        statistics.finish()
    with pytest.raises(ValueError, match=r"B = len\(concepts\) = 2, got \[1, 1, 1\]"):
        statistics.update(one, 1, [[0], [1]])
    for rows in ([2], [-1], [1, 1]):
        with pytest.raises(ValueError, match=r"different rows in \[0, C=2\)"):
            statistics.update(one, 1, [rows])
    statistics.update(one, 1, [[0]])
    with pytest.raises(ValueError, match="concept 1 has no token at timestep 1"):
        statistics.finish()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": {}}, ValueError, "at least one concept"),
        ({"prompts": {"cat": []}}, ValueError, "one or more prompts for 'cat'"),
        ({"prompts": {"cat": "a cat"}}, ValueError, "a list of one or more prompts"),
        ({"kinds": {"cow": "object"}}, ValueError, r"kinds: \['cow'\] are not concepts"),
        ({"hook_point": "mid_block"}, ValueError, "hook_point: the UNet has no 'mid_block'"),
        ({"hook_point": None}, TypeError, "hook_point: expected a name"),
        ({"batch_size": 0}, ValueError, "batch_size: expected >= 1, got 0"),
        ({"num_images_per_prompt": 2}, TypeError, r"\['num_images_per_prompt'\] are set by collect_concepts"),
    ],
)
def test_collect_refuses_spec_7_1(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    options = {"prompts": PROMPTS, "hook_point": SHALLOW} | SMALL
    with pytest.raises(error, match=message):
        collect_concepts(tiny_sd(), make_sae(SHALLOW), **(options | arguments))


def test_command_line_writes_the_table_that_the_library_collects(tmp_path: Path) -> None:
    pipe, sae = tiny_sd(), make_sae(SHALLOW)
    pipe.save_pretrained(tmp_path / "model")
    sae.save_pretrained(tmp_path / "sae")
    entries = {name: {"kind": "style" if name == "neon" else "object", "prompts": PROMPTS[name]} for name in PROMPTS}
    (tmp_path / "prompts.json").write_text(json.dumps(entries))
    Concepts(
        model=str(tmp_path / "model"),
        sae=str(tmp_path / "sae"),
        prompts=tmp_path / "prompts.json",
        hook_point=SHALLOW,
        out=tmp_path / "table",
        steps=2,
        guidance=5.0,
        height=32,
        width=32,
        assign=True,
        device="cpu",
    ).run()
    table = ConceptTable.load(tmp_path / "table")
    options = SMALL | {"height": 32, "width": 32, "num_inference_steps": 2}
    expected = collect_concepts(pipe, sae, PROMPTS, SHALLOW, guidance_scale=5.0, **options)
    torch.testing.assert_close(table.mu, expected.mu, rtol=2**-10, atol=1e-7)
    assert table.kinds == ["object", "object", "style"]
    assert table.assignment == expected.assign()
    assert table.model_id == "model"
    table.check_sae(sae)


def test_command_line_takes_an_assignment_over(tmp_path: Path) -> None:
    """SPEC 4.2: a table of a supervised SAE has the latents that were assigned before; those of another are refused."""
    pipe, sae = tiny_sd(), make_sae(SHALLOW)
    pipe.save_pretrained(tmp_path / "model")
    sae.save_pretrained(tmp_path / "sae")
    assignment = {name: 3 + 2 * row for row, name in enumerate(PROMPTS)}
    save_assignment(tmp_path / "sae", assignment, dict.fromkeys(PROMPTS, "object"), sae)
    (tmp_path / "prompts.json").write_text(json.dumps({n: {"kind": "object", "prompts": PROMPTS[n]} for n in PROMPTS}))
    options: dict[str, Any] = {"steps": 1, "height": 32, "width": 32, "device": "cpu", "hook_point": SHALLOW}
    options |= {"model": str(tmp_path / "model"), "sae": str(tmp_path / "sae"), "prompts": tmp_path / "prompts.json"}
    options |= {"out": tmp_path / "table", "assignment": tmp_path / "sae" / "assignment.json"}
    Concepts(**options).run()
    assert ConceptTable.load(tmp_path / "table").assignment == assignment
    with pytest.raises(ValueError, match="assign: expected either --assign or --assignment, got both"):
        Concepts(**options, assign=True).run()
    save_assignment(tmp_path / "sae", assignment | {"cow": 1}, dict.fromkeys([*PROMPTS, "cow"], "object"), sae)
    with pytest.raises(ValueError, match=r"prompts: expected those of every assigned concept, got none for \['cow'\]"):
        Concepts(**options).run()
    make_sae(DEEP).save_pretrained(tmp_path / "sae")
    with pytest.raises(ValueError, match="assignment: .* is of SAE"):
        Concepts(**options).run()


@pytest.mark.parametrize("entry", [["a cat"], {"prompts": ["a cat"]}, {"kind": "object", "prompts": "a cat"}])
def test_command_line_refuses_other_prompt_files(tmp_path: Path, entry: Any) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"cat": entry}))
    with pytest.raises(ValueError, match=r"prompts: expected .* for 'cat'"):
        Concepts(model="", sae="", prompts=path, hook_point=SHALLOW, out=tmp_path).run()
