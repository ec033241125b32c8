"""The benchmarks' harness refuses wrong answers, and its arithmetic, files and dry run are right."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import runpy
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

import activations
import demo
import dry
import erase
import gpu
import harness
import machine
import plot
import providers
import results
from saemnesia_fast import ops

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"

OPS = ("erase", "encode_topk", "unet", "hooks", "decode", "decode_error", "probe", "latent_gradients", "adam_latents")
STAMP = results.Stamp("abc", "2026-01-01T00:00:00Z", "a machine", 2, 2, "2.13.0", "3.6.0")
CASE = harness.Case("double", M=8, d=4, N=16, k=2)


class SyntheticClock:
    """Calls take as long as they say."""

    def prepare(self, call, capturable):
        return call, "wall"

    def samples(self, call, count):
        return [call.microseconds + i for i in range(count)]


def provider(name: str, answer: float, microseconds: float = 100.0, tolerance: float | None = None) -> harness.Provider:
    def call() -> torch.Tensor:
        return torch.full((8, 4), answer)

    call.microseconds = microseconds
    return harness.Provider(name, lambda: call, tolerance=tolerance)


def contest(*entered: harness.Provider, limit: float = 0.1) -> harness.Contest:
    def errors(answer: torch.Tensor) -> torch.Tensor:
        return (answer - 2.0).abs().amax(1)

    return harness.Contest(CASE, harness.Work(1000, 0), entered, errors, limit, "eager")


def run(*entered: harness.Provider, seconds: float = 0.01, floor: float = 50.0) -> dict[str, results.Row]:
    rows = harness.run(contest(*entered), SyntheticClock(), seconds, floor, STAMP)
    return {row.provider: row for row in rows}


def test_a_wrong_answer_is_not_timed() -> None:
    rows = run(provider("eager", 2.0), provider("ours", 2.5), provider("nan", math.nan))
    assert rows["eager"].status == "ok"
    for name in ("ours", "nan"):
        assert rows[name].status.startswith("failed: largest error") and rows[name].p50_us is None


def test_a_tolerance_of_its_own_holds_the_median() -> None:
    rows = run(provider("near", 2.15, tolerance=0.2), provider("far", 2.5, tolerance=0.2))
    assert rows["near"].status == "ok" and rows["near"].error == pytest.approx(0.15, abs=1e-6)
    assert rows["far"].status == "failed: median error 0.5 above 0.2"


def test_absent_and_broken_providers_leave_the_others_alone() -> None:
    def absent():
        raise harness.Absent("not installed")

    def broken():
        raise ValueError("k: expected\n  less")

    rows = run(provider("eager", 2.0), harness.Provider("a", absent), harness.Provider("b", broken))
    assert [row.status for row in rows.values()] == [
        "ok",
        "absent: not installed",
        "failed: ValueError: k: expected less",
    ]


def test_ratios_to_baseline_and_best_competitor() -> None:
    rows = run(
        provider("eager", 2.0, 400), provider("torch.compile", 2.0, 200), provider("ours cpu", 2.0, 50), seconds=0.001
    )
    expected = {"eager": (1.0, 0.5), "torch.compile": (2.0, 1.0), "ours cpu": (8.0, 4.0)}
    for name, (vs_baseline, vs_best) in expected.items():
        row = rows[name]
        centre = row.p50_us - (row.samples // harness.FEWEST_ROUNDS - 1) / 2
        assert centre == pytest.approx({"eager": 400, "torch.compile": 200, "ours cpu": 50}[name])
        assert row.vs_baseline == pytest.approx(vs_baseline, rel=0.1)
        assert row.vs_best == pytest.approx(vs_best, rel=0.1)
        assert row.of_floor == pytest.approx(100 * 50 / row.p50_us)


def test_without_a_floor_there_is_no_share_of_it() -> None:
    row = run(provider("eager", 2.0), floor=0.0)["eager"]
    assert row.floor_us is None and row.of_floor is None


def test_rounds_interleave_and_rotate() -> None:
    order: list[str] = []

    class Recording(SyntheticClock):
        def samples(self, call, count):
            order.append(call.name)
            return super().samples(call, count)

    entered = [provider(name, 2.0, 1000.0) for name in "abc"]
    for one in entered:
        one.start().name = one.name
    started = [harness.start(contest(one), one, SyntheticClock()) for one in entered]
    taken = harness.measure(started, Recording(), seconds=1e-3)
    assert order == [*"abc", *"bca", *"cab"]
    assert {name: len(samples) for name, samples in taken.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_contest_that_cannot_be_set_up_is_a_row() -> None:
    def build():
        raise MemoryError("no room")

    (row,) = harness.attempt(build, CASE, SyntheticClock(), 1.0, 1.0, STAMP)
    assert row.status == "failed: MemoryError: no room"


@pytest.mark.parametrize("percent", [0, 20, 50, 80, 100])
def test_percentiles_are_torch_quantiles(percent: int) -> None:
    values = torch.randn(37, dtype=torch.float64)
    expected = torch.quantile(values, percent / 100).item()
    assert harness.percentile(values.tolist(), percent) == pytest.approx(expected, rel=1e-12)


def test_cpu_clock_times_a_short_call_in_bursts() -> None:
    calls = []
    clock = harness.CpuClock()
    samples = clock.samples(lambda: calls.append(0), 5)
    assert len(samples) == 5 and 0 < min(samples) < harness.SHORTEST_SAMPLE_US / 10
    assert len(calls) > 100


def test_csv_round_trip_keeps_rows_and_appends(tmp_path: Path) -> None:
    path = tmp_path / "ops.csv"
    rows = list(run(provider("eager", 2.0), provider("ours", 9.0)).values())
    results.append_csv(rows[:1], path)
    results.append_csv(rows[1:], path)
    assert path.read_text().count("commit,") == 1
    back = results.read_csv(path)
    assert results.as_records(back) == results.as_records(rows)
    assert results.from_records(json.loads(json.dumps(results.as_records(rows)))) == back
    assert back[1].p50_us is None and back[0].flagged is None and isinstance(back[0].M, int)


def test_floor_is_the_larger_of_traffic_and_arithmetic() -> None:
    ceilings = machine.Ceilings(bandwidth=1e9, flops={"float32": 1e11, "float16": 1e12})
    assert ceilings.floor_us(harness.Work(bytes=2000, flops=0)) == pytest.approx(2.0)
    assert ceilings.floor_us(harness.Work(bytes=2000, flops=5_000_000)) == pytest.approx(5.0)


@pytest.fixture
def small() -> harness.Case:
    return harness.Case("erase", M=64, d=64, N=256, k=8, variant="exact", flagged=16)


@pytest.mark.parametrize("flagged", [0, 1, 16, 64])
def test_as_many_tokens_are_flagged_as_asked_for(small: harness.Case, flagged: int) -> None:
    own, x = activations.weights(64, 256, torch.float32, "cpu"), activations.tokens(small, "cpu")
    lines = activations.concept_lines(x, own, flagged)
    pre = torch.relu((x.double() - own.b_dec) @ own.W_enc.double().T + own.b_enc)
    assert int((pre[:, lines.latents[0]] > lines.thresholds[0]).any(1).sum()) == flagged


def test_tokens_have_latents_that_stand_out() -> None:
    case = harness.Case("erase", M=64, d=256, N=1024, k=32)
    own, x = activations.weights(256, 1024, torch.float32, "cpu"), activations.tokens(case, "cpu")
    pre = activations.exact_pre_activations(x, own)
    assert (pre.topk(8).values.mean() / pre.topk(64).values[:, -1].mean()) > 3


def test_block_layout_is_a_strided_view_of_the_same_tokens(small: harness.Case) -> None:
    x = activations.tokens(small, "cpu")
    block = activations.as_block(x)
    assert block.shape == (2, 4, 8, 64) and block.permute(0, 3, 1, 2).is_contiguous()
    assert torch.equal(block.flatten(0, 2), x)


@pytest.mark.parametrize("name", [name for name in OPS if name not in ("unet", "hooks")])
def test_every_provider_passes_its_gate_at_a_small_size(name: str) -> None:
    """Each op's own contest, on the CPU, without what has to be compiled first; also with weights of another dtype."""
    op = import_module(name)
    sizes = {"M": 32, "d": 64, "N": 512, "k": 8}
    cases = [*op.cases("cpu"), *(case for case in op.cases("cuda") if case.weights)]
    for case in {dataclasses.replace(case, **sizes, flagged=case.flagged and 16) for case in cases}:
        entered = op.contest(case, "cpu")
        for one in entered.providers:
            if one.name != "torch.compile":
                started = harness.start(entered, one, harness.CpuClock())
                assert isinstance(started, harness.Started) or started.startswith("absent"), f"{case} {started}"


@pytest.mark.parametrize("spoil", [lambda v, i: (v, i.flip(0)), lambda v, i: (v, i * 0), lambda v, i: (v * 1.01, i)])
def test_topk_gate_sees_wrong_indices_and_values(spoil) -> None:
    encode_topk = import_module("encode_topk")
    pre = torch.rand(6, 40, dtype=torch.float64)
    errors = encode_topk.topk_errors(pre, torch.arange(6), 5)
    values, indices = pre.topk(5)
    assert errors((values, indices.int())).max() == 0
    assert errors(spoil(values, indices.int())).max() > 5e-3


def test_erase_gate_sees_a_token_left_unsteered(small: harness.Case) -> None:
    own, x = activations.weights(64, 256, torch.float32, "cpu"), activations.tokens(small, "cpu")
    lines = activations.concept_lines(x, own, 16)
    exact, sure = erase.reference(x, own, lines, small.k, "exact", erase.BAND["float32"])
    moved = (exact != x.double()).any(1)
    assert 0 < moved.sum() <= 16 and sure.sum() > 60
    assert activations.relative_error(x, exact)[moved & sure].min() > 100 * erase.LIMIT["float32"]


def test_our_backends_that_cannot_run_say_why() -> None:
    (triton,) = [one for one in providers.ours("erase", "cuda", lambda: None) if one.name == "ours cuda"]
    with pytest.raises(harness.Absent, match="not in this version"):
        triton.start()


def test_exact_stands_beside_the_default_where_it_computes_otherwise() -> None:
    names = {
        device: [one.name for one in providers.ours("erase", device, lambda: None, lambda: None)]
        for device in ("cpu", "cuda")
    }
    assert names == {
        "cpu": ["ours eager", "ours cpu"],
        "cuda": ["ours eager", "ours triton", "ours cuda", "ours triton, exact"],
    }
    by_precision = providers.ours("erase", "cuda", lambda: "default", lambda: "exact")
    assert by_precision[-1].start.args == ("triton", by_precision[-1].start.args[1])
    assert by_precision[-1].start.args[1]() == "exact"


def test_peers_that_are_not_installed_say_so() -> None:
    stranger = providers.peer("stranger", "no_such_package.module", torch.float32, lambda module: module)
    with pytest.raises(harness.Absent, match="not installed"):
        stranger.start()


def test_a_peer_is_imported_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "heavy_peer"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('wants a data set')")
    (package / "kernel.py").write_text("def answer(): return 42")
    monkeypatch.syspath_prepend(str(tmp_path))
    for _ in range(2):
        assert providers.peer("p", "heavy_peer.kernel", torch.float32, lambda module: module.answer).start()() == 42
    for name in ("heavy_peer", "heavy_peer.kernel"):
        monkeypatch.delitem(sys.modules, name)


def test_dry_run_shows_every_op_and_case() -> None:
    command = [sys.executable, str(BENCHMARKS), "gpu", "--dry"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    for name in OPS:
        wanted = len(import_module(name).cases("cuda"))
        assert sum(line.startswith(f"{name} ") for line in shown) >= wanted > 0


def test_dry_floors_are_those_of_the_design() -> None:
    """The encode product in float16 at 580 TFLOP/s, as budgeted: 46, 185, 370 and 1481 us."""
    encode_topk = import_module("encode_topk")
    floors = [
        machine.H100.floor_us(encode_topk.work(case))
        for case in encode_topk.cases("cuda")
        if case.dtype == "float16" and not case.variant and not case.weights
    ]
    assert [round(floor) for floor in floors] == [46, 185, 370, 1481]
    assert "encode_topk" in dry.report(OPS)


def test_dry_run_shows_the_budgets_where_there_are_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry, "BUDGETS", tmp_path / "budgets.json")
    assert "no budgets" in dry.registers()
    dry.BUDGETS.write_text('{"erase sm_90": {"registers": 72, "spilled": 0}, "decode sm_80": {"registers": 40}}')
    assert [line.split() for line in dry.registers().splitlines()] == [
        ["kernel", "registers", "spilled"],
        ["erase", "sm_90", "72", "0"],
        ["decode", "sm_80", "40"],
    ]


def test_the_gpu_command_knows_every_part() -> None:
    command = runpy.run_path(str(BENCHMARKS / "__main__.py"))
    every = command["PARTS"]
    assert sorted(every) == sorted(("build", "tests", "tune", "ceilings", *command["OPS"], *command["STEPS"]))
    parse = command["parser"]().parse_args
    assert parse(["gpu"]).parts == every and parse(["gpu", "--parts", "tune", "unet"]).parts == ["tune", "unet"]


def test_without_a_gpu_the_command_says_so_and_fails(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(OPS, None, 1.0) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu.Session:
    monkeypatch.setattr(gpu, "describe", lambda device: STAMP)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return gpu.Session(tmp_path / "out" / "gpu.json", minutes=1)


def test_a_part_that_crashes_or_hangs_costs_only_itself(session: gpu.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.LIMITS, "hangs", 6)
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    session.part("crashes", [sys.executable, "-c", "import os; print('so far', flush=True); os.abort()"])
    session.part("hangs", ["sh", "-c", "echo so far; sleep 60 & sleep 60"])
    session.part("works", [sys.executable, "-c", "print('all')"])
    session.deadline = 0.0
    session.part("late", [sys.executable, "-c", ""])
    parts = json.loads(session.path.read_text())["parts"]
    assert parts["crashes"]["status"].startswith("failed: exit status") and "so far" in parts["crashes"]["output"]
    assert parts["hangs"]["status"] == "failed: longer than 6 s" and "so far" in parts["hangs"]["output"]
    assert parts["works"]["status"] == "ok" and parts["late"]["status"] == "left out: no time"
    assert session.log.read_text().count("so far\n") == 2 and "all\n" in session.log.read_text()


SLOW_TESTS = """
import time, pytest
@pytest.mark.gpu
def test_wrong(): assert 1 == 2, "one is not two"
@pytest.mark.gpu
def test_endless(): time.sleep(100)
"""


def test_gpu_tests_that_take_too_long_say_what_failed(
    session: gpu.Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that cannot be imported stops no other."""

    class Process(subprocess.Popen):
        """Its time is up when a test has failed."""

        def wait(self, timeout=None):
            while timeout == 50 and self.poll() is None:
                if "FAILED" in session.log.read_text():
                    raise subprocess.TimeoutExpired(self.args, timeout)
                time.sleep(0.1)
            return super().wait(timeout)

    monkeypatch.setattr(gpu.subprocess, "Popen", Process)
    monkeypatch.setitem(gpu.LIMITS, "tests", 50)
    monkeypatch.setattr(gpu, "GRACE", 60)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu")
    (tmp_path / "test_slow.py").write_text(SLOW_TESTS)
    (tmp_path / "test_broken.py").write_text("import no_such_module")
    files = [tmp_path / "test_slow.py", tmp_path / "test_broken.py"]
    command = [sys.executable, "-m", "pytest", "-c", tmp_path / "pytest.ini", *gpu.pytest_arguments(), *files]
    done = session.part("tests", command, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert done["status"] == "failed: longer than 50 s"
    last = done["output"][-2000:]
    assert "ERROR" in last and "No module named 'no_such_module'" in last
    assert "FAILED" in last and "one is not two" in last


def test_the_record_holds_every_part_and_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command's own course, with processes that answer at once; the second op crashes."""
    rows, written = results.as_records(run(provider("eager", 2.0, 100.0)).values()), []
    path = tmp_path / "gpu-a-machine-2026-01-01.json"

    def answer(command: list[str], environment: dict[str, str], limit: float, log: Path) -> dict[str, object]:
        written.append(list(json.loads(path.read_text())["parts"]) if path.exists() else [])
        assert environment["PYTHONPATH"].endswith("wheels")
        assert "setup.py" in command or environment["PYTHONPATH"].endswith(f"tree{os.pathsep}wheels")
        if "ceilings" in command:
            Path(command[-1]).write_text(json.dumps({"bandwidth": 3e12, "flops": {"float16": 6e14}}))
        elif "tune" in command:
            Path(command[-1]).write_text(json.dumps({"tiles": {"float16": {"probe": [64, 16, 64, 4, 6]}}}))
        elif "decode" in command:
            return {"status": "failed: exit status -6", "seconds": 1.0, "output": "aborted"}
        elif "--json" in command:
            assert "--ceilings" in command
            Path(command[command.index("--json") + 1]).write_text(json.dumps(rows))
        return {"status": "ok", "seconds": 1.0, "output": ""}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "describe", lambda device: dataclasses.replace(STAMP, commit="unknown"))
    monkeypatch.setattr(gpu, "_run", answer)
    monkeypatch.setenv("PYTHONPATH", "wheels")
    parts = ["build", "tests", "tune", "ceilings", "encode_topk", "decode", "train_step", "erase"]
    assert gpu.main(parts, tmp_path, 1, steps=["train_step"]) == 1
    record = json.loads(path.read_text())
    assert record["commit"] == "unknown" and record["ceilings"]["bandwidth"] == 3e12 and record["capability"] == [9, 0]
    statuses = {name: part["status"] for name, part in record["parts"].items()}
    assert list(statuses) == ["build", "load", *parts[1:]]
    assert written == [list(statuses)[:done] for done in range(len(statuses))]
    assert record["tuning"]["tiles"]["float16"]["probe"] == [64, 16, 64, 4, 6]
    assert statuses["decode"].startswith("failed") and statuses["erase"] == "ok"
    assert record["rows"] == rows * 2 and record["train_step"] == rows
    shown = capsys.readouterr().out
    assert path.name in shown and "COMMIT" in shown


class FakeCanvas:
    """Paints in no time, and notes who erased."""

    def __init__(self) -> None:
        self.painted: list[str] = []
        self.way = "plain"

    @contextmanager
    def erased(self, concepts):
        assert concepts == demo.CONCEPTS
        self.way = ops.current_backend()
        yield
        self.way = "plain"

    def paint(self, wanted):
        self.painted.append(f"{self.way} {len(wanted)}")


def test_the_demo_is_painted_in_interleaved_rounds() -> None:
    canvas = FakeCanvas()
    found, absent = demo.ways(canvas, demo.CONCEPTS)
    names = [name for name in ("plain", "eager", "cpu") if name not in absent]
    assert list(found) == names
    taken = demo.measure(canvas, found, rounds=2, pictures=5)
    assert canvas.painted == [f"{name} 2" for name in names] + [
        f"{name} 5" for name in [*names, *names[1:], *names[:1]]
    ]
    assert {name: len(seconds) for name, seconds in taken.items()} == dict.fromkeys(names, 2)
    assert ops.current_backend() == "auto"


def test_the_demo_compares_pictures_of_one_round() -> None:
    summary = demo.summary({"plain": [1.0, 2.0, 4.0], "cpu": [1.01, 2.04, 4.04]})
    assert summary["cpu"] == {"p20": 1.422, "p50": 2.04, "p80": 3.24, "percent_longer": 1.0}
    assert summary["plain"]["percent_longer"] == 0.0


def test_the_demo_writes_its_figures(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    demo.main(tmp_path / "demo.json", rounds=1, pictures=2)
    report = json.loads((tmp_path / "demo.json").read_text())
    assert {"commit", "machine", "threads", "torch", "diffusers", "erased", "rounds"} <= set(report)
    assert {"plain", "eager", "cpu"} == {*report["seconds_per_picture"], *report["absent"]}
    assert all(0 < one["p20"] <= one["p80"] for one in report["seconds_per_picture"].values())


def test_link_tree_is_laid_out_as_installed(tmp_path: Path) -> None:
    tree = gpu.link_tree(tmp_path / "tree")
    code = "import saemnesia_fast.kernels, saemnesia_fast.ops; print(saemnesia_fast.kernels.__file__)"
    command = [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {[str(tree), *sys.path]}; {code}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(tree))


HEAVY = ("accelerate", "diffusers", "huggingface_hub", "hypothesis", "tqdm", "transformers", "tyro")


def test_ops_and_benchmarks_import_with_torch_alone(tmp_path: Path) -> None:
    modules = [path.stem for path in BENCHMARKS.glob("*.py") if not path.stem.startswith("__")]
    path = [str(BENCHMARKS), str(ROOT / "tests")]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({HEAVY})); sys.path[:0] = {path}\n"
        f"import saemnesia_fast.ops, {', '.join(modules)}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_default_name_of_the_record() -> None:
    assert (
        gpu.default_path("NVIDIA H100 80GB HBM3", "2026-11-22T01:02:03Z") == "gpu-nvidia-h100-80gb-hbm3-2026-11-22.json"
    )


def test_plot_takes_the_newest_of_each() -> None:
    old, new = (run(provider("eager", 2.0, 100.0), provider("ours cpu", 2.0, us)) for us in (60.0, 30.0))
    elsewhere = dataclasses.replace(old["eager"], machine="another machine")
    rows = plot.newest([elsewhere, *old.values(), *new.values()])
    assert [row.provider for row in rows] == ["eager", "ours cpu"] and rows[1] is new["ours cpu"]
    assert list(plot.panels(rows)) == [("double", "float32")]


def test_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results.append_csv(
        run(provider("eager", 2.0, 100.0), provider("ours cpu", 2.0, 30.0)).values(), tmp_path / "ops.csv"
    )
    plot.draw(tmp_path / "ops.csv", tmp_path / "ops.png")
    assert (tmp_path / "ops.png").stat().st_size > 5000


def test_committed_measurements_are_readable_and_complete() -> None:
    committed: list[Path] = [*results.RESULTS.glob("ops*.csv"), *results.RESULTS.glob("gpu-*.json")]
    for path in committed:
        rows = plot.read(path)
        assert rows, path.name
        for row in rows:
            assert row.commit and row.machine and row.status.split(":")[0] in ("ok", "absent", "failed")
            assert (row.status == "ok") == (row.p50_us is not None)
            assert row.p50_us is None or row.p20_us <= row.p50_us <= row.p80_us


def test_every_op_module_has_the_same_interface() -> None:
    for name in OPS:
        op: ModuleType = import_module(name)
        for device in ("cpu", "cuda"):
            assert all(case.op == name for case in op.cases(device))
            assert all(min(op.work(case)) >= 0 for case in op.cases(device))
