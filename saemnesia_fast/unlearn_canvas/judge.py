"""UnlearnCanvas' classifiers: two ViT-L of timm, one for objects and one for styles."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..files import load_tensors
from ..training.unlearn_canvas import OBJECTS, STYLES

if TYPE_CHECKING:
    from ..evaluation import Judgement

ARCHITECTURE = "vit_large_patch16_224.augreg_in21k"
SIDE, PATCH, WIDTH, DEPTH = 224, 16, 1024, 24
"""ViT-L/16's (arXiv 2010.11929, table 1); its hidden layers are four times as wide."""
THEMES = tuple(sorted((*STYLES, "Seed_Images")))
"""The style classifier's 51 classes in its order, which is the alphabet's."""
_ORDER = [THEMES.index(style) for style in (*STYLES, "Seed_Images")]


def operations(classes: int) -> int:
    """Of one picture through one classifier: two for each multiplication of its matrix products."""
    patches = (SIDE // PATCH) ** 2
    tokens = patches + 1
    embedding = patches * 3 * PATCH**2 * WIDTH
    block = tokens * 12 * WIDTH**2 + 2 * tokens**2 * WIDTH
    return 2 * (embedding + DEPTH * block + WIDTH * classes)


class Judge(nn.Module):
    """The two classifiers; each maps [n, 3, 224, 224] to logits and has timm's `forward_features`, `forward_head`."""

    def __init__(self, objects: nn.Module, styles: nn.Module, batch_size: int = 32) -> None:
        super().__init__()
        self.object = objects
        self.style = styles
        self.batch_size = batch_size

    @torch.no_grad()
    def judged(self, images: Tensor) -> Judgement:
        """Of images [n, 3, H, W] in [0, 1]; features are both classifiers' inputs of their heads, side by side."""
        from ..evaluation import Judgement

        device = next(self.parameters()).device
        probabilities: dict[str, list[Tensor]] = {"object": [], "style": []}
        features = []
        for some in images.split(self.batch_size):
            x = prepared(some).to(device)
            seen = []
            for kind, found in probabilities.items():
                model: Any = getattr(self, kind)
                hidden = model.forward_head(model.forward_features(x), pre_logits=True)
                found.append(model.head(hidden).float().softmax(1).cpu())
                seen.append(hidden.float().cpu())
            features.append(torch.cat(seen, 1))
        styles = torch.cat(probabilities["style"])[:, _ORDER]
        return Judgement({"object": torch.cat(probabilities["object"]), "style": styles}, torch.cat(features))


def prepared(images: Tensor) -> Tensor:
    """[n, 3, H, W] in [0, 1] -> [n, 3, 224, 224] in [-1, 1] as the published evaluation reads its files.

    That is: saved as JPEG with PIL's defaults, resized bilinearly by PIL, and normalised with mean and deviation 0.5.
    """
    pixels = (images.float().cpu().clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    return torch.stack([_as_read(Image.fromarray(one)) for one in pixels])


def _as_read(picture: Image.Image) -> Tensor:
    file = io.BytesIO()
    picture.save(file, format="JPEG")
    with Image.open(file) as read:
        small = read.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255 * 2 - 1


def load_judge(
    folder: Path,
    device: str = "cpu",
    architecture: str = ARCHITECTURE,
    create: Callable[..., nn.Module] | None = None,
) -> Judge:
    """The classifiers in `object.safetensors` and `style.safetensors`, in float32.

    Args:
        folder: holds the two files, made of `style50_cls.pth` and `style50.pth` by `saemnesia-fast convert`.
        architecture: timm's name of it.
        create: makes a model in place of `timm.create_model`.

    Raises:
        ImportError: timm is not installed.
        FileNotFoundError: a file is missing.
        ValueError: a file does not fit the architecture.
    """
    create = create or _timm()
    models = {}
    for kind, classes in (("object", len(OBJECTS)), ("style", len(THEMES))):
        path = folder / f"{kind}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no classifier here; see docs/unlearn_canvas.md")
        model = create(architecture, pretrained=False, num_classes=classes)
        try:
            model.load_state_dict(load_tensors(path))
        except RuntimeError as error:
            raise ValueError(f"{path}: expected a {architecture} of {classes} classes ({error})") from error
        models[kind] = model
    return Judge(models["object"], models["style"]).eval().requires_grad_(False).to(device)


def _timm() -> Callable[..., nn.Module]:
    try:
        from timm import create_model
    except ImportError as error:
        raise ImportError(f"timm: needed for the classifiers, pip install saemnesia-fast[eval] ({error})") from error
    return create_model
