"""README.md and the other pages: short, their figures rendered from committed results, names and commands real."""

import ast
import json
import re
from pathlib import Path

import pytest

import harness
import render
import results
import saemnesia_fast
from saemnesia_fast.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = list(render.FIGURES)
MACHINE = {"machine": "a machine", "torch": "2.13.0", "commit": "abc"}


@pytest.mark.parametrize(("name", "lines"), [("README.md", 150), ("docs/kernels.md", 150)])
def test_pages_are_short(name, lines):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= lines


@pytest.mark.parametrize("name", FILES)
def test_every_figure_is_the_rendered_one(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    markers = re.findall(r"<!-- ([a-z-]+) -->\n(?:.*?)<!-- /\1 -->", text, re.DOTALL)
    assert sorted(markers) == sorted(render.FIGURES[name])
    assert render.render(name, text) == text


def test_a_figure_that_was_typed_by_hand_is_found():
    changed = re.sub(r"UA \d+", "UA 42", README, count=1)
    assert changed != README
    assert render.render("README.md", changed) == README


def test_the_demo_of_the_backends_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(render, "DEMO_BACKENDS", tmp_path / "demo_backends.json")
    assert render.demo_backends() == render.NOT_YET
    times = [("plain", 0.1, 0.0), ("eager", 0.11, 10.0), ("cpu", 0.101, 1.0)]
    seconds = {name: {"p20": p50, "p50": p50, "p80": p50, "percent_longer": longer} for name, p50, longer in times}
    report = {"seconds_per_picture": seconds, "rounds": 7, "pictures_a_round": 48, "threads": 2, **MACHINE}
    render.DEMO_BACKENDS.write_text(json.dumps(report))
    assert render.demo_backends() == (
        "A picture of MiniCanvas takes 0.1000 s plain, 0.1100 s erased by `eager` (+10.0 %), 0.1010 s erased by `cpu` "
        "(+1.0 %): medians of 7 rounds of 48 pictures, percent against the plain picture of the same round; a machine, "
        "2 threads, torch 2.13.0, abc."
    )


def test_the_cpu_table_shows_our_backend_against_baseline_and_best_other(tmp_path, monkeypatch):
    monkeypatch.setattr(render, "OPS", tmp_path / "ops.csv")
    assert render.cpu_ops() == render.NOT_YET
    results.append_csv(
        [
            _row("released hook", 8000.0, 1.0, 0.75),
            _row("torch.compile", 6000.0, 1.33, 1.0),
            _row("ours eager", 5000.0, 1.6, 1.2),
            _row("ours cpu", 100.0, 80.0, 60.0),
        ],
        render.OPS,
    )
    lines = render.cpu_ops().splitlines()
    assert lines[2] == "| erase | exact, 16 flagged | 512 | released hook 8 | 0.1 (0.09-0.11) | 80 | 60 |"
    assert lines[4] == "d = 1280, N = 20480, k = 32, float32; a machine, 2 threads, torch 2.13.0, abc."


def test_every_budget_is_in_the_table_of_kernels():
    budgets = json.loads(render.BUDGETS.read_text(encoding="utf-8"))
    header, _, *rows = (line.split("|")[1:-1] for line in render.aot_table().splitlines())
    cells = {
        f"{row[0].strip(' `')} {column.strip()}": cell.split()
        for row in rows
        for column, cell in zip(header[1:], row[1:], strict=True)
        if cell.strip()
    }
    assert cells.keys() == budgets.keys()
    for name, (registers, _, kib, *matrix) in cells.items():
        assert int(registers) == budgets[name]["registers"]
        assert float(kib) == pytest.approx(budgets[name]["shared"] / 1024, rel=5e-3)
        assert matrix == ([budgets[name]["matrix"]] if budgets[name]["matrix"] else [])


def _row(provider, microseconds, vs_baseline, vs_best):
    stamp = results.Stamp(date="2026-01-01", cores=2, threads=2, triton="3.6.0", **MACHINE)
    case = harness.Case("erase", M=512, variant="exact", flagged=16)
    row = results.Row.of(stamp, case, provider, 10.0)
    row.status, row.baseline, row.vs_baseline, row.vs_best = "ok", "released hook", vs_baseline, vs_best
    row.p20_us, row.p50_us, row.p80_us = 0.9 * microseconds, microseconds, 1.1 * microseconds
    return row


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_examples_parse_and_name_what_exists(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module == "saemnesia_fast":
            for alias in node.names:
                assert hasattr(saemnesia_fast, alias.name)


def test_commands_of_the_readme_exist():
    for name in re.findall(r"saemnesia-fast ([a-z]+)", README):
        assert name in COMMANDS, name


@pytest.mark.parametrize("name", [*FILES, "benchmarks/README.md"])
def test_links_to_files_lead_somewhere(name):
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
