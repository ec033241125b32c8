"""Forks a process for each line "task folder seconds" on stdin and kills it (-9) after that time; prints how it ended.

A fork needs no second for its imports, so that the kill falls into the work.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from pipelines import HOOK_POINTS, tiny_sd
from saemnesia_fast.training import CollectConfig, ShardActivations, TrainConfig, collect_activations, train_sae

STEPS = 100
RECIPE = {"steps": STEPS, "num_latents": 32, "k": 3, "lr": 3e-3, "dead_after": 256, "device": "cpu", "progress": False}
RECIPE |= {"checkpoint_every": 4, "log_every": 1, "on_bad_batch": "skip"}
SAMPLING = {"num_inference_steps": 2, "prompts_per_call": 1, "height": 64, "width": 64, "shard_bytes": 1}


def train(folder: Path) -> None:
    """From the shards beside `folder`."""
    data = ShardActivations(folder.parent / "activations", "block", batch_size=64, buffer_tokens=512)
    train_sae(TrainConfig(**RECIPE, out_dir=folder, resume=True), data)


def collect(folder: Path) -> None:
    prompts = [f"prompt {number}" for number in range(6)]
    with suppress(FileExistsError):  # killed when all was done
        collect_activations(tiny_sd(), prompts, HOOK_POINTS, folder, CollectConfig(**SAMPLING), progress=False)


TASKS: dict[str, Callable[[Path], None]] = {"train": train, "collect": collect}


def run(task: str, folder: str) -> None:
    """In the child: never returns."""
    try:
        TASKS[task](Path(folder))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main() -> None:
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        task, folder, seconds = line.split()
        child = os.fork()
        if child == 0:
            run(task, folder)
        until = time.monotonic() + float(seconds)
        ended, status = os.waitpid(child, os.WNOHANG)
        while not ended and time.monotonic() < until:
            time.sleep(0.001)
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
