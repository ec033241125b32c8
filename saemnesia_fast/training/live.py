"""Training tokens straight from a running pipeline: nothing touches the disk (SPEC 5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saemnesia_fast.training.data import ActivationSource
from saemnesia_fast.training.sampling import Sampling, sample_activations


class LiveActivations(ActivationSource):
    """Batches from the conditional half of `pipe` at `hook_point`, through a shuffle buffer.

    The buffer fills with the tokens of whole prompts until it holds `buffer_tokens`, is handed out in random order and
    fills again. Prompts repeat in order, with fresh noise in every pass; resuming samples the current buffer again.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        hook_point: str,
        sampling: Sampling | None = None,
        batch_size: int = 4096,
        buffer_tokens: int = 1_000_000,
    ) -> None:
        self.sampling = sampling or Sampling()
        super().__init__(batch_size, self.sampling.seed)
        if not prompts or isinstance(prompts, str):
            raise ValueError(f"prompts: expected a non-empty list of prompts, got {prompts!r}")
        if buffer_tokens < batch_size:
            raise ValueError(f"buffer_tokens: expected at least batch_size={batch_size}, got {buffer_tokens}")
        self.pipe = pipe
        self.prompts = list(prompts)
        self.hook_point = hook_point
        self.buffer_tokens = buffer_tokens

    def load_block(self, position: int) -> tuple[Tensor, int]:
        parts: list[Tensor] = []
        held = 0
        while held < self.buffer_tokens:
            numbers = range(position, position + self.sampling.prompts_per_call)
            prompts = [self.prompts[i % len(self.prompts)] for i in numbers]
            seed = self.sampling.seed + position
            activations, _ = sample_activations(self.pipe, prompts, seed, [self.hook_point], self.sampling)
            parts.append(activations[self.hook_point].flatten(0, 2))
            held += len(parts[-1])
            position = numbers.stop
        return torch.cat(parts), position
