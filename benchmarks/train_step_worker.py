"""One competitor of train_step in a process of its own: checked against float64, then its memory and its time taken."""

from __future__ import annotations

import ctypes
import gc
import time
from contextlib import suppress
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import Absent, Case, Clock, clock_for, percentile
from providers import HALF_TOLERANCE
from train_step_dense import Setting
from train_step_exact import LR, Expected, at_rows, checked_rows, fresh_weights, tokens
from train_step_peers import PHASES, Peer, Step, marked, peers

STILL = 1e-9
"""The learning rate while time is taken: weights that stay keep the same latents dead and the same work to do."""
UPDATE_LIMIT = 2e-2
"""Of the mean update: where an element's gradient is rounding alone, Adam's first step goes all the way too."""
ROW_LIMIT = 0.3
"""Of a latent's own update, in units of the rate: Adam's first step moves each element by it, up or down."""


class Memory:
    """The most memory in use since `start`, beyond what was in use before `before` was called."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self._before = 0

    def before(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            self._before = torch.cuda.memory_allocated()
        else:
            with suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
            self._before = _status("VmRSS")

    def start(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Bytes."""
        return (torch.cuda.max_memory_allocated() if self.on_gpu else _status("VmHWM")) - self._before


def _status(name: str) -> int:
    """A size in bytes from what Linux says of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise Absent(f"{name} is not told here")


class Marks:
    """When each of some steps began, passed from a phase to the next, and ended."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.steps: list[list[Any]] = []

    def __call__(self) -> None:
        if self.on_gpu:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter_ns()
        self.steps[-1].append(now)

    def laps(self) -> list[list[float]]:
        """Microseconds between the marks of each step; a GPU is done with them."""
        return [[self._between(*pair) for pair in pairwise(step)] for step in self.steps]

    def _between(self, start: Any, end: Any) -> float:
        return 1e3 * start.elapsed_time(end) if self.on_gpu else (end - start) / 1e3


class Runner:
    """A competitor at a case."""

    def __init__(self, case: Case, device: str, name: str) -> None:
        self.case, self.device, self.name = case, device, name
        self.peer: Peer = peers(device)[name]
        self.clock: Clock = clock_for(device)
        self.x = tokens(case, device)
        self.step: Step | None = None
        self.laps: list[list[float]] = []
        self.host: list[float] = []
        """Microseconds until each step was launched; on a CPU, done."""
        self.memory = Memory(device)

    def check(self, exact: Expected) -> dict[str, Any]:
        """The relative errors of the loss and of the new weights; ValueError where one is above its limit."""
        rows = checked_rows(self.case.N, self.device)
        own = fresh_weights(self.case, self.device)
        old = at_rows(own, rows)
        step = self.peer.start(own, Setting(self.case.k, LR, exact.dead))
        error = self._check_loss(float(step(self.x)), exact, self.peer.loss_limit)
        update_error = None
        if not self.peer.differs:
            new = at_rows(step.weights, rows)
            update_error = max(map(_update_error, new, exact.weights, old))
            if not update_error <= UPDATE_LIMIT:
                raise ValueError(f"error of the update {update_error:.2g} above {UPDATE_LIMIT:.2g}")
            sure = exact.margins >= self.peer.band
            for name in ("W_enc", "W_dec"):
                errors = (getattr(new, name) - getattr(exact.weights, name)).abs().mean(1)[sure] / LR
                if not errors.max() <= ROW_LIMIT:
                    latent = int(rows[sure][errors.argmax()])
                    raise ValueError(f"error of the update of {name}[{latent}] {errors.max():.2g} above {ROW_LIMIT}")
        return {"error": error, "update_error": update_error}

    def _check_loss(self, loss: float, exact: Expected, limit: float) -> float:
        wanted = exact.losses[self.peer.formula]
        error = abs(loss - wanted) / wanted
        if not error <= limit:
            raise ValueError(f"loss {loss:.6g} instead of {wanted:.6g}, error {error:.2g} above {limit:.2g}")
        return error

    def prepare(self, path: Path) -> dict[str, Any]:
        """Check against what is `Expected`, start anew, and take two steps, the second of which is the estimate."""
        exact = Expected.load(path, self.device)
        found = self.check(exact)
        self.memory.before()
        self.step = self.peer.start(fresh_weights(self.case, self.device), Setting(self.case.k, STILL, exact.dead))
        gc.collect()
        self.memory.start()
        if self.device == "cuda":
            torch.set_float32_matmul_precision("high")
        losses: list[float] = []
        estimate = self.clock.samples(lambda: losses.append(float(self.step(self.x))), 2)[-1]
        self._check_loss(losses[0], exact, HALF_TOLERANCE)
        return found | {"estimate_us": estimate}

    def samples(self, count: int) -> dict[str, Any]:
        """Microseconds of `count` steps, and the most bytes in use in any step so far."""
        marks = Marks(self.device)

        def call() -> None:
            marks.steps.append([])
            marks()
            before = time.perf_counter_ns()
            self.step(self.x)
            self.host.append((time.perf_counter_ns() - before) / 1e3)
            marks()

        with marked(self.step, marks):
            taken = self.clock.samples(call, count)
        self.laps += marks.laps()
        answer = {"taken": taken, "peak_bytes": self.memory.peak()}
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return answer

    def phases(self) -> dict[str, float]:
        """Of each phase of our steps so far the median microseconds; of one step more the most bytes that it adds.

        On a GPU also the host's, which must be less than the step's, or the GPU waits for it.
        """
        taken = zip(*self.laps, strict=True)
        found = {f"{name}_us": percentile(laps, 50) for name, laps in zip(PHASES, taken, strict=True)}
        if self.device == "cuda":
            found["host_us"] = percentile(self.host, 50)
        peaks: list[int] = []

        def pass_on() -> None:
            peaks.append(self.memory.peak())
            self.memory.before()
            self.memory.start()

        self.memory.before()
        self.memory.start()
        with marked(self.step, pass_on):
            self.step(self.x)
        pass_on()
        return found | {f"{name}_bytes": peak for name, peak in zip(PHASES, peaks, strict=True)}


def _update_error(new: Tensor, exact: Tensor, old: Tensor) -> float:
    """Mean error of the elements in units of their mean change."""
    return float((new - exact).abs().sum() / (exact - old).abs().sum())


def serve(connection: Connection, case: Case, device: str, name: str) -> None:
    """Answer (method of Runner, arguments) with (result, "") or (None, why not) until there are no more."""
    runner: Runner | None = None
    while True:
        try:
            method, *arguments = connection.recv()
        except EOFError:
            return
        try:
            runner = runner or Runner(case, device, name)
            connection.send((getattr(runner, method)(*arguments), ""))
        except (Absent, ImportError) as absent:
            connection.send((None, f"absent: {absent}"))
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            connection.send((None, f"failed: {kind}{text}"))
