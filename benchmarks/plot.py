"""Draws the newest measurements of a CSV or of the GPU command's JSON: bars of p50, whiskers from p20 to p80."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness import is_ours
from results import Row, from_records, read_csv, types

COLOURS = {
    "plain": "#9aa0a6",
    "eager": "#9aa0a6",
    "dense": "#c9ccd1",
    "torch.compile": "#6b7f99",
    "released hook": "#d08770",
    "ours eager": "#88b8a0",
}
OURS, PEER = "#2a7f62", "#b9a3c9"


def newest(rows: Sequence[Row]) -> list[Row]:
    """On the machine and the threads of the last row, of each provider at each case the last measured one."""
    last = rows[-1]
    latest: dict[tuple[object, ...], Row] = {}
    for row in rows:
        if (row.machine, row.threads) == (last.machine, last.threads):
            key = (row.op, row.M, row.d, row.N, row.k, types(row), row.variant, row.flagged, row.provider)
            latest.pop(key, None)
            latest[key] = row
    return list(latest.values())


def panels(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, list[Row]]]:
    """{(op, dtypes): {case: its timed rows}}."""
    grouped: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        if row.p50_us is not None:
            case = ", ".join(
                part
                for part in (f"M={row.M}", row.variant, "" if row.flagged is None else f"{row.flagged} flagged")
                if part
            )
            grouped.setdefault((row.op, types(row)), {}).setdefault(case, []).append(row)
    return grouped


def read(source: Path) -> list[Row]:
    if source.suffix == ".json":
        return from_records(json.loads(source.read_text(encoding="utf-8"))["rows"])
    return read_csv(source)


def draw(source: Path, out: Path) -> None:
    """Writes a picture with one panel for each op and dtype, on a logarithmic axis of microseconds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = newest(read(source))
    grouped = panels(rows)
    heights = [1 + sum(len(case) + 0.8 for case in cases.values()) for cases in grouped.values()]
    figure, axes = pyplot.subplots(
        len(grouped),
        1,
        figsize=(9, 0.9 + 0.21 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, ((op, dtype), cases) in zip(axes[:, 0], grouped.items(), strict=True):
        _panel(axis, f"{op}, {dtype}", cases)
    axes[-1, 0].set_xlabel(
        "microseconds; bars p50, whiskers p20 to p80, dots the floor, x against the baseline", fontsize=7.5
    )
    last = rows[-1]
    commits = ", ".join(dict.fromkeys(row.commit for row in rows))
    figure.suptitle(f"{last.machine}, {last.threads} threads, torch {last.torch}, {commits}", fontsize=9)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def _panel(axis, title: str, cases: dict[str, list[Row]]) -> None:
    position, ticks, labels = 0.0, [], []
    for case, rows in cases.items():
        across = axis.get_yaxis_transform()
        axis.text(0.0, position - 0.1, f" {case}", transform=across, fontsize=7.5, weight="bold", va="center")
        position += 0.9
        for row in sorted(rows, key=lambda row: -row.p50_us):
            spread = [[row.p50_us - row.p20_us], [row.p80_us - row.p50_us]]
            axis.barh(position, row.p50_us, 0.8, xerr=spread, color=_colour(row.provider), error_kw={"lw": 0.8})
            axis.text(row.p80_us, position, f" {_figures(row)}", va="center", fontsize=7)
            ticks.append(position)
            labels.append(row.provider)
            position += 1
        floor = rows[0].floor_us
        if floor:
            axis.plot([floor, floor], [position - len(rows) - 0.5, position - 0.5], color="black", lw=1, ls=":")
        position += 0.3
    timed = [row for rows in cases.values() for row in rows]
    fastest = min(min(row.p20_us, row.floor_us or row.p20_us) for row in timed)
    axis.set(xscale="log", xlim=(fastest / 1.6, 3 * max(row.p80_us for row in timed)))
    axis.set(ylim=(position - 0.4, -0.8), yticks=ticks)
    axis.set_yticklabels(labels, fontsize=7.5)
    axis.set_title(title, fontsize=9)
    axis.tick_params(axis="x", which="both", labelsize=7.5)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _figures(row: Row) -> str:
    """Duration, and how many times as fast as the baseline."""
    ratio = row.vs_baseline if row.provider != row.baseline else None
    return _duration(row.p50_us) + (f", {ratio:.3g}x" if ratio else "")


def _colour(provider: str) -> str:
    return COLOURS.get(provider, OURS if is_ours(provider) else PEER)


def _duration(microseconds: float) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds:.3g} us"
