"""`saemnesia-fast bench`."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass
class Bench:
    """Time the ops against other implementations; needs a checkout with an editable installation."""

    ops: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Which ops; all of them unless told."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """A GPU where there is one, or the one named."""
    seconds: float = 5.0
    """Of timed calls a case."""
    csv: Path | None = None
    """Append the measurements to this file."""

    def run(self) -> None:
        folder = Path(__file__).resolve().parents[2] / "benchmarks"
        if not (folder / "__main__.py").is_file():
            raise FileNotFoundError("bench: the benchmarks are part of a checkout, not of an installed package")
        command = [sys.executable, str(folder), "ops", *self.ops, "--seconds", str(self.seconds)]
        if self.device != "auto":
            command += ["--device", self.device]
        if self.csv is not None:
            command += ["--csv", str(self.csv)]
        if status := subprocess.call(command):
            raise SystemExit(status)
