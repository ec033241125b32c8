"""Whether the host waits for the GPU."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def _set(mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def no_waiting() -> Iterator[None]:
    """torch raises where the host would wait for the device."""
    try:
        _set("error")
        yield
    finally:
        _set("default")
