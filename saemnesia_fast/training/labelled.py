"""Batches of whole images with the concepts of their prompts, from collected activations (SPEC 4.2, 5.1)."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saemnesia_fast.files import open_tensors
from saemnesia_fast.training.data import _generator, read_index, shard_shape
from saemnesia_fast.training.prefetch import one_ahead

Labels = Mapping[str, Sequence[str]] | Callable[[str], Sequence[str]]
"""The concepts of a prompt."""


class LabelledImages(NamedTuple):
    """B images of T tokens, each what a hook point gave for one prompt at one denoising step."""

    x: Tensor
    """[B, T, d], in the dtype of the files."""
    labels: Tensor
    """[B, C] bool: the concepts of each image's prompt."""

    @property
    def tokens(self) -> Tensor:
        """[B * T, d]."""
        return self.x.flatten(0, 1)


class LabelledActivations:
    """Endless batches of images in random order from a folder that `collect_activations` finished.

    A share `validation` of the distinct prompts, with all their images, is never trained on. A pass visits each of the
    other images once, but for the last ones that fill no batch, in an order that depends on the seed and the number of
    the pass alone: a restored source continues with exactly the next batch. A thread reads one batch ahead.

    Args:
        folder: what `collect_activations` wrote.
        hook_point: one of those it was told.
        labels: prompt -> its concepts, at least for every prompt of the folder.
        concepts: C names, the columns of the labels.
        images: B.
        validation: share of the prompts, 0 < share < 1; one prompt at least.
        seed: of the order and of the choice of prompts.
        device: where batches are to be.

    Raises:
        ValueError: a prompt without entry or of another concept, a concept of which no image is left to train on, fewer
            images than a batch takes, or maps of several sizes.
    """

    def __init__(
        self,
        folder: str | Path,
        hook_point: str,
        labels: Labels,
        concepts: Sequence[str],
        images: int = 128,
        validation: float = 0.2,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.folder = Path(folder)
        self.concepts = list(concepts)
        self.images = images
        self.seed = seed
        self.device = torch.device(device)
        self._epoch, self._batch = 0, 0
        if images < 1:
            raise ValueError(f"images: expected a number >= 1, got {images}")
        if not 0 < validation < 1:
            raise ValueError(f"validation: expected a share > 0 and < 1, got {validation}")
        index = read_index(self.folder)
        if hook_point not in index["hook_points"]:
            raise ValueError(f"hook_point: expected one of {sorted(index['hook_points'])}, got {hook_point!r}")
        prompts = index["prompts"]
        self._labels = _label_rows(prompts, labels, self.concepts)
        self._maps = _Maps(self.folder, index["hook_points"][hook_point]["shards"])
        self.training, self.held_out = _split(self._maps.prompts, prompts, validation, seed)
        """[n] int64: numbers of the images to train on, and of those to validate on."""
        if len(self.training) < images:
            raise ValueError(f"images: expected at most the {len(self.training)} to train on, got {images}")
        untaught = ~self._labels[self._maps.prompts[self.training]].any(0)
        if untaught.any():
            names = [name for name, missing in zip(self.concepts, untaught.tolist(), strict=True) if missing]
            raise ValueError(f"labels: expected images of every concept to train on, got none of {names}")
        self.batches_per_epoch = len(self.training) // images
        rows = self._labels.to(torch.uint8).numpy().tobytes()
        self._identity = {
            "images": images,
            "seed": seed,
            "validation": validation,
            "of": hashlib.sha256(json.dumps([prompts, self.concepts]).encode() + rows).hexdigest()[:16],
            "num_images": len(self._maps.prompts),
        }

    def __iter__(self) -> Generator[LabelledImages, None, None]:
        start = self._epoch, self._batch
        with closing(one_ahead(lambda stopping: self._from(*start))) as batches:
            for self._epoch, self._batch, batch in batches:
                yield batch

    def _from(self, epoch: int, first: int) -> Iterator[tuple[int, int, LabelledImages]]:
        """From a batch of a pass on: the position behind each, and the batch."""
        while True:
            order = torch.randperm(len(self.training), generator=_generator(self.seed, "images", epoch))
            for batch in range(first, self.batches_per_epoch):
                chosen = self.training[order[batch * self.images : (batch + 1) * self.images]]
                last = batch + 1 == self.batches_per_epoch
                yield epoch + last, 0 if last else batch + 1, self._read(chosen)
            epoch, first = epoch + 1, 0

    def validation(self) -> Generator[LabelledImages, None, None]:
        """Once through the images that are not trained on, in the folder's order; the last batch may be shorter."""

        def read(stopping: threading.Event) -> Iterator[LabelledImages]:
            return (self._read(chosen) for chosen in self.held_out.split(self.images))

        return one_ahead(read)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch stands, with what the order depends on."""
        return {"epoch": self._epoch, "batch": self._batch} | self._identity

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; ValueError for other data. Starts with the next iter()."""
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise ValueError(f"{name}: expected {state.get(name)} as in the saved state, got {value}")
        self._epoch, self._batch = state["epoch"], state["batch"]

    def _read(self, chosen: Tensor) -> LabelledImages:
        x, labels = self._maps.read(chosen), self._labels[self._maps.prompts[chosen]]
        return LabelledImages(x.to(self.device), labels.to(self.device))


class _Maps:
    """The maps of all shards as one sequence."""

    def __init__(self, folder: Path, shards: Sequence[Mapping[str, Any]]) -> None:
        self._paths = [folder / shard["file"] for shard in shards]
        shapes = [shard_shape(path, shard["tokens"]) for path, shard in zip(self._paths, shards, strict=True)]
        if len({shape[1:] for shape in shapes}) != 1:
            raise ValueError(f"folder: expected shards [maps, T, d] of one T and d in {folder}, got {shapes}")
        self._shape = shapes[0][1:]
        self._starts = torch.tensor([0, *(maps for maps, _, _ in shapes)]).cumsum(0)
        owners = []
        for path in self._paths:
            with open_tensors(path) as file:
                owners.append(file.get_tensor("prompts"))
        self.prompts = torch.cat(owners)
        """[maps] int64: indices of the maps' prompts."""

    def read(self, numbers: Tensor) -> Tensor:
        """[n, T, d] float16 of maps `numbers` [n]."""
        x = torch.empty(len(numbers), *self._shape, dtype=torch.float16)
        shards = torch.searchsorted(self._starts, numbers, right=True) - 1
        places = sorted(zip(shards.tolist(), (numbers - self._starts[shards]).tolist(), range(len(x)), strict=True))
        for shard, some in groupby(places, key=lambda place: place[0]):
            with open_tensors(self._paths[shard]) as file:
                activations = file.get_slice("activations")
                for _, row, place in some:
                    x[place] = activations[row]
        return x


def _label_rows(prompts: Sequence[str], labels: Labels, concepts: Sequence[str]) -> Tensor:
    """[prompts, C] bool."""
    columns = {name: c for c, name in enumerate(concepts)}
    rows = torch.zeros(len(prompts), len(concepts), dtype=torch.bool)
    for row, prompt in zip(rows, prompts, strict=True):
        if isinstance(labels, Mapping) and prompt not in labels:
            raise ValueError(f"labels: expected the concepts of every prompt, got none for {prompt!r}")
        names = labels[prompt] if isinstance(labels, Mapping) else labels(prompt)
        unknown = [name for name in names if name not in columns]
        if isinstance(names, str) or unknown:
            raise ValueError(f"labels: expected some of {list(concepts)} for {prompt!r}, got {names!r}")
        row[[columns[name] for name in names]] = True
    return rows


def _split(owners: Tensor, prompts: Sequence[str], validation: float, seed: int) -> tuple[Tensor, Tensor]:
    """The numbers of the maps to train on and of those to validate on, by the texts of their prompts."""
    texts = sorted({prompts[i] for i in owners.unique().tolist()})
    count = max(1, round(validation * len(texts)))
    order = torch.randperm(len(texts), generator=_generator(seed, "validation")).tolist()
    chosen = {texts[i] for i in order[:count]}
    held_out = torch.tensor([text in chosen for text in prompts])[owners]
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
