"""Scratch memory that one caller's calls of an op use again, instead of asking torch's allocator in each of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


class Workspace:
    """The scratch tensors of a caller's last call, for the next one that needs the same.

    A call takes them out, and puts them back after its last launch: meanwhile no other thread has them, and after an
    error nobody. Only calls on the CUDA stream that they were put back on take them. While a CUDA graph is captured
    none are taken or put back: what a graph writes to is its own. They hold what the last call left there.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[Any, ...]] = {}

    def take(self, make: Callable[..., Any], x: Tensor, *arguments: Hashable) -> tuple[Hashable, Any]:
        """A key to put them back by, and what `make(x, *arguments)`, to which of x only the device matters, returns:
        a tuple, made now or by an earlier call. The current device is x's."""
        stream = None
        if x.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return None, make(x, *arguments)
            stream = torch._C._cuda_getCurrentRawStream(x.get_device())
        key = (x.device, stream, *arguments)
        return key, self._kept.pop(key, None) or make(x, *arguments)

    def put_back(self, key: Hashable, scratch: tuple[Any, ...]) -> None:
        """Keep `scratch` for the next call, in the place of any other."""
        if key is not None:
            self._kept = {key: scratch}

    def clear(self) -> None:
        """Free what is kept."""
        self._kept = {}

    @property
    def num_bytes(self) -> int:
        """Of the tensors kept."""
        return sum(one.nbytes for kept in self._kept.values() for one in kept if isinstance(one, Tensor))

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()  # a copy begins empty
