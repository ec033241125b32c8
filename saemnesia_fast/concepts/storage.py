"""The files of a concept table: `concepts.safetensors` and `concepts.json` (SPEC 6.3).

mu is kept as float16 times one power of two, `mu_scale`, that puts the largest value at the top of float16's range.
Rounding to float16 alone would overflow for SAEs with large activations and lose latents that fire rarely. A power of
two changes no digit: float16 values come back bit for bit, and saving a loaded table repeats its bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saemnesia_fast.files import load_tensors, read_json, read_metadata, save_tensors, write_json

TENSOR_FILE, METADATA_FILE = "concepts.safetensors", "concepts.json"
FORMAT_VERSION = 1
_KEYS = ("concepts", "kinds", "hook_point", "sae_hash", "model_id", "sampler")
_OPTIONAL = ("settings",)


def save_table(
    path: str | PathLike[str], mu: Tensor, timesteps: Tensor, assignment: Tensor, metadata: dict[str, Any]
) -> None:
    """Write both files, each atomically; a digest in both shows on loading whether they belong together."""
    scale = _power_of_two(float(mu.max()))
    half = (mu / scale).half()
    tensors = {"timesteps": timesteps, "assignment": assignment, "mu_scale": torch.tensor(scale), **_pack(half)}
    digest = _digest(tensors, metadata)
    folder = Path(path)
    save_tensors(folder / TENSOR_FILE, tensors, {"digest": digest})
    shape = list(mu.shape)
    write_json(folder / METADATA_FILE, {"version": FORMAT_VERSION, "digest": digest, "shape": shape, **metadata})


def load_table(path: str | PathLike[str]) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """(mu [C, T, N] float32, timesteps [T], assignment [C] with -1 for none, metadata)."""
    folder = Path(path)
    metadata = read_json(folder / METADATA_FILE)
    if metadata.get("version") != FORMAT_VERSION:
        raise ValueError(f"{METADATA_FILE}: expected format version {FORMAT_VERSION}, got {metadata.get('version')}")
    missing = sorted({*_KEYS, "shape", "digest"} - set(metadata))
    if missing:
        raise ValueError(f"{METADATA_FILE}: {missing} missing in {folder}")
    if read_metadata(folder / TENSOR_FILE).get("digest") != metadata["digest"]:
        raise ValueError(f"{TENSOR_FILE} and {METADATA_FILE} in {folder} were not written together")
    tensors = load_tensors(folder / TENSOR_FILE)
    mu = _unpack(tensors, metadata["shape"]).float() * tensors["mu_scale"]
    present = {key: metadata[key] for key in (*_KEYS, *_OPTIONAL) if key in metadata}
    return mu, tensors["timesteps"], tensors["assignment"], present


def _power_of_two(largest: float) -> float:
    """The smallest power of two by which `largest` may be divided without exceeding float16."""
    if largest == 0:
        return 1.0
    exponent = math.frexp(largest)[1] - 16
    rounds_to_infinity = torch.tensor(math.ldexp(largest, -exponent)).half().isinf()
    return math.ldexp(1.0, exponent + int(rounds_to_infinity))


def _pack(half: Tensor) -> dict[str, Tensor]:
    """Dense float16, or where it is smaller (6 bytes an entry against 2) its non-zeros with int32 flat indices."""
    flat = half.flatten()
    indices = flat.nonzero().squeeze(1)
    if 3 * len(indices) >= len(flat) or len(flat) > torch.iinfo(torch.int32).max:
        return {"mu": half}
    return {"mu_values": flat[indices], "mu_indices": indices.int()}


def _unpack(tensors: dict[str, Tensor], shape: list[int]) -> Tensor:
    if "mu" in tensors:
        return tensors["mu"]
    flat = torch.zeros(math.prod(shape), dtype=torch.float16)
    flat[tensors["mu_indices"].long()] = tensors["mu_values"]
    return flat.view(shape)


def _digest(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).numpy().data)
    return digest.hexdigest()
