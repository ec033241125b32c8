"""The Triton kernels in Triton's interpreter, on the CPU.

Whether it interprets is decided when Triton is imported, which others do before the tests run: so each file of
tests/interpreted runs in a process of its own. `TRITON_INTERPRET=1 pytest tests/interpreted/erase.py` runs one alone.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NAMES = sorted(path.stem for path in (TESTS / "interpreted").glob("*.py"))


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All files at once: each keeps one core busy."""
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-c", TESTS.parent / "pyproject.toml", "-q", "--tb=short", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", code, *options, TESTS / "interpreted" / f"{name}.py"],
            cwd=TESTS,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in NAMES
    }
    yield started
    for process in started.values():
        if process.stdout and not process.stdout.closed:
            process.kill()
            process.communicate()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name: str, runs: dict[str, subprocess.Popen[str]]) -> None:
    output, _ = runs[name].communicate()
    assert runs[name].returncode == 0, output
