"""The C++ extension: built or not, loaded when asked for, missed aloud (SPEC 7.3)."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from saemnesia_fast import ops
from saemnesia_fast.ops import backend, cpu_backend, reference
from weights import random_tokens, random_weights, same_bits

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS, _ = random_weights(4, 9)
X = random_tokens(5, 4)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)


@pytest.fixture(autouse=True)
def _untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backend, "_selected", {})
    monkeypatch.setattr(backend, "_logged", set())
    monkeypatch.setattr(backend, "_chosen", None)
    monkeypatch.delenv("SAEMNESIA_FAST_BACKEND", raising=False)
    monkeypatch.delenv("SAEMNESIA_FAST_STRICT", raising=False)
    yield
    cpu_backend.extension.cache_clear()


def lose_extension(monkeypatch: pytest.MonkeyPatch, error: ImportError) -> None:
    def import_module(name: str) -> None:
        raise error

    monkeypatch.setattr(cpu_backend, "import_module", import_module)
    cpu_backend.extension.cache_clear()


def test_is_loaded_by_the_first_question_and_not_by_import() -> None:
    code = """
import sys
from saemnesia_fast import ops
assert "saemnesia_fast._C" not in sys.modules
ops.backend_report("meta")
assert "saemnesia_fast._C" not in sys.modules
ops.backend_report("cpu")
from saemnesia_fast.ops.cpu_backend import extension
assert getattr(extension(), "__name__", None) in (None, "saemnesia_fast._C")
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_an_absent_extension_is_logged_once_per_op_and_eager_computes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lose_extension(monkeypatch, ModuleNotFoundError("No module named 'saemnesia_fast._C'"))
    with caplog.at_level(logging.DEBUG, "saemnesia_fast"):
        values = [ops.encode_topk(X, *WEIGHTS, 3).values for _ in range(3)]
    assert all(same_bits(v, reference.encode_topk(X, *WEIGHTS, 3)[0]) for v in values)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "eager instead of cpu (the C++ extension is not built: install from source" in record.getMessage()
    assert "extension is not built" in cpu_backend.build()


def test_an_absent_extension_is_an_error_where_it_is_demanded(monkeypatch: pytest.MonkeyPatch) -> None:
    lose_extension(monkeypatch, ImportError("undefined symbol: aoti_torch_something"))
    with ops.use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu' was chosen .* does not load: undefined"):
        ops.encode_topk(X, *WEIGHTS, 3)
    monkeypatch.setenv("SAEMNESIA_FAST_STRICT", "1")
    with pytest.raises(RuntimeError, match="encode_topk: eager instead of cpu .*SAEMNESIA_FAST_STRICT=1 forbids it"):
        ops.encode_topk(X, *WEIGHTS, 3)


def test_has_no_business_on_another_device() -> None:
    assert {choice.backend for choice in ops.backend_report("meta")} == {"eager"}
    with ops.use_backend("cpu"):
        assert "computes on the CPU" in ops.backend_report("meta")[0].why


def test_build_config_names_compiler_flags_and_instruction_sets() -> None:
    module = cpu_backend.extension()
    if isinstance(module, backend.Refusal):
        pytest.skip(module.reason)
    config = module.build_config()
    assert config["instruction_set"] in config["instruction_sets"]
    assert config["instruction_sets"][-1] == "baseline"
    assert "-O3" in config["flags"].split(",")
    assert config["compiler"].split()[0] in ("GCC", "Clang", "Apple")
    assert config["compiler"] in cpu_backend.build()
    with pytest.raises(ValueError, match="name: expected an instruction set of this build and this machine, got 'mmx'"):
        module.use_instruction_set("mmx")


SETUP = """
import runpy, sys, setuptools
{before}
setuptools.setup = lambda **arguments: print([module.name for module in arguments.get("ext_modules", [])])
runpy.run_path("setup.py")
"""


def test_setup_builds_the_extension_unless_told_not_to() -> None:
    wanted = "['saemnesia_fast._C']" if sys.platform != "win32" else "[]"
    assert run(SETUP.format(before=""), SAEMNESIA_FAST_BUILD="1", FORCE_CUDA="0").stdout.strip() == wanted
    assert run(SETUP.format(before=""), SAEMNESIA_FAST_BUILD="0").stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["torch", "pybind11"])
def test_setup_without_torch_or_pybind11_says_so_and_goes_on(package: str) -> None:
    done = run(SETUP.format(before=f"sys.modules[{package!r}] = None"), SAEMNESIA_FAST_BUILD="1")
    assert done.stdout.strip() == "[]"
    assert f"building without the C++ extension, as {package} cannot be imported" in done.stderr


def test_a_failing_compiler_is_one_clear_message(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "setup.py", "build_ext", "--build-temp", tmp_path / "t", "--build-lib", tmp_path]
    environment = os.environ | {"CXX": "no-such-compiler", "SAEMNESIA_FAST_BUILD": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("saemnesia_fast: the C++ extension could not be built")
    assert "SAEMNESIA_FAST_BUILD=0 installs without it" in last
