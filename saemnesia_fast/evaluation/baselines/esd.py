"""ESD-style fine-tuning: a UNet that steers away from a concept by itself (arXiv 2303.07345)."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saemnesia_fast.files import load_tensors, save_tensors
from saemnesia_fast.hookpoints import get_unet

from ..units import weights_hash
from .prompts import Prompts, asking, text_states
from .weights import swapped

logger = logging.getLogger("saemnesia_fast")
TRAINED = {"x": "cross-attention", "u": "all but cross-attention"}


@dataclass(frozen=True)
class ESD:
    """The trained UNet's answer to the concept becomes the frozen one's negative guidance,

        eps_frozen(x_t) - eta (eps_frozen(x_t, c) - eps_frozen(x_t)).

    The weights of both sides add up to one, so that it holds for v-prediction as it does for noise. The published code
    draws one step of a new trajectory for every iteration; here a batch of pictures is denoised by the trained UNet and
    every step on the way is an iteration, which spares most of the sampling. Several concepts are trained at once, in
    as many iterations for each.
    """

    prompts: Prompts
    """{concept: prompts that ask for it}."""
    trained: str = "x"
    """"x": the weights of cross-attention, for what is bound to its name; "u": all others."""
    iterations: int = 1000
    learning_rate: float = 1e-5
    eta: float = 1.0
    batch_size: int = 1
    steps: int = 50
    """Denoising steps of a trajectory."""
    guidance_scale: float = 3.0
    """With which the trajectories are sampled."""
    seed: int = 0
    folder: Path | None = None
    """Trained weights are kept here, a safetensors file for each set of concepts, settings and UNet."""
    name: str = "esd"
    source: str = "Erasing Concepts from Diffusion Models, arXiv 2303.07345"

    def __post_init__(self) -> None:
        if self.trained not in TRAINED:
            raise ValueError(f"trained: expected one of {', '.join(TRAINED)}, got {self.trained!r}")

    @contextmanager
    def erased(self, pipe: Any, concepts: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """Trains, unless the folder holds the weights.

        Raises ValueError for an unknown concept, and for a UNet that wants more than text (SDXL's).
        """
        with swapped(get_unet(pipe), self.weights(pipe, concepts)):
            yield {}

    def weights(self, pipe: Any, concepts: Sequence[str]) -> dict[str, Tensor]:
        """{name in the UNet: trained weight}, read from the folder or trained now."""
        asking(self.prompts, concepts)
        asked = {concept: list(self.prompts[concept]) for concept in sorted(set(concepts))}
        unet = get_unet(pipe)
        if getattr(unet.config, "addition_embed_type", None) is not None:
            raise ValueError("pipe: expected a UNet that reads nothing but text, got one with further embeddings")
        if self.folder is None:
            return self._train(pipe, unet, asked)
        settings = self._settings(pipe, unet, asked)
        path = self.folder / f"{hashlib.sha256(settings.encode()).hexdigest()[:16]}.safetensors"
        if not path.exists():
            save_tensors(path, self._train(pipe, unet, asked), {"esd": settings})
        return load_tensors(path)

    def _trained(self, unet: nn.Module) -> dict[str, nn.Parameter]:
        across = self.trained == "x"
        return {name: p for name, p in unet.named_parameters() if (".attn2." in name) == across}

    def _settings(self, pipe: Any, unet: nn.Module, asked: Prompts) -> str:
        """All that the trained weights depend on, as JSON."""
        kept = {key: value for key, value in vars(self).items() if key not in ("prompts", "folder", "name", "source")}
        scheduler = {"type": type(pipe.scheduler).__name__} | dict(pipe.scheduler.config)
        parts = {"settings": kept, "prompts": asked, "unet": weights_hash(unet), "scheduler": scheduler}
        return json.dumps(parts, sort_keys=True, default=str)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _train(self, pipe: Any, frozen: nn.Module, asked: Prompts) -> dict[str, Tensor]:
        unet: Any = copy.deepcopy(frozen).float().eval().requires_grad_(False)
        trained = self._trained(unet)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(list(trained.values()), lr=self.learning_rate)
        teacher = _Predictor(frozen)
        student = _Predictor(unet)
        texts = [text for some in asked.values() for text in some]
        states = text_states(pipe, texts)
        empty = text_states(pipe, [""]).expand(self.batch_size, -1, -1)
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        generator = torch.Generator().manual_seed(self.seed)
        wanted = self.iterations * len(asked)
        done = 0
        while done < wanted:
            scheduler.set_timesteps(self.steps, device=empty.device)
            text = states[torch.randint(len(texts), (self.batch_size,), generator=generator)]
            size = (self.batch_size, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
            x = torch.randn(size, generator=generator).to(empty.device) * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                given = scheduler.scale_model_input(x, t)
                with torch.no_grad():
                    neutral, conditional = teacher(torch.cat([given, given]), t, torch.cat([empty, text])).chunk(2)
                    unguided = student(given, t, empty)
                answer = student(given, t, text)
                loss = F.mse_loss(answer, neutral - self.eta * (conditional - neutral))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                guided = unguided + self.guidance_scale * (answer.detach() - unguided)
                x = scheduler.step(guided, t, x).prev_sample
                done += 1
                if done == wanted:
                    break
        logger.info("esd without %s: loss %.4f after %d iterations", ", ".join(asked), loss.item(), wanted)
        return {name: parameter.detach() for name, parameter in trained.items()}


class _Predictor:
    """A UNet's prediction in float32, whatever its own dtype."""

    def __init__(self, unet: Any) -> None:
        self.unet = unet

    def __call__(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        dtype = self.unet.dtype
        return self.unet(x.to(dtype), t, encoder_hidden_states=text.to(dtype), return_dict=False)[0].float()
