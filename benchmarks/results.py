"""Rows of measurements: where they come from, the CSV that keeps them, the table that shows them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saemnesia_fast.files import write_atomic

if TYPE_CHECKING:
    from harness import Case

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Stamp:
    """What a measurement was made of and on."""

    commit: str
    date: str
    machine: str
    cores: int
    threads: int
    torch: str
    triton: str


@dataclass
class Row:
    """One provider at one case; what was not measured is None."""

    commit: str
    date: str
    machine: str
    cores: int
    threads: int
    torch: str
    triton: str
    op: str
    M: int
    d: int
    N: int
    k: int
    dtype: str
    weights: str
    variant: str
    flagged: int | None
    provider: str
    status: str = ""
    """"ok", or "absent: why", or "failed: why"."""
    timing: str = ""
    """"wall", "events" or "graph"."""
    samples: int | None = None
    error: float | None = None
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    floor_us: float | None = None
    of_floor: float | None = None
    """Percent."""
    baseline: str = ""
    vs_baseline: float | None = None
    """Times as fast as the baseline."""
    vs_best: float | None = None
    """Times as fast as the fastest competitor."""

    @classmethod
    def of(cls, stamp: Stamp, case: Case, provider: str, floor_us: float) -> Row:
        return cls(**asdict(stamp), **asdict(case), provider=provider, floor_us=floor_us or None)

    @classmethod
    def from_text(cls, line: dict[str, str]) -> Row:
        return cls(**{field.name: _parse(str(field.type), line.get(field.name, "")) for field in fields(cls)})


def types(one: Row | Case) -> str:
    """The dtypes of tokens and weights, named once where they are the same."""
    return f"{one.dtype} x {one.weights}" if one.weights else one.dtype


def _parse(kind: str, text: str) -> Any:
    if kind.endswith("None") and text == "":
        return None
    return {"int": int, "float": float, "str": str}[kind.split(" ")[0]](text)


def append_csv(rows: Iterable[Row], path: Path) -> None:
    """Add rows, all of one kind, at the end of the file, whose columns become theirs."""
    if rows := list(rows):
        write_csv([*(read_csv(path, type(rows[0])) if path.exists() else []), *rows], path)


def write_csv(rows: list[Row], path: Path) -> None:
    """Write rows, all of one kind, and nothing else."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in fields(rows[0] if rows else Row)])
    writer.writeheader()
    writer.writerows(as_records(rows))
    write_atomic(path, text.getvalue().encode())


def read_csv(path: Path, kind: type[Row] = Row) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return [kind.from_text(line) for line in csv.DictReader(file)]


def as_records(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The rows as JSON takes them."""
    return [{name: _rounded(value) for name, value in asdict(row).items()} for row in rows]


def from_records(records: Iterable[dict[str, Any]], kind: type[Row] = Row) -> list[Row]:
    return [kind(**record) for record in records]


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _short(microseconds: float) -> str:
    return f"{microseconds:.0f}" if microseconds >= 1000 else f"{microseconds:.1f}"


COLUMNS = {
    "op": lambda row: row.op,
    "case": lambda row: ", ".join(filter(None, [row.variant, "" if row.flagged is None else f"{row.flagged} flagged"])),
    "M": lambda row: str(row.M),
    "dtype": types,
    "provider": lambda row: row.provider,
    "p50 us": lambda row: row.status[:80] if row.p50_us is None else _short(row.p50_us),
    "p20-p80": lambda row: "" if row.p50_us is None else f"{_short(row.p20_us)}-{_short(row.p80_us)}",
    "% of floor": lambda row: "" if row.of_floor is None else f"{row.of_floor:.0f}",
    "x baseline": lambda row: "" if row.vs_baseline is None else f"{row.vs_baseline:.2f}",
    "x best": lambda row: "" if row.vs_best is None else f"{row.vs_best:.2f}",
}


def table(rows: Iterable[Row]) -> str:
    """The rows for people, aligned."""
    return aligned([list(COLUMNS), *([show(row) for show in COLUMNS.values()] for row in rows)])


def aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
