"""The HTML report of an evaluation: one file, with its tables, plots and pictures inside."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from . import plots
from .metrics import DEBRIS_BELOW
from .outcome import erased_indices
from .units import GAP, PLAIN, Plan, Unit, in_row, shown

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .6rem 0 } td, th { padding: .2rem .7rem; text-align: right }
th { border-bottom: 1px solid #999 } td:first-child, th:first-child, .text * { text-align: left }
tr:nth-child(even) td { background: #f5f5f7 } small, .pm { color: #777 }
.grid td { padding: 1px .5rem } .grid tr:nth-child(even) td { background: none }
.grid th { font-weight: 400; border: 0 } .grid div { position: relative } .grid img { display: block }
.grid i { position: absolute; top: 0; bottom: 0; box-sizing: border-box; border: 2px solid #c81e2d }
svg { max-width: 100%; font-family: system-ui, sans-serif } summary { cursor: pointer; margin: .4rem 0 }
pre { background: #f5f5f7; padding: .6rem; overflow: auto; font-size: 12px }
"""
COLUMNS = {"UA": "UA", "IRA": "IRA", "CRA": "CRA", "retain": "retained", "average": "average", "debris": "debris"}
TITLES = {
    "single": "Erased one at a time",
    "sequence": "Erased in sequence",
    "pairs": "Erased in pairs",
}


def html(plan: Plan, summary: Mapping[str, Any]) -> str:
    """The report of what `summarize` found, with the pictures of the plan's first seed."""
    name = escape(summary["benchmark"]["name"])
    body = [f"<h1>Concept erasure on {name}</h1>", _introduction(summary)]
    body += ["<h2>Methods</h2>", _methods(summary)]
    for protocol, results in summary["protocols"].items():
        body.append(f"<h2>{TITLES[protocol]}</h2>")
        for group in _groups(results):
            body += [f"<h3>{escape(group)}</h3>", _scores(protocol, group, results), _plot(protocol, group, results)]
        body += _details(results)
    body += ["<h2>Pictures</h2>", *_pictures(plan)]
    record = {key: value for key, value in summary.items() if key != "protocols"}
    body.append(f"<details><summary>Settings and versions</summary><pre>{_json(record)}</pre></details>")
    head = f'<meta charset="utf-8"><title>Concept erasure on {name}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _introduction(summary: Mapping[str, Any]) -> str:
    percent, seeds = round(100 * summary["confidence"]), ", ".join(map(str, summary["seeds"]))
    plain, painted = summary["pictures_per_seed"], summary["pictures_per_erasure"]
    pictures = " to ".join(map(str, dict.fromkeys(painted))) + ("" if painted[0] == plain else f" of {plain}")
    counts = (
        f"{pictures} pictures for each erasure and seed, seeds {seeds}. Percent, means over the "
        f"erased concepts, ± half the {percent} % t-interval over the seeds."
    )
    scores = (
        "UA: pictures that ask for an erased concept and show another. IRA: other concepts of its kind that are "
        "recognised (in a sequence: RA, of the never erased). CRA: the same for the other kind. Retained: mean of IRA "
        "and CRA. Average: mean of UA, IRA and CRA. Debris: erased pictures whose best object probability is below "
        f"{DEBRIS_BELOW}. FID: of the retained pictures from the plain ones of the same requests; features: "
        f"{escape(summary['benchmark']['features'])}."
    )
    return f"<p>{counts}</p><p>{scores}</p>"


def _methods(summary: Mapping[str, Any]) -> str:
    rows = [
        [one["name"], one["source"], f"{one['seconds_per_picture']:.4f}", f"{one['seconds_to_get_ready']:.2f}"]
        for one in summary["methods"]
    ]
    return _table(["method", "source", "s a picture", "s to get ready"], [map(escape, row) for row in rows], "text")


def _groups(results: Mapping[str, Any]) -> list[str]:
    return list(next(iter(results.values())))


def _scores(protocol: str, group: str, results: Mapping[str, Any]) -> str:
    first = "RA" if protocol == "sequence" else "IRA"
    last = next(iter(results.values()))[group]["cases"][-1]["erased"]
    rows = []
    for method, groups in results.items():
        scores = groups[group]["scores"]
        fid = groups[group]["fid"]
        rows.append([escape(method), *(_cell(scores[name]) for name in COLUMNS), "" if fid is None else f"{fid:.2f}"])
    note = f"<p><small>After {escape(', '.join(last))}.</small></p>" if protocol == "sequence" else ""
    heads = [first if name == "IRA" else label for name, label in COLUMNS.items()]
    return note + _table(["method", *heads, "FID"], rows)


def _plot(protocol: str, group: str, results: Mapping[str, Any]) -> str:
    if protocol != "sequence":
        values = {
            name: {method: _value(groups[group]["scores"][name]) for method, groups in results.items()}
            for name in ("UA", "IRA", "CRA", "debris")
        }
        return plots.bars(group, values)
    return "".join(
        plots.lines(
            f"{label}, {group}s erased so far",
            {method: [_value(c["scores"][name]) for c in groups[group]["cases"]] for method, groups in results.items()},
        )
        for name, label in (("UA", "UA of all erased"), ("IRA", "RA of the never erased"))
    )


def _details(results: Mapping[str, Any]) -> list[str]:
    found = []
    for method, groups in results.items():
        rows = [
            [escape(" + ".join(case["erased"])), *(_cell(case["scores"][name]) for name in COLUMNS)]
            for group in groups.values()
            for case in group["cases"]
        ]
        table = _table(["erased", *COLUMNS.values()], rows)
        found.append(f"<details><summary>{escape(method)}: every case</summary>{table}</details>")
    return found


def _pictures(plan: Plan) -> list[str]:
    """For every method a grid: a row for each set of erased concepts, the same requests in every row.

    Places of requests that a row's unit did not paint stay empty.
    Pairs are shown if nothing else was asked for, as there are so many; their pictures are in the plan's folder.
    """
    seed, classes = plan.seeds[0], plan.benchmark.classes
    cases = [case for case in plan.cases if case.protocol != "pairs"] or plan.cases
    wanted = plan.wanted((), seed)
    columns = [wanted[n] for n in shown(wanted, classes)]
    prompts = escape("; ".join(one.prompt for one in columns))
    found = [f"<p><small>Left to right: {prompts}. Seed {seed}. In a frame: asks for an erased concept.</small></p>"]
    for method in plan.methods:
        units = {unit.path: unit for unit in (plan.unit(method, case.erased, seed) for case in cases)}
        erased = [unit for unit in units.values() if unit.erased]
        rows = []
        for unit in [plan.unit(PLAIN, (), seed), *erased]:
            some = erased_indices(classes, unit.erased)
            hits = [any(getattr(one, kind) in some[kind] for kind in classes) for one in columns]
            own = plan.wanted(unit.erased, seed)
            painted = {(own[n].prompt, own[n].seed): place for place, n in enumerate(shown(own, classes))}
            places = [painted.get((one.prompt, one.seed)) for one in columns]
            label = escape(" + ".join(unit.erased) or "nothing erased")
            rows.append(f"<tr><th>{label}</th><td>{_image(unit, places, hits)}</td></tr>")
        if erased:
            opened = " open" if len(found) == 1 else ""
            grid = f'<table class="grid">{"".join(rows)}</table>'
            found.append(f"<details{opened}><summary>{escape(method.name)}</summary>{grid}</details>")
    return found


def _image(unit: Unit, places: Sequence[int | None], hits: Sequence[bool]) -> str:
    """The pictures at these places of the unit's row, in 256 colours, frames where an erased concept is asked for."""
    png = io.BytesIO()
    with Image.open(unit.picture) as picture:
        size = picture.height
        left = [None if n is None else n * (size + GAP) for n in places]
        row = in_row([None if x is None else picture.crop((x, 0, x + size, size)) for x in left], size)
    row.quantize(256).save(png, format="PNG", optimize=True)
    data = base64.b64encode(png.getvalue()).decode()
    wide = 100 / max(1, len(hits))
    frames = "".join(f'<i style="left:{n * wide:.3f}%;width:{wide:.3f}%"></i>' for n, hit in enumerate(hits) if hit)
    return f'<div><img alt="" src="data:image/png;base64,{data}">{frames}</div>'


def _value(score: Mapping[str, float | None]) -> plots.Value:
    return score["mean"] or 0.0, score["plus_minus"]


def _cell(score: Mapping[str, float | None]) -> str:
    mean, width = _value(score)
    return f"{mean:.1f}" + (f' <span class="pm">± {width:.1f}</span>' if width is not None else "")


def _table(heads: Sequence[str], rows: Iterable[Iterable[str]], look: str = "") -> str:
    head = "".join(f"<th>{escape(one)}</th>" for one in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="{look}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _json(value: Any) -> str:
    return escape(json.dumps(value, indent=1, ensure_ascii=False))
