"""Benchmarks of a checkout: `python benchmarks ops`, `train_step`, `gpu` and others, see `--help`."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OPS = ("erase", "encode_topk", "unet", "hooks", "decode", "decode_error", "probe", "latent_gradients", "adam_latents")

STEPS = ("train_step",)
"""Commands of their own, whose rows have more columns."""

PARTS = (
    *("build", "tests", "tune", "ceilings", "erase", "encode_topk", "unet", "train_step"),
    *("latent_gradients", "adam_latents", "decode", "probe", "decode_error", "hooks"),
)
"""Of `gpu`, what is missed most first, as time may run out."""


def ops(arguments: argparse.Namespace) -> None:
    import torch

    import machine
    from harness import attempt, clock_for
    from results import append_csv, as_records, table
    from saemnesia_fast.files import write_json

    device = _device(arguments)
    stamp = machine.describe(device)
    ceilings = _ceilings(arguments, device)
    rows = []
    for name in arguments.names or OPS:
        op = import_module(name)
        clock = clock_for(getattr(op, "CLOCK", device))
        for case in op.cases(device):
            if arguments.only not in str(case):
                continue
            floor = ceilings.floor_us(op.work(case))
            with torch.no_grad():
                new = attempt(partial(op.contest, case, device), case, clock, arguments.seconds, floor, stamp)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
            rows += new
            print(f"\n{case}, floor {floor:.1f} us\n{table(new)}", flush=True)
            if arguments.csv:
                append_csv(new, arguments.csv)
            if arguments.json:
                write_json(arguments.json, as_records(rows))


def train_step(arguments: argparse.Namespace) -> None:
    import machine
    import train_step
    from results import as_records, read_csv, write_csv
    from saemnesia_fast.files import write_json

    device = _device(arguments)
    stamp = machine.describe(device)
    ceilings = _ceilings(arguments, device)
    csv = arguments.csv
    old = read_csv(csv, train_step.StepRow) if csv and csv.exists() else []
    rows: list[train_step.StepRow] = []
    for case in train_step.cases(device, arguments.small):
        if arguments.only not in str(case):
            continue
        floor = ceilings.floor_us(train_step.work(case))
        print(f"\n{case}, floor {floor / 1e3:.1f} ms", flush=True)
        names = [name for name in train_step.competitors(case, device) if name not in arguments.without]
        done = rows
        for new in train_step.measure(case, device, names, arguments.seconds, floor, stamp):
            rows = [*done, *new]
            if csv:
                write_csv([*old, *rows], csv)
            if arguments.json:
                write_json(arguments.json, as_records(rows))
        print(train_step.table(new), flush=True)


def _device(arguments: argparse.Namespace) -> str:
    import torch

    return arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _ceilings(arguments: argparse.Namespace, device: str) -> Any:
    """Those of the file, or what this machine can do."""
    import machine

    if arguments.ceilings:
        return machine.Ceilings(**json.loads(arguments.ceilings.read_text(encoding="utf-8")))
    measured = machine.measure_ceilings(device)
    print(f"{device}: {measured}", flush=True)
    return measured


def ceilings(arguments: argparse.Namespace) -> None:
    import machine
    from saemnesia_fast.files import write_json

    measured = asdict(machine.measure_ceilings(arguments.device))
    write_json(arguments.json, measured)
    print(json.dumps(measured, indent=2))


def gpu(arguments: argparse.Namespace) -> None:
    sys.path.append(str(ROOT))  # for this process, which only starts others: nothing may be installed yet
    import dry
    import gpu

    if arguments.dry:
        print(dry.report((*OPS, *STEPS)))
    else:
        raise SystemExit(gpu.main(arguments.parts, arguments.out, arguments.minutes, STEPS))


def tune(arguments: argparse.Namespace) -> None:
    import torch

    import machine
    import tune
    from harness import clock_for
    from results import as_records
    from saemnesia_fast.files import write_json

    if not torch.cuda.is_available():
        raise SystemExit("tune: no CUDA device")
    path = arguments.out or tune.config_path()
    record: dict[str, Any] = {"file": path.name, "tiles": {}, "rows": []}
    for operand, tiles, rows in tune.tune(path, clock_for("cuda"), arguments.seconds, machine.describe("cuda")):
        record["tiles"][operand] = tiles and tiles._asdict()
        record["rows"] += as_records(rows)
        if arguments.json:
            write_json(arguments.json, record)
    raise SystemExit(0 if all(record["tiles"].values()) else 1)


def demo(arguments: argparse.Namespace) -> None:
    import demo

    demo.main(arguments.out, arguments.rounds, arguments.pictures)


def minicanvas_sae(arguments: argparse.Namespace) -> None:
    import minicanvas_sae

    minicanvas_sae.main(arguments.out, arguments.steps, arguments.images, arguments.work, arguments.seeds)


def trials(arguments: argparse.Namespace) -> None:
    import trials

    trials.main(arguments.out, arguments.work, arguments.processes)


def supervised_step(arguments: argparse.Namespace) -> None:
    import supervised_step

    chosen = (arguments.rounds, arguments.images, arguments.tokens, arguments.small, arguments.dense)
    supervised_step.main(arguments.out, _device(arguments), *chosen)


def plot(arguments: argparse.Namespace) -> None:
    from plot import draw

    draw(arguments.source, arguments.out)


def _op(name: str) -> str:
    if name not in OPS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(OPS)}, got {name!r}")
    return name


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", choices=("cpu", "cuda"), help="a GPU where there is one unless told")
    command.add_argument("--only", default="", help="cases whose description holds this text")
    command.add_argument("--csv", type=Path, help="append the rows here")
    command.add_argument("--json", type=Path, help="write the rows here")
    command.add_argument("--ceilings", type=Path, help="use these instead of measuring them")


def parser() -> argparse.ArgumentParser:
    results = ROOT / "benchmarks" / "results"
    outer = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    commands = outer.add_subparsers(required=True)

    command = commands.add_parser("ops", help="time ops on one device")
    command.set_defaults(run=ops)
    command.add_argument("names", nargs="*", type=_op, help=f"which of {', '.join(OPS)}; all unless told")
    command.add_argument("--seconds", type=float, default=5.0, help="of timed calls a case")
    _add_common(command)

    command = commands.add_parser("train_step", help="time and weigh a training step against other trainers")
    command.set_defaults(run=train_step)
    command.add_argument("--seconds", type=float, default=8.0, help="of timed steps a case and competitor")
    command.add_argument("--small", action="store_true", help="tiny sizes: does everything, measures nothing of use")
    command.add_argument("--without", nargs="*", default=(), help="competitors to leave out")
    _add_common(command)

    command = commands.add_parser("ceilings", help="bandwidth and matrix products of a device")
    command.set_defaults(run=ceilings)
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    command.add_argument("--json", type=Path, required=True)

    command = commands.add_parser("gpu", help="build, test and measure everything on this GPU into one JSON")
    command.set_defaults(run=gpu)
    command.add_argument("--out", type=Path, help="a JSON, or a folder for it")
    command.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, metavar="PART", help=", ".join(PARTS))
    command.add_argument("--minutes", type=float, default=9.5, help="in all")
    command.add_argument("--dry", action="store_true", help="measure nothing: shapes, bytes, FLOPs, floors, registers")

    command = commands.add_parser("tune", help="find this GPU's fastest tiles, for the triton backend to use")
    command.set_defaults(run=tune)
    command.add_argument("--seconds", type=float, default=1.0, help="of timed calls a case")
    command.add_argument("--out", type=Path, help="the file to write; where the backend looks unless told")
    command.add_argument("--json", type=Path, help="write the choice and all rows here")

    command = commands.add_parser("demo", help="seconds per picture of the demo, erased by each backend")
    command.set_defaults(run=demo)
    command.add_argument("--rounds", type=int, default=7)
    command.add_argument("--pictures", type=int, default=48, help="in a round, of each way to paint")
    command.add_argument("--out", type=Path, default=results / "demo_backends.json")

    command = commands.add_parser("minicanvas_sae", help="train MiniCanvas' SAEs by autograd and by the Trainer")
    command.set_defaults(run=minicanvas_sae)
    command.add_argument("--steps", type=int, default=1500)
    command.add_argument("--images", type=int, default=12, help="of each object in each style")
    command.add_argument("--work", type=Path, help="keep the collected tokens here")
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--out", type=Path, default=results / "minicanvas_sae.json")

    command = commands.add_parser("trials", help="what else a supervised latent was tried with on MiniCanvas")
    command.set_defaults(run=trials)
    command.add_argument("--processes", type=int, default=0, help="that paint; as many as there are cores if 0")
    command.add_argument("--work", type=Path, help="keep what is done here, to go on from")
    command.add_argument("--out", type=Path, default=results / "minicanvas_trials.json")

    command = commands.add_parser("supervised_step", help="what supervision adds to a training step")
    command.set_defaults(run=supervised_step)
    command.add_argument("--device", choices=("cpu", "cuda"), help="a GPU where there is one unless told")
    command.add_argument("--rounds", type=int, default=100)
    command.add_argument("--images", type=int, default=128)
    command.add_argument("--tokens", type=int, default=16, help="of an image")
    command.add_argument("--small", action="store_true", help="tiny sizes: does everything, measures nothing of use")
    command.add_argument("--dense", action="store_true", help="also time the L1 of all latents")
    command.add_argument("--out", type=Path, default=results / "supervised_step.json")

    command = commands.add_parser("plot", help="draw the newest rows of a CSV or JSON")
    command.set_defaults(run=plot)
    command.add_argument("source", type=Path, nargs="?", default=results / "ops.csv")
    command.add_argument("--out", type=Path, default=results / "ops.png")
    return outer


if __name__ == "__main__":
    # The released hook is the tests' oracle.
    sys.path.append(str(ROOT / "tests"))
    chosen = parser().parse_args()
    chosen.run(chosen)
