"""Launches of Triton kernels that are made again without asking Triton once more which compiled kernel is meant."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> Any:
    """`kernel[grid](*arguments, **options)`: the compiled kernel, None if it was interpreted."""
    return kernel[grid](*arguments, **options)


class Kept(NamedTuple):
    run: Callable[..., Any]
    """Of the compiled kernel."""
    arguments: list[Any]
    """Grid, stream, function, metadata, no hooks, and all of the kernel's, compile-time ones included; tensors by their
    addresses."""
    varying: list[tuple[int, int]]
    """(position among the arguments, which of the varying tensors)."""


class Launches:
    """Makes launches, and repeats them with other tensors in the places of the `varying` ones.

    Triton looks a kernel up by the types, values and divisibility of all arguments, in every launch. Who repeats
    launches answers for all of these being the same. Tensors that do not vary are kept alive.
    """

    def __init__(self, varying: Sequence[Tensor], stream: int) -> None:
        self._stream = stream
        self.counter: Tensor | None = None
        """One more that varies: a zero, to count in."""
        self.scratch: dict[str, tuple[Any, tuple[Any, ...]]] = {}
        """{op: (key, memory)} that no other calls must write to."""
        self.suffice = False
        """Whether they are all that was done."""
        self._varying = [tensor.data_ptr() for tensor in varying]
        self._held: list[Tensor] = []
        self._kept: list[Kept] = []
        self._interpreted = False

    @property
    def repeatable(self) -> bool:
        return self.suffice and not self._interpreted

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """`kernel[grid](*arguments, **options)`, kept to be repeated."""
        compiled = launch(kernel, grid, *arguments, **options)
        if compiled is None:
            self._interpreted = True
            return
        own = {name: value for name, value in options.items() if name in kernel.arg_names}
        everything = inspect.signature(kernel.fn).bind(*arguments, **own).arguments.values()
        metadata_and_hooks = (compiled.packed_metadata, None, None, None)
        taken = [*(*grid, 1, 1)[:3], self._stream, compiled.function, *metadata_and_hooks, *everything]
        varying = []
        for at, one in enumerate(taken):
            if isinstance(one, Tensor):
                taken[at] = address = one.data_ptr()
                which = self._which(address)
                if which is None:
                    self._held.append(one)
                else:
                    varying.append((at, which))
        self._kept.append(Kept(compiled.run, taken, varying))

    def _which(self, address: int) -> int | None:
        """The varying tensor of that address, the counter after the others."""
        counter = [] if self.counter is None else [self.counter.data_ptr()]
        addresses = self._varying + counter
        return addresses.index(address) if address in addresses else None

    def repeat(self, varying: Sequence[Tensor]) -> None:
        """The counter comes last among `varying` if there is one. The stream's device is current."""
        addresses = [tensor.data_ptr() for tensor in varying]
        for run, arguments, places in self._kept:
            for at, which in places:
                arguments[at] = addresses[which]
            run(*arguments)


def observed() -> bool:
    """Whether Triton is to tell somebody of each launch, such as a profiler: it does not of repeated ones."""
    runtime = sys.modules["triton"].knobs.runtime
    return any(getattr(hook, "calls", hook) for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook))
