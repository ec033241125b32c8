"""train_step: one optimizer step of an SAE, every competitor in a process of its own, timed in interleaved rounds."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import FEWEST_ROUNDS, ROUNDS, Case, Work, compare, is_ours, percentile
from results import Row, Stamp, aligned
from train_step_exact import DEAD, num_dead, write_expected
from train_step_peers import BASELINE, OURS, PHASES, STATE_BYTES, package_version, peers
from train_step_worker import serve

SMALL = {"M": 64, "d": 64, "N": 512, "k": 8}
PATIENCE = 1800
"""Seconds until an answer that does not come counts as failed."""
SLOW = 10
"""Seconds of a step from which on two samples must do."""
FEWEST_SAMPLES = 6
"""Of a step that is not slow."""
ONE_CARD = 2**20
"""Latents at which only ours with the smaller moments take part: whether they train on one card."""
REFERENCE_A_WEIGHT = 8
"""Bytes: float32 weights while they are drawn."""
REFERENCE_BESIDE = 2e9
"""Bytes: blocks in float64."""


@dataclass
class StepRow(Row):
    """One competitor at one case."""

    version: str = ""
    """Of the package."""
    differs: str = ""
    """Where its recipe is not ours: only its loss is checked then."""
    update_error: float | None = None
    """Of the new weights, in units of the step's mean change."""
    peak_bytes: int | None = None
    """Most in use in a step, weights and moments included, tokens not."""
    of_baseline_peak: float | None = None
    working_bytes: int | None = None
    """Of them beyond weights and moments, which every step holds: gradients, latents, temporaries."""
    of_baseline_working: float | None = None
    encode_us: float | None = None
    loss_us: float | None = None
    gradients_us: float | None = None
    update_us: float | None = None
    encode_bytes: int | None = None
    """Most in use in this phase beyond what was before it; so the others."""
    loss_bytes: int | None = None
    gradients_bytes: int | None = None
    update_bytes: int | None = None
    host_us: float | None = None
    """Of our step on a GPU: until the host had launched it."""


def cases(device: str, small: bool = False) -> list[Case]:
    if small:
        return [Case("train_step", **SMALL, variant=variant) for variant in ("", DEAD)]
    sizes = [(4096, 20480), (1024, 20480), (1024, 131072), (4096, 131072)]
    first, second, *more = [Case("train_step", M=M, N=N) for M, N in sizes]
    largest = [replace(first, N=ONE_CARD)] if device == "cuda" else []
    return [first, second, replace(second, variant=DEAD), *more, *largest]


def work(case: Case) -> Work:
    """Of both matrices, Adam reads and writes weight and two moments, and the encoder reads W_enc; its product, and
    three sparse ones. AuxK adds a product over the dead rows and four over the d / 2 of them that a token keeps."""
    dead, weights = num_dead(case), 2 * case.N * case.d
    traffic = 6 * 4 * weights + 2 * weights + 4 * case.M * case.d
    products = case.N + 4 * case.k + (dead + 4 * min(case.d // 2, dead))
    return Work(traffic, 2 * case.M * case.d * products)


def competitors(case: Case, device: str) -> list[str]:
    return [name for name in peers(device) if case.N < ONE_CARD or name.endswith("moments")]


class Worker:
    """A competitor's process, and what is known of it so far. With a `status` from the start there is no process."""

    def __init__(self, case: Case, device: str, name: str, status: str = "") -> None:
        self.case = case
        self.name = name
        self.status = status
        self.found: dict[str, Any] = {}
        self.taken: list[float] = []
        if status:
            return
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, case, device, name), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, *question: Any) -> Any:
        """Its answer; None, and a status, where there is none."""
        try:
            self._connection.send(question)
            if not self._connection.poll(PATIENCE):
                raise TimeoutError
            answer, self.status = self._connection.recv()
        except TimeoutError:
            answer, self.status = None, f"failed: longer than {PATIENCE} s"
        except (EOFError, OSError):
            self._process.join(5)
            answer, self.status = None, f"failed: ended with exit status {self._process.exitcode}"
        if self.status:
            self.close()
        return answer

    def prepare(self, path: Path) -> None:
        if not self.status:
            self.found = self.ask("prepare", path) or {}

    def sample(self, count: int) -> None:
        if not self.status and (answer := self.ask("samples", count)):
            self.taken += answer["taken"]
            self.found["peak_bytes"] = answer["peak_bytes"]

    def close(self) -> None:
        self._connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def measure(
    case: Case, device: str, names: Sequence[str], seconds: float, floor_us: float, stamp: Stamp
) -> Iterator[list[StepRow]]:
    """A row for each competitor so far; each is timed for about `seconds`.

    They take turns, another one first in each round, unless they do not fit into the memory together: then each has
    all its turns at once, which the row's `timing` tells, and the rows are given after each.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "expected.pt"
        entered = peers(device)
        formulas = {entered[name].formula for name in names}
        free = _free_bytes(device)
        status = _lacks("the float64 step", REFERENCE_A_WEIGHT * 2 * case.N * case.d + REFERENCE_BESIDE, free)
        status = status or _alone(write_expected, case, device, formulas, path)
        if status:
            row = StepRow.of(stamp, case, "all", floor_us)
            row.status = status
            yield [row]
            return
        needed = {name: entered[name].bytes_needed(case) for name in names}
        together = sum(needed.values()) <= free
        rows: list[StepRow] = []
        for group in [names] if together else [[name] for name in names]:
            with ExitStack() as stack:
                workers = []
                for name in group:
                    workers.append(Worker(case, device, name, _lacks("the step", needed[name], free)))
                    if not workers[-1].status:
                        stack.callback(workers[-1].close)
                _take_turns(workers, path, seconds)
                rows += [_row(worker, case, device, together, floor_us, stamp) for worker in workers]
            yield weigh(compare([*rows], BASELINE))


def weigh(rows: list[StepRow]) -> list[StepRow]:
    """Fill in what each holds beyond weights and moments, and both sizes as shares of the baseline's."""
    held = [row for row in rows if row.peak_bytes]
    state_bytes = {name: peer.state_bytes for device in OURS for name, peer in peers(device).items()}
    for row in held:
        weights = 2 * row.N * row.d + row.N + row.d
        row.working_bytes = row.peak_bytes - state_bytes.get(row.provider, STATE_BYTES) * weights
    base = next((row for row in held if row.provider == BASELINE), None)
    for row in held if base else ():
        row.of_baseline_peak = row.peak_bytes / base.peak_bytes
        row.of_baseline_working = row.working_bytes / base.working_bytes
    return rows


def _take_turns(workers: Sequence[Worker], path: Path, seconds: float) -> None:
    for worker in workers:
        worker.prepare(path)
    ready = [worker for worker in workers if not worker.status]
    slowest = max((worker.found["estimate_us"] for worker in ready), default=1.0) / 1e6
    rounds = max(FEWEST_ROUNDS if slowest < SLOW else 2, min(ROUNDS, int(seconds / slowest)))
    for turn in range(rounds):
        first = turn % max(1, len(ready))
        for worker in [*ready[first:], *ready[:first]]:
            estimate = worker.found["estimate_us"] / 1e6
            fewest = 1 if estimate >= SLOW else -(-FEWEST_SAMPLES // rounds)
            worker.sample(max(fewest, int(seconds / rounds / estimate)))
    for worker in ready:
        if is_ours(worker.name) and not worker.status:
            worker.found |= worker.ask("phases") or {}


def _row(worker: Worker, case: Case, device: str, together: bool, floor_us: float, stamp: Stamp) -> StepRow:
    peer = peers(device)[worker.name]
    row = StepRow.of(stamp, case, worker.name, floor_us)
    row.version, row.differs, row.status = package_version(peer), peer.differs, worker.status
    if worker.taken and not worker.status:
        row.status, row.samples = "ok", len(worker.taken)
        row.timing = ("wall" if device == "cpu" else "events") + ("" if together else ", alone")
        row.p20_us, row.p50_us, row.p80_us = (percentile(worker.taken, percent) for percent in (20, 50, 80))
        row.of_floor = 100 * floor_us / row.p50_us if floor_us else None
        for name, value in worker.found.items():
            if name != "estimate_us":
                setattr(row, name, value)
    return row


def _alone(function: Any, *arguments: Any) -> str:
    """Call it in a process, so that no memory stays taken; a status where it fails."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    return f"failed: {function.__name__} ended with exit status {process.exitcode}" if process.exitcode else ""


def _lacks(what: str, needed: float, free: float) -> str:
    """A status where there is not memory enough."""
    return f"failed: {what} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free" if needed > free else ""


def _free_bytes(device: str) -> float:
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


COLUMNS = {
    "provider": lambda row: f"{row.provider} {row.version}".strip(),
    "p50 ms": lambda row: row.status[:100] if row.p50_us is None else f"{row.p50_us / 1e3:.4g}",
    "p20-p80": lambda row: "" if row.p50_us is None else f"{row.p20_us / 1e3:.4g}-{row.p80_us / 1e3:.4g}",
    "% of floor": lambda row: "" if row.of_floor is None else f"{row.of_floor:.0f}",
    "x dense": lambda row: "" if row.vs_baseline is None else f"{row.vs_baseline:.2f}",
    "x best": lambda row: "" if row.vs_best is None else f"{row.vs_best:.2f}",
    "peak MB": lambda row: "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
    "of dense": lambda row: "" if row.of_baseline_peak is None else f"{row.of_baseline_peak:.2f}",
    "working MB": lambda row: "" if row.working_bytes is None else f"{row.working_bytes / 1e6:.0f}",
    "of its": lambda row: "" if row.of_baseline_working is None else f"{row.of_baseline_working:.2f}",
    "loss error": lambda row: "" if row.error is None else f"{row.error:.1g}",
    "update error": lambda row: "" if row.update_error is None else f"{row.update_error:.1g}",
    "host ms": lambda row: "" if row.host_us is None else f"{row.host_us / 1e3:.4g}",
    "encode, loss, gradients, update ms": lambda row: (
        "" if row.encode_us is None else ", ".join(f"{us / 1e3:.4g}" for us in phases(row))
    ),
    "MB": lambda row: "" if row.encode_us is None else ", ".join(f"{size / 1e6:.0f}" for size in phases(row, "bytes")),
}


def phases(row: StepRow, of: str = "us") -> list[Any]:
    """What a row says "us" or "bytes" of each phase."""
    return [getattr(row, f"{name}_{of}") for name in PHASES]


def table(rows: Iterable[StepRow]) -> str:
    return aligned([list(COLUMNS), *([show(row) for show in COLUMNS.values()] for row in rows)])
