"""What one caller's calls of ops use again: scratch memory, and launches of Triton kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .launches import Launches, launch, observed

COUNTERS = 64
"""Zeros that one launch fills, for as many calls."""


class Workspace:
    """Of one caller, who makes one call at a time.

    What a call leaves is for the next one on the same CUDA stream. While a CUDA graph is captured nothing is used again
    or kept: what a graph writes to is its own.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Free what is kept."""
        self._kept: dict[str, tuple[Hashable, tuple[Any, ...]]] = {}
        self._zeros: tuple[object, Iterator[Tensor]] = (None, iter(()))
        self._recording: Launches | None = None
        self._repeat: tuple[object, Launches] | None = None

    def take(self, op: str, make: Callable[..., Any], x: Tensor, *arguments: Hashable) -> tuple[Hashable, Any]:
        """A key to put it back by, and what `make(x, *arguments)`, to which of x only the device matters, returns: a
        tuple, made now or by the op's last call. It holds what that left there. The current device is x's."""
        where = _where(x)
        if where is None:
            return None, make(x, *arguments)
        key = (where, arguments)
        known, scratch = self._kept.pop(op, (None, None))
        return key, scratch if known == key else make(x, *arguments)

    def put_back(self, op: str, key: Hashable, scratch: tuple[Any, ...]) -> None:
        """Keep `scratch` for the op's next call, after this one's last launch: after an error nobody has it."""
        if key is not None:
            (self._kept if self._recording is None else self._recording.scratch)[op] = key, scratch

    def zero(self, x: Tensor) -> Tensor:
        """[1] int32 on x's device, which is current: a 0 to count in."""
        where = _where(x)
        if where is None:
            return x.new_zeros(1, dtype=torch.int32)
        if self._zeros[0] != where:
            self._zeros = where, _counters(x.new_empty(0, dtype=torch.int32))
        zero = next(self._zeros[1])
        if self._recording is not None:
            self._recording.counter = zero
        return zero

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """`kernel[grid](*arguments, **options)`."""
        (launch if self._recording is None else self._recording.launch)(kernel, grid, *arguments, **options)

    @contextmanager
    def record(self, how: object, *varying: Tensor) -> Iterator[None]:
        """Let the launches made in here be repeated, with other tensors in the places of `varying`: if a call made in
        here will `allow_repeat`."""
        key = _key(how, varying)
        if key is None:
            yield
            return
        self._repeat = None
        self._recording = recording = Launches(varying, stream=key[0][1])
        try:
            yield
        finally:
            self._recording = None
        if recording.repeatable:
            self._repeat = key, recording
        else:
            self._kept |= recording.scratch

    def allow_repeat(self) -> None:
        """Said by a call that has done nothing to the varying tensors but launch kernels, from here."""
        if self._recording is not None:
            self._recording.suffice = True

    def repeat(self, how: object, *varying: Tensor) -> bool:
        """Make the launches that were recorded, if `how` is what it was then, which is all else that they depend on.

        False if there are none for tensors on this device, stream and as well aligned, or if launches are observed.
        """
        if self._repeat is None or self._repeat[0] != _key(how, varying) or observed():
            return False
        launches = self._repeat[1]
        launches.repeat(varying if launches.counter is None else (*varying, self.zero(varying[0])))
        return True

    @property
    def num_bytes(self) -> int:
        """Of the scratch memory that is kept."""
        kept = [*self._kept.values(), *(self._repeat[1].scratch.values() if self._repeat else ())]
        return sum(one.nbytes for _, scratch in kept for one in scratch if isinstance(one, Tensor))

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()  # a copy begins empty


def state_of(tensors: Iterable[Tensor]) -> list[tuple[int, int | None]]:
    """What changes when one of them is written to, or is given other memory. Inference tensors have no version: a
    change of theirs in place is not noticed."""
    return [(one.data_ptr(), None if one.is_inference() else one._version) for one in tensors]


def _where(x: Tensor) -> tuple[int, int] | None:
    """x's device and its current stream; None while a graph is captured from it."""
    if not x.is_cuda:
        return -1, 0
    if torch.cuda.is_current_stream_capturing():
        return None
    device = x.get_device()
    return device, torch._C._cuda_getCurrentRawStream(device)


def _key(how: object, varying: tuple[Tensor, ...]) -> tuple[tuple[int, int], Any, Any, Any] | None:
    """What launches depend on, device and stream first; None if they must not be repeated."""
    where = _where(varying[0])
    if how is None or where is None or (where[0] >= 0 and where[0] != torch._C._cuda_getDevice()):
        return None
    return where, how, torch._C._get_cublas_allow_tf32(), [tensor.data_ptr() % 16 for tensor in varying]


def _counters(like: Tensor) -> Iterator[Tensor]:
    """Zeros to count in; those of a second call and later ones are filled together, each aligned for Triton."""
    yield like.new_zeros(1)
    while True:
        yield from like.new_zeros(COUNTERS, 4)[:, :1].unbind()
