"""A driver for Triton that launches nothing: what the host does for a GPU, where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from harness import Absent
from saemnesia_fast.ops import backend


class Driver:
    """Of an H100 that is not there. `launched` holds each launch's arguments once it is a list."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] | None = None
        self.utils = self

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(*arguments: Any) -> None:
            if self.launched is not None:
                self.launched.append((metadata.name, *arguments))

        return launch

    def get_current_device(self) -> int:
        return -1  # whose compiled kernels no GPU is given

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 2, 32, 0, 1024


DRIVER = Driver()
"""One for all, as compiled kernels keep their launcher."""


@contextmanager
def no_device() -> Iterator[Driver]:
    """Meanwhile Triton's kernels are compiled and launched for tensors on the CPU, and compute nothing."""
    try:
        from triton.runtime import driver
    except ImportError as error:
        raise Absent(str(error)) from error

    slots = dict(backend._slots)
    before = driver._active  # to ask for `active` would look for a GPU
    driver.set_active(DRIVER)
    try:
        for (op, name), slot in slots.items():
            if name == "triton":
                backend.register(op, name, slot.implementation, takes_workspace=slot.takes_workspace)
        yield DRIVER
    finally:
        driver._active = before
        for (op, name), slot in slots.items():
            backend.register(op, name, *slot)
