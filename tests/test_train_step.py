"""The benchmark of a training step: its gate refuses other steps, its processes answer, its tables are rendered."""

from __future__ import annotations

import dataclasses
import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest
import torch

import activations
import dry
import gpu
import harness
import minicanvas_sae
import render
import results
import train_step
import train_step_dense
import train_step_exact
import train_step_peers
import train_step_worker as worker
from saemnesia_fast.training import TensorActivations, TrainConfig

STAMP = results.Stamp("abc", "2026-01-01T00:00:00Z", "a machine", 2, 2, "2.13.0", "3.6.0")


@pytest.fixture(scope="module", params=["", "N/10 dead"])
def exact_step(request: pytest.FixtureRequest):
    """A case of train_step, and what a dense float64 step comes to."""
    case = harness.Case("train_step", M=64, d=64, N=512, k=8, variant=request.param)
    formulas = {peer.formula for peer in train_step_peers.peers("cpu").values()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step_exact, "BLOCK", 100 * 64)  # latents in six parts, the last shorter
        patch.setattr(train_step_exact, "PAIRS", 150)
        return case, train_step_exact.expected(case, "cpu", formulas)


def test_the_exact_step_is_that_of_dense_autograd_in_float64(exact_step) -> None:
    case, exact = exact_step
    own = train_step_exact.at_rows(train_step_exact.fresh_weights(case, "cpu"), slice(None))
    x = train_step_exact.tokens(case, "cpu").double()
    dead = torch.zeros(case.N, dtype=torch.bool) if exact.dead is None else exact.dead
    variance = (x - x.mean(0)).square().sum()
    released = train_step_dense.released_loss(own, x, case.k, variance, dead, int(dead.sum())).loss
    assert exact.losses["released"] == pytest.approx(float(released), rel=1e-12)
    step = train_step_dense.Plain(own, train_step_dense.Setting(case.k, train_step_exact.LR, exact.dead))
    assert exact.losses["topk"] == pytest.approx(float(step(x)), rel=1e-12)
    for got, want in zip(exact.weights, step.weights, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-9, atol=1e-9 * train_step_exact.LR)


def test_the_margins_are_those_to_the_first_latent_that_is_left_out(exact_step) -> None:
    case, exact = exact_step
    own = train_step_exact.at_rows(train_step_exact.fresh_weights(case, "cpu"), slice(None))
    pre = train_step_dense.pre_activations(own, train_step_exact.tokens(case, "cpu").double())
    values, latents = pre.sort(dim=1, descending=True)
    above = values[:, : case.k] / values[:, case.k : case.k + 1] - 1
    above = torch.cat([above, above[:, -1:]], 1)
    wanted = [above[latents[:, : case.k + 1] == latent] for latent in range(case.N)]
    wanted = torch.stack([gaps.min() if len(gaps) else torch.tensor(torch.inf).double() for gaps in wanted])
    torch.testing.assert_close(exact.margins, wanted, rtol=1e-9, atol=1e-12)
    assert (wanted < train_step_peers.HALF_BAND).any() and (wanted > train_step_peers.HALF_BAND).any()


@pytest.mark.parametrize("name", list(train_step_peers.peers("cpu")))
def test_every_training_step_passes_its_gate(exact_step, name: str) -> None:
    if name == "torch.compile":
        pytest.skip("compiles for a minute")
    case, exact = exact_step
    try:
        found = worker.Runner(case, "cpu", name).check(exact)
    except harness.Absent as absent:
        pytest.skip(str(absent))
    assert found["error"] < (1e-4 if "float16" in name else 1e-5)
    differs = train_step_peers.peers("cpu")[name].differs
    assert found["update_error"] is None if differs else found["update_error"] < 1e-3


def _without(part: str):
    """A dense step that leaves out a part of the recipe."""

    class Faulty(train_step_dense.Plain):
        def _update(self) -> None:
            W_dec = self.weights.W_dec
            if part == "norm":
                self.optimizer.step()
            elif part == "parallel":
                self.optimizer.step()
                with torch.no_grad():
                    W_dec /= W_dec.norm(dim=1, keepdim=True)
            else:
                self.weights.b_enc.grad.zero_()
                super()._update()

    return Faulty


@pytest.mark.parametrize("part", ["norm", "parallel", "bias"])
def test_a_training_step_with_another_recipe_does_not_pass(exact_step, part: str) -> None:
    case, exact = exact_step
    runner = worker.Runner(case, "cpu", "dense eager")
    runner.peer = dataclasses.replace(runner.peer, start=_without(part))
    with pytest.raises(ValueError, match="error of the update"):
        runner.check(exact)


@pytest.mark.parametrize("name", ["W_enc", "W_dec"])
def test_a_training_step_with_a_wrong_gradient_of_one_latent_does_not_pass(exact_step, name: str) -> None:
    class Faulty(train_step_dense.Plain):
        def _update(self) -> None:
            gradient = getattr(self.weights, name).grad
            gradient[7] = gradient[7].flip(0)
            super()._update()

    case, exact = exact_step
    runner = worker.Runner(case, "cpu", "dense eager")
    runner.peer = dataclasses.replace(runner.peer, start=Faulty)
    with pytest.raises(ValueError, match=rf"error of the update of {name}\[7\]"):
        runner.check(exact)


def test_a_training_step_with_another_loss_does_not_pass(exact_step) -> None:
    case, exact = exact_step
    runner = worker.Runner(case, "cpu", "SAeUron")
    runner.peer = dataclasses.replace(runner.peer, formula="topk")
    with pytest.raises(ValueError, match="loss .* instead of"):
        runner.check(exact)


def test_latents_called_dead_fire_on_no_token(exact_step) -> None:
    case, exact = exact_step
    assert (exact.dead is not None) == bool(case.variant)
    if exact.dead is None:
        return
    own, x = train_step_exact.fresh_weights(case, "cpu"), train_step_exact.tokens(case, "cpu")
    pre = torch.relu((x - own.b_dec) @ own.W_enc.T + own.b_enc)
    kept = torch.zeros_like(pre).scatter(1, pre.topk(case.k).indices, 1.0)
    assert int(exact.dead.sum()) == case.N // 10 and kept[:, exact.dead].sum() == 0
    assert exact.losses["topk"] > 0 and pre[:, exact.dead].max() > 0


@pytest.mark.slow
def test_training_steps_are_measured_in_processes_of_their_own(tmp_path: Path) -> None:
    """Two competitors at a small size: time, memory, ratios, and a file that reads back."""
    case = train_step.cases("cpu", small=True)[0]
    (rows,) = train_step.measure(case, "cpu", ["dense eager", "ours eager"], 0.05, 10.0, STAMP)
    dense, ours = rows
    assert [row.provider for row in rows] == ["dense eager", "ours eager"]
    assert dense.status == ours.status == "ok" and dense.timing == "wall"
    for row in (dense, ours):
        assert row.samples >= train_step.FEWEST_SAMPLES and 0 < row.p20_us <= row.p50_us <= row.p80_us
        assert row.update_error < 1e-3 and row.peak_bytes > 4 * case.N * case.d
    assert ours.vs_baseline == ours.vs_best == pytest.approx(dense.p50_us / ours.p50_us)
    assert ours.of_baseline_peak == pytest.approx(ours.peak_bytes / dense.peak_bytes)
    assert dense.encode_us is None and all(us > 0 for us in train_step.phases(ours))
    assert None not in train_step.phases(ours, "bytes")
    results.append_csv(rows, tmp_path / "train_step.csv")
    back = results.read_csv(tmp_path / "train_step.csv", train_step.StepRow)
    assert results.as_records(back) == results.as_records(rows)
    assert "ours eager" in train_step.table(back)


class Questions(list):
    """A connection that asks what it is made of, and then is closed."""

    def __init__(self, *questions: tuple) -> None:
        super().__init__(questions)
        self.answers: list[tuple] = []
        self.send = self.answers.append

    def recv(self) -> tuple:
        if not self:
            raise EOFError
        return self.pop(0)


def test_a_worker_answers_or_says_why_not(exact_step, tmp_path: Path) -> None:
    case, exact = exact_step
    exact.save(tmp_path / "expected.pt")
    prepare = ("prepare", tmp_path / "expected.pt")
    asked = Questions(prepare, ("samples", 2), ("phases",))
    worker.serve(asked, case, "cpu", "ours eager")
    (found, _), (sampled, _), (phases, why) = asked.answers
    assert found["update_error"] < 1e-3 and found["estimate_us"] > 0 and why == ""
    assert len(sampled["taken"]) == 2
    assert list(phases) == [f"{name}_{of}" for of in ("us", "bytes") for name in train_step_peers.PHASES]
    nobody = Questions(prepare)
    worker.serve(nobody, case, "cpu", "nobody")
    assert nobody.answers == [(None, "failed: KeyError: 'nobody'")]


@pytest.mark.parametrize("name", ["ours eager", "ours cpu"])
def test_phases_are_those_of_the_steps_that_are_timed(name: str) -> None:
    """Their times add up to the step's; eager holds [M, N] activations and both [N, d] gradients, the other neither."""
    case = harness.Case("train_step", M=256, d=64, N=16384, k=8)
    runner = worker.Runner(case, "cpu", name)
    own, setting = train_step_exact.fresh_weights(case, "cpu"), train_step_dense.Setting(case.k, worker.STILL, None)
    try:
        runner.step = runner.peer.start(own, setting)
    except harness.Absent as absent:
        pytest.skip(str(absent))
    runner.memory.before()
    taken = runner.samples(3)["taken"]
    assert [sum(laps) for laps in runner.laps] == pytest.approx(taken, rel=0.1)
    assert runner.host == pytest.approx(taken, rel=0.1), "nothing is left to do on a CPU"
    found = runner.phases()
    encode, gradients = found["encode_bytes"] / (4 * case.M * case.N), found["gradients_bytes"] / (8 * case.N * case.d)
    assert encode > 0.9 and gradients > 0.9 if name == "ours eager" else encode < 0.5 and gradients < 0.5


def test_a_competitor_whose_process_dies_says_so() -> None:
    started = train_step.Worker(train_step.cases("cpu", small=True)[0], "cpu", "dense eager")
    started._process.kill()
    assert started.ask("samples", 1) is None and started.status == "failed: ended with exit status -9"


def test_a_case_too_large_for_the_memory_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_step, "_free_bytes", lambda device: 1e9)
    ((row,),) = train_step.measure(train_step.cases("cpu")[-1], "cpu", ["dense eager"], 1.0, 1.0, STAMP)
    assert row.status == "failed: the float64 step needs 4.7 GB, 1.0 are free" and row.provider == "all"


def test_competitors_too_large_for_the_memory_are_rows_that_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows so far are given after each, as none fits beside another."""
    case, names = train_step.cases("cpu")[-1], ["dense eager", "ours cpu"]
    monkeypatch.setattr(train_step, "_alone", lambda *_: "")
    monkeypatch.setattr(train_step, "_free_bytes", lambda device: 5e9)
    first, both = train_step.measure(case, "cpu", names, 1.0, 1.0, STAMP)
    assert first == both[:1]
    assert {row.provider: row.status for row in both} == {
        "dense eager": "failed: the step needs 18.0 GB, 5.0 are free",
        "ours cpu": "failed: the step needs 9.4 GB, 5.0 are free",
    }


def test_slow_steps_are_timed_twice_and_others_more_often() -> None:
    asked = []

    def found_slow(name: str, seconds: float) -> SimpleNamespace:
        found = {"estimate_us": 1e6 * seconds}
        sample = lambda count: asked.append((name, count))  # noqa: E731
        return SimpleNamespace(name=name, status="", found=found, sample=sample, prepare=lambda path: None)

    train_step._take_turns([found_slow("a", 60), found_slow("b", 5), found_slow("c", 0.4)], Path(), 8.0)
    assert asked == [("a", 1), ("b", 3), ("c", 10), ("b", 3), ("c", 10), ("a", 1)]


def test_a_killed_run_has_written_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beneath rows of a time when there were fewer columns."""

    def measure(*_: object) -> Iterator[list[results.Row]]:
        yield rows[:1]
        raise KeyboardInterrupt

    rows = [_step_row("dense eager", 400.0, 3_000_000_000), _step_row("ours cpu", 50.0, 750_000_000)]
    path = tmp_path / "train_step.csv"
    results.append_csv(rows[1:], path)
    path.write_text("\n".join(line.rsplit(",", 4)[0] for line in path.read_text().splitlines()))
    (tmp_path / "ceilings.json").write_text('{"bandwidth": 1e10, "flops": {"float32": 1e11}}')
    monkeypatch.setattr(train_step, "measure", measure)
    files = ["--csv", str(path), "--json", str(tmp_path / "rows.json"), "--ceilings", str(tmp_path / "ceilings.json")]
    parser = runpy.run_path(str(Path(train_step.__file__).parent / "__main__.py"))["parser"]()
    chosen = parser.parse_args(["train_step", "--small", "--device", "cpu", *files])
    with pytest.raises(KeyboardInterrupt):
        chosen.run(chosen)
    back = results.read_csv(path, train_step.StepRow)
    assert results.as_records(back) == results.as_records([rows[1], rows[0]])
    assert json.loads((tmp_path / "rows.json").read_text()) == results.as_records(rows[:1])


def test_the_least_work_of_a_training_step() -> None:
    """At SD 1.5's size: 28 bytes a weight of the encoder, 24 of the decoder; the encoder's product is all but 1 %."""
    plain, dead = train_step.cases("cpu")[1:3]
    one = train_step.work(plain)
    assert one.bytes == 52 * 20480 * 1280 + 4 * 1024 * 1280
    assert one.flops / (2 * 1024 * 20480 * 1280) == pytest.approx(1.00625)
    assert train_step.work(dead).flops / one.flops == pytest.approx(1.2236, rel=1e-3)


def test_everyone_takes_part_wherever_it_fits() -> None:
    sizes = [(M, N, variant) for variant in ("", train_step_exact.DEAD) for N in (20480, 131072) for M in (1024, 4096)]
    for device in ("cpu", "cuda"):
        cases = [case for case in train_step.cases(device) if case.N < train_step.ONE_CARD]
        assert {(case.M, case.N, case.variant) for case in cases} == {*sizes[:4], sizes[4]}
        assert all(train_step.competitors(case, device) == list(train_step_peers.peers(device)) for case in cases)
    first, *_, largest = train_step.cases("cuda")
    assert (first.M, first.N, largest.M, largest.N) == (4096, 20480, 4096, 1_048_576)
    few = ["ours cuda, bfloat16 moments", "ours cuda, 8bit moments"]
    assert train_step.competitors(largest, "cuda") == few
    entered = train_step_peers.peers("cuda")
    assert all(entered[name].bytes_needed(largest) < 78 * 2**30 for name in few)


def test_saes_trained_by_autograd_and_by_the_trainer_are_alike() -> None:
    case = harness.Case("sae", M=1024, d=32, N=128, k=4)
    x = activations.tokens(case, "cpu")
    config = TrainConfig(num_latents=64, k=4, steps=40, lr=1e-3, dead_after=512, device="cpu", progress=False)
    found = minicanvas_sae.compare(config, lambda: TensorActivations(x[:768], 128), x[768:])
    former, present = found.values()
    assert present["fvu"] == pytest.approx(former["fvu"], rel=2e-3) and present["fvu"] < 0.9
    assert {"seconds", "dead_fraction", "l0"} <= set(former)


def test_the_committed_saes_of_the_trainer_are_as_good_and_took_less_time() -> None:
    for ways in json.loads(render.MINICANVAS_SAE.read_text())["points"].values():
        former, present = ways.values()
        assert len(former) == len(present) == 3
        fvus = [one["fvu"] for one in former]
        assert mean(one["fvu"] for one in present) <= mean(fvus) + max(fvus) - min(fvus), "more than seeds differ"
        assert mean(one["seconds"] for one in present) < mean(one["seconds"] for one in former)


def test_the_gpu_command_keeps_the_steps_rows_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(command: list[str], *_: object) -> dict[str, object]:
        asked.append(command)
        if "train_step" in command:
            Path(command[command.index("--json") + 1]).write_text('[{"provider": "ours cuda"}]')
        return {"status": "ok", "seconds": 1.0, "output": ""}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "describe", lambda device: STAMP)
    monkeypatch.setattr(gpu, "_run", answer)
    assert gpu.main(("train_step",), tmp_path / "gpu.json", 1, ("train_step",)) == 0
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["rows"] == [] and record["train_step"] == [{"provider": "ours cuda"}]
    assert asked[-1][2] == "train_step" and "cuda" in asked[-1]


def test_dry_run_shows_the_training_steps() -> None:
    lines = [line.split() for line in dry.report(("train_step",)).splitlines() if line.startswith("train_step")]
    assert lines[1][-4:] == ["1368.39", "54.0", "456.1", "bytes"]
    assert len(lines) == len(train_step.cases("cuda"))


def _step_row(provider: str, milliseconds: float, peak: int, **more: object) -> results.Row:
    case = harness.Case("train_step", M=1024)
    row = train_step.StepRow.of(STAMP, case, provider, 20_000.0)
    row.status, row.p50_us, row.peak_bytes = "ok", 1e3 * milliseconds, peak
    row.p20_us, row.p80_us = 0.9 * row.p50_us, 1.1 * row.p50_us
    return dataclasses.replace(row, **more)


def test_the_table_of_training_steps_is_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "TRAIN_STEP", tmp_path / "train_step.csv")
    assert render.train_step() == render.NOT_YET
    phases = {"encode_us": 30e3, "loss_us": 1e3, "gradients_us": 9e3, "update_us": 10e3}
    sizes = {"encode_bytes": 21_000_000, "loss_bytes": 0, "gradients_bytes": 3_141_592, "update_bytes": 4096}
    rows = [
        _step_row("dense eager", 400.0, 3_000_000_000),
        _step_row("eai-sparsify", 200.0, 2_000_000_000, version="1.3.3", differs="no clipping"),
        _step_row("ours cpu", 50.0, 750_000_000, **phases, **sizes),
        _step_row("ours eager", 80.0, 2_000_000_000, **phases),
        dataclasses.replace(_step_row("SAeUron", 1.0, 1), status="failed: x", p50_us=None, p20_us=None, p80_us=None),
    ]
    results.append_csv(train_step.weigh(harness.compare(rows, "dense eager")), render.TRAIN_STEP)
    text = render.train_step()
    assert "| 1024 | 20480 |  | eai-sparsify 1.3.3 | 200 (180-220) | 2 | 1 | 2000 | 0.667 | 1371 | 0.578 |" in text
    assert "| 1024 | 20480 |  | ours cpu | 50 (45-55) | 8 | 4 | 750 | 0.25 | 121 | 0.0509 |" in text
    assert "| 1024 | 20480 |  | cpu | 20 | 50 | 30 | 1 | 9 | 10 | 21 | 0 | 3.14 | 0.0041 |" in text
    assert "| eager |" not in text, "its phases were run apart from its steps"
    assert "SAeUron" not in text and text.endswith("torch 2.13.0, abc. eai-sparsify: no clipping.")


def test_the_table_of_minicanvas_saes_is_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "MINICANVAS_SAE", tmp_path / "minicanvas_sae.json")
    assert render.minicanvas_sae() == render.NOT_YET
    found = [{"seconds": seconds, "fvu": fvu} for seconds, fvu in ((12.34, 0.0857), (10.0, 0.0861), (14.0, 0.085))]
    points = {"up": {"Trainer": found}}
    report = {**dataclasses.asdict(STAMP), "steps": 1500, "tokens_a_step": 2048, "points": points}
    render.MINICANVAS_SAE.write_text(json.dumps(report))
    text = render.minicanvas_sae()
    assert "| up | Trainer | 12.3 (10.0-14.0) | 0.0857 (0.0850-0.0861) |" in text
    assert text.endswith("of 3 seeds, 1500 steps of 2048 tokens; a machine, 2 threads, torch 2.13.0, abc.")
