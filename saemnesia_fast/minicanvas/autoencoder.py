"""The autoencoder of MiniCanvas: 64x64 RGB to 8x8 latents of 8 channels, a diffusers `AutoencoderTiny`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from .loop import fit

LATENT_CHANNELS = 8
_COLOR_GAIN = 3.0


def build_autoencoder(width: int = 32) -> AutoencoderTiny:
    """A fresh autoencoder that starts as 8x8 average pooling and nearest upsampling of the colours.

    The first three channels of every layer carry RGB in [0, 1], which passes the ReLUs unchanged; the residual
    branches start at zero. The remaining channels are free to learn texture. Without this start, colours are lost.
    """
    model = AutoencoderTiny(
        encoder_block_out_channels=(width,) * 4,
        decoder_block_out_channels=(width,) * 4,
        num_encoder_blocks=(0, 1, 1, 2),
        num_decoder_blocks=(2, 2, 1, 1),
        latent_channels=LATENT_CHANNELS,
    )
    with torch.no_grad():
        for half in (model.encoder, model.decoder):
            for module in half.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                    if module.bias is not None:
                        module.bias.zero_()
            for layer in half.layers:
                if isinstance(layer, nn.Conv2d):
                    _carry_color(layer)
                elif hasattr(layer, "conv"):
                    layer.conv[-1].weight.zero_()
        first, last = model.decoder.layers[0], model.encoder.layers[-1]
        last.weight[3:] *= 0.5
        last.weight[:3] *= _COLOR_GAIN
        last.bias[:3] = -0.5 * _COLOR_GAIN
        first.weight[:3] /= _COLOR_GAIN
        first.bias[:3] = 0.5
        model.decoder.layers[-1].weight[:, 3:] *= 0.1
    return model


def _carry_color(layer: nn.Conv2d) -> None:
    """Makes the first three outputs the first three inputs, averaged over 2x2 where the layer strides."""
    layer.weight[:3] = 0
    for channel in range(3):
        if layer.stride == (2, 2):
            layer.weight[channel, channel, 1:, 1:] = 0.25
        else:
            layer.weight[channel, channel, 1, 1] = 1


def to_model_range(images: Tensor) -> Tensor:
    """[0, 1] to the [-1, 1] of diffusers."""
    return images * 2 - 1


def train_autoencoder(
    images: Tensor, folder: Path, *, steps: int = 2000, batch_size: int = 16, seed: int = 0, progress: bool = True
) -> tuple[AutoencoderTiny, dict[str, Any]]:
    """Trains on images [n, 3, 64, 64] in [0, 1].

    The loss is squared and absolute error, the error of 8x8 means (colour), the error of gradients (texture) and a
    pull of every latent channel towards zero mean and unit variance; noise on the latents grows during training.
    """
    torch.manual_seed(seed)
    model = build_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2.5e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2.5e-3, total_steps=steps, pct_start=0.15)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        picked = torch.randint(len(images), (batch_size,), generator=generator)
        target = to_model_range(images[picked]).contiguous(memory_format=torch.channels_last)
        latents = model.encoder(target)
        noise = 0.03 + 0.09 * step / steps
        output = model.decoder(latents + noise * torch.randn(latents.shape, generator=generator))
        error = output - target
        gradients = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        mean, variance = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
        moments = (mean.square() + (variance - 1).square()).mean()
        coarse = F.avg_pool2d(error, 8).square().mean()
        return error.square().mean() + 0.3 * error.abs().mean() + 2 * coarse + 0.15 * gradients + 0.03 * moments

    record = fit(
        "autoencoder",
        model,
        loss,
        steps=steps,
        optimizer=optimizer,
        schedule=schedule,
        folder=folder,
        seed=seed,
        clip=1.0,
        progress=progress,
    )
    latents = encode(model, images[:: max(1, len(images) // 2000)])
    model.register_to_config(scaling_factor=round(float(1 / latents.std()), 4))
    return model, record


@torch.no_grad()
def encode(model: AutoencoderTiny, images: Tensor, batch_size: int = 64) -> Tensor:
    """Images [n, 3, 64, 64] in [0, 1] -> unscaled latents [n, 8, 8, 8]."""
    return torch.cat([model.encoder(to_model_range(part)) for part in images.split(batch_size)])


@torch.no_grad()
def decode(model: AutoencoderTiny, latents: Tensor, batch_size: int = 64) -> Tensor:
    """Unscaled latents [n, 8, 8, 8] -> images [n, 3, 64, 64] in [0, 1]."""
    return torch.cat([(model.decoder(part) / 2 + 0.5).clamp(0, 1) for part in latents.split(batch_size)])


def psnr(model: AutoencoderTiny, images: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of the pictures after the autoencoder, over all pixels."""
    return float(-10 * (decode(model, encode(model, images)) - images).square().mean().log10())
