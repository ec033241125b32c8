"""MiniCanvas as it is shipped: its record, its pipeline, its erasures, its demo and its builder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import trials
from saemnesia_fast.cli.demo import Demo
from saemnesia_fast.cli.main import main
from saemnesia_fast.concepts import load_assignment
from saemnesia_fast.evaluation.analyses.scores import score_profile
from saemnesia_fast.evaluation.units import described
from saemnesia_fast.files import read_json
from saemnesia_fast.minicanvas import build
from saemnesia_fast.minicanvas.build import BuildConfig, Builder
from saemnesia_fast.minicanvas.canvas import WEIGHTS, MiniCanvas, load_sparse, requests
from saemnesia_fast.minicanvas.classifier import accuracy
from saemnesia_fast.minicanvas.drawing import OBJECTS, STYLES, draw_all
from saemnesia_fast.minicanvas.methods import SUPERVISED, methods
from saemnesia_fast.minicanvas.settings import HOOK_POINTS, SETTINGS, SUPERVISED_SETTINGS, Supervision

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
BARS = {
    ("saeuron-exact", "object"): {"UA": 97, "IRA": 97, "CRA": 98},
    ("saeuron-exact", "style"): {"UA": 85, "IRA": 93, "CRA": 93},
    ("saemnesia-exact", "object"): {"IRA": 97, "CRA": 98},
    ("saemnesia-contrast", "object"): {"UA": 97, "IRA": 97, "CRA": 98},
    ("saemnesia-exact", "style"): {"UA": 95, "IRA": 95, "CRA": 95},
}


@pytest.fixture(scope="module")
def canvas() -> MiniCanvas:
    return MiniCanvas.load()


def test_the_record_meets_the_bars():
    record = read_json(WEIGHTS / "record.json")
    stages = record["stages"]
    assert min(stages["judge"]["test_accuracy"].values()) >= 0.99
    assert min(stages["unet"]["generated_accuracy"][kind] for kind in ("object", "style")) >= 0.97
    assert all(stages["sparse_autoencoders"][name]["fvu"] <= 0.10 for name in HOOK_POINTS)
    assert record["total_minutes"] < 90


def test_the_weights_are_small_float16_safetensors():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt"}


def test_the_settings_that_are_shipped_are_those_of_the_code(canvas):
    assert canvas.settings == SETTINGS
    assert load_sparse(SUPERVISED)[2] == SUPERVISED_SETTINGS


def test_every_concept_has_a_supervised_latent_that_stands_out_more_than_its_best_one_did(canvas):
    saes, tables, _ = load_sparse(SUPERVISED)
    for kind, setting in SUPERVISED_SETTINGS.items():
        for point in setting.strength:
            before, table = canvas.tables[point], tables[point]
            table.check_sae(saes[point])
            assert load_assignment(SUPERVISED / "sae" / point, table.sae_hash) == table.assignment
            assert len(set(table.assignment.values())) == len(table.concepts) == len(OBJECTS) + len(STYLES)
            for name in (name for name, its in zip(table.concepts, table.kinds, strict=True) if its == kind):
                own = table.scores(name).mean(0)[table.assignment[name]]
                assert own > before.scores(name).mean(0).max()
                assert own == table.scores(name).mean(0).max()


@pytest.mark.parametrize(("method", "kind", "name"), [(*one, name) for one in BARS for name in BARS[one]])
def test_the_committed_evaluation_meets_the_bars(method, kind, name):
    """SPEC 5.3: means over all concepts of a kind, each erased alone with the kind's one setting."""
    group = read_json(RESULTS / "minicanvas.json")["protocols"]["single"][method][kind]
    values = [case["scores"][name]["mean"] for case in group["cases"]]
    assert group["scores"][name]["mean"] == pytest.approx(sum(values) / len(values), abs=0.02)
    assert group["scores"][name]["mean"] >= BARS[method, kind][name]


def test_contrast_halves_the_debris_and_has_the_better_average():
    """At a higher UA than the exact mode's, and against the best of SAeUron's."""
    single = read_json(RESULTS / "minicanvas.json")["protocols"]["single"]
    scores = {name: {key: one["mean"] for key, one in single[name]["object"]["scores"].items()} for name in single}
    contrast, exact = scores["saemnesia-contrast"], scores["saemnesia-exact"]
    assert contrast["debris"] <= exact["debris"] / 2 and contrast["UA"] >= exact["UA"]
    saeuron = [one["average"] for name, one in scores.items() if name.startswith("saeuron")]
    assert contrast["average"] > max(saeuron)


def test_the_committed_sequence_meets_the_bars():
    """Seven of eight objects erased at once by one latent each: RA is of the eighth."""
    sequence = read_json(RESULTS / "minicanvas_sequence.json")["protocols"]["sequence"]
    (scores, exact) = (sequence[name]["object"]["scores"] for name in ("saemnesia-contrast", "saemnesia-exact"))
    assert scores["UA"]["mean"] >= 92 and scores["IRA"]["mean"] >= 90 and exact["IRA"]["mean"] >= 90


EVALUATIONS = ("minicanvas.json", "minicanvas_sequence.json", "minicanvas_pairs.json")
ATTACKS = ("attack_vocabulary.json", "attack_continuous.json", "attack_search.json")


@pytest.mark.parametrize("file", [*EVALUATIONS, *ATTACKS])
def test_the_committed_results_are_of_what_is_shipped(canvas, file):
    found = read_json(RESULTS / file)["methods"]
    made = found if isinstance(found, dict) else {one["name"]: one["settings"] for one in found}
    names = [name for name in made if name.startswith(("saeuron", "saemnesia"))]
    assert "saemnesia-exact" in names
    assert {one.name: described(one) for one in methods(names, canvas)} == {name: made[name] for name in names}


def test_the_committed_scores_are_those_of_what_is_shipped(canvas):
    """A supervised latent stands out twice as far as SAeUron's best but at the first of the objects' hook points."""
    committed = read_json(RESULTS / "analyse_scores.json")
    peaks = {}
    for name, tables in (("SAeUron", canvas.tables), ("SAEmnesia", load_sparse(SUPERVISED)[1])):
        for kind, setting in SUPERVISED_SETTINGS.items():
            for point in setting.strength:
                concepts = [
                    one for one, its in zip(tables[point].concepts, tables[point].kinds, strict=True) if its == kind
                ]
                mean = score_profile(tables[point], concepts)["mean"]
                assert mean == pytest.approx(committed[f"{name} at {point}"][kind]["mean"])
                peaks[name, point] = mean["peak"]
    ratios = {point: peaks["SAEmnesia", point] / peaks["SAeUron", point] for point in HOOK_POINTS}
    assert [point for point, ratio in ratios.items() if ratio < 2] == [HOOK_POINTS[0]]


def test_the_committed_searches_are_of_what_is_shipped():
    """7 runs a concept against 210, the best of which the supervised tables hold."""
    supervised, unsupervised = (read_json(RESULTS / f"sweep_{name}.json") for name in ("saemnesia", "saeuron"))
    assert (supervised["runs_per_concept"], unsupervised["runs_per_concept"]) == (7, 210)
    assert supervised["machine"]["cpu"] == unsupervised["machine"]["cpu"]
    tables = load_sparse(SUPERVISED)[1]
    for kind, setting in SUPERVISED_SETTINGS.items():
        for table in (tables[point] for point in setting.strength):
            for name in (name for name, its in zip(table.concepts, table.kinds, strict=True) if its == kind):
                best = supervised["concepts"][name]["best"]
                assert {key: table.settings[name][key] for key in best} == best


def test_the_committed_trials_are_those_of_the_benchmark(canvas):
    """In its order, of its settings; those on SAEs that were taught anew by name."""
    committed = [
        (one["changed"], one["name"], one["settings"])
        for one in read_json(RESULTS / "minicanvas_trials.json")["trials"]
    ]
    shipped = [
        (group, one.name, described(trials.erasure(one, canvas).settings))
        for group, some in trials.trials().items()
        for one in some
    ]
    assert committed[: len(shipped)] == shipped
    assert [one[:2] for one in committed[len(shipped) :]] == [("teaching", name) for name in trials.TRAINED]


def test_the_committed_evaluations_agree_to_the_last_digit():
    """Painted on two machines."""
    alone, more = (read_json(RESULTS / file) for file in ("minicanvas.json", "minicanvas_sequence.json"))
    assert alone["machine"]["cpu"] != more["machine"]["cpu"]
    for method, groups in more["protocols"]["single"].items():
        for kind, group in groups.items():
            assert alone["protocols"]["single"][method][kind] == group


def test_the_judge_knows_drawn_pictures(canvas):
    pictures = draw_all(2, seed=77)
    on_objects, on_styles = accuracy(canvas.judge, pictures.images, pictures.objects, pictures.styles)
    assert on_objects >= 0.97 and on_styles >= 0.97


def test_painting_is_reproducible_and_depends_on_the_seed_alone(canvas):
    wanted = requests(1, seed=123)[:4]
    together = canvas.paint(wanted)
    assert torch.equal(together, canvas.paint(wanted))
    apart = torch.cat([canvas.paint([one]) for one in wanted])
    torch.testing.assert_close(together, apart, atol=2e-3, rtol=0)


def test_an_erased_object_disappears_and_the_rest_stays(canvas):
    wanted = requests(1, seed=9_000_000)
    plain = canvas.paint(wanted)
    with canvas.erased(["flower"]):
        erased = canvas.paint(wanted)
    scores = canvas.scores(erased, wanted, ["flower"])["object"]
    assert scores.UA >= 80 and scores.IRA >= 93 and scores.CRA >= 95
    assert torch.equal(canvas.paint(wanted[:4]), plain[:4]) or torch.allclose(
        canvas.paint(wanted[:4]), plain[:4], atol=2e-3
    )


def test_one_supervised_latent_erases_a_style_and_the_rest_stays(canvas):
    (method,) = methods(["saemnesia-exact"], canvas)
    wanted = requests(1, seed=9_000_000)
    with method.erased(canvas.pipe, ["mosaic"]):
        erased = canvas.paint(wanted)
    scores = canvas.scores(erased, wanted, ["mosaic"])["style"]
    assert scores.UA >= 85 and scores.IRA >= 93 and scores.CRA >= 90


def test_demo_writes_picture_and_scores(tmp_path, capsys):
    erasing = ["--object", "moon", "--style", "neon"]
    main(["demo", *erasing, "--images", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "without-moon-neon.json").read_text())
    assert set(report) >= {"UA", "IRA", "CRA", "seconds_per_image"}
    assert set(report["by_kind"]) == {"object", "style"} and report["method"]["name"] == "saemnesia-exact"
    assert report["UA"] == pytest.approx(sum(one["UA"] for one in report["by_kind"].values()) / 2, abs=0.01)
    assert report["seconds_per_image"]["after"] > 0
    with Image.open(tmp_path / "without-moon-neon.png") as picture:
        assert picture.width > 2 * len(OBJECTS) * 64 and picture.height > len(STYLES) * 64
    assert "UA" in printed and "without-moon-neon.png" in printed


def test_demo_names_the_concepts_it_knows(tmp_path):
    with pytest.raises(ValueError, match=r"object: expected one of star, .*, got 'dog'"):
        Demo(object=("dog",), out=tmp_path).run()


@pytest.fixture
def hasty(monkeypatch):
    """A builder that paints in three steps, one picture of each combination, and teaches for one pass."""
    canvas = Builder.canvas
    monkeypatch.setattr(Builder, "canvas", lambda self: replace(canvas(self), steps=3))
    monkeypatch.setattr(build, "draw_all", lambda count, seed: draw_all(min(count, 2), seed))
    monkeypatch.setattr(build, "requests", lambda count, seed: requests(1, seed))
    monkeypatch.setattr(build, "PROMPT_TEMPLATES", build.PROMPT_TEMPLATES[:1])
    monkeypatch.setattr(build, "SUPERVISION", Supervision(epochs=1, images=48))


@pytest.mark.slow
def test_the_builder_makes_everything_from_nothing_and_resumes(tmp_path, hasty):
    config = BuildConfig(
        work=tmp_path / "work",
        out=tmp_path / "out",
        pictures_per_combination=2,
        autoencoder_steps=2,
        judge_steps=2,
        text_steps=2,
        unet_steps=2,
        sae_images_per_combination=1,
        sae_steps=2,
        num_latents=64,
        k=4,
        progress=False,
    )
    record = Builder(config).run()
    stages = ["autoencoder", "judge", "text_encoder", "unet", "activations", "sparse_autoencoders", "concepts"]
    assert list(record["stages"]) == [*stages, "supervised"]
    made = MiniCanvas.load(config.out)
    with made.erased(["fish", "neon"]) as erasures:
        assert made.paint(requests(1, seed=0)[:2]).isfinite().all()
        assert {point for one in erasures for point in one.hook_points} == set(made.saes)
    _, supervised = methods(["saeuron-exact", "saemnesia-exact"], made, config.out / "supervised")
    with supervised.erased(made.pipe, ["fish", "neon"]):
        assert made.paint(requests(1, seed=0)[:2]).isfinite().all()
    for point, table in supervised.tables.items():
        assert load_assignment(config.out / "supervised" / "sae" / point, table.sae_hash) == table.assignment
    before = (tmp_path / "work" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert Builder(config).run() == record
    assert (tmp_path / "work" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before

    again = replace(config, work=tmp_path / "again", start=config.out, out=tmp_path / "second")
    assert list(Builder(again).run()["stages"]) == list(record["stages"])
    for name in ("settings.json", "sae", "concepts", "supervised"):
        assert contents(again.out / name) == contents(config.out / name)


def contents(path: Path) -> dict[str, bytes]:
    """Of a file, or of all in a folder."""
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    return {str(one.relative_to(path)): one.read_bytes() for one in files}
