"""State dicts and whole pipelines out of pickles: as tensors by name, as safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from torch import Tensor

from ..files import save_tensors, write_atomic
from .unpickle import read_legacy

_WRAPPERS = ("model_state_dict", "state_dict")
_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_NAMES = {"pytorch_model": "model"}


def read_state_dict(path: str | PathLike[str]) -> dict[str, Tensor]:
    """{name: tensor} of a file that `torch.save` wrote, also where it is under `model_state_dict` or `state_dict`.

    Raises ValueError where there is anything but tensors by name.
    """
    found = read_legacy(path)
    for key in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    named = isinstance(found, Mapping) and all(isinstance(key, str) for key in found)
    if not named or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path}: expected tensors by name, perhaps under {' or '.join(_WRAPPERS)}")
    return {name: tensor.clone() for name, tensor in found.items()}


def convert_pipeline(source: str | PathLike[str], out: str | PathLike[str]) -> list[Path]:
    """Copy a pipeline's folder, every pickled weight file as safetensors under the name that diffusers expects.

    Returns the safetensors files written. A pickle whose safetensors file is there already is left out. Raises
    FileNotFoundError where `source` has no `model_index.json`, ValueError where `out` is inside it.
    """
    source, out = Path(source), Path(out)
    if not (source / "model_index.json").is_file():
        raise FileNotFoundError(f"{source}: expected a pipeline in diffusers' format, got no model_index.json")
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"out: expected a folder outside {source}, got {out}")
    written = []
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        target = out / path.relative_to(source)
        if path.suffix not in _PICKLED:
            write_atomic(target, path.read_bytes())
            continue
        name = f"{_NAMES.get(path.stem, path.stem)}.safetensors"
        if not path.with_name(name).exists():
            save_tensors(target.with_name(name), read_state_dict(path), {"format": "pt"})
            written.append(target.with_name(name))
    return written
