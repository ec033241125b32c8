"""Safetensors files, or folders of several processes, each with all that a run needs to continue to the same curve."""

from __future__ import annotations

import json
import logging
import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saemnesia_fast.files import load_tensors, read_metadata, save_tensors
from saemnesia_fast.training.layout import ALONE, Layout
from saemnesia_fast.training.sharded_checkpoint import load_shards, read_state, remove_shards, save_shards

logger = logging.getLogger("saemnesia_fast")
GROUPS = ("sae", "adam", "counters")


class Checkpoint(NamedTuple):
    sae: dict[str, Tensor]
    """The SAE's state_dict."""
    adam: dict[str, Tensor]
    """Adam's moments."""
    counters: dict[str, Tensor]
    """[N] int64: tokens since each latent fired, and its firings."""
    rng: Tensor
    """State of torch's global CPU generator, uint8."""
    state: dict[str, Any]
    """Step, tokens, seconds, position in the data, SAE configuration, training recipe; plain JSON.

    `fvu` is the mean over the steps since the checkpoint before, None where all of them were skipped. Where there is a
    `rating`, that tells the best instead.
    """


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int, layout: Layout = ALONE) -> None:
    """Write `step-<step>.safetensors`, or of several processes the folder `step-<step>`, atomically; then tidy up.

    Kept are the `keep` newest and the one with the lowest rating; those of later steps belong to a run that was given
    up for an earlier checkpoint, and go.
    """
    tensors = {"rng": checkpoint.rng}
    for group in GROUPS:
        tensors |= {f"{group}.{name}": tensor.detach() for name, tensor in getattr(checkpoint, group).items()}
    step = checkpoint.state["step"]
    path = folder / f"step-{step:08d}"
    if layout.size > 1:
        of_latents = [name for name, tensor in tensors.items() if _has_latents(name, tensor)]
        save_shards(path, tensors, of_latents, checkpoint.state, layout)
    else:
        path = path.with_suffix(".safetensors")
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_tensors(path, tensors, {"state": json.dumps(checkpoint.state), "crc32": str(_crc32(tensors))})
    if layout.writes:
        _tidy_up(folder, path, keep)


def _tidy_up(folder: Path, newest: Path, keep: int) -> None:
    """Delete all checkpoints but those that `save_checkpoint` keeps when it has written the newest."""
    paths = list_checkpoints(folder)
    written = [*(path for path in paths if _step_of(path) < _step_of(newest)), newest]
    best = min(written, key=_rating_of)
    kept = {*written[-keep:], *([best] if _rating_of(best) < math.inf else [])}
    for path in set(paths) - kept:
        if path.is_dir():
            remove_shards(path)
        else:
            path.unlink()


def list_checkpoints(folder: Path, newest: int | None = None) -> list[Path]:
    """The checkpoints in `folder`, oldest first, to that of step `newest`."""
    found = (path for path in folder.glob("step-*") if _step_of(path) >= 0)
    return sorted((path for path in found if newest is None or _step_of(path) <= newest), key=_step_of)


def load_newest_checkpoint(
    folder: Path, device: str = "cpu", newest: int | None = None, layout: Layout = ALONE
) -> tuple[Path, Checkpoint]:
    """The newest checkpoint that is whole, with its path, none after step `newest`.

    A warning names each that is not whole, an error says that none is.
    """
    for path in reversed(list_checkpoints(folder, newest)):
        problem: ValueError | str = "another process could not read it"
        try:
            checkpoint = load_checkpoint(path, device, layout)
        except ValueError as error:
            checkpoint, problem = None, error
        if layout.agree(checkpoint is not None) and checkpoint:
            return path, checkpoint
        logger.warning("%s; trying the checkpoint before it", problem)
    raise ValueError(f"out_dir: no checkpoint in {folder} is whole; restore one, or delete the folder to start afresh")


def load_checkpoint(path: Path, device: str = "cpu", layout: Layout = ALONE) -> Checkpoint:
    """Read what `save_checkpoint` wrote, of latents the rows that `layout` gives to this process.

    However many processes wrote it. The generator's state stays on the CPU. ValueError unless it is whole.
    """
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in GROUPS}
    try:
        tensors, state = load_shards(path, layout, device) if path.is_dir() else _load_file(path, layout, device)
        rng = tensors.pop("rng").cpu()
        for key, tensor in tensors.items():
            group, name = key.split(".", 1)
            groups[group][name] = tensor
    except KeyError as error:
        raise ValueError(f"{path}: not a checkpoint, it has no {error}") from error
    return Checkpoint(**groups, rng=rng, state=state)


def _load_file(path: Path, layout: Layout, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    metadata, tensors = read_metadata(path), load_tensors(path)
    if int(metadata["crc32"]) != _crc32(tensors):
        raise ValueError(f"{path}: damaged, its content does not have the checksum it was written with")
    parts = {
        name: tensor[layout.shard(len(tensor))] if _has_latents(name, tensor) else tensor
        for name, tensor in tensors.items()
    }
    # Copies, as what is read is a map of a file that will be deleted.
    return {name: part.to(device, copy=True) for name, part in parts.items()}, json.loads(metadata["state"])


def _has_latents(name: str, tensor: Tensor) -> bool:
    """Whether the tensor's rows are latents."""
    return tensor.dim() > 0 and name != "rng" and "b_dec" not in name.split(".")


def _crc32(tensors: Mapping[str, Tensor]) -> int:
    """Checksum of the tensors' bytes in the order of their names."""
    checksum = 0
    for _, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum


def _step_of(path: Path) -> int:
    match = re.fullmatch(r"step-(\d+)(\.safetensors)?", path.name)
    return int(match[1]) if match else -1


def _rating_of(path: Path) -> float:
    """The rating or else the mean FVU, lower is better; infinity where it has none or cannot be read."""
    try:
        state = read_state(path) if path.is_dir() else json.loads(read_metadata(path)["state"])
        rating = state["rating"] if "rating" in state else state["fvu"]
    except (OSError, KeyError, ValueError):
        return math.inf
    return math.inf if rating is None else rating
