"""Training tokens straight from a running pipeline: nothing touches the disk (SPEC 5.1)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from saemnesia_fast.training.data import ActivationSource
from saemnesia_fast.training.sampling import Sampling, sample_activations


class LiveActivations(ActivationSource):
    """Batches from the conditional half of `pipe` at `hook_point`, through a shuffle buffer.

    The buffer fills with the tokens of whole prompts until it holds `buffer_tokens`, is handed out in random order and
    fills again; a thread, on a CUDA device with a stream of its own, fills the next one while the SAE learns from the
    present one. Prompts repeat in order, with fresh noise in every pass; resuming samples the current buffer again.
    Tokens wait on `device`, by default the pipeline's.

    Given several hook points, whose maps must be of one size, batches are {hook point: [batch_size, d]} of one call.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        hook_point: str | Sequence[str],
        sampling: Sampling | None = None,
        batch_size: int = 4096,
        buffer_tokens: int = 1_000_000,
        device: str | torch.device | None = None,
    ) -> None:
        self.sampling = sampling or Sampling()
        if not prompts or isinstance(prompts, str):
            raise ValueError(f"prompts: expected a non-empty list of prompts, got {prompts!r}")
        if buffer_tokens < batch_size:
            raise ValueError(f"buffer_tokens: expected at least batch_size={batch_size}, got {buffer_tokens}")
        super().__init__(batch_size, self.sampling.seed, buffer_tokens, pipe.device if device is None else device)
        self.pipe = pipe
        self.prompts = list(prompts)
        self.hook_points = [hook_point] if isinstance(hook_point, str) else list(hook_point)
        self._alone = isinstance(hook_point, str)
        self._widths: list[int] = []

    def identity(self) -> dict[str, Any]:
        prompts = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()
        return super().identity() | {
            "prompts": prompts,
            "sampling": asdict(self.sampling),
            "hook_points": self.hook_points,
        }

    def __iter__(self) -> Generator[Any, None, None]:
        with closing(super().__iter__()) as batches:
            for batch in batches:
                parts = zip(self.hook_points, batch.split(self._widths, dim=1), strict=True)
                yield batch if self._alone else {name: part.contiguous() for name, part in parts}

    def pieces(self, position: int) -> Iterator[tuple[Tensor, int]]:
        while True:
            numbers = range(position, position + self.sampling.prompts_per_call)
            prompts = [self.prompts[i % len(self.prompts)] for i in numbers]
            seed = self.sampling.seed + position
            activations, _ = sample_activations(self.pipe, prompts, seed, self.hook_points, self.sampling, self.device)
            position = numbers.stop
            tokens = [activations[name].flatten(0, 2) for name in self.hook_points]
            if len({len(of_one) for of_one in tokens}) > 1:
                sizes = {name: activations[name].shape[2] for name in self.hook_points}
                raise ValueError(f"hook_point: expected several with maps of one size, got tokens a map {sizes}")
            self._widths = [of_one.shape[1] for of_one in tokens]
            yield tokens[0] if self._alone else torch.cat(tokens, dim=1), position

    def _producing_device(self) -> torch.device:
        return torch.device(self.pipe.device)
