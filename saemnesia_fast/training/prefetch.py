"""Making the next item in a thread while the present one is used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from queue import SimpleQueue
from typing import TypeVar

import torch

T = TypeVar("T")


def one_ahead(produce: Callable[[threading.Event], Iterator[T]]) -> Generator[T, None, None]:
    """The items of `produce(stopping)`, which runs in a thread of its own, one item in front of the reader.

    An item is begun when the one before it is taken, so two are alive at a time. What the producer raises is raised
    here. Closing the generator sets `stopping`, which the producer may look at to end early, and waits for the thread.
    """
    stopping = threading.Event()
    taken = threading.Semaphore(0)
    made: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def work() -> None:
        try:
            for item in produce(stopping):
                made.put((item, None))
                del item
                taken.acquire()
                if stopping.is_set():
                    return
            made.put((None, StopIteration()))
        except BaseException as error:
            made.put((None, error))

    thread = threading.Thread(target=copy_context().run, args=(work,), name="one_ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            taken.release()
            yield item  # type: ignore[misc]
            del item
    finally:
        stopping.set()
        taken.release()
        thread.join()


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Let this thread's work on a CUDA `device` go beside the default stream's, after what that has queued so far."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        yield
