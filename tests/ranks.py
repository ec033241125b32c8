"""Runs a function in several processes that are connected as torchrun connects them, over gloo on this machine."""

import importlib.util
import inspect
import io
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

# A server that has imported what ranks need forks them, so that only the first run waits for that.
SLOW_IMPORTS = ["pytest", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.tensor"]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([*SLOW_IMPORTS, "saemnesia_fast.training"])


class RankFailed(AssertionError):
    """Holds each rank's traceback, or None where it succeeded."""

    def __init__(self, failures: list[str | None]) -> None:
        super().__init__("\n".join(f"rank {rank}:\n{text}" for rank, text in enumerate(failures) if text))
        self.failures = failures


def run_on_ranks(size: int, function: Callable[..., Any], *arguments: Any, seconds: float = 60) -> list[Any]:
    """The result of `function(*arguments)` on each of `size` ranks, one after another; RankFailed where one fails.

    `function` stands at the top of a module, and reads its rank from torchrun's environment. Results are what
    `torch.save` writes and `torch.load` reads without unpickling: numbers, strings, tensors, lists, dictionaries.
    Ranks that run longer than `seconds` are killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    path, name = inspect.getfile(function), function.__name__
    started = []
    for rank in range(size):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = CONTEXT.Process(target=_rank, args=(sender, environment, path, name, arguments), daemon=True)
        process.start()
        sender.close()
        started.append((process, receiver))
    until = time.monotonic() + seconds
    outcomes = [_outcome(process, receiver, until) for process, receiver in started]
    if any(failure for _, failure in outcomes):
        raise RankFailed([failure for _, failure in outcomes])
    return [result for result, _ in outcomes]


def _outcome(process: Any, receiver: Any, until: float) -> tuple[Any, str | None]:
    """(result, what went wrong)."""
    result, failure = None, "ended without a word"
    if receiver.poll(max(0, until - time.monotonic())):
        with suppress(EOFError):
            content, failure = receiver.recv()
            result = None if content is None else torch.load(io.BytesIO(content))
    else:
        failure = "killed, as it took too long"
        process.kill()
    process.join(max(1, until - time.monotonic()))
    if process.is_alive():
        failure = "killed, as it did not end"
        process.kill()
        process.join()
    return result, failure


def _rank(sender: Any, environment: dict[str, Any], path: str, name: str, arguments: Any) -> None:
    os.environ.update({key: str(value) for key, value in environment.items()})
    torch.set_num_threads(1)
    try:
        content = io.BytesIO()
        torch.save(getattr(_module(path), name)(*arguments), content)
        sender.send((content.getvalue(), None))
    except BaseException:
        sender.send((None, traceback.format_exc()))


def _module(path: str) -> Any:
    """The module in the file `path`, which need not be on sys.path."""
    spec = importlib.util.spec_from_file_location("ranks_task", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
