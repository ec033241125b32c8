"""Small plots as SVG text: bars with intervals, and lines with bands."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = (
    *("#3366aa", "#cc6633", "#559944", "#aa4488", "#777777", "#cc9922", "#338899", "#884422"),
    *("#99aa33", "#5544aa", "#dd7799", "#224455", "#66bbaa", "#aa8866"),
    *("#cc3355", "#666600"),
)
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 720, 250, 46, 26, 30
LEGEND, LETTER = 18, 6
"""Height of a line of the legend, width of a letter in it."""
LABELS = 20
"""At most so many along the axis of a line plot."""

Value = tuple[float, float | None]
"""A mean, and half the width of its interval where there is one."""


def bars(title: str, groups: Mapping[str, Mapping[str, Value]], top: float = 100.0) -> str:
    """{group on the axis: {series: 0 to top}} as bars beside each other, the intervals as whiskers.

    Names of groups that have no room beside each other are written slanted.
    """
    series = list(dict.fromkeys(name for values in groups.values() for name in values))
    body = []
    room = (WIDTH - LEFT - 10) / max(1, len(groups))
    wide = room * 0.84 / max(1, len(series))
    longest = LETTER * max(map(len, groups), default=0)
    slant = 60 if longest > room else 0
    for g, (group, values) in enumerate(groups.items()):
        left = LEFT + room * (g + 0.08)
        anchor = "end" if slant else "middle"
        body.append(_text(left + room * 0.42, HEIGHT - BOTTOM + 16, group, anchor, slant=slant))
        for name, (mean, width) in values.items():
            x = left + wide * series.index(name)
            upper, label = _y(mean, top), f"{name}, {group}: {_number(mean, width, top)}"
            body.append(
                f'<rect x="{x:.1f}" y="{upper:.1f}" width="{max(1.0, wide - 2):.1f}" height="{_y(0) - upper:.1f}" '
                f'fill="{_colour(series, name)}"><title>{escape(label)}</title></rect>'
            )
            if width:
                middle = x + (wide - 2) / 2
                body.append(_line([(middle, _y(mean - width, top)), (middle, _y(mean + width, top))], "#222", 1.2))
    return _frame(title, body, series, top, longest * math.sin(math.radians(slant)))


def lines(
    title: str, series: Mapping[str, Sequence[Value]], top: float = 100.0, labels: Sequence[str] | None = None
) -> str:
    """{name: 0 to top at each label, by default 1, 2, ...}, with intervals as bands."""
    longest = max(map(len, series.values()), default=1)
    step = (WIDTH - LEFT - 30) / max(1, longest - 1)
    labels = labels or [str(n + 1) for n in range(longest)]
    shown = range(0, longest, -(-longest // LABELS))
    body = [_text(LEFT + step * n, HEIGHT - BOTTOM + 16, labels[n], "middle") for n in shown]
    for name, values in series.items():
        colour = _colour(list(series), name)
        upper = [(LEFT + step * n, _y(mean + (width or 0), top)) for n, (mean, width) in enumerate(values)]
        lower = [(LEFT + step * n, _y(mean - (width or 0), top)) for n, (mean, width) in enumerate(values)]
        band = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*upper, *reversed(lower)])
        body.append(f'<polygon points="{band}" fill="{colour}" opacity="0.15"/>')
        points = [(LEFT + step * n, _y(mean, top)) for n, (mean, _) in enumerate(values)]
        body.append(_line(points, colour, 2))
        for (x, y), (mean, width) in zip(points, values, strict=True):
            label = escape(f"{name}: {_number(mean, width, top)}")
            body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{label}</title></circle>')
    return _frame(title, body, list(series), top)


def ceiling(values: Sequence[float]) -> float:
    """A round number that is none too small for an axis of `values`: 1, 2 or 5 times a power of ten."""
    highest = max(values, default=0.0)
    if highest < 1e-9:
        return 1.0
    power = 10.0 ** math.floor(math.log10(highest))
    return next(n * power for n in (1, 2, 5, 10, 20) if n * power >= highest)


def standalone(svg: str) -> str:
    """A plot as a file of its own."""
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" ', 1)


def _frame(title: str, body: list[str], series: list[str], top: float, below: float = 0.0) -> str:
    """Axis from 0 to top, title above, legend `below` the usual place."""
    longest = max((len(name) for name in series), default=0)
    columns = max(1, min(4, (WIDTH - LEFT) // (25 + LETTER * longest)))
    legend = HEIGHT + round(below)
    tall = legend + LEGEND * -(-len(series) // columns) + 4
    parts = [_text(LEFT, 15, title, "start", "bold")]
    for fifths in range(6):
        y = _y(fifths, 5)
        parts.append(_line([(LEFT, y), (WIDTH - 10, y)], "#ddd", 1))
        parts.append(_text(LEFT - 6, y + 4, f"{fifths * top / 5:.3g}", "end"))
    for n, name in enumerate(series):
        x, y = LEFT + (n % columns) * (WIDTH - LEFT) / columns, legend + LEGEND * (n // columns)
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="10" height="10" fill="{_colour(series, name)}"/>')
        parts.append(_text(x + 15, y + 9, name, "start"))
    return f'<svg viewBox="0 0 {WIDTH} {tall}" width="{WIDTH}" role="img">{"".join([*parts, *body])}</svg>'


def _y(value: float, top: float = 100.0) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(top, max(0.0, value)) / top)


def _colour(series: Sequence[str], name: str) -> str:
    return COLOURS[series.index(name) % len(COLOURS)]


def _number(mean: float, width: float | None, top: float) -> str:
    digits = 1 if top >= 100 else 2
    return f"{mean:.{digits}f}" + (f" ± {width:.{digits}f}" if width is not None else "")


def _line(points: Sequence[tuple[float, float]], colour: str, width: float) -> str:
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, anchor: str, weight: str = "normal", slant: int = 0) -> str:
    turn = f' transform="rotate({-slant} {x:.1f} {y:.1f})"' if slant else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" font-weight="{weight}" text-anchor="{anchor}"{turn}>'
        f"{escape(text)}</text>"
    )
