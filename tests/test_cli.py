"""The command line itself; each command's work is tested with the module that does it."""

import builtins
import dataclasses
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import saemnesia_fast
from saemnesia_fast.cli import main as cli


@dataclasses.dataclass
class Fail:
    """Raise the error asked for."""

    kind: str = "ValueError"

    def run(self) -> None:
        raise getattr(builtins, self.kind)("k: expected 1 <= k <= N = 8,\ngot 9")


@pytest.fixture
def fail_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "fail", "fail:Fail")
    monkeypatch.setitem(sys.modules, "saemnesia_fast.cli.fail", sys.modules[__name__])


def exit_status(*arguments: str) -> object:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    return stop.value.code


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_command_is_a_documented_dataclass(name: str) -> None:
    module, class_name = cli.COMMANDS[name].split(":")
    command = getattr(import_module(f"saemnesia_fast.cli.{module}"), class_name)
    assert dataclasses.is_dataclass(command)
    assert callable(command.run)
    assert cli.summary(name) == (command.__doc__ or "").partition("\n")[0] != ""


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(arguments)
    out = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"  {name} " in out
        assert cli.summary(name) in out


def test_listing_commands_imports_none_of_them(tmp_path: Path) -> None:
    code = "import sys; from saemnesia_fast.cli.main import overview; overview(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert not {"torch", "numpy", "tyro", "diffusers", "transformers"} & set(done.stdout.split())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_command_help_shows_its_summary(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(name, "--help") == 0
    out = capsys.readouterr().out
    assert f"usage: saemnesia-fast {name}" in out
    assert cli.summary(name).split()[0] in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--version"])
    assert capsys.readouterr().out == f"saemnesia-fast {saemnesia_fast.__version__}\n"


def test_python_m_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "saemnesia_fast", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == f"saemnesia-fast {saemnesia_fast.__version__}\n"


def test_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("trian") == 2
    assert capsys.readouterr().err == "saemnesia-fast: unknown command 'trian', did you mean train?\n"
    assert exit_status("xyz") == 2
    assert capsys.readouterr().err.startswith("saemnesia-fast: unknown command 'xyz', expected one of demo, ")


def test_unknown_option_exits_with_2(fail_command: None) -> None:
    assert exit_status("fail", "--no-such-option", "1") == 2


@pytest.mark.parametrize("kind", ["ValueError", "KeyError", "OSError", "ImportError"])
def test_user_error_is_one_line_and_status_2(
    kind: str, fail_command: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SAEMNESIA_FAST_DEBUG", raising=False)
    assert exit_status("fail", "--kind", kind) == 2
    assert capsys.readouterr().err == "saemnesia-fast: k: expected 1 <= k <= N = 8, got 9\n"


def test_debug_shows_the_traceback(fail_command: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEMNESIA_FAST_DEBUG", "1")
    with pytest.raises(ValueError, match="expected 1 <= k"):
        cli.main(["fail"])


def test_other_errors_keep_their_traceback(fail_command: None) -> None:
    with pytest.raises(RuntimeError):
        cli.main(["fail", "--kind", "RuntimeError"])
