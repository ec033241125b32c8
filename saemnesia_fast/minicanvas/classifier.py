"""The judges of MiniCanvas: one classifier for objects and one for styles."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from ..files import load_tensors
from . import autoencoder
from .drawing import OBJECTS, STYLES, Pictures
from .loop import fit


class Classifier(nn.Module):
    """Four strided convolutions and a linear head. Images [n, 3, 64, 64] in [0, 1] -> logits [n, classes]."""

    def __init__(self, classes: int, width: int = 24) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 3 * width, 4 * width)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 5 if before == 3 else 3, stride=2, padding=2 if before == 3 else 1)]
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(16 * widths[-1], classes)

    def features(self, images: Tensor) -> Tensor:
        """[n, 3, 64, 64] -> [n, 16 * 4 * width], the activations before the head."""
        return self.body(images * 2 - 1).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.dropout(self.features(images), 0.3, self.training))


class Judge(nn.Module):
    """The two classifiers, told apart by what they name."""

    def __init__(self) -> None:
        super().__init__()
        self.object = Classifier(len(OBJECTS))
        self.style = Classifier(len(STYLES))

    @torch.no_grad()
    def predict(self, images: Tensor, batch_size: int = 128) -> tuple[Tensor, Tensor]:
        """Images [n, 3, 64, 64] in [0, 1] -> object and style probabilities, [n, 8] and [n, 6]."""
        parts = images.split(batch_size)
        objects = torch.cat([self.object(part).softmax(1) for part in parts])
        styles = torch.cat([self.style(part).softmax(1) for part in parts])
        return objects, styles


def load_judge(folder: Path) -> Judge:
    """The judge in `folder/judge.safetensors`, in float32 whatever the file's dtype."""
    judge = Judge().eval()
    judge.load_state_dict(load_tensors(folder / "judge.safetensors"))
    return judge


def accuracy(judge: Judge, images: Tensor, objects: Tensor, styles: Tensor) -> tuple[float, float]:
    """Share of images whose object, and whose style, is recognised."""
    object_scores, style_scores = judge.predict(images)
    return (
        float((object_scores.argmax(1) == objects).double().mean()),
        float((style_scores.argmax(1) == styles).double().mean()),
    )


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts by up to 4 pixels, blurs a third of the batches, adds noise of random size."""
    dx, dy = (int(torch.randint(-4, 5, (), generator=generator)) for _ in range(2))
    images = F.pad(images, (4, 4, 4, 4), mode="replicate")[:, :, 4 + dy : 68 + dy, 4 + dx : 68 + dx]
    if torch.rand((), generator=generator) < 0.33:
        images = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    level = 0.08 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return images + level * torch.randn(images.shape, generator=generator)


def train_judge(
    pictures: Pictures,
    vae: AutoencoderTiny,
    folder: Path,
    *,
    steps: int = 1200,
    batch_size: int = 48,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Judge, dict[str, Any]]:
    """Trains both classifiers on drawn pictures, half of them after a round trip through the autoencoder."""
    torch.manual_seed(seed)
    judge = Judge()
    seen = autoencoder.decode(vae, autoencoder.encode(vae, pictures.images))

    def loss(step: int, generator: torch.Generator) -> Tensor:
        picked = torch.randint(len(seen), (batch_size,), generator=generator)
        half = batch_size // 2
        images = torch.cat([pictures.images[picked[:half]], seen[picked[half:]]])
        images = _augment(images, generator)
        return F.cross_entropy(judge.object(images), pictures.objects[picked], label_smoothing=0.05) + F.cross_entropy(
            judge.style(images), pictures.styles[picked], label_smoothing=0.05
        )

    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.15)
    record = fit(
        "judge",
        judge,
        loss,
        steps=steps,
        optimizer=optimizer,
        schedule=schedule,
        folder=folder,
        seed=seed,
        progress=progress,
    )
    return judge, record
