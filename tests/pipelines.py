"""Tiny random diffusers pipelines with a real CLIP text model and tokenizer, built locally and seeded.

Each has hook points at two resolutions, latents of four channels and 8x8 by default (64x64 pixels), and DDIM sampling.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

HOOK_POINTS = ("up_blocks.0.attentions.1", "up_blocks.1.attentions.0")
CHANNELS = {"up_blocks.0.attentions.1": 64, "up_blocks.1.attentions.0": 32}
PROMPT_LENGTH = 16


@cache
def _vocabulary() -> str:
    letters = [chr(code) for code in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return json.dumps({token: index for index, token in enumerate(tokens)})


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose words are spelt letter by letter, 16 tokens a prompt."""
    return CLIPTokenizer(vocab=json.loads(_vocabulary()), merges=[], model_max_length=PROMPT_LENGTH)


def text_encoder(hidden: int = 32, projection: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(json.loads(_vocabulary())),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=PROMPT_LENGTH,
        projection_dim=hidden,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    ).eval()


def tiny_unet(cross_attention_dim: int = 32, **config: Any) -> UNet2DConditionModel:
    """Channels (32, 64), one layer a block, cross-attention at both resolutions."""
    options: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": cross_attention_dim,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(options | config)).eval()


def tiny_sd_to_compile(seed: int = 0) -> StableDiffusionPipeline:
    """SD 1.x class with a UNet of one resolution, 32 channels and two cross-attention blocks: quick to compile."""
    pipe = tiny_sd(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe.unet = tiny_unet(
            block_out_channels=(32,),
            down_block_types=("DownBlock2D",),
            mid_block_type=None,
            up_block_types=("CrossAttnUpBlock2D",),
        )
    return pipe


def _scheduler(**config: Any) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **config,
    )


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _stable_diffusion(seed: int, hidden: int, unet: dict[str, Any], scheduler: dict[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=text_encoder(hidden),
            tokenizer=tokenizer(),
            unet=tiny_unet(hidden, **unet),
            scheduler=_scheduler(**scheduler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _quiet(pipe)


def tiny_sd(seed: int = 0) -> StableDiffusionPipeline:
    """SD 1.x class: noise prediction, convolutions around the transformer blocks."""
    return _stable_diffusion(seed, hidden=32, unet={}, scheduler={})


def tiny_sd2(seed: int = 0) -> StableDiffusionPipeline:
    """SD 2.x class: v-prediction, wider text states, linear projections around the transformer blocks."""
    return _stable_diffusion(
        seed,
        hidden=48,
        unet={"use_linear_projection": True, "attention_head_dim": (4, 8)},
        scheduler={"prediction_type": "v_prediction"},
    )


def tiny_sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """SDXL class: two text encoders, micro-conditioning, two transformer layers in the deep blocks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=text_encoder(),
            text_encoder_2=text_encoder(projection=True),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            unet=tiny_unet(
                cross_attention_dim=64,
                use_linear_projection=True,
                transformer_layers_per_block=(1, 2),
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 32,
            ),
            scheduler=_scheduler(),
            add_watermarker=False,
        )
    return _quiet(pipe)


def generate(pipe: Any, prompt: str | list[str] = "a cat", seed: int = 0, **options: Any) -> torch.Tensor:
    """Latents [B, 4, h, w] of a short seeded run: 4 steps, guidance 5, 64x64 pixels unless told otherwise."""
    defaults = {
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "height": 64,
        "width": 64,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
    }
    return pipe(prompt, **(defaults | options)).images
