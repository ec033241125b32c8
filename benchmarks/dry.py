"""What the GPU command would measure, without a GPU: shapes, bytes, FLOPs, floors on an H100, registers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from machine import H100
from results import aligned, types

BUDGETS = Path(__file__).resolve().parents[1] / "tests" / "budgets.json"


def report(ops: Sequence[str]) -> str:
    lines = [["op", "case", "M", "d", "N", "k", "dtype", "MB", "GFLOP", "floor us", "bound by"]]
    for name in ops:
        op = import_module(name)
        for case in op.cases("cuda"):
            work = op.work(case)
            floor = H100.floor_us(work)
            what = case.variant + ("" if case.flagged is None else f" {case.flagged} flagged")
            by_bytes = H100.floor_us(work._replace(flops=0)) == floor
            bound = "-" if floor == 0 else "bytes" if by_bytes else "FLOPs"
            sizes = [str(size) for size in (case.M, case.d, case.N, case.k)]
            figures = [f"{work.bytes / 1e6:.2f}", f"{work.flops / 1e9:.1f}", f"{floor:.1f}", bound]
            lines.append([name, what.strip(), *sizes, types(case), *figures])
    peaks = ", ".join(f"{dtype} {flops / 1e12:.0f} TFLOP/s" for dtype, flops in H100.flops.items())
    heading = f"floors on an H100 of {H100.bandwidth / 1e12:.1f} TB/s, {peaks} (estimates)"
    return "\n\n".join([heading, aligned(lines), registers()])


def registers() -> str:
    """What each kernel takes on each architecture, as the budgets of the tests record it."""
    if not BUDGETS.exists():
        return "registers: no budgets recorded yet"
    budgets = json.loads(BUDGETS.read_text(encoding="utf-8"))
    columns = list(dict.fromkeys(name for row in budgets.values() for name in row))
    lines = [[kernel, *(str(row.get(name, "")) for name in columns)] for kernel, row in budgets.items()]
    return aligned([["kernel", *columns], *lines])
