"""Tile shapes of the Triton kernels: a heuristic by architecture and dtype, and measured ones for single GPUs.

A token's bits must not depend on the batch it comes in, so nothing here looks at the number of tokens.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


class Tile(NamedTuple):
    """How one program of a product is cut: tokens x latents, in steps of `depth` channels."""

    tokens: int
    latents: int
    depth: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The products of one architecture and operand dtype. `depth` is one for all: equal operands give equal bits."""

    encode_topk: Tile
    probe: Tile
    rank: Tile


EXACT_PROBE = Tile(4, 16, 64, 4, 3)
"""Of exact scores, which are no matrix product."""
SCREEN_WARPS = 8
"""Of the rank of exact precision, which keeps more in registers."""


def heuristic(capability: tuple[int, int], operand: torch.dtype) -> Tiles:
    """Tiles for a compute capability; at least 64 tokens high, so that all use the same matrix instruction."""
    if operand == torch.float32:
        return Tiles(Tile(64, 64, 32, 4, 3), Tile(64, 16, 32, 4, 3), Tile(64, 64, 32, 4, 3))
    if capability[0] in (9, 10):
        stages = 6 if capability[0] == 9 else 3
        return Tiles(Tile(128, 128, 64, 8, 3), Tile(64, 16, 64, 4, stages), Tile(128, 64, 64, 4, 4))
    return Tiles(Tile(128, 128, 32, 8, 3), Tile(64, 16, 32, 8, 4), Tile(128, 64, 32, 4, 3))


def measured(path: Path, operand: torch.dtype) -> Tiles | None:
    """Tiles from a file `{"float16": {"encode_topk": [128, 128, 64, 8, 3], "probe": ..., "rank": ...}, ...}`."""
    if not path.is_file():
        return None
    shapes = json.loads(path.read_text(encoding="utf-8")).get(str(operand).removeprefix("torch."))
    if shapes is None:
        return None
    tiles = Tiles(**{name: Tile(*shape) for name, shape in shapes.items()})
    if len({tile.depth for tile in tiles}) > 1 or any(tile.tokens < 64 for tile in tiles):
        raise ValueError(f"{path}: expected one depth for all products and at least 64 tokens in each, got {tiles}")
    return tiles


@lru_cache
def tiles_for(device: torch.device, operand: torch.dtype) -> Tiles:
    """The tiles for products of `operand` on a device; small ones where the interpreter stands in for it."""
    if device.type != "cuda":
        return Tiles(Tile(64, 64, 32, 4, 1), Tile(64, 16, 32, 4, 1), Tile(64, 32, 32, 4, 1))
    name = torch.cuda.get_device_name(device).replace(" ", "_")
    capability = torch.cuda.get_device_capability(device)
    return measured(CONFIGS / f"{name}.json", operand) or heuristic(capability, operand)


@lru_cache
def num_programs(device: torch.device) -> int:
    """The size of a grid that shares its work by a number read on the device."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
