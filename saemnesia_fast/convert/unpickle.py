"""Pickles, read without running them: the one place where anything is unpickled (SPEC 6.4).

A pickle is a program that may call whatever it can name. Here it can name nothing but the makers below, which build
tensors, arrays and dicts from checked arguments and cannot be changed by it; any other name ends the reading. Files of
`torch.save` go to `torch.load(weights_only=True)`, which works alike.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

_ZIP, _TORCH_LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_DTYPE = re.compile(r"[?]|b1|i[1248]|u[1248]|f[248]|c(8|16)")
_PLAIN = "tensors, numpy arrays, dicts, lists, strings and numbers"


def read_legacy(path: str | PathLike[str], each: Callable[[Tensor], Tensor] | None = None) -> Any:
    """What a `.pkl`, `.pth` or `.pt` holds: dicts, lists, strings, numbers and tensors on the CPU, nothing else.

    Arrays become tensors, tuples lists, parameters plain tensors. `each` is applied to every tensor of a plain pickle
    as it is read; with one that makes tensors smaller, this takes the file's size in memory rather than twice that.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it names anything else, or is damaged. Nothing of it has been called.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(len(_TORCH_LEGACY))
        file.seek(0)
        try:
            if start.startswith(_ZIP) or start == _TORCH_LEGACY:
                found = _torch_load(file)
            else:
                found = _Unpickler(file, each or (lambda tensor: tensor)).load()
            return _plain(found, {})
        except _RefusedError as error:
            raise ValueError(f"{path}: expected {_PLAIN} alone, got {error}") from None
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = named[1] if named else "something else, or a damaged file"
            raise ValueError(f"{path}: expected {_PLAIN} alone, got {what}") from None
        except (MemoryError, OSError):
            raise
        except Exception as error:
            raise ValueError(
                f"{path}: expected a whole pickle or torch file ({type(error).__name__}: {error})"
            ) from error


def _torch_load(file: IO[bytes]) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")
        return torch.load(file, map_location="cpu", weights_only=True)


class _RefusedError(Exception):
    """The pickle wants something that is not among what may be read."""


class _Maker:
    """What a name in a pickle stands for: it may be called, and nothing else may be done to it."""

    __slots__ = ("_make",)
    _make: Callable[..., Any]

    def __init__(self, make: Callable[..., Any]) -> None:
        object.__setattr__(self, "_make", make)

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise _RefusedError(f"a change of {name}")

    def __setstate__(self, state: Any) -> NoReturn:
        raise _RefusedError("a change of a function")


class _Dict(dict[Any, Any]):
    """An OrderedDict whose attributes, such as a state dict's `_metadata`, are left out."""

    def __setstate__(self, state: Any) -> None:
        return


class _DType:
    """A numpy dtype of numbers."""

    __slots__ = ("name",)

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not _DTYPE.fullmatch(code):
            raise _RefusedError(f"an array of dtype {code!r}")
        self.name = code

    def __setstate__(self, state: Any) -> None:
        _, order, subarray, names, fields, *_ = state
        if order not in ("<", ">", "=", "|") or not subarray is names is fields is None:
            raise _RefusedError("an array of records")
        self.name = order + self.name


class _Array:
    """A numpy array before its content is known."""

    __slots__ = ("tensor",)
    tensor: Tensor | None

    def __init__(self, *_: Any) -> None:
        self.tensor = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.fill(data, dtype, shape, "F" if fortran else "C")

    def fill(self, data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
        if not isinstance(data, bytes | bytearray) or not isinstance(dtype, _DType) or order not in ("C", "F"):
            raise _RefusedError("an array of objects")
        flat = np.frombuffer(data, np.dtype(dtype.name))
        array = flat.reshape(shape, order=order)
        self.tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
        return self


def _scalar(dtype: Any, data: Any) -> Any:
    filled = _Array().fill(data, dtype, (), "C").tensor
    return None if filled is None else filled.item()


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise _RefusedError(f"a text in {encoding!r}")
    return text.encode("latin1")


class _Storage:
    """A tensor's storage as bytes, which the pickle keeps; read where a tensor is made of it and not kept twice."""

    __slots__ = ("data",)

    def __init__(self, data: Any) -> None:
        self.data = data

    def __setstate__(self, state: Any) -> NoReturn:
        raise _RefusedError("a change of a storage")

    def read(self) -> torch.storage.TypedStorage:
        found = _torch_load(io.BytesIO(self.data))
        if not isinstance(found, torch.storage.TypedStorage):
            raise _RefusedError(f"{type(found).__name__} for a storage")
        return found


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    if not isinstance(storage, _Storage):
        raise _RefusedError(f"a tensor of {type(storage).__name__}")
    found = storage.read()
    flat = torch.empty(0, dtype=found.dtype).set_(found._untyped_storage)
    return flat.as_strided(size, stride, offset)


_NUMPY: dict[str, _Maker] = {"_reconstruct": _Maker(_Array), "scalar": _Maker(_scalar)}
_KNOWN: dict[tuple[str, str], _Maker] = {
    ("collections", "OrderedDict"): _Maker(lambda: _Dict()),
    ("_codecs", "encode"): _Maker(_encode),
    ("numpy", "dtype"): _Maker(_DType),
    ("numpy", "ndarray"): _Maker(_Array),
    **{(f"numpy.{core}.multiarray", name): maker for core in ("core", "_core") for name, maker in _NUMPY.items()},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Maker(lambda *a: _Array().fill(*a)) for core in ("core", "_core")},
    ("torch.storage", "_load_from_bytes"): _Maker(_Storage),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BufferedReader, each: Callable[[Tensor], Tensor]) -> None:
        super().__init__(file)
        self._known = {
            **_KNOWN,
            ("torch._utils", "_rebuild_tensor_v2"): _Maker(lambda *arguments: each(_tensor(*arguments))),
            ("torch._utils", "_rebuild_parameter"): _Maker(lambda tensor, *_: tensor),
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise _RefusedError(f"{module}.{name}")
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _RefusedError("a reference to another file")


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """`value` of plain types. `done` has what was met before, which is looked at once however often it occurs."""
    if isinstance(value, Tensor):
        return value.detach()
    if value is None or isinstance(value, bool | int | float | complex | str):
        return value
    if isinstance(value, _Array) and value.tensor is not None:
        return value.tensor
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, Mapping):
        done[id(value)] = mapping = {}
        mapping.update({_plain(key, done): _plain(one, done) for key, one in value.items()})
        return mapping
    if isinstance(value, list | tuple):
        sequence: list[Any] = []
        done[id(value)] = sequence
        sequence.extend(_plain(one, done) for one in value)
        return sequence
    raise _RefusedError(f"a {type(value).__name__}")
