"""One competitor of train_step in a process of its own: checked against float64, then its memory and its time taken."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import activations
from activations import Weights
from harness import Absent, Case, Clock, clock_for
from providers import HALF_TOLERANCE
from saemnesia_fast import ops
from train_step_dense import ALPHA, Plain, Setting, largest, pre_activations, released_loss, topk_loss
from train_step_peers import OURS, Peer, Step, peers, phases

LR = 4e-4
STILL = 1e-9
"""The learning rate while time is taken: weights that stay keep the same latents dead and the same work to do."""
UPDATE_LIMIT = 2e-2
"""Of the mean update: where an element's gradient is rounding alone, Adam's first step goes all the way too."""
CHECKED_ROWS = 1024
CHUNK = 256
DEAD = "N/10 dead"
PHASE_SAMPLES = 5


class Expected(NamedTuple):
    """What one step comes to in float64."""

    losses: dict[str, float]
    """By formula."""
    weights: Weights
    """The new ones, float64, at `checked_rows`; without the rest of W_enc, b_enc and W_dec."""
    dead: Tensor | None
    """[N] bool."""

    def save(self, path: Path) -> None:
        torch.save(self._asdict() | {"weights": tuple(self.weights)}, path)

    @classmethod
    def load(cls, path: Path, device: str) -> Expected:
        entries = torch.load(path, map_location=device, weights_only=True)
        return cls(**entries | {"weights": Weights(*entries["weights"])})


def checked_rows(num_latents: int, device: str) -> Tensor:
    return torch.linspace(0, num_latents - 1, min(num_latents, CHECKED_ROWS), device=device).long()


def at_rows(own: Weights, rows: Tensor) -> Weights:
    """A float64 copy of some latents' weights."""
    some = (own.W_enc[rows], own.b_enc[rows], own.b_dec, own.W_dec[rows])
    return Weights(*(tensor.detach().double().clone() for tensor in some))


def fresh_weights(case: Case, device: str) -> Weights:
    """The case's weights, held by nobody else."""
    own = activations.weights(case.d, case.N, case.torch_dtype, device)
    activations.weights.cache_clear()
    return own


def tokens(case: Case, device: str) -> Tensor:
    x = activations.tokens(case, device)
    activations.weights.cache_clear()
    return x


@torch.no_grad()
def latents_to_call_dead(own: Weights, x: Tensor, k: int, count: int) -> Tensor:
    """[N] bool: the first `count` latents that are nowhere among the k largest of the tokens."""
    fired = torch.zeros(len(own.W_enc), dtype=torch.bool, device=x.device)
    for some in x.split(CHUNK):
        fired[pre_activations(own, some).topk(k).indices.flatten()] = True
    silent = (~fired).nonzero().squeeze(1)
    return torch.zeros_like(fired).index_fill(0, silent[:count], True)


def num_dead(case: Case) -> int:
    return case.N // 10 if case.variant == DEAD else 0


def expected(case: Case, device: str, formulas: set[str]) -> Expected:
    """One dense step in float64, and the losses of other formulas before it."""
    own, x = Weights(*(t.double() for t in fresh_weights(case, device))), tokens(case, device).double()
    dead = latents_to_call_dead(own, x, case.k, num_dead(case)) if num_dead(case) else None
    losses = {name: OTHER_LOSSES[name](own, x, case.k, dead) for name in formulas - {"topk"}}
    step = Plain(own, Setting(case.k, LR, dead), topk_loss, chunk=CHUNK)
    losses["topk"] = float(step(x))
    return Expected(losses, at_rows(step.weights, checked_rows(case.N, device)), dead)


@torch.no_grad()
def _released(own: Weights, x: Tensor, k: int, dead: Tensor | None) -> float:
    dead = torch.zeros_like(own.b_enc, dtype=torch.bool) if dead is None else dead
    return float(released_loss(own, x, k, (x - x.mean(0)).square().sum(), dead, int(dead.sum())).loss)


@torch.no_grad()
def _dictionary_learning(own: Weights, x: Tensor, k: int, dead: Tensor | None) -> float:
    """Mean squared error of a token, and AuxK in units of the errors' own variance."""
    pre = pre_activations(own, x)
    error = x - (largest(pre, k) @ own.W_dec + own.b_dec)
    loss = error.square().sum(1).mean()
    if dead is not None:
        e_hat = largest(torch.where(dead, pre, 0), min(x.shape[1] // 2, int(dead.sum()))) @ own.W_dec
        loss += ALPHA * (e_hat - error).square().sum() / (error - error.mean(0)).square().sum()
    return float(loss)


OTHER_LOSSES: dict[str, Callable[[Weights, Tensor, int, Tensor | None], float]] = {
    "released": _released,
    "dictionary-learning": _dictionary_learning,
}


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


class Runner:
    """A competitor at a case."""

    def __init__(self, case: Case, device: str, name: str) -> None:
        self.case, self.device, self.name = case, device, name
        self.peer: Peer = peers(device)[name]
        self.clock: Clock = clock_for(device)
        self.x = tokens(case, device)
        self.step: Step | None = None
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
        return {"error": error, "update_error": update_error}

    def _check_loss(self, loss: float, exact: Expected, limit: float) -> float:
        wanted = exact.losses[self.peer.formula]
        error = abs(loss - wanted) / wanted
        if not error <= limit:
            raise ValueError(f"loss {loss:.6g} instead of {wanted:.6g}, error {error:.2g} above {limit:.2g}")
        return error

    def prepare(self, path: Path) -> dict[str, Any]:
        """Check against what is `Expected`, start anew, and take the first step; its microseconds are the estimate."""
        exact = Expected.load(path, self.device)
        found = self.check(exact)
        self.memory.before()
        self.step = self.peer.start(fresh_weights(self.case, self.device), Setting(self.case.k, STILL, exact.dead))
        gc.collect()
        self.memory.start()
        if self.device == "cuda":
            torch.set_float32_matmul_precision("high")
        losses: list[float] = []
        (estimate,) = self.clock.samples(lambda: losses.append(float(self.step(self.x))), 1)
        self._check_loss(losses[0], exact, HALF_TOLERANCE)
        return found | {"estimate_us": estimate}

    def samples(self, count: int) -> dict[str, Any]:
        """Microseconds of `count` steps, and the most bytes in use in any step so far."""
        taken = self.clock.samples(self._call, count)
        answer = {"taken": taken, "peak_bytes": self.memory.peak()}
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return answer

    def phases(self) -> dict[str, float]:
        """Median microseconds of each part of our step; the step itself is over."""
        self.step = None
        own = fresh_weights(self.case, self.device)
        with ops.use_backend(OURS[self.device][self.name]):
            parts = phases(own, self.x, self.case.k)
            return {
                name: sorted(self.clock.samples(call, PHASE_SAMPLES))[PHASE_SAMPLES // 2]
                for name, call in parts.items()
            }

    def _call(self) -> Any:
        return self.step(self.x)


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


def write_expected(case: Case, device: str, formulas: set[str], path: Path) -> None:
    expected(case, device, formulas).save(path)
