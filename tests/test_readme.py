"""README.md: short, its figures rendered from committed results, its names and commands real."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import saemnesia_fast
from saemnesia_fast.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _render():
    spec = importlib.util.spec_from_file_location("render", ROOT / "benchmarks" / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_every_figure_is_the_rendered_one():
    render = _render()
    for name in render.FIGURES:
        assert f"<!-- {name} -->" in README, name
    assert render.render(README) == README


def test_a_figure_that_was_typed_by_hand_is_found():
    render = _render()
    changed = re.sub(r"UA \d+", "UA 42", README, count=1)
    assert changed != README
    assert render.render(changed) == README


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_examples_parse_and_name_what_exists(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module == "saemnesia_fast":
            for alias in node.names:
                assert hasattr(saemnesia_fast, alias.name)


def test_commands_of_the_readme_exist():
    for name in re.findall(r"saemnesia-fast ([a-z]+)", README):
        assert name in COMMANDS, name


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
