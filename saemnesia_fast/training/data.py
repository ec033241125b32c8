"""Sources of training tokens: shuffled batches whose position can be saved and restored exactly."""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saemnesia_fast.files import open_tensors, read_json
from saemnesia_fast.training.prefetch import one_ahead, own_stream

# Tokens of a shard that are read together: small next to a window, which so mixes many prompts, large for a disk.
PIECE_TOKENS = 1024
SHARD_KEYS = ("file", "prompts", "tokens")


class Window(NamedTuple):
    """Tokens that are shuffled together."""

    tokens: Tensor
    """[n, d]."""
    order: Tensor
    """[n] int64, a permutation."""
    start: int
    following: int
    """Positions of this window and the next."""
    ready: torch.cuda.Event | None
    """What to wait for where the tokens are on a CUDA device."""


class ActivationSource(ABC):
    """Endless batches [batch_size, d], shuffled within one window of tokens after another.

    A window holds `buffer_tokens` tokens and the rest of the last piece, or what is left of a pass. A thread makes the
    next one while the present one is handed out, so two are in memory, on `device`. Closing the iterator ends it.

    The order is a function of the seed and the position alone, so `state_dict` is a few numbers and a restored source
    continues with exactly the next batch. A window's last tokens that fill no batch are left out; the windows of a pass
    hold at least one batch between them.
    """

    num_tokens: int | None = None
    """Tokens of one pass over the data, where known beforehand."""
    longest_piece: int = 0
    """Tokens of the longest piece; 0 where all are of one length."""

    def __init__(self, batch_size: int, seed: int, buffer_tokens: int, device: str | torch.device = "cpu") -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected a number >= 1, got {batch_size}")
        self.batch_size = batch_size
        self.seed = seed
        self.buffer_tokens = buffer_tokens
        self.device = torch.device(device)
        self._window = 0
        self._batch = 0

    @abstractmethod
    def pieces(self, position: int) -> Iterator[tuple[Tensor, int]]:
        """Runs of tokens [n, d] from `position` to the end of its pass, each with the position behind it."""

    def identity(self) -> dict[str, Any]:
        """What the order of the tokens depends on, as plain JSON."""
        return {"batch_size": self.batch_size, "seed": self.seed, "buffer_tokens": self.buffer_tokens}

    def __iter__(self) -> Generator[Any, None, None]:
        start = self._window
        with closing(one_ahead(lambda stopping: self._windows(start, stopping))) as windows:
            for window in windows:
                _use_here(window)
                batches = len(window.tokens) // self.batch_size
                for batch in range(self._batch, batches):
                    last = batch + 1 == batches
                    self._window, self._batch = (window.following, 0) if last else (window.start, batch + 1)
                    yield window.tokens[window.order[batch * self.batch_size : (batch + 1) * self.batch_size]]
                del window

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch stands, with what the order depends on."""
        return {"window": self._window, "batch": self._batch} | self.identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; ValueError for data of another order. Starts with the next iter()."""
        for name, value in self.identity().items():
            if state.get(name) != value:
                raise ValueError(f"{name}: expected {state.get(name)} as in the saved state, got {value}")
        self._window, self._batch = state["window"], state["batch"]

    def _windows(self, position: int, stopping: threading.Event) -> Iterator[Window]:
        with own_stream(self._producing_device()):
            while True:
                window = self._load_window(position, stopping)
                position = window.following
                yield window
                del window

    def _producing_device(self) -> torch.device:
        """Where the thread has its work done."""
        return self.device

    def _load_window(self, start: int, stopping: threading.Event) -> Window:
        """The window at `start`; a part of it where nobody wants it any more."""
        held, position = 0, start
        for piece, following in self.pieces(start):
            position = following
            if held == 0 and len(piece) >= self.buffer_tokens:
                tokens, held = piece.to(self.device), len(piece)
                break
            if held == 0:
                room = min(self.buffer_tokens, self.num_tokens or self.buffer_tokens)
                room += max(len(piece), self.longest_piece)
                tokens = torch.empty(room, piece.shape[1], dtype=piece.dtype, device=self.device)
            tokens[held : held + len(piece)] = piece
            held += len(piece)
            if held >= self.buffer_tokens or stopping.is_set():
                break
        order = torch.randperm(held, generator=_generator(self.seed, "tokens", start)).to(self.device)
        ready = None
        if self.device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record()
        return Window(tokens[:held], order, start, position, ready)


class TensorActivations(ActivationSource):
    """Batches from a tensor in memory, activations [n, d]; a window is one pass over it."""

    def __init__(self, activations: Tensor, batch_size: int = 4096, seed: int = 0) -> None:
        if activations.ndim != 2 or not activations.is_floating_point():
            got = f"{activations.dtype} {list(activations.shape)}"
            raise ValueError(f"activations: expected a floating-point tensor [n, d], got {got}")
        super().__init__(batch_size, seed, len(activations), activations.device)
        if len(activations) < batch_size:
            raise ValueError(f"activations: expected at least batch_size={batch_size} tokens, got {len(activations)}")
        self.activations = activations
        self.num_tokens = len(activations)

    def pieces(self, position: int) -> Iterator[tuple[Tensor, int]]:
        yield self.activations, position + 1


class ShardActivations(ActivationSource):
    """Batches from a folder that `collect_activations` finished, read through memory maps.

    Each pass visits the pieces of all of `hook_point`'s shards, about a thousand tokens each, in a new order.
    """

    def __init__(
        self,
        folder: str | Path,
        hook_point: str,
        batch_size: int = 4096,
        seed: int = 0,
        buffer_tokens: int = 1_000_000,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(batch_size, seed, buffer_tokens, device)
        self.folder = Path(folder)
        index = read_index(self.folder)
        if hook_point not in index["hook_points"]:
            raise ValueError(f"hook_point: expected one of {sorted(index['hook_points'])}, got {hook_point!r}")
        self.hook_point = hook_point
        self._pieces: list[tuple[Path, int, int]] = []
        self.num_tokens = 0
        for shard in index["hook_points"][hook_point]["shards"]:
            path = self.folder / shard["file"]
            maps, tokens_per_map, _ = shard_shape(path, shard["tokens"])
            length = max(1, PIECE_TOKENS // tokens_per_map)
            self._pieces += [(path, first, min(first + length, maps)) for first in range(0, maps, length)]
            self.longest_piece = max(self.longest_piece, min(length, maps) * tokens_per_map)
            self.num_tokens += maps * tokens_per_map
        if min(self.num_tokens, buffer_tokens) < batch_size:
            got = f"{self.num_tokens} in {folder} and buffer_tokens={buffer_tokens}"
            raise ValueError(f"batch_size: expected at most the tokens held, {got}, got {batch_size}")

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"num_tokens": self.num_tokens}

    def pieces(self, position: int) -> Iterator[tuple[Tensor, int]]:
        epoch, start = divmod(position, len(self._pieces))
        order = torch.randperm(len(self._pieces), generator=_generator(self.seed, "pieces", epoch))
        for following, number in enumerate(order[start:].tolist(), position + 1):
            path, first, last = self._pieces[number]
            with open_tensors(path) as file:
                yield file.get_slice("activations")[first:last].flatten(0, 1), following


class SeveralActivations:
    """Batches of several hook points at a time, {hook point: [batch_size, d]}, each from a source of its own."""

    def __init__(self, sources: Mapping[str, ActivationSource]) -> None:
        if not sources:
            raise ValueError("sources: expected at least one")
        self.sources = dict(sources)
        smallest = min(self.sources.values(), key=lambda source: (source.num_tokens or 0) // source.batch_size)
        self.num_tokens, self.batch_size = smallest.num_tokens, smallest.batch_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        with ExitStack() as stack:
            iterators = {name: stack.enter_context(closing(iter(source))) for name, source in self.sources.items()}
            while True:
                yield {name: next(batches) for name, batches in iterators.items()}

    def state_dict(self) -> dict[str, Any]:
        """The position of each source."""
        return {name: source.state_dict() for name, source in self.sources.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; ValueError for other sources or data of another order."""
        if state.keys() != self.sources.keys():
            raise ValueError(f"sources: expected {sorted(state)} as in the saved state, got {sorted(self.sources)}")
        for name, source in self.sources.items():
            source.load_state_dict(state[name])


def _use_here(window: Window) -> None:
    """Let the reader's stream wait for the window, and its memory live until that stream is done with it."""
    if window.ready is None:
        return
    stream = torch.cuda.current_stream(window.tokens.device)
    stream.wait_event(window.ready)
    for tensor in (window.tokens, window.order):
        tensor.record_stream(stream)


def _generator(*key: object) -> torch.Generator:
    """A generator seeded by a hash of `key`, so that neighbouring seeds and positions share nothing."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a finished set of shards; a ValueError where `folder` holds none."""
    path = folder / "index.json"
    if not path.is_file():
        raise ValueError(f"folder: expected the output of `collect` with an index.json, got {folder}")
    index = load_index(path)
    if not index["finished"]:
        raise ValueError(f"folder: collecting into {folder} was interrupted; run it again to finish it")
    return index


def load_index(path: Path) -> dict[str, Any]:
    """The index of a set of shards, finished or not; a ValueError where it is damaged."""
    try:
        index = read_json(path)
        entries = index["hook_points"].values()
        _ = index["finished"], [[shard[key] for key in SHARD_KEYS] for entry in entries for shard in entry["shards"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: not an index that `collect` wrote ({why}); collect into a new folder") from error
    return index


def shard_shape(path: Path, tokens: int) -> tuple[int, int, int]:
    """(maps, tokens a map, d) from the header of a shard; ValueError unless it is whole and holds `tokens` tokens."""
    advice = "restore it, or collect into a new folder"
    try:
        with open_tensors(path) as file:
            maps, tokens_per_map, d = file.get_slice("activations").get_shape()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: the index names this shard, but it is missing; {advice}") from error
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from error
    if maps * tokens_per_map != tokens:
        raise ValueError(f"{path}: expected {tokens} tokens as in the index, got {maps * tokens_per_map}; {advice}")
    return maps, tokens_per_map, d
