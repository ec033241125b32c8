"""Sources of training tokens: every token once a pass, seeded, restored at the exact batch (SPEC 5.1)."""

import subprocess
import sys
import threading
import time
from functools import cache
from itertools import islice

import pytest
import torch

from pipelines import HOOK_POINTS, tiny_sd
from saemnesia_fast.files import write_json
from saemnesia_fast.training import LiveActivations, Sampling, ShardActivations, TensorActivations, data, live
from saemnesia_fast.training.prefetch import one_ahead
from saemnesia_fast.training.sampling import sample_activations
from shards import numbered, shards

SAMPLING = Sampling(num_inference_steps=2, guidance_scale=3.0, prompts_per_call=2, height=64, width=64, seed=7)


@cache
def pipeline():
    return tiny_sd()


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "one_ahead"]


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
    """Within a window, at its end and behind it; the live buffer holds two batches."""
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


def test_state_of_another_window_or_prompts_is_refused(tmp_path):
    source = make("shards", tmp_path)
    other = ShardActivations(tmp_path, "block", batch_size=4, buffer_tokens=12)
    with pytest.raises(ValueError, match="buffer_tokens: expected 8 as in the saved state, got 12"):
        other.load_state_dict(source.state_dict())
    source, other = make("live", None), make("live", None)
    other.prompts[1] = "d"
    with pytest.raises(ValueError, match="prompts: expected .* as in the saved state"):
        other.load_state_dict(source.state_dict())
    other.load_state_dict(source.state_dict() | other.identity())


def test_a_short_last_window_of_a_pass_is_left_out(tmp_path):
    source = ShardActivations(shards(tmp_path, [8, 2, 8]), "block", batch_size=4, buffer_tokens=4)
    assert all(len(batch) == 4 for batch in islice(source, 20))


def test_live_tokens_are_the_conditional_half_of_seeded_prompts():
    """Prompt i of the stream starts from seed + i; the next pass over the prompts has fresh noise."""
    pieces = make("live", None).pieces(2)
    for first, prompts in ((2, ["c", "a"]), (4, ["b", "c"])):
        activations, timesteps = sample_activations(pipeline(), prompts, 7 + first, [HOOK_POINTS[0]], SAMPLING)
        assert timesteps.tolist() == [501, 1]
        tokens, position = next(pieces)
        assert position == first + 2
        assert torch.equal(tokens, activations[HOOK_POINTS[0]].reshape(-1, 64))


@pytest.mark.parametrize("kind", ["tensor", "shards", "live"])
def test_batches_are_those_made_without_a_thread(kind, tmp_path, monkeypatch):
    overlapping = list(islice(make(kind, tmp_path), 9))
    monkeypatch.setattr(data, "one_ahead", lambda produce: (item for item in produce(threading.Event())))
    assert all(map(torch.equal, islice(make(kind, tmp_path), 9), overlapping))


@pytest.mark.parametrize("kind", ["tensor", "shards", "live"])
def test_a_source_that_is_left_leaves_no_thread(kind, tmp_path):
    batches = iter(make(kind, tmp_path))
    next(batches)
    assert threads()
    batches.close()
    assert not threads()


def test_the_pipeline_stops_at_the_prompt_at_hand(monkeypatch):
    """A window is long, one call of the pipeline is not: leaving waits for the call only."""
    sampled = []
    entered, leave = threading.Event(), threading.Event()

    def slow(pipe, prompts, *arguments):
        sampled.append(prompts)
        if len(sampled) == 3:
            entered.set()
            leave.wait(10)
        return sample_activations(pipe, prompts, *arguments)

    monkeypatch.setattr(live, "sample_activations", slow)
    batches = iter(make("live", None))
    next(batches)
    assert entered.wait(10)
    threading.Timer(0.1, leave.set).start()
    batches.close()
    assert len(sampled) == 3


def test_an_error_of_the_pipeline_reaches_the_reader(monkeypatch):
    """Behind the batches of the window that was whole; a second window of two calls is not."""
    calls = iter(range(3))

    def failing(*arguments):
        if next(calls, None) is None:
            raise RuntimeError("the UNet is out of memory")
        return sample_activations(*arguments)

    monkeypatch.setattr(live, "sample_activations", failing)
    batches = iter(make("live", None))
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(RuntimeError, match="out of memory"):
        next(batches)
    assert not threads()


def test_one_item_is_made_ahead_and_no_more():
    made = []

    def produce(stopping):
        for number in range(5):
            made.append(number)
            yield number

    items = one_ahead(produce)
    for number in range(4):
        assert next(items) == number
        until = time.monotonic() + 10
        while len(made) < number + 2:
            assert time.monotonic() < until
        time.sleep(0.01)
        assert made == list(range(number + 2))
    assert list(items) == [4]
    assert not threads()


def test_reading_overlaps_training(monkeypatch, tmp_path):
    """The second window is there when the first is used up: nothing is waited for."""
    pause = 0.2

    class Slow(TensorActivations):
        def pieces(self, position):
            time.sleep(pause)
            yield from super().pieces(position)

    batches = iter(Slow(numbered(8), batch_size=4))
    next(batches)
    time.sleep(2 * pause)
    started = time.monotonic()
    for _ in range(2):
        next(batches)
    assert time.monotonic() - started < pause / 2
    batches.close()


MEASURE = """
import resource, sys
from itertools import islice
from saemnesia_fast.training import ShardActivations

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

source = ShardActivations(sys.argv[1], "block", batch_size=1024, buffer_tokens=int(sys.argv[2]))
before = peak()
total = sum(len(batch) for batch in islice(source, source.num_tokens // 1024 - 8))
print(total, peak() - before)
"""


@pytest.mark.slow
def test_memory_is_two_windows(tmp_path):
    """96 MiB in three shards, read through windows of 4 MiB: what is held at a time is two windows, not a shard."""
    shards(tmp_path, [32 * 1024] * 3, d=512, maps=128)
    window = 4 * 1024
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(window)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    total, grown = map(int, done.stdout.split())
    assert total == 88 * 1024
    assert grown < 4 * window * 512 * 2


def test_a_window_may_begin_within_a_shard(tmp_path, monkeypatch):
    """Pieces of two maps: windows of 16 tokens draw on all shards, and every token comes once a pass."""
    monkeypatch.setattr(data, "PIECE_TOKENS", 4)
    source = ShardActivations(shards(tmp_path, [24, 12, 24], maps=6), "block", batch_size=4, buffer_tokens=16)
    batches = list(islice(source, 15))
    assert sorted(rows(batches)) == [tuple(row) for row in numbered(60).tolist()]
    owners = {row[0] // 48 for row in rows(batches[:4])}
    assert len(owners) > 1


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


def test_a_damaged_set_is_refused_by_the_file_s_name(tmp_path):
    shards(tmp_path, [8, 4])
    path = tmp_path / "block/00001.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-3], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"00001\.safetensors: not a complete safetensors file .*; restore it, or"):
            ShardActivations(tmp_path, "block", 4)
    path.write_bytes((tmp_path / "block/00000.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"00001\.safetensors: expected 4 tokens as in the index, got 8; restore it"):
        ShardActivations(tmp_path, "block", 4)
    path.unlink()
    with pytest.raises(ValueError, match=r"00001\.safetensors: the index names this shard, but it is missing; restore"):
        ShardActivations(tmp_path, "block", 4)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"finished": true}', '{"finished": true, "hook_points": {"a": 1}}']
)
def test_a_damaged_index_is_refused_by_its_name(content, tmp_path):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"index\.json: not an index that `collect` wrote .*; collect into a new folder"
    ):
        ShardActivations(tmp_path, "block")
