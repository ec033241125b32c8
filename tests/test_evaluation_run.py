"""An evaluation as it runs: resumed, in parts, summed up, and shown in a file that needs no other."""

import base64
import io
import re
import shutil
import subprocess
import weakref
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from saemnesia_fast.cli.evaluate import Evaluate, read_shard
from saemnesia_fast.cli.processes import in_processes
from saemnesia_fast.evaluation import NoErasure, Outcome, Plan, cases, frechet_distance, html, paint, summarize
from saemnesia_fast.evaluation import units as units_module
from saemnesia_fast.evaluation.units import ERASING, made_with
from saemnesia_fast.files import read_json, write_json
from saemnesia_fast.minicanvas.canvas import KINDS, WEIGHTS, MiniCanvas
from saemnesia_fast.minicanvas.methods import BASELINES, METHODS, methods
from saemnesia_fast.minicanvas.settings import CONTRAST_SETTINGS, HOOK_POINTS, SETTINGS
from saemnesia_fast.ops import backend_report, use_backend
from saemnesia_fast.ops.backend import Choice
from tiny_benchmark import CLASSES, TinyBenchmark, TinyErasure
from tiny_parts import note

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
ALL = [case for protocol in ("single", "sequence", "pairs") for case in cases(protocol, CLASSES)]


SINGLE = cases("single", CLASSES)


def make_plan(folder: Path, *some, found=None, seeds=(0, 1, 2), **options) -> Plan:
    some = some or (NoErasure(), TinyErasure(), TinyErasure("half", strength=0.5, broken=True))
    return Plan(TinyBenchmark(), some, ALL if found is None else found, seeds, folder, **options)


def bits(folder: Path) -> dict[str, bytes]:
    """Every outcome and picture but for its times."""
    found = {}
    for path in sorted(folder.rglob("*.*")):
        if path.suffix == ".safetensors":
            outcome = Outcome.load(path)
            tensors = [*outcome.wanted.values(), *outcome.probabilities.values(), outcome.features]
            found[str(path.relative_to(folder))] = b"".join(one.numpy().tobytes() for one in tensors)
        else:
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def test_scores_of_a_run_are_those_of_its_pictures(tmp_path):
    plan = make_plan(tmp_path, found=cases("single", CLASSES, ["object"]))
    paint(plan, progress=False)
    results = summarize(plan)["protocols"]["single"]
    none, turn, half = (results[name]["object"] for name in ("none", "turn", "half"))
    assert {name: score["mean"] for name, score in none["scores"].items()} == {
        "UA": 0,
        "IRA": 100,
        "CRA": 100,
        "retain": 100,
        "average": pytest.approx(66.67),
        "debris": 0,
    }
    assert turn["scores"]["UA"] == {"mean": 100, "plus_minus": 0}
    assert turn["scores"]["debris"]["mean"] == 0
    by_seed = [case["by_seed"] for case in half["cases"]]
    assert all(one["UA"] == one["debris"] for one in by_seed)
    means = [sum(one["UA"][seed] for one in by_seed) / 3 for seed in range(3)]
    assert half["scores"]["UA"]["mean"] == pytest.approx(sum(means) / 3, abs=0.01)
    assert 20 < half["scores"]["UA"]["mean"] < 80 and half["scores"]["UA"]["plus_minus"] > 0


def test_in_a_sequence_the_last_case_counts_and_pairs_of_two_kinds_are_both_scored(tmp_path):
    plan = make_plan(tmp_path, TinyErasure())
    paint(plan, progress=False)
    protocols = summarize(plan)["protocols"]
    sequence = protocols["sequence"]["turn"]["object"]
    assert [case["erased"] for case in sequence["cases"]] == [["cat"], ["cat", "dog"]]
    assert sequence["scores"] == sequence["cases"][-1]["scores"]
    assert (sequence["scores"]["UA"]["mean"], sequence["scores"]["IRA"]["mean"]) == (100, 100)
    mixed = protocols["pairs"]["turn"]["object+style"]
    assert len(mixed["cases"]) == 6
    assert mixed["scores"]["UA"]["mean"] == 50  # objects turn, styles stay
    assert mixed["scores"]["IRA"]["mean"] == 100
    assert mixed["scores"]["CRA"]["mean"] == 75  # of the styles 100, of the objects those not in the erased style


def test_fid_is_that_of_the_retained_pictures_of_all_cases_and_seeds(tmp_path):
    found = cases("single", CLASSES, ["object"])
    plan = make_plan(tmp_path, NoErasure(), TinyErasure(), found=found)
    paint(plan, progress=False)
    results = summarize(plan)["protocols"]["single"]
    assert results["none"]["object"]["fid"] == 0
    benchmark, kept, plain = TinyBenchmark(), [], []
    for case in found:
        for seed in plan.seeds:
            wanted = [one for one in benchmark.requests(seed) if CLASSES["object"][one.object] not in case.erased]
            plain.append(benchmark.judged(benchmark.paint(wanted)).features)
            benchmark.pipe.erased = {case.erased[0]: 1.0}
            kept.append(benchmark.judged(benchmark.paint(wanted)).features)
            benchmark.pipe.erased = {}
    expected = frechet_distance(torch.cat(kept), torch.cat(plain))
    assert results["turn"]["object"]["fid"] == pytest.approx(expected, abs=1e-4)


def test_features_are_let_go_of_once_they_are_in_the_fid(tmp_path, monkeypatch):
    """Of 33 units in memory: the plain ones of each seed, and two that are being read."""
    plan = make_plan(tmp_path, found=SINGLE, seeds=(0, 1, 2))
    paint(plan, progress=False)
    load, read, most = Outcome.load, [], 0

    def noting(path):
        nonlocal most
        outcome = load(path)
        read.append(weakref.ref(outcome.features))
        most = max(most, sum(one() is not None for one in read))
        return outcome

    monkeypatch.setattr(Outcome, "load", noting)
    summarize(plan)
    assert len(read) > 30 and most <= 3 + 2


def test_plain_pictures_are_painted_once_and_a_method_is_opened_once_for_all_seeds(tmp_path):
    turn = TinyErasure()
    plan = make_plan(tmp_path, NoErasure(), turn)
    paint(plan, progress=False)
    erased = {frozenset(case.erased) for case in ALL}
    assert len(erased) == 5 + 9  # a sequence's first is a single, its second a pair
    assert sorted(turn._opened) == sorted(tuple(n for k in CLASSES.values() for n in k if n in one) for one in erased)
    assert plan.benchmark.painted == [12] * 3 * (1 + len(erased))


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    class Failing(TinyBenchmark):
        def paint(self, wanted, **options):
            if len(self.painted) == 7:
                raise KeyboardInterrupt
            return super().paint(wanted, **options)

    whole, cut = (make_plan(tmp_path / name, found=SINGLE, seeds=(0, 1)) for name in ("whole", "cut"))
    paint(whole, progress=False)
    with pytest.raises(KeyboardInterrupt):
        paint(replace(cut, benchmark=Failing()), progress=False)
    assert len(list((tmp_path / "cut").rglob("*.safetensors"))) == 7
    with pytest.raises(ValueError, match=r"units: expected all to be painted, got \d+ missing"):
        summarize(cut)
    (tmp_path / "cut" / "turn" / ".x.png.tmp").mkdir(parents=True)
    paint(cut, progress=False)
    assert len(cut.benchmark.painted) == len(whole.benchmark.painted) - 7
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole")
    paint(cut, progress=False)
    assert len(cut.benchmark.painted) == len(whole.benchmark.painted) - 7


@pytest.mark.parametrize("parts", [2, 5])
def test_parts_together_are_the_whole_bit_for_bit(tmp_path, parts):
    paint(make_plan(tmp_path / "whole", found=SINGLE, seeds=(0, 1)), progress=False)
    painted = 0
    for part in range(parts):
        plan = make_plan(tmp_path / "parts", found=SINGLE, seeds=(0, 1))
        paint(plan, shard=(part, parts), progress=False)
        painted += len(plan.benchmark.painted)
    assert bits(tmp_path / "parts") == bits(tmp_path / "whole")
    assert painted == len(list((tmp_path / "whole").rglob("*.safetensors")))
    with pytest.raises(ValueError, match="shard: expected i of n with 0 <= i < n, got 2 of 2"):
        paint(plan, shard=(2, 2))


def test_a_changed_setting_is_never_taken_for_what_was_painted(tmp_path):
    make = partial(make_plan, tmp_path, found=SINGLE[:2])
    plan = make(TinyErasure(), seeds=(0, 1))
    paint(plan, progress=False)
    erased, plain = 2 * 2, 2
    assert len(list(tmp_path.rglob("*.safetensors"))) == erased + plain
    assert not plan.missing()
    assert not replace(plan, cases=SINGLE[1::-1], seeds=(1, 0)).missing()
    assert len(replace(plan, methods=[TinyErasure(strength=0.9)]).missing()) == erased
    assert len(replace(plan, seeds=(0, 7)).missing()) == (erased + plain) / 2
    for change in ({"threads": 2}, {"benchmark": TinyBenchmark(per_combination=1)}):
        assert len(replace(plan, **change).missing()) == erased + plain


def test_units_are_known_by_versions_and_by_the_backends_that_compute(tmp_path, monkeypatch):
    """What was asked for does not matter: "auto" is the backend that it stands for."""

    def digest():
        return make_plan(tmp_path, seeds=(0,)).missing()[0].path.name

    found, first = made_with("cpu"), digest()
    assert found["backend"] == {one.op: one.backend for one in backend_report("cpu") if one.op in ERASING}
    assert set(found["backend"]) == set(ERASING)
    assert {name: found[name] for name in ("diffusers", "transformers")} == {
        name: version(name) for name in ("diffusers", "transformers")
    }
    assert make_plan(tmp_path).descriptions[""]["made_with"] == found
    with use_backend(found["backend"]["erase"]):
        assert digest() == first
    devices = []
    monkeypatch.setattr(
        units_module, "backend_report", lambda device: devices.append(device) or [Choice("erase", "other", "")]
    )
    assert digest() != first
    on_gpu = TinyBenchmark(pipe=SimpleNamespace(erased={}, device=torch.device("cuda")))
    assert replace(make_plan(tmp_path), benchmark=on_gpu).descriptions[""]["made_with"]["backend"] == {"erase": "other"}
    assert devices == ["cpu", torch.device("cuda")]
    monkeypatch.undo()
    monkeypatch.setattr(units_module, "version", {"diffusers": "0", "transformers": version("transformers")}.get)
    assert digest() != first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": (TinyErasure(), TinyErasure(strength=0.5))}, r"methods: expected different names, got \['turn',"),
        ({"seeds": ()}, r"seeds: expected different ones, at least one, got \[\]"),
        ({"seeds": (1, 1)}, "seeds: expected different ones"),
    ],
)
def test_a_plan_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(make_plan(tmp_path), **changes)


def test_every_part_has_a_process_and_a_failure_is_told(tmp_path):
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
    in_processes(partial(note, tmp_path / "good"), processes=2, threads=1)
    assert sorted(path.name for path in (tmp_path / "good").iterdir()) == ["0of2", "1of2"]
    with pytest.raises(ChildProcessError, match=r"processes \[1\] of 2 failed; what is done is kept"):
        in_processes(partial(note, tmp_path / "bad"), processes=2, threads=1)
    in_processes(partial(note, tmp_path), processes=1, threads=1)
    assert (tmp_path / "0of1").exists()
    with pytest.raises(ValueError, match="processes, threads: expected >= 0 and >= 1, got -1 and 1"):
        in_processes(partial(note, tmp_path), processes=-1, threads=1)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    plan = make_plan(tmp_path_factory.mktemp("report"), seeds=(0, 1))
    paint(plan, progress=False)
    return html(plan, summarize(plan, {"machine": {"cpu": "<a cpu>"}}))


def test_a_part_of_the_pictures_is_shown_in_its_places_and_counted(tmp_path):
    """Rows hold what was painted under its prompt, and white where nothing was; as in the report of all."""
    whole, part = (make_plan(tmp_path, TinyErasure(), found=SINGLE, retained=some, seeds=(0,)) for some in (None, 1))
    paint(whole, progress=False)
    paint(part, progress=False)
    summary = summarize(part)
    assert (summary["pictures_per_seed"], summary["pictures_per_erasure"]) == (12, [4 + 1, 6 + 1])
    assert summarize(whole)["pictures_per_erasure"] == [12, 12]
    full, few = html(whole, summarize(whole)), html(part, summary)
    assert "<p>12 pictures for each erasure" in full and "<p>5 to 7 of 12 pictures for each erasure" in few
    rows, expected = (dict(_rows(text)) for text in (few, full))
    painted = {  # of cat in ink, dog in pop art, cow in ink
        "nothing erased": (True, True, True),
        "cat": (True, False, False),
        "dog": (True, True, False),
        "cow": (True, False, True),
        "ink": (True, False, True),
        "pop art": (True, True, False),
    }
    assert set(rows) == set(painted)
    for name, places in painted.items():
        pixels, frames = rows[name]
        assert frames == expected[name][1]
        for n, place in enumerate(places):
            wanted = expected[name][0][:, 6 * n : 6 * n + 4] if place else np.full((4, 4, 3), 255)
            assert np.abs(pixels[:, 6 * n : 6 * n + 4] - wanted).max() <= 4, (name, n)
    assert rows["ink"][1].count("<i") == 2 and rows["dog"][1] == '<i style="left:33.333%;width:33.333%"></i>'


def _rows(report):
    """(row's name, (pixels [4, 16, 3], frames)) of each of a report's rows of pictures."""
    for name, data, frames in re.findall(
        r'<tr><th>([^<]*)</th><td><div><img alt="" src="data:image/png;base64,([^"]*)">(.*?)</div>', report
    ):
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            yield name, (np.asarray(picture.convert("RGB")).astype(int), frames)


class Reader(HTMLParser):
    """Collects what a page is made of, and checks that what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.resources: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.resources += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_needs_no_other_file(report):
    page = Reader(report)
    assert page.open == []
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in report and "@import" not in report
    assert page.resources and all(one.startswith("data:image/png;base64,") for one in page.resources)
    for one in set(page.resources):
        with Image.open(io.BytesIO(base64.b64decode(one.split(",")[1]))) as picture:
            assert picture.size == (3 * 6 - 2, 4)
    assert page.tags.count("svg") == 2 + 2 * 2 + 2
    assert "&lt;pop art&gt;" in report and "&lt;a cpu&gt;" in report


def test_the_report_opens_in_a_browser(report, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs a browser on the PATH: {', '.join(BROWSERS)}")
    check = (
        "<script>addEventListener('load', () => { const sizes = [...document.images].map(one => one.naturalWidth);"
        "document.title = `${sizes.length} ${Math.min(...sizes)} ${document.querySelectorAll('svg rect').length}`"
        "})</script>"
    )
    page = tmp_path / "report.html"
    page.write_text(report.replace("</body>", f"{check}</body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([browser, *flags, page.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    title = done.stdout.partition("<title>")[2].partition("</title>")[0]
    images, narrowest, bars = map(int, title.split())
    assert images == report.count("<img") and narrowest == 16 and bars == report.count("<rect")


def test_the_command_line_evaluates_minicanvas(tmp_path, monkeypatch, capsys):
    """Two denoising steps: the numbers mean nothing, their sources do."""
    load = MiniCanvas.load
    monkeypatch.setattr(MiniCanvas, "load", lambda: replace(load(), steps=2))
    command = Evaluate(
        minicanvas=True,
        methods=("none", "saeuron-released", "negative_prompt"),
        protocol=("sequence",),
        kinds=("style",),
        order=("neon",),
        seeds=(0,),
        out=tmp_path,
        processes=1,
    )
    command.run()
    summary = read_json(tmp_path / "evaluation.json")
    assert summary["benchmark"]["steps"] == 2 and summary["pictures_per_seed"] == 48
    assert {one["name"] for one in summary["methods"]} == set(command.methods)
    released = summary["methods"][1]["settings"]
    assert released["settings"]["style"]["mode"] == "released" and set(released["saes"]) == set(HOOK_POINTS)
    (case,) = summary["protocols"]["sequence"]["negative_prompt"]["style"]["cases"]
    assert case["erased"] == ["neon"]
    assert set(summary["versions"]) >= {"torch", "diffusers"} and summary["machine"]["cores"]
    assert (tmp_path / "report.html").stat().st_size < 1e6
    assert "saeuron-released" in capsys.readouterr().out
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "units").rglob("*.safetensors"))
    replace(command, shard="1/2").run()
    assert before == sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "units").rglob("*.safetensors"))


def test_the_command_names_what_it_knows():
    with pytest.raises(ValueError, match="minicanvas: expected --minicanvas"):
        Evaluate().run()
    with pytest.raises(ValueError, match="shard: expected i/n with 0 <= i < n, got '2/2'"):
        read_shard("2/2")
    assert read_shard("0/2") == (0, 2)
    documented = Path(__file__).parents[1] / "saemnesia_fast" / "cli" / "evaluate.py"
    assert all(name in documented.read_text(encoding="utf-8") for name in METHODS)
    with pytest.raises(ValueError, match="methods: expected some of none, .*, got 'uce-stored'"):
        methods(["uce-stored"], None)


def test_the_methods_of_minicanvas_by_name(tmp_path):
    shutil.copytree(WEIGHTS / "sae", tmp_path / "sae")
    shutil.copytree(WEIGHTS / "concepts", tmp_path / "concepts")
    assigned = {kind: {"strength": setting.strength, "num_latents": None} for kind, setting in SETTINGS.items()}
    write_json(tmp_path / "settings.json", assigned)
    names = ["saemnesia-exact", "saemnesia-released-reselected", "saemnesia-exact-stored", "saemnesia-contrast"]
    names += BASELINES
    found = methods(names, SimpleNamespace(steps=20, guidance_scale=3.0), tmp_path, tmp_path / "weights")
    assert [one.name for one in found] == names
    assert all(one.source for one in found)
    exact, released, stored = (one.settings["object"] for one in found[:3])
    assert (exact.mode, exact.num_latents, exact.reselect) == ("exact", None, False)
    assert (released.mode, released.num_latents, released.reselect) == ("released", 1, True)
    assert stored == exact and found[2].stored and not found[0].stored
    assert found[3].settings["object"] == replace(CONTRAST_SETTINGS["object"], num_latents=None)
    (uce,) = (one for one in found if one.name == "uce")
    assert list(uce.prompts) == [name for names in KINDS.values() for name in names]
    assert all("neon" in prompt for prompt in uce.prompts["neon"])
    with pytest.raises(FileNotFoundError, match="supervised: expected settings.json, sae/ and concepts/ in .*nowhere"):
        methods(["saemnesia-exact"], None, tmp_path / "nowhere")
