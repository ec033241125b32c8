"""Where in a picture the concepts' latents are active, over the denoising."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .reading import Analysis, Reading, by_kind
from .watching import Sample, Watched

CELL, GAP, LEFT, TOP = 72, 4, 110, 46
INK, PAPER = (30, 30, 34), (255, 255, 255)


def one_of_each(readings: Sequence[Reading], samples: Sequence[Sample]) -> list[Sample]:
    """A sample for every concept, the n-th concept's being the n-th of those that ask for it.

    Raises:
        ValueError: no sample asks for a concept.
    """
    chosen = []
    for concepts in (
        list(dict.fromkeys(c for one in some for c in one.concepts)) for some in by_kind(readings).values()
    ):
        for n, concept in enumerate(concepts):
            asking = [sample for sample in samples if concept in sample.concepts]
            if not asking:
                raise ValueError(f"samples: expected a picture of every concept, got none of {concept!r}")
            chosen.append(asking[n % len(asking)])
    return list(dict.fromkeys(chosen))


def analyse_maps(
    readings: Sequence[Reading], watched: Watched, samples: Sequence[Sample], columns: int = 5
) -> Analysis:
    """Activation maps of each concept's latent over the first picture that asks for it.

    Args:
        readings: those with which `watched` was made.
        watched: activations [P, T, C, H, W].
        samples: P.
        columns: steps to draw, from the first to the last; the numbers cover all.

    Returns:
        numbers {method: {kind: {"timesteps": [T], "concepts": {name: {"latent", "prompt", "mean": [T] over the tokens,
        "active": [T] share of the tokens, "mean_elsewhere": [T] mean over the pictures that do not ask for it}}}}} and
        one grid of pictures for each kind. A row of maps is white where its latent is silent and darkest at its maximum
        over the row.
    """
    numbers: dict[str, Any] = {}
    pictures = {}
    steps = torch.linspace(0, len(watched.timesteps) - 1, min(columns, len(watched.timesteps))).round().long()
    for kind, some in by_kind(readings).items():
        rows: dict[str, tuple[Tensor, list[Tensor]]] = {}
        for one in some:
            concepts: dict[str, Any] = {}
            numbers.setdefault(one.method, {})[kind] = {"timesteps": watched.timesteps.tolist(), "concepts": concepts}
            for c, (concept, latent) in enumerate(zip(one.concepts, one.latents(), strict=True)):
                asks = torch.tensor([concept in sample.concepts for sample in samples])
                picture = int(asks.nonzero()[0])
                every = watched.activations[one.name][:, :, c]
                maps, elsewhere = every[picture], every[~asks].mean((0, 2, 3))
                concepts[concept] = {
                    "latent": latent,
                    "prompt": samples[picture].prompt,
                    "mean": maps.mean((1, 2)).tolist(),
                    "active": (maps > 0).float().mean((1, 2)).tolist(),
                    "mean_elsewhere": elsewhere.tolist() if not asks.all() else None,
                }
                rows.setdefault(concept, (watched.images[picture], []))[1].append(maps[steps])
        pictures[kind] = _grid(rows, [one.method for one in some], watched.timesteps[steps].tolist())
    return Analysis(numbers, pictures=pictures)


def _grid(
    rows: dict[str, tuple[Tensor, list[Tensor]]], methods: Sequence[str], timesteps: Sequence[int]
) -> Image.Image:
    """{concept: (picture [3, h, w], a method's maps [columns, H, W] each)}, one row a concept."""
    block = len(timesteps) * (CELL + GAP) + 16
    width = LEFT + CELL + 16 + len(methods) * block
    sheet = Image.new("RGB", (width, TOP + len(rows) * (CELL + GAP) + 6), PAPER)
    pen = ImageDraw.Draw(sheet)
    title, label = ImageFont.load_default(15), ImageFont.load_default(12)
    starts = [LEFT + CELL + 16 + m * block for m in range(len(methods))]
    for left, method in zip(starts, methods, strict=True):
        pen.text((left, 6), f"{method}, timestep", fill=INK, font=title)
        for n, timestep in enumerate(timesteps):
            pen.text((left + n * (CELL + GAP) + CELL / 2, TOP - 10), str(timestep), fill=INK, font=label, anchor="mm")
    for row, (concept, (picture, maps)) in enumerate(rows.items()):
        y = TOP + row * (CELL + GAP)
        pen.text((LEFT - 8, y + CELL / 2), concept, fill=INK, font=label, anchor="rm")
        sheet.paste(_image(picture), (LEFT, y))
        for left, some in zip(starts, maps, strict=True):
            highest = some.max().clamp_min(torch.finfo(some.dtype).tiny)
            for n, one in enumerate(some):
                sheet.paste(_heat(one / highest), (left + n * (CELL + GAP), y))
                pen.rectangle(
                    (left + n * (CELL + GAP), y, left + n * (CELL + GAP) + CELL - 1, y + CELL - 1), outline=INK
                )
    return sheet


def _image(picture: Tensor) -> Image.Image:
    pixels = (picture.clamp(0, 1).float().permute(1, 2, 0) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((CELL, CELL), Image.Resampling.BICUBIC)


def _heat(shares: Tensor) -> Image.Image:
    """[H, W] in [0, 1]: white, yellow, red, black."""
    colour = torch.stack([3 - 3 * shares, 2 - 3 * shares, 1 - 3 * shares], -1).clamp(0, 1)
    return Image.fromarray((colour * 255).round().to(torch.uint8).numpy()).resize(
        (CELL, CELL), Image.Resampling.NEAREST
    )
