"""Draws the pictures of MiniCanvas: eight objects in six styles, from signed distance functions.

A picture is 64x64 RGB. Place, scale, tilt and hue are random; textures sit on the 8-pixel grid of the latent space,
because a small autoencoder cannot carry a texture of random phase.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

OBJECTS = ("star", "heart", "moon", "house", "tree", "fish", "flower", "mushroom")
STYLES = ("sketch", "neon", "mosaic", "watercolor", "pop art", "woodcut")
SIZE = 64
CELL = 8

PROMPT_TEMPLATES = (
    "a painting of a {object} in {style} style",
    "{object} in {style} style",
    "a {style} painting of a {object}",
    "a {object}, {style} style",
)


def prompt_for(obj: str, style: str, template: int = 0) -> str:
    """The text that asks for `obj` in `style`; `template` picks one of PROMPT_TEMPLATES."""
    return PROMPT_TEMPLATES[template % len(PROMPT_TEMPLATES)].format(object=obj, style=style)


def prompt_concepts() -> dict[str, tuple[str, str]]:
    """{prompt: its object and its style}, for all prompts that there are."""
    templates = range(len(PROMPT_TEMPLATES))
    return {prompt_for(one, style, t): (one, style) for one in OBJECTS for style in STYLES for t in templates}


@dataclass
class _Shape:
    """Distances in units of the picture's half width: negative inside. Each [n, SIZE, SIZE]."""

    body: Tensor
    accent: Tensor

    @property
    def outline(self) -> Tensor:
        return torch.minimum(self.body, self.accent)


def _circle(x: Tensor, y: Tensor, cx: float, cy: float, r: float) -> Tensor:
    return torch.hypot(x - cx, y - cy) - r


def _ellipse(x: Tensor, y: Tensor, cx: float, cy: float, rx: float, ry: float) -> Tensor:
    u, v = (x - cx) / rx, (y - cy) / ry
    level = torch.hypot(u, v)
    slope = torch.hypot(u / rx, v / ry) / level.clamp_min(1e-3)
    return (level - 1) / slope.clamp_min(1e-3)


def _box(x: Tensor, y: Tensor, cx: float, cy: float, hx: float, hy: float) -> Tensor:
    dx, dy = (x - cx).abs() - hx, (y - cy).abs() - hy
    return torch.hypot(dx.clamp_min(0), dy.clamp_min(0)) + torch.maximum(dx, dy).clamp_max(0)


def _polygon(x: Tensor, y: Tensor, corners: list[tuple[float, float]]) -> Tensor:
    """Exact signed distance to a simple polygon: nearest edge, sign by the even-odd rule."""
    nearest = torch.full_like(x, torch.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        along = (((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        nearest = torch.minimum(nearest, (x - ax - along * ex) ** 2 + (y - ay - along * ey) ** 2)
        if ey != 0:
            inside ^= ((ay <= y) != (by <= y)) & (x < ax + (y - ay) * (ex / ey))
    return torch.where(inside, -nearest.sqrt(), nearest.sqrt())


def _union(*distances: Tensor) -> Tensor:
    return torch.stack(distances).amin(0)


def _star(x: Tensor, y: Tensor) -> _Shape:
    radii = (1.0, 0.42)
    corners = [(radii[i % 2] * math.sin(math.pi * i / 5), -radii[i % 2] * math.cos(math.pi * i / 5)) for i in range(10)]
    return _Shape(_polygon(x, y, corners), _circle(x, y, 0, 0, 0.2))


def _heart(x: Tensor, y: Tensor) -> _Shape:
    corners = []
    for i in range(36):
        t = 2 * math.pi * i / 36
        height = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        corners.append((16 * math.sin(t) ** 3 / 17, -(height + 2.5) / 17))
    return _Shape(_polygon(x, y, corners), _circle(x, y, -0.42, -0.35, 0.16))


def _moon(x: Tensor, y: Tensor) -> _Shape:
    crescent = torch.maximum(_circle(x, y, 0, 0, 0.92), -_circle(x, y, 0.45, -0.12, 0.74))
    return _Shape(crescent, _circle(x, y, 0.62, -0.2, 0.15))


def _house(x: Tensor, y: Tensor) -> _Shape:
    walls = _box(x, y, 0, 0.4, 0.62, 0.45)
    roof = _polygon(x, y, [(-0.92, 0.0), (0.0, -0.92), (0.92, 0.0)])
    return _Shape(torch.maximum(walls, -_box(x, y, 0, 0.55, 0.17, 0.3)), roof)


def _tree(x: Tensor, y: Tensor) -> _Shape:
    crown = _union(
        _polygon(x, y, [(-0.42, -0.35), (0.0, -1.0), (0.42, -0.35)]),
        _polygon(x, y, [(-0.58, 0.1), (0.0, -0.65), (0.58, 0.1)]),
        _polygon(x, y, [(-0.74, 0.55), (0.0, -0.25), (0.74, 0.55)]),
    )
    return _Shape(crown, _box(x, y, 0, 0.76, 0.14, 0.22))


def _fish(x: Tensor, y: Tensor) -> _Shape:
    body = _ellipse(x, y, -0.2, 0.0, 0.72, 0.46)
    tail = _polygon(x, y, [(0.35, 0.0), (0.95, -0.5), (0.8, 0.0), (0.95, 0.5)])
    return _Shape(torch.maximum(body, -_circle(x, y, -0.55, -0.1, 0.1)), tail)


def _flower(x: Tensor, y: Tensor) -> _Shape:
    petals = [
        _circle(x, y, 0.58 * math.sin(2 * math.pi * i / 6), -0.58 * math.cos(2 * math.pi * i / 6), 0.34)
        for i in range(6)
    ]
    return _Shape(torch.maximum(_union(*petals), -_circle(x, y, 0, 0, 0.36)), _circle(x, y, 0, 0, 0.3))


def _mushroom(x: Tensor, y: Tensor) -> _Shape:
    cap = torch.maximum(_ellipse(x, y, 0, 0.0, 0.92, 0.85), y - 0.05)
    dots = _union(_circle(x, y, -0.4, -0.25, 0.15), _circle(x, y, 0.12, -0.5, 0.17), _circle(x, y, 0.5, -0.16, 0.13))
    return _Shape(torch.maximum(cap, -dots), _box(x, y, 0, 0.47, 0.25, 0.42))


_SHAPES: dict[str, Callable[[Tensor, Tensor], _Shape]] = {
    "star": _star,
    "heart": _heart,
    "moon": _moon,
    "house": _house,
    "tree": _tree,
    "fish": _fish,
    "flower": _flower,
    "mushroom": _mushroom,
}


def _color(hue: Tensor, saturation: float, value: float) -> Tensor:
    """HSV to RGB. hue [n] in turns -> [n, 3, 1, 1]."""
    channel = torch.tensor([5.0, 3.0, 1.0], device=hue.device)
    k = (channel + 6 * hue[:, None]) % 6
    rgb = value * (1 - saturation * torch.minimum(k, 4 - k).clamp(0, 1))
    return rgb[:, :, None, None]


def _mix(below: Tensor, above: Tensor, alpha: Tensor) -> Tensor:
    """Paints `above` over `below` where alpha [n, SIZE, SIZE] is one."""
    return below + (above - below) * alpha[:, None]


def _inside(distance: Tensor, softness: float = 1.0) -> Tensor:
    return (0.5 - distance * SIZE / 2 / softness).clamp(0, 1)


def _stroke(distance: Tensor, width: float) -> Tensor:
    """One along the contour, `width` in pixels."""
    return (0.5 + width / 2 - distance.abs() * SIZE / 2).clamp(0, 1)


def _pixels() -> tuple[Tensor, Tensor]:
    row, column = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    return column.float(), row.float()


def _gray(value: float) -> Tensor:
    return torch.full((1, 3, 1, 1), value)


def _sketch(shape: _Shape, hue: Tensor, noise: Tensor) -> Tensor:
    column, row = _pixels()
    hatch = (((column + row) % 8) < 2).float()
    canvas = _mix(_gray(0.96), _gray(0.55), hatch * _inside(shape.body))
    canvas = _mix(canvas, _gray(0.72), _inside(shape.accent))
    return _mix(canvas, _gray(0.12), torch.maximum(_stroke(shape.body, 2.2), _stroke(shape.accent, 2.2)))


def _neon(shape: _Shape, hue: Tensor, noise: Tensor) -> Tensor:
    night = torch.tensor([0.03, 0.02, 0.09]).view(1, 3, 1, 1)
    tube, second = _color(hue, 0.9, 1.0), _color(hue + 0.33, 0.9, 1.0)
    glow = torch.exp(-shape.body.abs() * 9)[:, None] * tube + torch.exp(-shape.accent.abs() * 9)[:, None] * second
    core = torch.maximum(_stroke(shape.body, 1.6), _stroke(shape.accent, 1.6))
    return _mix((night + 0.85 * glow).clamp(0, 1), _gray(1.0), 0.8 * core)


def _mosaic(shape: _Shape, hue: Tensor, noise: Tensor) -> Tensor:
    column, row = _pixels()
    half = CELL // 2
    tiles = noise[:, : SIZE // half, : SIZE // half].repeat_interleave(half, 1).repeat_interleave(half, 2)
    canvas = _mix(_color(hue + 0.5, 0.35, 0.72), _color(hue, 0.75, 0.9), _inside(shape.body))
    canvas = _mix(canvas, _color(hue + 0.15, 0.7, 0.6), _inside(shape.accent))
    canvas = (canvas * (0.88 + 0.24 * tiles[:, None])).clamp(0, 1)
    grout = ((column % half == 0) | (row % half == 0)).float().expand_as(shape.body)
    return _mix(canvas, _gray(0.25), 0.75 * grout)


def _watercolor(shape: _Shape, hue: Tensor, noise: Tensor) -> Tensor:
    coarse = noise[:, None, : SIZE // CELL, : SIZE // CELL]
    wash = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic", align_corners=False)[:, 0]
    paper = torch.tensor([0.98, 0.96, 0.92]).view(1, 3, 1, 1)
    edge = 0.08 * (wash - 0.5)
    canvas = _mix(paper, _color(hue, 0.55, 0.85), _inside(shape.body + edge, 5.0) * (0.5 + 0.5 * wash).clamp(0, 1))
    canvas = _mix(canvas, _color(hue + 0.12, 0.6, 0.7), _inside(shape.accent + edge, 4.0) * 0.85)
    return _mix(canvas, _color(hue, 0.7, 0.6), 0.25 * _stroke(shape.body + edge, 3.0))


def _pop_art(shape: _Shape, hue: Tensor, noise: Tensor) -> Tensor:
    column, row = _pixels()
    dots = (2.4 - torch.hypot(column % CELL - 3.5, row % CELL - 3.5)).clamp(0, 1).expand_as(shape.body)
    canvas = _mix(_color(hue + 0.5, 0.85, 1.0), _color(hue + 0.62, 0.9, 0.85), dots)
    canvas = _mix(canvas, _color(hue, 0.9, 1.0), _inside(shape.body))
    canvas = _mix(canvas, _gray(1.0), _inside(shape.accent))
    return _mix(canvas, _gray(0.02), torch.maximum(_stroke(shape.body, 3.5), _stroke(shape.accent, 3.0)))


def _woodcut(shape: _Shape, hue: Tensor, noise: Tensor) -> Tensor:
    _, row = _pixels()
    paper = torch.tensor([0.87, 0.77, 0.58]).view(1, 3, 1, 1)
    ink = torch.tensor([0.16, 0.09, 0.06]).view(1, 3, 1, 1)
    carved = ((row % CELL) < 5).float()
    sparse = ((row % CELL) < 2).float()
    canvas = _mix(paper, ink, 0.45 * sparse * (1 - _inside(shape.outline)))
    canvas = _mix(canvas, ink, carved * _inside(shape.body))
    return _mix(canvas, ink, torch.maximum(_inside(shape.accent), _stroke(shape.body, 2.5)))


_PAINTERS: dict[str, Callable[[_Shape, Tensor, Tensor], Tensor]] = {
    "sketch": _sketch,
    "neon": _neon,
    "mosaic": _mosaic,
    "watercolor": _watercolor,
    "pop art": _pop_art,
    "woodcut": _woodcut,
}


def draw(obj: str, style: str, count: int, seed: int) -> Tensor:
    """Draws `count` pictures of one object in one style.

    Returns [count, 3, 64, 64] float32 in [0, 1], in steps of 1/255. The same arguments give the same pictures.
    """
    if obj not in _SHAPES or style not in _PAINTERS:
        raise ValueError(f"draw: expected an object of {OBJECTS} and a style of {STYLES}, got {obj!r}, {style!r}")
    generator = torch.Generator().manual_seed(seed * 1000 + OBJECTS.index(obj) * 10 + STYLES.index(style))

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    place_x, place_y, scale = uniform(-0.22, 0.22), uniform(-0.22, 0.22), uniform(0.62, 0.85)
    tilt, hue = uniform(-0.22, 0.22), uniform(0, 1)
    noise = torch.rand(count, SIZE, SIZE, generator=generator)
    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    x = (axis[None, None, :] - place_x[:, None, None]) / scale[:, None, None]
    y = (axis[None, :, None] - place_y[:, None, None]) / scale[:, None, None]
    cos, sin = tilt.cos()[:, None, None], tilt.sin()[:, None, None]
    shape = _SHAPES[obj](x * cos + y * sin, y * cos - x * sin)
    scaled = _Shape(shape.body * scale[:, None, None], shape.accent * scale[:, None, None])
    return _PAINTERS[style](scaled, hue, noise).clamp(0, 1).mul(255).round() / 255


@dataclass
class Pictures:
    """A drawn data set. images [n, 3, 64, 64] float32 in [0, 1]; objects, styles [n] int64 class indices."""

    images: Tensor
    objects: Tensor
    styles: Tensor


def draw_all(per_combination: int, seed: int) -> Pictures:
    """`per_combination` pictures of every object in every style, objects outermost."""
    images, objects, styles = [], [], []
    for o, obj in enumerate(OBJECTS):
        for s, style in enumerate(STYLES):
            images.append(draw(obj, style, per_combination, seed))
            objects.append(torch.full((per_combination,), o))
            styles.append(torch.full((per_combination,), s))
    return Pictures(torch.cat(images), torch.cat(objects), torch.cat(styles))
