"""Draws the demo's picture: the same requests before and after, with labels."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .drawing import OBJECTS, STYLES

_CELL = 96
_GAP = 4
_LEFT = 110
_TOP = 74
_INK = (30, 30, 34)
_RED = (200, 30, 45)


def comparison(before: Tensor, after: Tensor, erased: Collection[str], caption: str) -> Image.Image:
    """A grid of objects (columns) by styles (rows), without erasure on the left and with it on the right.

    before, after: [8 * 6, 3, 64, 64] in [0, 1], objects outermost. Names in `erased` are marked.
    """
    block = len(OBJECTS) * (_CELL + _GAP)
    width, height = _LEFT + 2 * block + 30, _TOP + len(STYLES) * (_CELL + _GAP) + 40
    canvas = Image.new("RGB", (width, height), (255, 255, 255))
    pen = ImageDraw.Draw(canvas)
    title, label = ImageFont.load_default(22), ImageFont.load_default(16)
    for images, left, name in ((before, _LEFT, "before"), (after, _LEFT + block + 20, "after")):
        pen.text((left + block / 2, 18), name, fill=_INK, font=title, anchor="mm")
        for column, obj in enumerate(OBJECTS):
            x = left + column * (_CELL + _GAP)
            _label(pen, (x + _CELL / 2, _TOP - 18), obj, obj in erased and name == "after", label, "mm")
            for row in range(len(STYLES)):
                cell = images[column * len(STYLES) + row].clamp(0, 1).permute(1, 2, 0).numpy()
                picture = Image.fromarray((cell * 255).round().astype(np.uint8))
                picture = picture.resize((_CELL, _CELL), Image.Resampling.BICUBIC)
                y = _TOP + row * (_CELL + _GAP)
                canvas.paste(picture, (x, y))
                if name == "after" and (obj in erased or STYLES[row] in erased):
                    pen.rectangle((x - 2, y - 2, x + _CELL + 1, y + _CELL + 1), outline=_RED, width=2)
    for row, style in enumerate(STYLES):
        middle = _TOP + row * (_CELL + _GAP) + _CELL / 2
        _label(pen, (_LEFT - 10, middle), style, style in erased, label, "rm")
    pen.text((_LEFT, height - 22), caption, fill=_INK, font=label, anchor="lm")
    return canvas


def _label(
    pen: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    erased: bool,
    font: Any,
    anchor: str,
) -> None:
    pen.text(at, text, fill=_RED if erased else _INK, font=font, anchor=anchor)
    if erased:
        left, top, right, bottom = pen.textbbox(at, text, font=font, anchor=anchor)
        pen.line((left - 2, (top + bottom) / 2, right + 2, (top + bottom) / 2), fill=_RED, width=2)
