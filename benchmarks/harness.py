"""Times the providers of an op against each other: first the answer is checked, then rounds are interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from results import Row, Stamp, types

ROUNDS = 7
FEWEST_ROUNDS = 3
SAMPLES_PER_ROUND = 50
SHORTEST_SAMPLE_US = 100.0
FLUSH_BYTES = 256 << 20


class Absent(RuntimeError):
    """A provider that cannot run here; the message says why."""


@dataclass(frozen=True)
class Case:
    """One size at which an op is timed: M tokens of d channels, N latents of which k are kept."""

    op: str
    M: int
    d: int = 1280
    N: int = 20480
    k: int = 32
    dtype: str = "float32"
    weights: str = ""
    """The weights' dtype where it is not that of the tokens."""
    variant: str = ""
    flagged: int | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def weights_dtype(self) -> torch.dtype:
        return getattr(torch, self.weights or self.dtype)

    def __str__(self) -> str:
        flagged = "" if self.flagged is None else f", {self.flagged} flagged"
        return f"{self.op}({self.variant}{flagged}) M={self.M} d={self.d} N={self.N} k={self.k} {types(self)}"


class Work(NamedTuple):
    """The least that any implementation must do."""

    bytes: int
    """Read and written, every operand once."""
    flops: int
    """Of matrix products, 2 per multiplication and addition."""


@dataclass(frozen=True)
class Provider:
    """One competitor: `start()` returns the call to time, or raises Absent."""

    name: str
    start: Callable[[], Callable[[], Any]]
    tolerance: float | None = None
    """Its own limit on the median error over tokens; None: the largest error is held to the contest's limit."""
    errors: Callable[[Any], Tensor] | None = None
    """As the contest's, for one that computes another formula."""
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Entered around its calls."""
    capturable: bool = True
    """Whether a CUDA graph can hold the call; False where the host waits for the device."""


@dataclass(frozen=True)
class Contest:
    """The providers of one case, all on the same tensors."""

    case: Case
    work: Work
    providers: Sequence[Provider]
    errors: Callable[[Any], Tensor]
    """What a call returned -> the error of each checked token, against a float64 reference."""
    limit: float
    baseline: str
    """The provider to which all others are compared."""


class Clock(Protocol):
    """How time is taken on a device."""

    def prepare(self, call: Callable[[], Any], capturable: bool) -> tuple[Callable[[], Any], str]:
        """The call as it is timed, and how: "wall", "events" or "graph"."""
        ...

    def samples(self, call: Callable[[], Any], count: int) -> list[float]:
        """Microseconds of each of `count` calls."""
        ...


class CpuClock:
    """Wall time; short calls are timed in bursts, as the timer itself takes a part of a microsecond."""

    def __init__(self) -> None:
        self._bursts: WeakKeyDictionary[Callable[[], Any], int] = WeakKeyDictionary()

    def prepare(self, call: Callable[[], Any], capturable: bool) -> tuple[Callable[[], Any], str]:
        return call, "wall"

    def samples(self, call: Callable[[], Any], count: int) -> list[float]:
        burst = self._bursts.setdefault(call, 1)
        taken = []
        while len(taken) < count:
            before = time.perf_counter_ns()
            for _ in range(burst):
                call()
            duration = (time.perf_counter_ns() - before) / 1e3
            if duration < SHORTEST_SAMPLE_US:
                burst = self._bursts[call] = burst * 2
            else:
                taken.append(duration / burst)
        return taken


class CudaClock:
    """CUDA events around calls that find the L2 cache cold, captured as a graph where that is possible."""

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def prepare(self, call: Callable[[], Any], capturable: bool) -> tuple[Callable[[], Any], str]:
        if not capturable:
            return call, "events"
        side, before = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(before)
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        before.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                result = call()
        except RuntimeError:
            torch.cuda.set_stream(before)  # which a capture that fails leaves behind
            torch.cuda.synchronize()
            return call, "events"

        def replay() -> Any:
            graph.replay()
            return result

        return replay, "graph"

    def samples(self, call: Callable[[], Any], count: int) -> list[float]:
        pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
        for start, end in pairs:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [1e3 * start.elapsed_time(end) for start, end in pairs]


def clock_for(device: str) -> Clock:
    return CudaClock() if device == "cuda" else CpuClock()


class Started(NamedTuple):
    provider: Provider
    call: Callable[[], Any]
    timing: str
    error: float
    estimate: float
    """Microseconds of one call."""


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between order statistics."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def start(contest: Contest, provider: Provider, clock: Clock) -> Started | str:
    """The provider, checked and warm; or its status, where it is absent or its answer is wrong."""
    try:
        with provider.context():
            call, timing = clock.prepare(provider.start(), provider.capturable)
            errors = (provider.errors or contest.errors)(call()).double()
            clock.samples(call, 1)
            estimate = clock.samples(call, 1)[0]
    except Absent as absent:
        return f"absent: {absent}"
    except Exception as error:
        return _failure(error)
    exact = provider.tolerance is None
    error = float(errors.max() if exact else errors.median())
    limit = contest.limit if exact else provider.tolerance
    if not error <= limit:
        return f"failed: {'largest' if exact else 'median'} error {error:.2g} above {limit:.2g}"
    return Started(provider, call, timing, error, estimate)


def measure(started: Sequence[Started], clock: Clock, seconds: float) -> dict[str, list[float]]:
    """Microseconds of every sample by provider. A round gives each its turn, and each round another one goes first."""
    if not started:
        return {}
    once = sum(one.estimate for one in started) / 1e6
    rounds = max(FEWEST_ROUNDS, min(ROUNDS, int(seconds / once)))
    share = 1e6 * seconds / rounds / len(started)
    taken: dict[str, list[float]] = {one.provider.name: [] for one in started}
    for turn in range(rounds):
        first = turn % len(started)
        for one in [*started[first:], *started[:first]]:
            count = max(1, min(SAMPLES_PER_ROUND, int(share / one.estimate)))
            with one.provider.context():
                taken[one.provider.name] += clock.samples(one.call, count)
    return taken


def run(contest: Contest, clock: Clock, seconds: float, floor_us: float, stamp: Stamp) -> list[Row]:
    """A row for every provider of the contest; all timed calls together take about `seconds`. A floor of 0 is none."""
    ready = [start(contest, provider, clock) for provider in contest.providers]
    samples = measure([one for one in ready if isinstance(one, Started)], clock, seconds)
    rows = []
    for provider, one in zip(contest.providers, ready, strict=True):
        row = Row.of(stamp, contest.case, provider.name, floor_us)
        if isinstance(one, Started):
            taken = samples[provider.name]
            row.status, row.timing, row.error, row.samples = "ok", one.timing, one.error, len(taken)
            row.p20_us, row.p50_us, row.p80_us = (percentile(taken, percent) for percent in (20, 50, 80))
            row.of_floor = 100 * floor_us / row.p50_us if floor_us else None
        else:
            row.status = one
        rows.append(row)
    return compare(rows, contest.baseline)


def attempt(
    build: Callable[[], Contest], case: Case, clock: Clock, seconds: float, floor_us: float, stamp: Stamp
) -> list[Row]:
    """As `run`; where not even the contest can be set up, one row that says so."""
    try:
        return run(build(), clock, seconds, floor_us, stamp)
    except Exception as error:
        row = Row.of(stamp, case, "all", floor_us)
        row.status = _failure(error)
        return [row]


def _failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def is_ours(provider: str) -> bool:
    return provider.startswith("ours")


def compare(rows: list[Row], baseline: str) -> list[Row]:
    """Fill in how many times as fast as the baseline, and as the fastest competitor, each row is."""
    timed = [row for row in rows if row.p50_us is not None]
    base = next((row.p50_us for row in timed if row.provider == baseline), None)
    best = min((row.p50_us for row in timed if not is_ours(row.provider)), default=None)
    for row in timed:
        row.baseline = baseline
        row.vs_baseline = base / row.p50_us if base else None
        row.vs_best = best / row.p50_us if best else None
    return rows
