"""Sources of training tokens: shuffled batches whose position can be saved and restored exactly."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saemnesia_fast.files import load_tensors, read_json


class ActivationSource(ABC):
    """Endless batches [batch_size, d], shuffled within one block of tokens after another.

    The order is a function of the seed and the position alone, so `state_dict` is a few integers and a restored
    source continues with exactly the next batch. A block's last tokens that fill no batch are left out; the blocks of a
    pass hold at least one batch between them.
    """

    num_tokens: int | None = None
    """Tokens of one pass over the data, where known beforehand."""

    def __init__(self, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected a number >= 1, got {batch_size}")
        self.batch_size = batch_size
        self.seed = seed
        self._block = 0
        self._batch = 0

    @abstractmethod
    def load_block(self, position: int) -> tuple[Tensor, int]:
        """The tokens [n, d] of the block that starts at `position`, and the position of the next one."""

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            tokens, following = self.load_block(self._block)
            batches = len(tokens) // self.batch_size
            order = torch.randperm(len(tokens), generator=_generator(self.seed, "tokens", self._block))
            while self._batch < batches:
                self._batch += 1
                yield tokens[order[(self._batch - 1) * self.batch_size : self._batch * self.batch_size]]
            self._block, self._batch = following, 0

    def state_dict(self) -> dict[str, int]:
        """Where the next batch stands, with what the order depends on."""
        return {"block": self._block, "batch": self._batch, "batch_size": self.batch_size, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken; ValueError for another batch size or seed. Starts with the next iter()."""
        for name in ("batch_size", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(f"{name}: expected {state[name]} as in the saved state, got {getattr(self, name)}")
        self._block, self._batch = state["block"], state["batch"]


class TensorActivations(ActivationSource):
    """Batches from a tensor in memory, activations [n, d]; a block is one pass over it."""

    def __init__(self, activations: Tensor, batch_size: int = 4096, seed: int = 0) -> None:
        super().__init__(batch_size, seed)
        if activations.ndim != 2 or not activations.is_floating_point():
            got = f"{activations.dtype} {list(activations.shape)}"
            raise ValueError(f"activations: expected a floating-point tensor [n, d], got {got}")
        if len(activations) < batch_size:
            raise ValueError(f"activations: expected at least batch_size={batch_size} tokens, got {len(activations)}")
        self.activations = activations
        self.num_tokens = len(activations)

    def load_block(self, position: int) -> tuple[Tensor, int]:
        return self.activations, position + 1


class ShardActivations(ActivationSource):
    """Batches from a folder that `collect_activations` finished.

    Each pass visits the shards of `hook_point` in a new order; a block is as many shards as hold `buffer_tokens`.
    """

    def __init__(
        self,
        folder: str | Path,
        hook_point: str,
        batch_size: int = 4096,
        seed: int = 0,
        buffer_tokens: int = 1_000_000,
    ) -> None:
        super().__init__(batch_size, seed)
        self.folder = Path(folder)
        index = read_index(self.folder)
        if hook_point not in index["hook_points"]:
            raise ValueError(f"hook_point: expected one of {sorted(index['hook_points'])}, got {hook_point!r}")
        self.hook_point = hook_point
        self.buffer_tokens = buffer_tokens
        self._shards = index["hook_points"][hook_point]["shards"]
        self.num_tokens = sum(shard["tokens"] for shard in self._shards)
        if min(self.num_tokens, buffer_tokens) < batch_size:
            got = f"{self.num_tokens} in {folder} and buffer_tokens={buffer_tokens}"
            raise ValueError(f"batch_size: expected at most the tokens held, {got}, got {batch_size}")

    def load_block(self, position: int) -> tuple[Tensor, int]:
        epoch, start = divmod(position, len(self._shards))
        order = torch.randperm(len(self._shards), generator=_generator(self.seed, "shards", epoch)).tolist()
        held = 0
        parts = []
        for shard in (self._shards[i] for i in order[start:]):
            parts.append(load_tensors(self.folder / shard["file"])["activations"].flatten(0, 1))
            held += shard["tokens"]
            if held >= self.buffer_tokens:
                break
        return torch.cat(parts), position + len(parts)


def _generator(*key: object) -> torch.Generator:
    """A generator seeded by a hash of `key`, so that neighbouring seeds and positions share nothing."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a finished set of shards; a ValueError where `folder` holds none."""
    path = folder / "index.json"
    if not path.is_file():
        raise ValueError(f"folder: expected the output of `collect` with an index.json, got {folder}")
    index = read_json(path)
    if not index["finished"]:
        raise ValueError(f"folder: collecting into {folder} was interrupted; run it again to finish it")
    return index
