"""Small files in the formats in which other projects publish theirs, written as their own code does."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def write_pickle(path: Path, value: Any, protocol: int | None = None) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def write_latents(path: Path, concepts: Sequence[str], prompts: int, steps: int, num_latents: int) -> dict[str, Tensor]:
    """`cls_latents_dict_*.pkl`: {concept: float16 [prompts, steps, N]}, mostly zeros, one latent of each its own."""
    generator = torch.Generator().manual_seed(0)
    latents = {}
    for c, name in enumerate(concepts):
        one = torch.rand(prompts, steps, num_latents, generator=generator)
        one *= torch.rand(prompts, steps, num_latents, generator=generator) < 0.2
        one[..., c] = 2 + torch.rand(prompts, steps, generator=generator)
        latents[name] = one.half()
    write_pickle(path, latents)
    return latents


class UnboxAutoencoder(nn.Module):
    """sdxl-unbox's autoencoder, which is OpenAI's: relu(topk(encoder(x - pre_bias) + latent_bias))."""

    def __init__(self, d: int, num_latents: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.encoder = nn.Linear(d, num_latents, bias=False)
        self.decoder = nn.Linear(num_latents, d, bias=False)
        self.pre_bias = nn.Parameter(torch.randn(d))
        self.latent_bias = nn.Parameter(torch.randn(num_latents) / 3)
        self.register_buffer("stats_last_nonzero", torch.zeros(num_latents, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        values, indices = (self.encoder(x - self.pre_bias) + self.latent_bias).topk(self.k)
        z = torch.zeros(*x.shape[:-1], self.encoder.out_features).scatter(-1, indices, values.relu())
        return self.decoder(z) + self.pre_bias

    def save_to_disk(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        sizes = {"n_dirs_local": self.encoder.out_features, "d_model": self.encoder.in_features, "k": self.k}
        (folder / "config.json").write_text(json.dumps({**sizes, "auxk": 8, "dead_steps_threshold": 100}))
        torch.save({"state_dict": self.state_dict()}, folder / "state_dict.pth")
