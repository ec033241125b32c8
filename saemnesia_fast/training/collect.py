"""Writing a pipeline's activations to safetensors shards (SPEC 5.1)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from saemnesia_fast.files import read_json, save_tensors, write_json
from saemnesia_fast.training.sampling import Sampling, sample_activations

logger = logging.getLogger("saemnesia_fast")
FORMAT = 1


@dataclass(kw_only=True)
class CollectConfig(Sampling):
    """How activations are sampled and cut into files."""

    shard_bytes: int = 512 * 2**20
    """Largest size of a shard, unless one call of the pipeline alone needs more."""


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
    the last complete shard and gives the files that the uninterrupted run gives.

    FileExistsError where `out_dir` holds a finished set; ValueError where it holds another one, or where activations
    are not finite in float16.
    """
    config = config or CollectConfig()
    folder = Path(out_dir)
    if not prompts or isinstance(prompts, str):
        raise ValueError(f"prompts: expected a non-empty list of prompts, got {prompts!r}")
    if not hook_points or isinstance(hook_points, str) or len(set(hook_points)) < len(hook_points):
        raise ValueError(f"hook_points: expected a non-empty list of distinct names, got {hook_points!r}")
    index = _open_index(folder, _describe(pipe, prompts, hook_points, config))

    shards = {name: index["hook_points"][name]["shards"] for name in hook_points}
    done = sum(shard["prompts"] for shard in shards[hook_points[0]])
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
        "sampling": {f.name: getattr(config, f.name) for f in fields(CollectConfig)},
        "hook_points": list(hook_points),
        "prompts": list(prompts),
    }


def _open_index(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The index to continue from, new or of an interrupted run of the same description."""
    path = folder / "index.json"
    if path.exists():
        index = read_json(path)
        if index["finished"]:
            raise FileExistsError(f"out_dir: {folder} holds a finished set of activations; choose another folder")
        found = index | {"hook_points": list(index["hook_points"])}
        different = [key for key in wanted if found.get(key) != wanted[key]]
        if different:
            raise ValueError(f"out_dir: {folder} holds an interrupted set with another {', '.join(different)}")
        return index
    entries: dict[str, Any] = {name: {"shards": []} for name in wanted["hook_points"]}
    index = wanted | {"hook_points": entries, "finished": False}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, index)
    return index


def _to_half(x: Tensor, hook_point: str, first_prompt: int) -> Tensor:
    half = x.half()
    if not half.isfinite().all():
        where = f"{hook_point}, prompts {first_prompt} to {first_prompt + len(x) - 1}"
        raise ValueError(f"activations: expected values that are finite in float16, got NaN or inf at {where}")
    return half


def _largest(activations: dict[str, Tensor]) -> int:
    return max(x.numel() * x.element_size() for x in activations.values())
