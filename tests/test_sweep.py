"""SAEs as methods, the search for their settings, and the tables that keep what it found."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from erasing import HOOK_POINT, OTHER_HOOK_POINT, random_sae, random_table, sae_and_table
from pipelines import generate, tiny_sd
from saemnesia_fast import apply_erasure
from saemnesia_fast.cli.sweep import Sweep
from saemnesia_fast.concepts import ConceptTable
from saemnesia_fast.concepts.storage import METADATA_FILE
from saemnesia_fast.evaluation import Setting, SparseErasure, paint
from saemnesia_fast.evaluation.sweep import SET_SIZES, STRENGTHS, Search, best_settings, store
from saemnesia_fast.files import read_json
from saemnesia_fast.minicanvas.canvas import MiniCanvas
from tiny_benchmark import CLASSES, TinyBenchmark

NAMES = [name for names in CLASSES.values() for name in names]
KINDS = [kind for kind, names in CLASSES.items() for _ in names]
SEARCHED = {"scale": "constant", "reselect": False, "mode": "released", "halves": "cond"}


@dataclass(frozen=True)
class Pretended(SparseErasure):
    """Erases a share of its concept's pictures that is 1 from -10 on, and takes a wrong one along with two latents."""

    @contextmanager
    def erased(self, pipe: Any, concepts: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        ((concept, setting),) = ((name, self.settings[KINDS[NAMES.index(name)]]) for name in concepts)
        (strength,) = setting.strength.values()
        pipe.erased = {concept: min(1.0, -strength / 10)}
        if setting.num_latents == 2:
            pipe.erased["cow" if concept != "cow" else "dog"] = 1.0
        try:
            yield {}
        finally:
            pipe.erased = {}


@pytest.fixture
def tables() -> dict[str, ConceptTable]:
    def table(point: str) -> ConceptTable:
        return ConceptTable(torch.rand(5, 2, 6), torch.tensor([501, 1]), NAMES, KINDS, point, "5ae")

    return {"a": table("a"), "b": table("b")}


@pytest.fixture
def search(tables) -> Search:
    settings = {
        "object": Setting({"a": -1.0}, scale="constant", mode="released", halves="cond"),
        "style": Setting({"b": -1.0}, scale="constant"),
    }
    sparse = Pretended("pretended", "this test", {}, tables, settings)
    return Search(sparse, strengths=(-15.0, -1.0, -10.0), num_latents=(2, 1), kinds=["object"])


def test_the_papers_grids_are_7_and_210_runs(search):
    assert len(Search(search.sparse).methods()) == 7
    assert len(Search(search.sparse, STRENGTHS, SET_SIZES).methods()) == 210


def test_the_best_setting_is_the_smallest_and_weakest_of_the_best(search, tmp_path):
    plan = search.plan(TinyBenchmark(), (5, 6), tmp_path, retained=None)
    paint(plan, progress=False)
    found = best_settings(search, plan)
    assert (found["runs_per_concept"], found["runs"]) == (6, 18)
    assert 0 < found["seconds"] < 60
    for concept in CLASSES["object"]:
        one = found["concepts"][concept]
        assert one["best"] == {"strength": -10.0, "num_latents": 1, **SEARCHED}
        assert (one["scores"]["UA"], one["scores"]["IRA"], one["scores"]["CRA"]) == (100, 100, 100)
        tried = {(run["num_latents"], run["strength"]): run for run in one["tried"]}
        assert list(tried) == [(1, -1.0), (1, -10.0), (1, -15.0), (2, -1.0), (2, -10.0), (2, -15.0)]
        assert tried[1, -1.0]["UA"] < 50 and tried[2, -10.0]["IRA"] == 50


def test_a_run_may_paint_a_part_of_the_pictures_that_asks_for_everything(search, tmp_path):
    plan = search.plan(TinyBenchmark(), (5,), tmp_path, retained=4)
    paint(plan, progress=False)
    assert set(plan.benchmark.painted) == {4 + 4, 12}
    wanted = plan.wanted(["dog"], 5)
    assert [one.object for one in wanted].count(1) == 4
    assert {(one.object, one.style) for one in wanted} >= {(0, 0), (2, 0)}
    assert best_settings(search, plan)["concepts"]["dog"]["best"]["strength"] == -10.0
    full = search.plan(TinyBenchmark(), (5,), tmp_path, retained=None)
    assert len(full.missing()) == 6 * 3 + 1


def test_some_concepts_may_be_searched_for(search, tmp_path):
    plan = replace(search, concepts=("dog",)).plan(TinyBenchmark(), (5,), tmp_path, retained=4)
    assert [case.erased for case in plan.cases] == [("dog",)]
    with pytest.raises(ValueError, match=r"concepts: expected some of the kinds object, got \['sketch'\]"):
        replace(search, concepts=("dog", "sketch")).plan(TinyBenchmark(), (5,), tmp_path, retained=4)


def test_the_tables_keep_what_was_found_where_their_kind_is_erased(search, tables, tmp_path):
    best = {"strength": -10.0, "num_latents": 1, **SEARCHED}
    store({"concepts": {"cat": {"best": best}}}, search, tables, CLASSES)
    assert tables["a"].settings == {"cat": best} and tables["b"].settings == {}
    for point, table in tables.items():
        table.save(tmp_path / point)
    assert ConceptTable.load(tmp_path / "a").settings == {"cat": best}
    assert "settings" not in read_json(tmp_path / "b" / METADATA_FILE)
    assert ConceptTable.load(tmp_path / "b").settings == {}
    store({"concepts": {"dog": {"best": best}}}, search, tables, CLASSES)
    assert set(tables["a"].settings) == {"cat", "dog"}


def test_settings_are_part_of_what_binds_the_files_together(tables, tmp_path):
    table = replace(tables["a"], settings={"cat": {"strength": -3.0}})
    table.save(tmp_path)
    metadata = read_json(tmp_path / METADATA_FILE)
    table.settings = {}
    table.save(tmp_path)
    (tmp_path / METADATA_FILE).write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="were not written together"):
        ConceptTable.load(tmp_path)


def test_stored_settings_are_arguments_of_select(tables):
    best = {"strength": -3.0, "num_latents": 2, "scale": "constant", "reselect": False}
    table = replace(tables["a"], settings={"cat": best, "dog": best | {"strength": -9.0, "num_latents": None}})
    found = table.select(["cat", "dog"], **table.stored(["cat", "dog"]))
    alone = [table.select("cat", -3.0, 2, scale="constant"), table.select("dog", -9.0, scale="constant")]
    for step, (latents, factors) in enumerate(zip(found.latents.tolist(), found.factors.tolist(), strict=True)):
        expected = {}
        for one in alone:
            expected |= dict(zip(one.latents[step].tolist(), one.factors[step].tolist(), strict=True))
        assert {i: f for i, f in zip(latents, factors, strict=True) if f != 1} == expected
    with pytest.raises(ValueError, match=r"expected those with stored settings, \['cat', 'dog'\], got \['cow'\]"):
        table.stored(["cat", "cow"])
    table.settings["dog"]["scale"] = "mean"
    with pytest.raises(ValueError, match="expected stored settings of one scale"):
        table.stored(["cat", "dog"])
    with pytest.raises(ValueError, match="bird"):
        table.select("cat", num_latents={"bird": 1})
    with pytest.raises(ValueError, match="bird"):
        replace(table, settings={"bird": best})


def test_settings_bring_the_mode_and_halves_they_were_found_with_or_are_refused(tables):
    best = {"strength": -3.0, "num_latents": 2, **SEARCHED}
    old = {name: best[name] for name in ("strength", "num_latents", "scale", "reselect")}
    table = replace(tables["a"], settings={"cat": best, "dog": best | {"strength": -9.0}, "cow": old})
    expected = {"strength": {"cat": -3.0, "dog": -9.0}, "num_latents": {"cat": 2, "dog": 2}, **SEARCHED}
    assert table.stored(["cat", "dog"]) == expected
    assert table.stored(["cat", "dog"], "released", "cond") == expected
    with pytest.raises(ValueError, match="mode: expected 'released', with which stored settings were found, got 'ex"):
        table.stored("cat", mode="exact")
    with pytest.raises(ValueError, match="halves: expected 'cond', with which stored settings were found, got 'both'"):
        table.stored("cat", halves="both")
    with pytest.raises(ValueError, match="of one scale, mode and halves"):
        table.stored(["cat", "cow"])
    by_name = {"strength": {"cow": -3.0}, "num_latents": {"cow": 2}}
    assert table.stored("cow", "exact", "both") == {**by_name, "scale": "constant", "reselect": False}


def test_a_sparse_erasure_is_apply_erasure_with_the_settings_of_the_kinds():
    pipe, points = tiny_sd(), (HOOK_POINT, OTHER_HOOK_POINT)
    parts = {point: sae_and_table(point) for point in points}
    saes, tables = ({point: parts[point][n] for point in points} for n in (0, 1))
    settings = {
        "object": Setting({HOOK_POINT: -40.0}, num_latents=12, mode="released", stop=0.7),
        "style": Setting({OTHER_HOOK_POINT: -30.0}, num_latents=9, halves="cond"),
    }
    method = SparseErasure("both", "this test", saes, tables, settings)
    plain = generate(pipe)
    with method.erased(pipe, ["sketch", "cat"]) as arguments:
        erased = generate(pipe, **arguments)
    assert torch.equal(generate(pipe), plain) and not torch.equal(erased, plain)
    one = (saes[HOOK_POINT], tables[HOOK_POINT], "cat", -40.0, "released")
    other = (saes[OTHER_HOOK_POINT], tables[OTHER_HOOK_POINT], "sketch", -30.0, "exact", "cond")
    with apply_erasure(pipe, *one, stop=0.7, num_latents=12), apply_erasure(pipe, *other, num_latents=9):
        assert torch.equal(generate(pipe), erased)


def test_kinds_that_share_a_hook_point_are_erased_there_at_once():
    pipe, sae = tiny_sd(), random_sae()
    table = random_table(sae)
    settings = {
        "object": Setting({HOOK_POINT: -40.0}, num_latents=12),
        "style": Setting({HOOK_POINT: -30.0}, num_latents=9),
    }
    method = SparseErasure("shared", "this test", {HOOK_POINT: sae}, {HOOK_POINT: table}, settings)
    with method.handles(pipe, ["cat", "sketch"]) as handles:
        erased = generate(pipe)
    assert len(handles) == 1
    strength, numbers = {"cat": -40.0, "sketch": -30.0}, {"cat": 12, "sketch": 9}
    with apply_erasure(pipe, sae, table, ["cat", "sketch"], strength, num_latents=numbers):
        assert torch.equal(generate(pipe), erased)
    table.settings = {name: {"strength": -30.0, "num_latents": 9, "scale": "mean"} for name in ("cat", "sketch")}
    stored = replace(method, stored=True)
    with stored.erased(pipe, ["cat", "sketch"]):
        assert not torch.equal(generate(pipe), erased)
    settings["style"].mode = "released"
    with (
        pytest.raises(ValueError, match="to differ in strength and num_latents alone"),
        method.erased(pipe, ["cat", "sketch"]),
    ):
        pass
    with (
        pytest.raises(ValueError, match="concepts: expected some of cat, dog, sketch, got 'bird'"),
        method.erased(pipe, ["bird"]),
    ):
        pass
    del settings["style"]
    with (
        pytest.raises(ValueError, match="settings: expected one for 'sketch', of kind 'style'"),
        method.erased(pipe, ["sketch"]),
    ):
        pass


def test_the_command_line_searches_on_minicanvas(tmp_path, monkeypatch, capsys):
    """Two denoising steps and a grid of one."""
    load = MiniCanvas.load
    monkeypatch.setattr(MiniCanvas, "load", lambda: replace(load(), steps=2))
    command = Sweep(
        minicanvas=True,
        method="saeuron",
        strengths=(-4.0,),
        set_sizes=(2,),
        kinds=("style",),
        concepts=("neon", "mosaic"),
        retained=2,
        out=tmp_path,
        processes=1,
    )
    command.run()
    found = read_json(tmp_path / "sweep.json")
    assert (found["runs_per_concept"], found["runs"]) == (1, 2)
    points = MiniCanvas.load().settings["style"].strength
    for point in points:
        table = ConceptTable.load(tmp_path / "concepts" / point)
        assert table.settings == {name: one["best"] for name, one in found["concepts"].items()}
        assert set(table.settings) == {"neon", "mosaic"}
    assert "1 runs a concept, 2 in all" in capsys.readouterr().out
    with pytest.raises(ValueError, match="minicanvas: expected --minicanvas"):
        Sweep().run()
