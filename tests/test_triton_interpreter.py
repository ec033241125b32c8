"""The Triton kernels in Triton's interpreter, on the CPU.

Whether it interprets is decided when Triton is imported, which others do before the tests run: so each file of
tests/interpreted runs in a process of its own. `TRITON_INTERPRET=1 pytest tests/interpreted/erase.py` runs one alone.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("name", sorted(path.stem for path in (TESTS / "interpreted").glob("*.py")))
def test_interpreted(name: str) -> None:
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-c", TESTS.parent / "pyproject.toml", "-q", "--tb=short", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [sys.executable, "-c", code, *options, TESTS / "interpreted" / f"{name}.py"],
        cwd=TESTS,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
