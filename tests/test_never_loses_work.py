"""Whatever ends a run, it continues to the same curve: kill -9, damaged checkpoints, bad batches, full disks.

`SAEMNESIA_FAST_KILLS` says how often each command is killed, 10 times unless set.
"""

import errno
import json
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import killable
from saemnesia_fast.files import load_tensors, read_metadata, save_tensors, write_json
from saemnesia_fast.training import TensorActivations, TrainConfig, Trainer, train_sae
from saemnesia_fast.training.checkpoint import list_checkpoints, load_checkpoint
from saemnesia_fast.training.metrics import JsonLines

KILLS = int(os.environ.get("SAEMNESIA_FAST_KILLS", "10"))
D, N, K = 8, 32, 3
RECIPE: dict[str, Any] = {"num_latents": N, "k": K, "lr": 3e-3, "dead_after": 256, "progress": False, "device": "cpu"}
RECIPE |= {"steps": 40, "checkpoint_every": 10, "log_every": 1}


def sparse_tokens(n=600):
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(n, 20, generator=generator) * (torch.rand(n, 20, generator=generator) < 0.1)
    return codes @ torch.randn(20, D, generator=generator) + 1.0


def tokens_with_nan():
    x = sparse_tokens()
    x[100] = torch.nan
    return x


class Stopped(Exception):
    """Stands for whatever ends a process."""


class Stopping(TensorActivations):
    """Calls `then` after `count` batches."""

    def __init__(self, x, count, then):
        super().__init__(x, 64)
        self.count = count
        self.then = then

    def __iter__(self):
        batches = super().__iter__()
        yield from islice(batches, self.count)
        self.then()
        yield from batches


class Listed(list):
    """Batches of a list, from its start."""

    state_dict = dict


def stop():
    raise Stopped


def run(folder, then=stop, count=1000, x=None, **options):
    x = sparse_tokens() if x is None else x
    return train_sae(TrainConfig(**RECIPE | options, out_dir=folder, resume=True), Stopping(x, count, then))


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves, without its times: the curve, the SAE and each checkpoint's tensors."""
    left: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            left[name] = {key: tensor.numpy().tobytes() for key, tensor in load_tensors(path).items()}
        elif path.suffix == ".jsonl":
            left[name] = [{**json.loads(line), "seconds": 0} for line in path.read_text().splitlines()]
        else:
            left[name] = {**json.loads(path.read_text()), "seconds": 0}
    return left


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """What the run leaves that nothing stops."""
    folder = tmp_path_factory.mktemp("straight")
    torch.manual_seed(0)  # as before each test: checkpoints hold the generator's state
    run(folder)
    return outcome(folder)


@pytest.fixture(scope="module")
def forks() -> Iterator[Any]:
    command = [sys.executable, str(Path(killable.__file__))]
    paths = os.pathsep.join(filter(None, [str(Path(killable.__file__).parent), os.environ.get("PYTHONPATH")]))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, **pipes) as process:
        assert process.stdout.readline() == "ready\n"

        def run_for(task: str, folder: Path, seconds: float) -> int:
            """The exit code of the task; -9 where it was killed after `seconds`."""
            process.stdin.write(f"{task} {folder} {seconds}\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield run_for
        process.stdin.close()


def store(folder):
    """Shards with a map of NaN, for a training run that skips what it meets there."""
    entries = []
    for number, part in enumerate(sparse_tokens(16 * 96).half().split(16 * 32)):
        maps = part.view(32, 16, D).clone()
        if number == 1:
            maps[7] = torch.nan
        file = f"block/{number:05d}.safetensors"
        save_tensors(folder / file, {"activations": maps})
        entries.append({"file": file, "prompts": 1, "tokens": len(part)})
    write_json(folder / "index.json", {"finished": True, "hook_points": {"block": {"d": D, "shards": entries}}})


@pytest.mark.slow
@pytest.mark.parametrize("task", killable.TASKS)
def test_killed_at_any_moment_it_continues_to_the_same_files(task, tmp_path, forks):
    store(tmp_path / "activations")
    started = time.monotonic()
    assert forks(task, tmp_path / "straight", 100) == 0
    length = time.monotonic() - started
    expected = outcome(tmp_path / "straight")
    moments = random.Random(0)
    kills = 0
    while kills < KILLS:
        ended = forks(task, tmp_path / "killed", moments.uniform(0, length))
        assert ended in (0, -9)
        kills += ended == -9
        if ended == 0:
            assert outcome(tmp_path / "killed") == expected
            shutil.rmtree(tmp_path / "killed")
    assert forks(task, tmp_path / "killed", 100) == 0
    assert outcome(tmp_path / "killed") == expected
    if task == "train":
        curve = expected["sae/metrics.jsonl"]
        assert [line["step"] for line in curve] == list(range(1, killable.STEPS + 1))
        assert curve[-1]["skipped"] > 0


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def drop_a_tensor(path):
    tensors, metadata = load_tensors(path), read_metadata(path)
    del tensors["rng"]
    save_tensors(path, tensors, metadata)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 8),
    "one bit": flip_a_bit,
    "no rng": drop_a_tensor,
    "another file": lambda path: save_tensors(path, {"x": torch.zeros(3)}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_continues(damage, tmp_path, straight, caplog):
    with pytest.raises(Stopped):
        run(tmp_path, count=35)
    paths = list_checkpoints(tmp_path / "sae/checkpoints")
    assert [path.name for path in paths[-2:]] == ["step-00000020.safetensors", "step-00000030.safetensors"]
    DAMAGES[damage](paths[-1])
    with caplog.at_level(logging.INFO, "saemnesia_fast"):
        run(tmp_path)
    warning, info = caplog.messages
    assert str(paths[-1]) in warning and warning.endswith("; trying the checkpoint before it")
    assert "continuing at step 20" in info
    assert outcome(tmp_path) == straight


def test_a_run_without_a_whole_checkpoint_is_an_error(tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path, count=35)
    for path in list_checkpoints(tmp_path / "sae/checkpoints"):
        flip_a_bit(path)
    with pytest.raises(ValueError, match=r"no checkpoint in .*checkpoints is whole; restore one, or delete the folder"):
        run(tmp_path)


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_and_the_best_checkpoints_are_kept(keep, tmp_path):
    """The best by the mean FVU of the ten steps before it: here the third of seven, as noise follows structure."""
    noise = torch.randn(8, 64, D, generator=torch.Generator().manual_seed(1))
    data = Listed([*islice(TensorActivations(sparse_tokens(), 64), 30), *(3 * noise).repeat(5, 1, 1)])
    train_sae(TrainConfig(**RECIPE | {"steps": 70, "keep_checkpoints": keep}, out_dir=tmp_path), data)
    curve = [json.loads(line)["fvu"] for line in (tmp_path / "sae/metrics.jsonl").read_text().splitlines()]
    means = {last: sum(curve[last - 10 : last]) / 10 for last in range(10, 71, 10)}
    best = min(means, key=means.get)
    assert best == 30
    left = list_checkpoints(tmp_path / "sae/checkpoints")
    assert [int(path.stem.split("-")[1]) for path in left] == [30, *range(70, 0, -10)[:keep][::-1]]
    assert load_checkpoint(left[0]).state["fvu"] == pytest.approx(means[30], rel=1e-6)


def test_checkpoints_of_a_future_that_was_given_up_go(tmp_path):
    """Continued from step 20 with fewer checkpoints, the damaged one of step 30 is not what stays."""
    with pytest.raises(Stopped):
        run(tmp_path, count=35)
    flip_a_bit(list_checkpoints(tmp_path / "sae/checkpoints")[-1])
    with pytest.raises(Stopped):
        run(tmp_path, count=5, checkpoint_every=4, keep_checkpoints=1)
    names = [path.name for path in list_checkpoints(tmp_path / "sae/checkpoints")]
    assert "step-00000024.safetensors" in names
    assert "step-00000030.safetensors" not in names


def test_what_is_restored_does_not_depend_on_the_file(tmp_path):
    """The file is mapped into memory when it is read, and deleted or damaged later."""
    with pytest.raises(Stopped):
        run(tmp_path, count=35)
    path = list_checkpoints(tmp_path / "sae/checkpoints")[-1]
    saved = load_checkpoint(path)
    before = {name: tensor.clone() for name, tensor in saved.sae.items()}
    with path.open("r+b") as file:
        file.seek(-5000, os.SEEK_END)
        file.write(bytes(5000))
    assert all(torch.equal(tensor, saved.sae[name]) for name, tensor in before.items())


@pytest.mark.parametrize("options", [{}, {"micro_batches": 2}, {"batch_topk": True}])
def test_a_bad_batch_is_skipped_counted_and_changes_nothing(options, tmp_path, caplog):
    """The step is spent; weights, moments and counters stay as they were."""
    x = tokens_with_nan()
    bad = [number for number, batch in enumerate(islice(TensorActivations(x, 64), 40)) if batch.isnan().any()]
    assert len(bad) == 4
    config = TrainConfig(**RECIPE | options, out_dir=tmp_path, on_bad_batch="skip")
    trainer = Trainer(config, TensorActivations(x, 64))
    states = []
    step = trainer.train_step

    def recorded(batch):
        result = step(batch)
        activity = trainer.activity
        tensors = [*trainer.sae.parameters(), activity.tokens_since_fired, activity.firings]
        tensors += trainer._adam.state_dict().values()
        states.append([tensor.detach().clone() for tensor in tensors])
        return result

    trainer.train_step = recorded
    sae = trainer.fit()
    assert all(parameter.isfinite().all() for parameter in sae.parameters())
    for number in range(1, 40):
        same = all(map(torch.equal, states[number], states[number - 1]))
        assert same == (number in bad)
    lines = [json.loads(line) for line in (tmp_path / "sae/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" not in line] == [number + 1 for number in bad]
    assert [line["skipped"] for line in lines] == [sum(b <= number for b in bad) for number in range(40)]
    assert lines[-1]["tokens"] == 36 * 64
    assert [f"batch {number}," in message for number, message in zip(bad, caplog.messages, strict=True)] == [True] * 4


def test_a_bad_batch_is_fatal_unless_told_otherwise_and_the_run_continues_without_it(tmp_path):
    x = tokens_with_nan()
    with pytest.raises(ValueError, match=r"NaN or inf in 1 tokens of batch \d+, .*; on_bad_batch='skip' leaves such"):
        run(tmp_path / "resumed", x=x)
    run(tmp_path / "straight", x=x, on_bad_batch="skip")
    with pytest.raises(Stopped):
        run(tmp_path / "resumed", count=15, x=x, on_bad_batch="skip")
    run(tmp_path / "resumed", x=x, on_bad_batch="skip")
    assert outcome(tmp_path / "resumed") == outcome(tmp_path / "straight")


@pytest.mark.parametrize("value", [1e25, 1e12])
def test_finite_tokens_that_overflow_are_bad_too(value, tmp_path):
    """In float32 their variance is infinite."""
    x = sparse_tokens()
    x[100] = value
    trainer = Trainer(TrainConfig(**RECIPE, on_bad_batch="skip"), TensorActivations(x, 64))
    sae = trainer.fit()
    assert trainer.skipped == (4 if value == 1e25 else 0)
    assert all(parameter.isfinite().all() for parameter in sae.parameters())


def test_nothing_but_bad_batches_is_an_error(tmp_path):
    config = TrainConfig(**RECIPE, on_bad_batch="skip", out_dir=tmp_path)
    with pytest.raises(ValueError, match="data: all of the 40 batches were skipped"):
        train_sae(config, TensorActivations(torch.full((64, D), torch.nan), 64))


def limit_files(size: int) -> None:
    """Let no file grow beyond `size` bytes: a write fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def unlimited_after() -> Iterator[None]:
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    limit_files(soft)


@pytest.mark.usefixtures("unlimited_after")
def test_a_disk_that_fills_leaves_the_last_checkpoint_and_says_what_to_do(tmp_path, straight):
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    message = r"make room and continue, earlier files are whole: '.*checkpoints/step-00000030.safetensors'"
    with pytest.raises(OSError, match=message) as stopped:
        run(tmp_path, count=25, then=lambda: limit_files(6000))
    assert stopped.value.errno == errno.EFBIG
    left = sorted(path.name for path in (tmp_path / "sae/checkpoints").iterdir())
    assert left == ["step-00000010.safetensors", "step-00000020.safetensors"]
    limit_files(soft)
    run(tmp_path)
    assert outcome(tmp_path) == straight


@pytest.mark.usefixtures("unlimited_after")
def test_a_full_disk_under_the_metrics_names_them(tmp_path):
    log = JsonLines(tmp_path / "metrics.jsonl", 0)
    log.write({"step": 1})
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit_files(20)
    with pytest.raises(OSError, match=r"make room and continue.*metrics\.jsonl"):
        log.write({"step": 2})
    limit_files(soft)
    log.close()
    log = JsonLines(tmp_path / "metrics.jsonl", 2)
    log.write({"step": 2})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
