"""Checkpoints that several processes write together, each its share, and any number of processes reads.

A folder holds safetensors files of torch.distributed.checkpoint, whose headers say where a tensor's rows belong, and
`state.json` with the shapes, the files' checksums and the run's state. Nothing is pickled.
"""

from __future__ import annotations

import shutil
import warnings
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saemnesia_fast.files import fsync, naming_full_disk, read_json, write_json
from saemnesia_fast.training.layout import Layout

CONTENT = "state.json"
READ_AT_ONCE = 2**24


def save_shards(
    path: Path, tensors: Mapping[str, Tensor], of_latents: Collection[str], state: dict[str, Any], layout: Layout
) -> None:
    """Write the folder `path`, which exists once it is whole. All processes call this; a full disk is all's OSError.

    `tensors`: those named `of_latents` are the rows that this process holds, of the others one process's are kept.
    `state`: plain JSON; that of the first process is kept.
    """
    import torch.distributed as dist
    from torch.distributed import checkpoint as dcp

    temporary = path.parent / f".{path.name}.tmp"
    with layout.as_one():
        if layout.writes:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    whole = {name: layout.as_whole(tensor) if name in of_latents else tensor for name, tensor in tensors.items()}
    with naming_full_disk(path):
        try:
            dcp.save(whole, storage_writer=dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True))
        except dcp.CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None
        checksums: list[dict[str, int]] = [{}] * layout.size
        mine = _share(_files(temporary), layout)
        dist.all_gather_object(checksums, {name: _crc32(temporary / name) for name in mine})
        content = {
            "state": state,
            "of_latents": sorted(of_latents),
            "shapes": {name: list(tensor.shape) for name, tensor in whole.items()},
            "dtypes": {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in whole.items()},
            "crc32": {name: checksum for part in checksums for name, checksum in part.items()},
        }
        with layout.as_one():
            if layout.writes:
                write_json(temporary / CONTENT, content)
                remove_shards(path)
                temporary.replace(path)
                fsync(path.parent)


def load_shards(path: Path, layout: Layout, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) of `save_shards`, of those of latents the rows that `layout` gives to this process.

    All processes call this, however many wrote it; unless the folder is whole it is all's ValueError.
    """
    from torch.distributed import checkpoint as dcp

    problem, content = _examine(path, layout)
    if not layout.agree(problem is None):
        raise ValueError(f"{path}: {problem or 'damaged, as another process found'}")
    tensors, targets = {}, {}
    for name, shape in content["shapes"].items():
        dtype = getattr(torch, content["dtypes"][name])
        if name in content["of_latents"]:
            rows = layout.shard(shape[0])
            tensors[name] = torch.empty(rows.stop - rows.start, *shape[1:], dtype=dtype, device=device)
            targets[name] = layout.as_whole(tensors[name])
        else:
            targets[name] = tensors[name] = torch.empty(shape, dtype=dtype, device=device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        dcp.load(targets, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=layout.size == 1)
    return tensors, content["state"]


def read_state(path: Path) -> dict[str, Any]:
    """The state alone; a ValueError or KeyError where it cannot be read."""
    return read_json(path / CONTENT)["state"]


def remove_shards(path: Path) -> None:
    """Delete the folder `path`, if there is one, so that a part of it is never taken for a checkpoint."""
    if path.is_dir():
        unseen = path.parent / f".{path.name}.old.tmp"
        shutil.rmtree(unseen, ignore_errors=True)
        path.rename(unseen)
        shutil.rmtree(unseen)


def _examine(path: Path, layout: Layout) -> tuple[str | None, dict[str, Any]]:
    """(what is wrong, the content of `state.json`). Each process looks at its share of the files."""
    try:
        content = read_json(path / CONTENT)
        checksums = content["crc32"]
        if sorted(checksums) != _files(path):
            return f"damaged, expected the files {sorted(checksums)}", {}
        for name in _share(_files(path), layout):
            if _crc32(path / name) != checksums[name]:
                return f"damaged, {name} does not have the checksum it was written with", {}
        _ = content["state"], content["of_latents"], content["shapes"], content["dtypes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"not a checkpoint ({type(error).__name__}: {error})", {}
    return None, content


def _files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.safetensors"))


def _share(names: list[str], layout: Layout) -> list[str]:
    return names[layout.rank :: layout.size]


def _crc32(file: Path) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while part := stream.read(READ_AT_ONCE):
            checksum = zlib.crc32(part, checksum)
    return checksum
