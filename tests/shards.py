"""Sets of activations on disk, as `collect` leaves them."""

from pathlib import Path

import torch
from torch import Tensor

from saemnesia_fast.files import save_tensors, write_json


def numbered(n: int, d: int = 2) -> Tensor:
    """Tokens [n, d] that are all different."""
    return torch.arange(n * d, dtype=torch.float32).view(n, d)


def shards(folder: Path, sizes: list[int], d: int = 2, maps: int = 2) -> Path:
    """A finished set whose token number i is the row i of `numbered`."""
    tokens = numbered(sum(sizes), d).half()
    entries = []
    for number, part in enumerate(tokens.split(sizes)):
        file = f"block/{number:05d}.safetensors"
        save_tensors(folder / file, {"activations": part.view(maps, -1, d)})
        entries.append({"file": file, "prompts": 1, "tokens": len(part)})
    write_json(folder / "index.json", {"finished": True, "hook_points": {"block": {"d": d, "shards": entries}}})
    return folder
