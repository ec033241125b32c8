"""Training tokens straight from a running pipeline: nothing touches the disk (SPEC 5.1)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
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
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        hook_point: str,
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
        self.hook_point = hook_point

    def identity(self) -> dict[str, Any]:
        prompts = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()
        return super().identity() | {"prompts": prompts, "sampling": asdict(self.sampling)}

    def pieces(self, position: int) -> Iterator[tuple[Tensor, int]]:
        while True:
            numbers = range(position, position + self.sampling.prompts_per_call)
            prompts = [self.prompts[i % len(self.prompts)] for i in numbers]
            seed = self.sampling.seed + position
            activations, _ = sample_activations(self.pipe, prompts, seed, [self.hook_point], self.sampling, self.device)
            position = numbers.stop
            yield activations[self.hook_point].flatten(0, 2), position

    def _producing_device(self) -> torch.device:
        return torch.device(self.pipe.device)
