"""Renders the figures of README.md from committed results: `python benchmarks/render.py` rewrites them in place.

A figure stands between `<!-- NAME -->` and `<!-- /NAME -->`; nobody types one by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EVALUATION = ROOT / "benchmarks" / "results" / "minicanvas.json"
DEMO = ROOT / "benchmarks" / "results" / "demo.json"
RECORD = ROOT / "saemnesia_fast" / "minicanvas" / "weights" / "record.json"


def erasure_table() -> str:
    """Mean scores of every concept of MiniCanvas, each erased alone."""
    report = _read(EVALUATION)
    lines = [
        "| erased, one at a time | UA | IRA | CRA | debris |",
        "|---|---|---|---|---|",
    ]
    for kind in ("object", "style"):
        mean = report[kind]["mean"]
        count = len(report[kind]["concepts"])
        scores = " | ".join(f"{mean[name]:.1f}" for name in ("UA", "IRA", "CRA", "debris"))
        lines.append(f"| {count} {kind}s | {scores} |")
    lines += ["", f"Percent, means over the concepts, {report['images_per_concept']} pictures each; {_device(report)}."]
    return "\n".join(lines)


def demo_time() -> str:
    """Seconds per picture of the demo whose picture is shown."""
    report = _read(DEMO)
    seconds = report["seconds_per_image"]
    return (
        f"`saemnesia-fast demo` without {' and '.join(report['erased'])}: UA {report['UA']:.1f}, "
        f"IRA {report['IRA']:.1f}, CRA {report['CRA']:.1f} on {report['images']} pictures; "
        f"{seconds['before']:.3f} s a picture before, {seconds['after']:.3f} s after."
    )


def training_record() -> str:
    """What MiniCanvas is and what it took to make."""
    record = _read(RECORD)
    stages = record["stages"]
    generated = stages["unet"]["generated_accuracy"]
    fvu = [one["fvu"] for one in stages["sparse_autoencoders"].values() if isinstance(one, dict)]
    return (
        f"The committed weights took {record['total_minutes']:.0f} minutes from nothing, on "
        f"{record['machine']['threads']} of {record['machine']['cores']} CPU cores: "
        f"of its pictures {100 * generated['object']:.1f} % of objects and {100 * generated['style']:.1f} % of styles "
        f"are recognised, and its SAEs leave {100 * min(fvu):.1f} to {100 * max(fvu):.1f} % of the "
        "variance unexplained."
    )


FIGURES: dict[str, Callable[[], str]] = {
    "erasure-table": erasure_table,
    "demo-time": demo_time,
    "training-record": training_record,
}


def render(text: str) -> str:
    """`text` with every figure replaced by what the results say."""
    for name, figure in FIGURES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda found, figure=figure: f"{found[1]}{figure()}\n{found[2]}", text)
    return text


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _device(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, diffusers {machine['diffusers']}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text(encoding="utf-8")), encoding="utf-8")
