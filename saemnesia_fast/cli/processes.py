"""Work cut into parts, one for each process."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable

Part = tuple[int, int]
"""i of n."""


def in_processes(work: Callable[[Part], None], processes: int, threads: int) -> None:
    """Calls `work((i, n))` for all i, each in a process of its own; in this one if there is one only.

    `work` is a function of a module or a method of a dataclass of plain values. `processes` = 0 stands for as many as
    there are cores for `threads` threads each.

    Raises:
        ValueError: a number below 0, or no threads.
        ChildProcessError: a process failed; the others are waited for.
    """
    if processes < 0 or threads < 1:
        raise ValueError(f"processes, threads: expected >= 0 and >= 1, got {processes} and {threads}")
    count = processes or max(1, (os.cpu_count() or 1) // threads)
    if count == 1:
        return work((0, 1))
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=work, args=((part, count),)) for part in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    failed = [part for part, process in enumerate(started) if process.exitcode]
    if failed:
        raise ChildProcessError(f"processes {failed} of {count} failed; what is done is kept, run again to go on")
