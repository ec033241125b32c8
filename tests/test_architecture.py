"""Imports run one way, nothing below the command line prints, nothing unpickles (SPEC 6.4), no file grows too long."""

import ast
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import saemnesia_fast

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted([*(ROOT / "saemnesia_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
PICKLES = {"cloudpickle", "dill", "joblib", "pickle"}

# A component imports from its own layer and those before it.
LAYERS = [
    {"kernels", "files"},
    {"ops"},
    {"sae", "hookpoints"},
    {"concepts"},
    {"erasure", "training", "convert"},
    {"evaluation", "minicanvas"},
    {"demo", "unlearn_canvas", "nudity", "eval_unlearn"},
    {"env", "cli"},
]
LAYER = {component: number for number, components in enumerate(LAYERS) for component in components}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def location(path: Path) -> list[str]:
    """The dotted name of the package that holds the file, in parts: kernels/ is saemnesia_fast.kernels."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return (["saemnesia_fast"] if parts[0] == "kernels" else []) + parts[:-1]


def component(path: Path) -> str:
    package = location(path)
    return package[1] if len(package) > 1 else path.stem


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names of everything that the file imports, wherever in the file."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = location(path)
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def calls(path: Path) -> Iterator[str]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def found(wrong: Callable[[Path], Collection[str]]) -> dict[str, Collection[str]]:
    """What is wrong in which file; empty when all is well."""
    return {path.relative_to(ROOT).as_posix(): what for path in MODULES if (what := wrong(path))}


def test_every_component_has_a_layer() -> None:
    assert {component(path) for path in MODULES} - {"__init__", "__main__"} <= set(LAYER)


def test_imports_run_one_way() -> None:
    def upward(path: Path) -> set[str]:
        here = LAYER.get(component(path), len(LAYERS))
        names = {tuple(name.split(".")) for name in imports(path) if name.startswith("saemnesia_fast.")}
        homes = {".".join(name): saemnesia_fast._HOMES.get(name[1], name[1]) for name in names}
        return {name for name, home in homes.items() if LAYER.get(home, 0) > here}

    assert found(upward) == {}


def test_kernels_and_ops_know_nothing_of_pipelines() -> None:
    def pipelines(path: Path) -> set[str]:
        packages = {name.split(".")[0] for name in imports(path)}
        return packages & {"diffusers", "transformers"} if component(path) in ("kernels", "ops") else set()

    assert found(pipelines) == {}


def test_only_the_command_line_prints() -> None:
    def prints(path: Path) -> list[str]:
        above = component(path) in ("cli", "env") or path.stem == "__main__"
        return [] if above else [call for call in calls(path) if call == "print"]

    assert found(prints) == {}


def test_nothing_unpickles_but_convert() -> None:
    def unpickles(path: Path) -> set[str]:
        if path == ROOT / "saemnesia_fast/convert/unpickle.py":  # the restricted unpickler
            return set()
        names = {*imports(path), *calls(path)}
        return {name for name in names if name == "torch.load" or name.split(".")[0] in PICKLES}

    assert found(unpickles) == {}


def test_public_code_raises_rather_than_asserts() -> None:
    def asserts(path: Path) -> list[str]:
        return [f"line {node.lineno}" for node in ast.walk(parsed(path)) if isinstance(node, ast.Assert)]

    assert found(asserts) == {}


def test_no_file_above_600_lines() -> None:
    beside = [path for folder in ("tests", "benchmarks", "csrc") for path in (ROOT / folder).rglob("*")]
    files = [path for path in [*MODULES, *beside] if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h")]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_bytes().splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > 600} == {}
