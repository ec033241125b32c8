"""Launches of Triton kernels that are made again without asking Triton once more which compiled kernel is meant."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> Any:
    """`kernel[grid](*arguments, **options)`: the compiled kernel, None if it was interpreted."""
    return kernel[grid](*arguments, **options)


class Kept(NamedTuple):
    run: Callable[..., Any]
    """Of the compiled kernel and its grid."""
    arguments: list[Any]
    """All of the kernel's, compile-time ones included; tensors by their addresses."""
    varying: list[tuple[int, int]]
    """(position among the arguments, which of the varying tensors)."""


class Launches:
    """Makes launches, and repeats them with other tensors in the places of the `varying` ones.

    Triton looks a kernel up by the types, values and divisibility of all arguments, in every launch. Who repeats
    launches answers for all of these being the same. Tensors that do not vary are kept alive.
    """

    def __init__(self, varying: Sequence[Tensor]) -> None:
        self.counter: Tensor | None = None
        """One more that varies: a zero, to count in."""
        self.scratch: list[Any] = []
        """What others must not write to any more."""
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
        everything = list(inspect.signature(kernel.fn).bind(*arguments, **own).arguments.values())
        counter = () if self.counter is None else (self.counter.data_ptr(),)
        addresses = (*self._varying, *counter)
        varying = []
        for at, one in enumerate(everything):
            if not isinstance(one, Tensor):
                continue
            everything[at] = one.data_ptr()
            if everything[at] in addresses:
                varying.append((at, addresses.index(everything[at])))
            else:
                self._held.append(one)
        self._kept.append(Kept(compiled[(*grid, 1, 1)[:3]], everything, varying))

    def repeat(self, varying: Sequence[Tensor]) -> None:
        """On the current stream of the current device, which is that of `varying`, the counter last if there is one."""
        addresses = [tensor.data_ptr() for tensor in varying]
        device = varying[0].get_device()
        stream = torch._C._cuda_getCurrentRawStream(device) if device >= 0 else None
        for run, arguments, places in self._kept:
            for at, which in places:
                arguments[at] = addresses[which]
            run(*arguments, stream=stream)
