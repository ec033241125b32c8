"""Entry point of `saemnesia-fast`: picks a command, imports that command alone, lets tyro parse its dataclass."""

import ast
import logging
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from .. import __version__

PROGRAM = "saemnesia-fast"

COMMANDS = {
    "demo": "demo:Demo",
    "collect": "collect:Collect",
    "train": "train:Train",
    "supervise": "supervise:Supervise",
    "concepts": "concepts:Concepts",
    "erase": "erase:Erase",
    "sweep": "sweep:Sweep",
    "evaluate": "evaluate:Evaluate",
    "analyse": "analyse:Analyse",
    "attack": "attack:AttackCommand",
    "unlearn-canvas": "unlearn_canvas:UnlearnCanvasCommand",
    "nudity": "nudity:Nudity",
    "convert": "convert:Convert",
    "bench": "bench:Bench",
    "env": "env:Env",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. `argv` defaults to the process's arguments.

    A mistake of the user (`ValueError`, `KeyError`, `OSError`, `ImportError`) ends with one line on stderr and exit
    status 2; `SAEMNESIA_FAST_DEBUG=1` gives the traceback instead.
    """
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
    elif name == "--version":
        print(f"{PROGRAM} {__version__}")
    elif name in COMMANDS:
        run(name, rest)
    else:
        close = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)}"
        fail(f"unknown command {name!r}, {hint}")


def run(name: str, arguments: Sequence[str]) -> None:
    """Parse `arguments` for the command `name` and run it."""
    # Read by the libraries when they are imported, which the command does.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("saemnesia_fast").setLevel(logging.INFO)

    import tyro

    module, class_name = COMMANDS[name].split(":")
    command_type = getattr(import_module(f"{__package__}.{module}"), class_name)
    command = tyro.cli(command_type, prog=f"{PROGRAM} {name}", args=arguments)
    try:
        command.run()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, KeyError, OSError, ImportError) as error:
        if os.environ.get("SAEMNESIA_FAST_DEBUG") == "1":
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        fail(" ".join(str(message).split()) or type(error).__name__)


def overview() -> str:
    """The list of commands, one line each."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{summary(name)}" for name in COMMANDS]
    usage = f"usage: {PROGRAM} [--version] COMMAND [OPTIONS]"
    return "\n".join([usage, "", "commands:", *lines, "", f"`{PROGRAM} COMMAND --help` shows a command's options."])


def summary(name: str) -> str:
    """First line of a command's docstring, read from its source so that listing commands imports none of them."""
    module, class_name = COMMANDS[name].split(":")
    spec = find_spec(f"{__package__}.{module}")
    if spec is None or spec.origin is None:
        raise LookupError(f"command {name!r}: no module {module!r} in {__package__}")
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    raise LookupError(f"command {name!r}: no class {class_name!r} in {spec.origin}")


def fail(message: str) -> None:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
