"""Small plots as SVG text: bars with intervals, and lines with bands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

COLOURS = (
    *("#3366aa", "#cc6633", "#559944", "#aa4488", "#777777", "#cc9922", "#338899", "#884422"),
    *("#99aa33", "#5544aa", "#dd7799", "#224455", "#66bbaa", "#aa8866"),
)
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 720, 250, 46, 26, 30
LEGEND = 18

Value = tuple[float, float | None]
"""A mean, and half the width of its interval where there is one."""


def bars(title: str, groups: Mapping[str, Mapping[str, Value]]) -> str:
    """{group on the axis: {series: percent}} as bars beside each other, the intervals as whiskers."""
    series = list(dict.fromkeys(name for values in groups.values() for name in values))
    body = []
    room = (WIDTH - LEFT - 10) / max(1, len(groups))
    wide = room * 0.84 / max(1, len(series))
    for g, (group, values) in enumerate(groups.items()):
        left = LEFT + room * (g + 0.08)
        body.append(_text(left + room * 0.42, HEIGHT - BOTTOM + 16, group, "middle"))
        for name, (mean, width) in values.items():
            x = left + wide * series.index(name)
            top, label = _y(mean), f"{name}, {group}: {_number(mean, width)}"
            body.append(
                f'<rect x="{x:.1f}" y="{top:.1f}" width="{max(1.0, wide - 2):.1f}" height="{_y(0) - top:.1f}" '
                f'fill="{_colour(series, name)}"><title>{escape(label)}</title></rect>'
            )
            if width:
                middle = x + (wide - 2) / 2
                body.append(_line([(middle, _y(mean - width)), (middle, _y(mean + width))], "#222", 1.2))
    return _frame(title, body, series)


def lines(title: str, series: Mapping[str, Sequence[Value]]) -> str:
    """{name: percent at 1, 2, ...}, with intervals as bands."""
    longest = max(map(len, series.values()), default=1)
    step = (WIDTH - LEFT - 30) / max(1, longest - 1)
    body = [_text(LEFT + step * n, HEIGHT - BOTTOM + 16, str(n + 1), "middle") for n in range(longest)]
    for name, values in series.items():
        colour = _colour(list(series), name)
        upper = [(LEFT + step * n, _y(mean + (width or 0))) for n, (mean, width) in enumerate(values)]
        lower = [(LEFT + step * n, _y(mean - (width or 0))) for n, (mean, width) in enumerate(values)]
        band = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*upper, *reversed(lower)])
        body.append(f'<polygon points="{band}" fill="{colour}" opacity="0.15"/>')
        points = [(LEFT + step * n, _y(mean)) for n, (mean, _) in enumerate(values)]
        body.append(_line(points, colour, 2))
        for (x, y), (mean, width) in zip(points, values, strict=True):
            label = escape(f"{name}: {_number(mean, width)}")
            body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{label}</title></circle>')
    return _frame(title, body, list(series))


def _frame(title: str, body: list[str], series: list[str]) -> str:
    """Axis from 0 to 100 percent, title above, legend below."""
    columns = 4
    tall = HEIGHT + LEGEND * -(-len(series) // columns) + 4
    parts = [_text(LEFT, 15, title, "start", "bold")]
    for percent in range(0, 101, 20):
        parts.append(_line([(LEFT, _y(percent)), (WIDTH - 10, _y(percent))], "#ddd", 1))
        parts.append(_text(LEFT - 6, _y(percent) + 4, str(percent), "end"))
    for n, name in enumerate(series):
        x, y = LEFT + (n % columns) * (WIDTH - LEFT) / columns, HEIGHT + LEGEND * (n // columns)
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="10" height="10" fill="{_colour(series, name)}"/>')
        parts.append(_text(x + 15, y + 9, name, "start"))
    return f'<svg viewBox="0 0 {WIDTH} {tall}" width="{WIDTH}" role="img">{"".join([*parts, *body])}</svg>'


def _y(percent: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(100.0, max(0.0, percent)) / 100)


def _colour(series: Sequence[str], name: str) -> str:
    return COLOURS[series.index(name) % len(COLOURS)]


def _number(mean: float, width: float | None) -> str:
    return f"{mean:.1f}" + (f" ± {width:.1f}" if width is not None else "")


def _line(points: Sequence[tuple[float, float]], colour: str, width: float) -> str:
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, anchor: str, weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" font-weight="{weight}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )
