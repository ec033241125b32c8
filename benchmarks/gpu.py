"""Everything that needs a GPU, in one command, one JSON and one log: build, GPU tests, tuning, ceilings, every op.

Each part is a process of its own under its own time limit, so that one that crashes, hangs or poisons the device costs
nothing but itself. The JSON is rewritten after each part; the log beside it grows with all that they print.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from machine import ROOT, describe
from results import RESULTS, from_records, table
from saemnesia_fast.files import write_json

LIMITS = {
    "build": 200,
    "tests": 450,
    "tune": 180,
    "ceilings": 40,
    "erase": 150,
    "encode_topk": 180,
    "unet": 120,
    "train_step": 330,
    "latent_gradients": 120,
}
LIMIT = 80
GRACE = 15.0
"""Seconds that a part has at its limit to say what it knows, before it is killed."""
SECONDS = {"unet": 5.0}
SECONDS_A_CASE = 0.5
TAIL = 6000
LOADS = "import torch, saemnesia_fast._C_cuda as built; print(built.__file__, built.build_config())"
PYTEST = [
    *("-m", "gpu", "-v", "--tb=short", "-rsfE", "--continue-on-collection-errors", "-p", "no:cacheprovider"),
    *("-W", "default"),  # what this machine's packages warn of is no failure of ours
]
PLUGINS = {
    "xdist": ("-n", str(min(8, (os.cpu_count() or 1) // 2)), "--dist", "worksteal"),
    "pytest_timeout": ("--timeout=200", "--timeout-method=thread"),
}
"""Those of pytest that are used where they are installed, as against whatever else a machine may have."""


class Session:
    """The parts done so far, and the files that hold them."""

    def __init__(self, path: Path, minutes: float) -> None:
        self.path = path
        self.log = path.with_suffix(".log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_bytes(b"")
        self.deadline = time.monotonic() + 60 * minutes
        self.environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
        capability = torch.cuda.get_device_capability()
        self.environment.setdefault("TORCH_CUDA_ARCH_LIST", ".".join(map(str, capability)))
        self.record: dict[str, Any] = {
            **asdict(describe("cuda")),
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "capability": list(capability),
            "parts": {},
            "tuning": {},
            "ceilings": {},
            "rows": [],
        }

    def part(self, name: str, command: Sequence[str | Path], **environment: str) -> dict[str, Any]:
        """Run one process and record its status, duration and the end of its output."""
        limit = min(LIMITS.get(name, LIMIT), self.deadline - time.monotonic())
        print(f"\n== {name}", flush=True)
        if limit < 5:
            done = {"status": "left out: no time", "seconds": 0.0, "output": ""}
        else:
            done = _run([str(word) for word in command], self.environment | environment, limit, self.log)
        self.record["parts"][name] = done
        self.save()
        shown = done["output"] if done["status"] != "ok" else done["output"].rstrip().rpartition("\n")[2]
        print(shown, f"{name}: {done['status']}, {done['seconds']} s", sep="\n", flush=True)
        return done

    def save(self) -> None:
        write_json(self.path, self.record)


def _run(command: list[str], environment: dict[str, str], limit: float, log: Path) -> dict[str, Any]:
    """One process and all that it starts, ended together at the limit; what they print is added to the log."""
    before = time.monotonic()
    with log.open("ab") as output:
        output.write(f"\n$ {' '.join(command)}\n".encode())
        output.flush()
        start = output.tell()
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background
            )
            try:
                code = process.wait(limit)
                status = "ok" if code == 0 else f"failed: exit status {code}"
            except subprocess.TimeoutExpired:
                status = f"failed: longer than {limit:.0f} s"
                os.killpg(process.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        except OSError as error:
            status = f"failed: {error}"
    text = log.read_bytes()[start:].decode(errors="replace")
    return {"status": status, "seconds": round(time.monotonic() - before, 1), "output": text[-TAIL:]}


def gpu_tests() -> list[Path]:
    """The test files with tests marked gpu: the others may import what is not installed."""
    return sorted(path for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8"))


def pytest_arguments() -> list[str]:
    """How pytest runs, so that nothing but a GPU test fails, and it alone."""
    there = {name: options for name, options in PLUGINS.items() if find_spec(name)}
    return [*PYTEST, *(word for name, options in there.items() for word in ("-p", name, *options))]


def link_tree(folder: Path) -> Path:
    """The package as an installation would lay it out, of links: where pip cannot install the checkout."""
    package = folder / "saemnesia_fast"
    package.mkdir(parents=True)
    for entry in (ROOT / "saemnesia_fast").iterdir():
        (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(ROOT / "kernels")
    return folder


def default_path(device: str, date: str) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"gpu-{name}-{date[:10]}.json"


def main(parts: Sequence[str], out: Path | None, minutes: float, steps: Sequence[str] = ()) -> int:
    """0 if every part that could run did so; the JSON is there in any case. `steps` are commands, with rows apart."""
    if not torch.cuda.is_available():
        print("no CUDA device; `--dry` shows what would be measured", file=sys.stderr)
        return 2
    stamp = describe("cuda")
    if stamp.commit == "unknown":
        print("the commit is recorded as unknown: set the variable COMMIT")
    out = out or RESULTS
    session = Session(out if out.suffix == ".json" else out / default_path(stamp.machine, stamp.date), minutes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python: list[str | Path] = [sys.executable]
        benchmarks = [*python, ROOT / "benchmarks"]
        if "build" in parts:
            session.part("build", [*python, "setup.py", "build_ext", "--inplace"])
        paths = [str(link_tree(folder / "tree")), *filter(None, [os.environ.get("PYTHONPATH")])]
        session.environment["PYTHONPATH"] = os.pathsep.join(paths)
        if "build" in parts:
            session.part("load", [*python, "-c", LOADS])
        ceilings = folder / "ceilings.json"
        for part in parts:
            rows = folder / f"{part}.json"
            measured = ["--device", "cuda", "--json", rows, *(["--ceilings", ceilings] if ceilings.exists() else [])]
            if part == "tests":
                command = [*python, "-m", "pytest", *pytest_arguments(), *gpu_tests()]
                session.part(part, command, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", OMP_NUM_THREADS="2")
            elif part == "tune":
                session.part(part, [*benchmarks, part, "--json", rows])
                session.record["tuning"] = _read(rows) or {}
                config = ROOT / "saemnesia_fast" / "configs" / session.record["tuning"].get("file", "absent")
                if config.is_file() and session.path.parent != RESULTS:
                    shutil.copy(config, session.path.parent)
            elif part == "ceilings":
                session.part(part, [*benchmarks, part, "--device", "cuda", "--json", rows])
                session.record["ceilings"] = _read(rows) or {}
            elif part in steps:
                session.part(part, [*benchmarks, part, "--seconds", "1", *measured])
                session.record[part] = _read(rows) or []
            elif part != "build":
                seconds = str(SECONDS.get(part, SECONDS_A_CASE))
                session.part(part, [*benchmarks, "ops", part, "--seconds", seconds, *measured])
                session.record["rows"] += _read(rows) or []
            session.save()
    print(f"\n{table(from_records(session.record['rows']))}\n\nwritten: {session.path.name}, {session.log.name}")
    return int(any(part["status"].startswith("failed") for part in session.record["parts"].values()))


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
