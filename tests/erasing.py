"""SAEs and concept tables for the tiny pipelines' hook points, random but seeded, and erasures that certainly act."""

from __future__ import annotations

from typing import Any

import torch

from pipelines import CHANNELS, HOOK_POINTS, generate
from saemnesia_fast.concepts import ConceptTable
from saemnesia_fast.hookpoints import capture
from saemnesia_fast.sae import TopKSAE

HOOK_POINT, OTHER_HOOK_POINT = HOOK_POINTS
STRONG: dict[str, Any] = {"strength": -40.0, "num_latents": 12}
CONCEPTS = ["cat", "dog", "sketch"]


def random_sae(hook_point: str = HOOK_POINT, seed: int = 0, k: int = 8, **options: Any) -> TopKSAE:
    d = CHANNELS[hook_point]
    sae = TopKSAE.init(d, 4 * d, k, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        sae.encoder.bias.add_(0.1 * torch.randn(sae.num_latents, generator=generator))
        sae.b_dec.add_(0.1 * torch.randn(d, generator=generator))
    return sae


def random_table(
    sae: TopKSAE, hook_point: str = HOOK_POINT, seed: int = 0, timesteps: tuple[int, ...] = (751, 501, 251, 1)
) -> ConceptTable:
    """Means so low that most tokens on which a latent fires are above the threshold, and all different."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(CONCEPTS), len(timesteps), sae.num_latents)
    return ConceptTable(
        mu=0.01 + 0.02 * torch.rand(shape, generator=generator),
        timesteps=torch.tensor(timesteps),
        concepts=list(CONCEPTS),
        kinds=["object", "object", "style"],
        hook_point=f"unet.{hook_point}",
        sae_hash=sae.content_hash(),
    )


def sae_and_table(hook_point: str = HOOK_POINT, seed: int = 0) -> tuple[TopKSAE, ConceptTable]:
    sae = random_sae(hook_point, seed)
    return sae, random_table(sae, hook_point, seed)


def activations(pipe: Any, hook_point: str = HOOK_POINT, **options: Any) -> list[tuple[int, torch.Tensor]]:
    """(timestep, what leaves the block [B, C, H, W]) at every UNet call of a run."""
    seen: list[tuple[int, torch.Tensor]] = []
    with capture(pipe, [hook_point], lambda name, activation, t: seen.append((int(t), activation.clone()))):
        generate(pipe, **options)
    return seen


def unet_call(
    unet: Any, timestep: Any = 501, hook_point: str = HOOK_POINT, rows: int = 2, size: tuple[int, int] = (8, 8)
) -> torch.Tensor:
    """What leaves the block [B, C, H, W] in one seeded call of a bare UNet."""
    generator = torch.Generator().manual_seed(3)
    inner = getattr(unet, "_orig_mod", unet)
    sample = torch.randn(rows, 4, *size, generator=generator).to(inner.dtype)
    states = torch.randn(rows, 16, inner.config.cross_attention_dim, generator=generator).to(inner.dtype)
    seen = []
    with capture(unet, [hook_point], lambda name, activation, t: seen.append(activation.clone())), torch.no_grad():
        unet(sample, timestep, encoder_hidden_states=states)
    return seen[0]
