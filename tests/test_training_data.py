"""Sources of training tokens: every token once a pass, seeded, restored at the exact batch (SPEC 5.1)."""

from functools import cache
from itertools import islice

import pytest
import torch

from pipelines import HOOK_POINTS, tiny_sd
from saemnesia_fast.files import save_tensors, write_json
from saemnesia_fast.training import LiveActivations, Sampling, ShardActivations, TensorActivations
from saemnesia_fast.training.sampling import sample_activations

SAMPLING = Sampling(num_inference_steps=2, guidance_scale=3.0, prompts_per_call=2, height=64, width=64, seed=7)


def numbered(n, d=2):
    return torch.arange(n * d, dtype=torch.float32).view(n, d)


@cache
def pipeline():
    return tiny_sd()


def shards(folder, sizes, d=2):
    """A finished set whose token number i is the row i of `numbered`."""
    tokens = numbered(sum(sizes), d).half()
    entries = []
    for number, part in enumerate(tokens.split(list(sizes))):
        file = f"block/{number:05d}.safetensors"
        save_tensors(folder / file, {"activations": part.view(2, -1, d)})
        entries.append({"file": file, "prompts": 1, "tokens": len(part)})
    write_json(folder / "index.json", {"finished": True, "hook_points": {"block": {"d": d, "shards": entries}}})
    return folder


def rows(batches):
    return [tuple(row) for batch in batches for row in batch.tolist()]


def make(kind, tmp_path, **options):
    if kind == "tensor":
        return TensorActivations(numbered(24), batch_size=4, **options)
    if kind == "shards":
        folder = tmp_path if (tmp_path / "index.json").exists() else shards(tmp_path, [8, 4, 8, 4])
        return ShardActivations(folder, "block", batch_size=4, buffer_tokens=8, **options)
    return LiveActivations(pipeline(), ["a", "b", "c"], HOOK_POINTS[0], SAMPLING, batch_size=48, buffer_tokens=100)


@pytest.mark.parametrize("kind", ["tensor", "shards"])
def test_every_token_once_a_pass_in_another_order(kind, tmp_path):
    source = make(kind, tmp_path)
    assert source.num_tokens == 24
    batches = list(islice(source, 12))
    first, second = rows(batches[:6]), rows(batches[6:])
    assert sorted(first) == sorted(second) == [tuple(row) for row in numbered(24).tolist()]
    assert first != sorted(first)
    assert first != second
    assert rows(islice(make(kind, tmp_path, seed=1), 6)) != first


@pytest.mark.parametrize("kind", ["tensor", "shards", "live"])
def test_state_continues_at_the_next_batch(kind, tmp_path):
    """Within a block, at its end and behind it; the live buffer holds two batches."""
    count, stops = (4, (1, 2)) if kind == "live" else (9, (1, 5, 6))
    expected = list(islice(make(kind, tmp_path), count))
    for stop in stops:
        source = make(kind, tmp_path)
        assert len(list(islice(source, stop))) == stop
        restored = make(kind, tmp_path)
        restored.load_state_dict(source.state_dict())
        continued = list(islice(restored, count - stop))
        assert all(torch.equal(batch, wanted) for batch, wanted in zip(continued, expected[stop:], strict=True))


def test_state_of_another_order_is_refused():
    source = TensorActivations(numbered(24), batch_size=4)
    with pytest.raises(ValueError, match="seed: expected 0"):
        TensorActivations(numbered(24), batch_size=4, seed=1).load_state_dict(source.state_dict())
    with pytest.raises(ValueError, match="batch_size: expected 4"):
        TensorActivations(numbered(24), batch_size=8).load_state_dict(source.state_dict())


def test_a_short_last_block_of_a_pass_is_left_out(tmp_path):
    source = ShardActivations(shards(tmp_path, [8, 2, 8]), "block", batch_size=4, buffer_tokens=4)
    assert all(len(batch) == 4 for batch in islice(source, 20))


def test_live_tokens_are_the_conditional_half_of_seeded_prompts():
    """Prompt i of the stream starts from seed + i; the next pass over the prompts has fresh noise."""
    source = make("live", None)
    tokens, position = source.load_block(2)
    assert position == 6
    expected = []
    for first, prompts in ((2, ["c", "a"]), (4, ["b", "c"])):
        activations, timesteps = sample_activations(pipeline(), prompts, 7 + first, [HOOK_POINTS[0]], SAMPLING)
        assert timesteps.tolist() == [501, 1]
        expected.append(activations[HOOK_POINTS[0]].reshape(-1, 64))
    assert torch.equal(tokens, torch.cat(expected))


def test_sampling_reads_the_conditional_rows():
    """Guidance <= 1 runs the conditional half alone: at the first step it sees the same latents as with guidance."""
    both, timesteps = sample_activations(pipeline(), ["a cat", "a dog"], 3, HOOK_POINTS, SAMPLING)
    alone = Sampling(**(vars(SAMPLING) | {"guidance_scale": 1.0}))
    single, _ = sample_activations(pipeline(), ["a cat", "a dog"], 3, HOOK_POINTS, alone)
    assert timesteps.dtype == torch.int64
    for name, (tokens, d) in zip(HOOK_POINTS, ((16, 64), (64, 32)), strict=True):
        assert both[name].shape == (2, 2, tokens, d)
        torch.testing.assert_close(both[name][:, 0], single[name][:, 0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(both[name][:, 1], single[name][:, 1], rtol=1e-4, atol=1e-5)


def test_sampling_leaves_the_pipeline_as_it_was():
    pipe = tiny_sd()
    pipe.set_progress_bar_config(disable=False, desc="mine")
    sample_activations(pipe, ["a"], 0, HOOK_POINTS, SAMPLING)
    assert pipe._progress_bar_config == {"disable": False, "desc": "mine"}
    assert not any(module._forward_hooks for module in pipe.unet.modules())


@pytest.mark.parametrize(
    ("make_source", "message"),
    [
        (lambda p: TensorActivations(torch.zeros(4, 2, 2)), r"activations: expected a floating-point tensor \[n, d\]"),
        (lambda p: TensorActivations(torch.zeros(4, 2).long()), "activations: expected a floating-point"),
        (lambda p: TensorActivations(torch.zeros(4, 2), 5), "expected at least batch_size=5 tokens, got 4"),
        (lambda p: TensorActivations(torch.zeros(4, 2), 0), "batch_size: expected a number >= 1, got 0"),
        (lambda p: ShardActivations(p / "none", "block"), "expected the output of `collect`"),
        (lambda p: ShardActivations(shards(p, [8]), "other"), r"hook_point: expected one of \['block'\], got 'other'"),
        (lambda p: ShardActivations(shards(p, [8]), "block", 9), "batch_size: expected at most"),
        (lambda p: LiveActivations(None, [], "block"), "prompts: expected a non-empty list"),
        (lambda p: LiveActivations(None, ["a"], "block", buffer_tokens=9), "buffer_tokens: expected at least"),
    ],
)
def test_bad_sources_are_refused(make_source, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_source(tmp_path)


def test_an_unfinished_set_is_refused(tmp_path):
    write_json(tmp_path / "index.json", {"finished": False, "hook_points": {}})
    with pytest.raises(ValueError, match="was interrupted"):
        ShardActivations(tmp_path, "block")
