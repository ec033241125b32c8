"""The denoiser of MiniCanvas: a `UNet2DConditionModel` with cross-attention at two resolutions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from .autoencoder import LATENT_CHANNELS
from .loop import Average, fit
from .text import HIDDEN


def build_unet() -> UNet2DConditionModel:
    """8x8x8 latents, channels (64, 96), one layer a block; text enters at 4x4 and once in the 8x8 up block.

    The first down block has no cross-attention and that of the last up block is held at zero: text reaches the picture
    through hook points that have layers after them, which is where a concept can be erased.
    """
    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=HIDDEN,
        attention_head_dim=(2, 3),
        norm_num_groups=16,
    )
    read_text = model.up_blocks[-1].attentions[-1].transformer_blocks[0].attn2.to_out[0]
    for parameter in read_text.parameters():
        torch.nn.init.zeros_(parameter.requires_grad_(False))
    return model


def build_scheduler() -> DDIMScheduler:
    """v-prediction on the squared-cosine schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        steps_offset=1,
    )


def train_unet(
    latents: Tensor,
    prompts: Tensor,
    embeddings: Tensor,
    empty: Tensor,
    folder: Path,
    *,
    steps: int = 5000,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> tuple[UNet2DConditionModel, dict[str, Any]]:
    """Trains on latents [n, 8, 8, 8] (scaled to unit variance).

    prompts [n] is the row of embeddings [rows, templates, 16, 64] that describes each picture; a template is drawn at
    random and one prompt in ten is replaced by the empty prompt, empty [16, 64].
    """
    torch.manual_seed(seed)
    model = build_unet()
    scheduler = build_scheduler()

    def loss(step: int, generator: torch.Generator) -> Tensor:
        picked = torch.randint(len(latents), (batch_size,), generator=generator)
        clean = latents[picked]
        template = torch.randint(embeddings.shape[1], (batch_size,), generator=generator)
        text = embeddings[prompts[picked], template]
        dropped = torch.rand(batch_size, generator=generator) < 0.1
        text = torch.where(dropped[:, None, None], empty, text)
        timesteps = (1000 * torch.rand(batch_size, generator=generator).sqrt()).long().clamp_max(999)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = scheduler.get_velocity(clean, noise, timesteps)
        return F.mse_loss(model(noisy, timesteps, text, return_dict=False)[0], target)

    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1.5e-3, betas=(0.9, 0.99), weight_decay=0.01
    )
    warm = 100

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    record = fit(
        "unet",
        model,
        loss,
        steps=steps,
        optimizer=optimizer,
        schedule=schedule,
        folder=folder,
        seed=seed,
        clip=1.0,
        average=Average(model, 0.999),
        progress=progress,
    )
    return model, record
