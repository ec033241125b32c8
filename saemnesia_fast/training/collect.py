"""Writing a pipeline's activations to safetensors shards (SPEC 5.1)."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from saemnesia_fast.files import remove_leftovers, save_tensors, write_json
from saemnesia_fast.training.data import load_index, shard_shape
from saemnesia_fast.training.sampling import Sampling, activation_shapes, sample_activations

logger = logging.getLogger("saemnesia_fast")
FORMAT = 1


@dataclass(kw_only=True)
class CollectConfig(Sampling):
    """How activations are sampled and cut into files."""

    shard_bytes: int = 512 * 2**20
    """Largest size of a shard, unless one call of the pipeline alone needs more."""
    check_disk: bool = True
    """Refuse to start where the disk has no room for all the activations."""


def collect_activations(
    pipe: Any,
    prompts: Sequence[str],
    hook_points: Sequence[str],
    out_dir: str | Path,
    config: CollectConfig | None = None,
    progress: bool = True,
) -> Path:
    """Write the conditional half's activations at every denoising step, in float16, and return `out_dir`.

    A shard `<hook point>/<number>.safetensors` holds whole prompts: `activations` [maps, H*W, d] float16, with
    `timesteps` [maps] int64 and `prompts` [maps] int64 (index into the prompts), one map for each prompt and UNet
    call. `index.json` lists the shards, the prompts and the sampling. A call on an interrupted folder continues after
    the last complete shard and gives the files that the uninterrupted run gives. The disk need is logged first.

    FileExistsError where `out_dir` holds a finished set; ValueError where it holds another or a damaged one, or where
    activations are not finite in float16; OSError where they do not fit on the disk.
    """
    config = config or CollectConfig()
    folder = Path(out_dir)
    if not prompts or isinstance(prompts, str):
        raise ValueError(f"prompts: expected a non-empty list of prompts, got {prompts!r}")
    if not hook_points or isinstance(hook_points, str) or len(set(hook_points)) < len(hook_points):
        raise ValueError(f"hook_points: expected a non-empty list of distinct names, got {hook_points!r}")
    index = _open_index(folder, _describe(pipe, prompts, hook_points, config))
    done = _prompts_done(folder, index)
    _check_room(folder, activation_shapes(pipe, hook_points, config), len(prompts) - done, config.check_disk)
    for written in (folder, *(folder / name for name in hook_points)):
        remove_leftovers(written)
    write_json(folder / "index.json", index)
    if done:
        logger.info("collect: continuing at prompt %d of %d in %s", done, len(prompts), folder)
    held = _Shard(done)
    with tqdm(total=len(prompts), initial=done, unit="prompt", disable=not progress) as bar:
        for first in range(done, len(prompts), config.prompts_per_call):
            some = prompts[first : first + config.prompts_per_call]
            activations, timesteps = sample_activations(pipe, some, config.seed + first, hook_points, config)
            half = {name: _to_half(x, name, first) for name, x in activations.items()}
            if held.parts and held.bytes + _largest(half) > config.shard_bytes:
                held = _write(held, folder, index)
            held.add(half, timesteps)
            bar.update(len(some))
    _write(held, folder, index, finished=True)
    return folder


class _Shard:
    """Prompts sampled but not yet written."""

    def __init__(self, first_prompt: int) -> None:
        self.first_prompt = first_prompt
        self.num_prompts = 0
        self.bytes = 0
        self.parts: list[tuple[dict[str, Tensor], Tensor]] = []

    def add(self, activations: dict[str, Tensor], timesteps: Tensor) -> None:
        """Keep activations [B, T, H*W, d] of B prompts."""
        self.parts.append((activations, timesteps))
        self.num_prompts += len(next(iter(activations.values())))
        self.bytes += _largest(activations)

    def tensors(self, hook_point: str) -> dict[str, Tensor]:
        """The content of the shard's file."""
        maps, steps, owners = [], [], []
        prompt = self.first_prompt
        for activations, timesteps in self.parts:
            x = activations[hook_point]
            numbers = torch.arange(prompt, prompt + len(x))
            maps.append(x.flatten(0, 1))
            steps.append(timesteps.repeat(len(x)))
            owners.append(numbers.repeat_interleave(len(timesteps)))
            prompt += len(x)
        return {"activations": torch.cat(maps), "timesteps": torch.cat(steps), "prompts": torch.cat(owners)}


def _write(held: _Shard, folder: Path, index: dict[str, Any], finished: bool = False) -> _Shard:
    """Write what is held, then the index that counts it, and return an empty shard that follows."""
    for name, entry in index["hook_points"].items():
        tensors = held.tensors(name)
        activations = tensors["activations"]
        file = f"{name}/{len(entry['shards']):05d}.safetensors"
        save_tensors(folder / file, tensors)
        tokens = activations.shape[0] * activations.shape[1]
        entry["d"] = activations.shape[-1]
        entry["shards"].append({"file": file, "prompts": held.num_prompts, "tokens": tokens})
    index["finished"] = finished
    write_json(folder / "index.json", index)
    return _Shard(held.first_prompt + held.num_prompts)


def _describe(pipe: Any, prompts: Sequence[str], hook_points: Sequence[str], config: CollectConfig) -> dict[str, Any]:
    """All that decides the content of the files."""
    return {
        "format": FORMAT,
        "model": str(pipe.name_or_path or ""),
        "scheduler": type(pipe.scheduler).__name__,
        "sampling": {f.name: getattr(config, f.name) for f in fields(CollectConfig) if f.name != "check_disk"},
        "hook_points": list(hook_points),
        "prompts": list(prompts),
    }


def _open_index(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The index to continue from, new or of an interrupted run of the same description."""
    path = folder / "index.json"
    if not path.exists():
        return wanted | {"hook_points": {name: {"shards": []} for name in wanted["hook_points"]}, "finished": False}
    index = load_index(path)
    if index["finished"]:
        raise FileExistsError(f"out_dir: {folder} holds a finished set of activations; choose another folder")
    found = index | {"hook_points": list(index["hook_points"])}
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if different:
        raise ValueError(f"out_dir: {folder} holds an interrupted set with another {', '.join(different)}")
    return index


def _prompts_done(folder: Path, index: dict[str, Any]) -> int:
    """How many prompts the shards hold; ValueError where one of them is not whole."""
    entries = index["hook_points"].values()
    for entry in entries:
        for shard in entry["shards"]:
            shard_shape(folder / shard["file"], shard["tokens"])
    return min(sum(shard["prompts"] for shard in entry["shards"]) for entry in entries)


def _check_room(folder: Path, shapes: dict[str, tuple[int, int, int]], prompts: int, refuse: bool) -> None:
    """Log the bytes that the activations of `prompts` prompts need; OSError where the disk has fewer."""
    bytes_per_prompt = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    for name, (calls, tokens, d) in shapes.items():
        content = f"{calls} maps x {tokens} tokens x {d} channels x 2 bytes"
        logger.info("collect: %s a prompt at %s (%s)", _size(bytes_per_prompt[name]), name, content)
    needed = prompts * sum(bytes_per_prompt.values())
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    logger.info("collect: %s for %d prompts, %s free in %s", _size(needed), prompts, _size(free), existing)
    if refuse and needed > free:
        advice = "give fewer prompts or steps, another folder, or check_disk=False to start all the same"
        raise OSError(f"out_dir: {prompts} prompts need {_size(needed)}, {existing} has {_size(free)} free; {advice}")


def _size(number: float) -> str:
    """Bytes for people: 32.8 MB."""
    units = iter(("bytes", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while number >= 1000 and unit != "TB":
        number, unit = number / 1000, next(units)
    return f"{number:.{0 if unit == 'bytes' else 1}f} {unit}"


def _to_half(x: Tensor, hook_point: str, first_prompt: int) -> Tensor:
    half = x.half()
    if not half.isfinite().all():
        where = f"{hook_point}, prompts {first_prompt} to {first_prompt + len(x) - 1}"
        raise ValueError(f"activations: expected values that are finite in float16, got NaN or inf at {where}")
    return half


def _largest(activations: dict[str, Tensor]) -> int:
    return max(x.numel() * x.element_size() for x in activations.values())
