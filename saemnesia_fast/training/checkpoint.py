"""Safetensors files, each with all that a training run needs to continue to the same curve."""

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

logger = logging.getLogger("saemnesia_fast")


class Checkpoint(NamedTuple):
    sae: dict[str, Tensor]
    """The SAE's state_dict."""
    adam: dict[int, dict[str, Tensor]]
    """Adam's state of each parameter, by the parameter's number."""
    tokens_since_fired: Tensor
    """[N] int64."""
    rng: Tensor
    """State of torch's global CPU generator, uint8."""
    state: dict[str, Any]
    """Step, tokens, seconds, position in the data, SAE configuration, training recipe; plain JSON.

    `fvu` is the mean over the steps since the checkpoint before, None where all of them were skipped.
    """


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Write `step-<step>.safetensors` atomically, then delete what need not be kept.

    Kept are the `keep` newest and the one with the lowest `fvu`; files of later steps belong to a run that was given
    up for an earlier checkpoint, and go.
    """
    tensors = {f"sae.{name}": tensor for name, tensor in checkpoint.sae.items()}
    for number, moments in checkpoint.adam.items():
        tensors |= {f"adam.{number}.{name}": tensor for name, tensor in moments.items()}
    tensors |= {"tokens_since_fired": checkpoint.tokens_since_fired, "rng": checkpoint.rng}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    step = checkpoint.state["step"]
    metadata = {"state": json.dumps(checkpoint.state), "crc32": str(_crc32(tensors))}
    save_tensors(folder / f"step-{step:08d}.safetensors", tensors, metadata)

    paths = list_checkpoints(folder)
    written = [path for path in paths if _step_of(path) <= step]
    best = min(written, key=_fvu_of)
    kept = {*written[-keep:], *([best] if _fvu_of(best) < math.inf else [])}
    for path in set(paths) - kept:
        path.unlink()


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted((path for path in folder.glob("step-*.safetensors") if _step_of(path) >= 0), key=_step_of)


def load_newest_checkpoint(folder: Path, device: str = "cpu") -> tuple[Path, Checkpoint]:
    """The newest checkpoint that is whole, with its path; a warning names each that is not, an error says none is."""
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, load_checkpoint(path, device)
        except ValueError as error:
            logger.warning("%s; trying the checkpoint before it", error)
    raise ValueError(f"out_dir: no checkpoint in {folder} is whole; restore one, or delete the folder to start afresh")


def load_checkpoint(path: Path, device: str = "cpu") -> Checkpoint:
    """Read what `save_checkpoint` wrote; the generator's state stays on the CPU. ValueError unless it is whole."""
    sae: dict[str, Tensor] = {}
    adam: dict[int, dict[str, Tensor]] = {}
    try:
        metadata, tensors = read_metadata(path), load_tensors(path)
        if int(metadata["crc32"]) != _crc32(tensors):
            raise ValueError(f"{path}: damaged, its content does not have the checksum it was written with")
        state = json.loads(metadata["state"])
        # Copies, as what is read is a map of a file that will be deleted.
        rng = tensors.pop("rng").clone()
        tensors = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
        tokens_since_fired = tensors.pop("tokens_since_fired")
    except KeyError as error:
        raise ValueError(f"{path}: not a checkpoint, it has no {error}") from error
    for key, tensor in tensors.items():
        group, name = key.split(".", 1)
        if group == "sae":
            sae[name] = tensor
        else:
            number, name = name.split(".", 1)
            adam.setdefault(int(number), {})[name] = tensor
    return Checkpoint(sae, adam, tokens_since_fired, rng, state)


def _crc32(tensors: Mapping[str, Tensor]) -> int:
    """Checksum of the tensors' bytes in the order of their names."""
    checksum = 0
    for _, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum


def _step_of(path: Path) -> int:
    match = re.fullmatch(r"step-(\d+)\.safetensors", path.name)
    return int(match[1]) if match else -1


def _fvu_of(path: Path) -> float:
    """The mean FVU that the checkpoint was written with; infinity where it has none or cannot be read."""
    try:
        fvu = json.loads(read_metadata(path)["state"])["fvu"]
    except (KeyError, ValueError):
        return math.inf
    return math.inf if fvu is None else fvu
