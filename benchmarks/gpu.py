"""Everything that needs a GPU, in one command and one JSON: build, GPU tests, tuning, ceilings, every op.

Each part is a process of its own under its own time limit, so that one that crashes, hangs or poisons the device costs
nothing but itself. The JSON is rewritten after each part.
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
from pathlib import Path
from typing import Any

import torch

from machine import ROOT, describe
from results import RESULTS, from_records, table

LIMITS = {
    "build": 150,
    "tests": 210,
    "tune": 120,
    "ceilings": 30,
    "erase": 100,
    "encode_topk": 120,
    "unet": 90,
    "hooks": 30,
    "train_step": 180,
}
LIMIT = 60
SECONDS = {"unet": 5.0}
SECONDS_A_CASE = 0.5
TAIL = 6000


class Session:
    """The parts done so far, and the file that holds them."""

    def __init__(self, path: Path, minutes: float) -> None:
        self.path = path
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

    def part(self, name: str, command: Sequence[str | Path]) -> dict[str, Any]:
        """Run one process and record its status, duration and the end of its output."""
        limit = min(LIMITS.get(name, LIMIT), self.deadline - time.monotonic())
        print(f"\n== {name}", flush=True)
        if limit < 5:
            done = {"status": "left out: no time", "seconds": 0.0, "output": ""}
        else:
            done = _run([str(word) for word in command], self.environment, limit)
        self.record["parts"][name] = done
        self.save()
        print(done["output"][-2000:] if done["status"] != "ok" else "", f"{name}: {done['status']}", flush=True)
        return done

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(self.record, indent=1), encoding="utf-8")
        unfinished.replace(self.path)


def _run(command: list[str], environment: dict[str, str], limit: float) -> dict[str, Any]:
    """One process and all that it starts, ended together at the limit."""
    before = time.monotonic()
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(limit)
                status = "ok" if code == 0 else f"failed: exit status {code}"
            except subprocess.TimeoutExpired:
                status = f"failed: longer than {limit:.0f} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        except OSError as error:
            status = f"failed: {error}"
        output.seek(0)
        text = output.read().decode(errors="replace")
    return {"status": status, "seconds": round(time.monotonic() - before, 1), "output": text[-TAIL:]}


def gpu_tests() -> list[Path]:
    """The test files with tests marked gpu: the others may import what is not installed."""
    return sorted(path for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8"))


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


def main(ops: Sequence[str], out: Path | None, minutes: float, steps: Sequence[str] = ()) -> int:
    """0 if every part that could run did so; the JSON is there in any case. `steps` are commands, with rows apart."""
    if not torch.cuda.is_available():
        print("no CUDA device; `--dry` shows what would be measured", file=sys.stderr)
        return 2
    stamp = describe("cuda")
    out = out or RESULTS
    session = Session(out if out.suffix == ".json" else out / default_path(stamp.machine, stamp.date), minutes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python: list[str | Path] = [sys.executable]
        benchmarks = [*python, ROOT / "benchmarks"]
        install = ["-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."]
        if session.part("build", [*python, *install])["status"] != "ok":
            session.environment["PYTHONPATH"] = str(link_tree(folder / "tree"))
        if tests := gpu_tests():
            session.part("tests", [*python, "-m", "pytest", "-m", "gpu", "-q", "-rfEs", *tests])
        else:
            session.record["parts"]["tests"] = {"status": "absent: no test is marked gpu", "seconds": 0.0, "output": ""}
        tuned = folder / "tuned.json"
        session.part("tune", [*benchmarks, "tune", "--json", tuned])
        session.record["tuning"] = _read(tuned) or {}
        config = ROOT / "saemnesia_fast" / "configs" / session.record["tuning"].get("file", "absent")
        if config.is_file() and session.path.parent != RESULTS:
            shutil.copy(config, session.path.parent)
        ceilings = folder / "ceilings.json"
        session.part("ceilings", [*benchmarks, "ceilings", "--device", "cuda", "--json", ceilings])
        session.record["ceilings"] = _read(ceilings) or {}
        given = ["--ceilings", ceilings] if ceilings.exists() else []
        for op in ops:
            rows = folder / f"{op}.json"
            seconds = str(SECONDS.get(op, SECONDS_A_CASE))
            arguments = [op, "--device", "cuda", "--seconds", seconds, "--json", rows, *given]
            session.part(op, [*benchmarks, "ops", *arguments])
            session.record["rows"] += _read(rows) or []
            session.save()
        for name in steps:
            rows = folder / f"{name}.json"
            session.part(name, [*benchmarks, name, "--device", "cuda", "--seconds", "1", "--json", rows, *given])
            session.record[name] = _read(rows) or []
            session.save()
    print(f"\n{table(from_records(session.record['rows']))}\n\nwritten: {session.path.name}")
    return int(any(part["status"].startswith("failed") for part in session.record["parts"].values()))


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
