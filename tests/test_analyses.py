"""Analyses of concepts and latents: numbers against loops, plots that are whole files, the command."""

from __future__ import annotations

import json
import math
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines import CHANNELS, HOOK_POINTS, tiny_sd
from saemnesia_fast import ConceptTable, TopKSAE, collect_concepts
from saemnesia_fast.cli.main import main
from saemnesia_fast.concepts.collect import _generator
from saemnesia_fast.concepts.own import auc
from saemnesia_fast.evaluation import plots
from saemnesia_fast.evaluation.analyses import (
    Reading,
    Sample,
    Watched,
    analyse_maps,
    analyse_scores,
    analyse_separability,
    analyse_timesteps,
    distances,
    one_of_each,
    score_profile,
    separability,
    watch,
)
from saemnesia_fast.minicanvas.settings import SETTINGS

POINT = HOOK_POINTS[1]
PROMPTS = {"cat": ["a cat", "a cat in ink"], "dog": ["a dog", "a dog in ink"], "ink": ["a cat in ink", "a dog in ink"]}
KINDS = {"ink": "style"}
SAMPLING: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 5.0, "height": 32, "width": 32}


def table_of(mu: torch.Tensor, **options: Any) -> ConceptTable:
    names = [f"c{c}" for c in range(len(mu))]
    steps = torch.arange(len(mu[0])).flip(0)
    return ConceptTable(mu, steps, names, ["object"] * len(names), "point", "hash", **options)


def random_table(seed: int, concepts: int = 3, steps: int = 2, latents: int = 12, **options: Any) -> ConceptTable:
    """Half of the entries are 0, many of the others equal."""
    mu = torch.randint(-4, 5, (concepts, steps, latents), generator=torch.Generator().manual_seed(seed)) / 4
    return table_of(mu.clamp_min(0), **options)


def check_svg(svg: str) -> ElementTree.Element:
    """A file of its own: valid, in SVG's name space, with numbers that are numbers and nothing from outside."""
    root = ElementTree.fromstring(plots.standalone(svg))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    for element in root.iter():
        assert not element.tag.endswith(("image", "use", "script", "style", "a"))
        for name, value in element.attrib.items():
            assert "href" not in name and "url(" not in value and "nan" not in value and "inf" not in value
    return root


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), top=st.integers(1, 12), share=st.sampled_from([0.3, 0.5, 0.9, 1.0]))
def test_score_profile_is_what_loops_find(seed: int, top: int, share: float) -> None:
    table = random_table(seed, assignment={"c1": 5})
    found = score_profile(table, ["c1", "c2"], top, share)
    scores = {name: table.scores(name).mean(0).tolist() for name in table.concepts}
    best = {name: sorted(range(12), key=lambda i, s=s: (-s[i], i))[:top] for name, s in scores.items()}
    for name, one in found["concepts"].items():
        order = sorted(scores[name], reverse=True)
        positive = sum(score for score in order if score > 0)
        needed, held = 1, max(0.0, order[0])
        while held < share * positive - 1e-12:
            held += max(0.0, order[needed])
            needed += 1
        others = [other for other in table.concepts if other != name]
        shared = {other: sum(i in best[other] for i in best[name]) for other in others}
        assert one["needed"] == needed or math.isclose(held, share * positive, rel_tol=1e-9)
        assert one["shared"] == {other: count for other, count in shared.items() if count}
        assert one["overlap"] == sum(any(i in best[other] for other in others) for i in best[name]) / top
        assert one["latent"] == best[name][0] and one["peak"] == order[0] and one["ranked"] == order
        assert one["peak_of_a_step"] == max(max(row) for row in table.scores(name).tolist())
    assert found["concepts"]["c1"]["assigned"] == 5
    assert found["concepts"]["c1"]["assigned_score"] == scores["c1"][5]
    assert found["concepts"]["c2"]["assigned"] is None
    assert found["mean"]["peak"] == pytest.approx(sum(one["peak"] for one in found["concepts"].values()) / 2)


def test_latents_of_a_concept_alone_share_nothing_and_one_is_enough() -> None:
    mu = torch.zeros(3, 2, 6)
    for c in range(3):
        mu[c, :, c] = 1.0
    found = score_profile(table_of(mu), top=1)
    for c, one in enumerate(found["concepts"].values()):
        assert (one["latent"], one["needed"], one["overlap"], one["shared"]) == (c, 1, 0.0, {})
        assert one["peak"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"share": 0.0}, "share"), ({"top": 13}, "top"), ({"concepts": ["horse"]}, "horse")],
)
def test_score_profile_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_profile(random_table(0), **options)


def test_timesteps_follow_the_assigned_or_the_best_latent() -> None:
    table = random_table(3, steps=4, assignment={"c0": 7})
    found = analyse_timesteps([Reading("ours", "object", table)])
    here = found.numbers["ours"]["object"]
    assert here["timesteps"] == [3, 2, 1, 0]
    for name, one in here["concepts"].items():
        scores = table.scores(name)
        assert one["latent"] == (7 if name == "c0" else int(scores.mean(0).argmax()))
        assert one["scores"] == [float(row[one["latent"]]) for row in scores]
        assert one["best"] == [int(row.argmax()) for row in scores]
    texts = [element.text for element in check_svg(found.plots["ours-object"]).iter() if element.tag.endswith("text")]
    assert {"3", "2", "1", "c0", "c1", "c2"} <= set(texts)


def test_methods_stand_side_by_side() -> None:
    readings = [Reading(method, "object", random_table(seed)) for seed, method in enumerate(("SAeUron", "<ours> & co"))]
    found = analyse_scores(readings, top=4)
    assert set(found.numbers) == {"SAeUron", "<ours> & co"}
    assert set(found.plots) == {"peak-object", "needed-object", "overlap-object", "ranked-object"}
    for name, svg in found.plots.items():
        root = check_svg(svg)
        bars = [element for element in root.iter() if element.tag.endswith("rect")]
        assert len(bars) == 2 + (0 if name == "ranked-object" else 2 * 3)
        assert all(float(bar.attrib["height"]) >= 0 for bar in bars)
    peak = found.numbers["SAeUron"]["object"]["concepts"]["c0"]["peak"]
    labels = [element.text for element in check_svg(found.plots["peak-object"]).iter() if element.tag.endswith("title")]
    assert any(label and label.startswith(f"SAeUron, c0: {100 * peak:.2f}") for label in labels)


@pytest.mark.parametrize("groups", [2, 20, 51])
def test_names_below_bars_have_room(groups: int) -> None:
    names = [f"Abstractionism{n}" for n in range(groups)]
    root = check_svg(plots.bars("title", {name: {"a": (50.0, None)} for name in names}))
    texts = [element for element in root.iter() if element.text in names]
    turned = [element.attrib.get("transform", "") for element in texts]
    assert len(texts) == groups and all(turn.startswith("rotate(") == (groups > 2) for turn in turned)
    places = [float(element.attrib["x"]) for element in texts]
    apart = min(b - a for a, b in pairwise(places))
    long = plots.LETTER * len(names[-1])
    assert apart > long if groups == 2 else apart * math.sin(math.radians(60)) > 11
    legend = max(float(element.attrib["y"]) for element in root.iter() if element.tag.endswith("rect"))
    down = math.sin(math.radians(60)) * long if groups > 2 else 0
    assert float(texts[0].attrib["y"]) + down < legend < float(root.attrib["viewBox"].split()[3])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_an_axis_reaches_the_highest_value(values: list[float]) -> None:
    top = plots.ceiling(values)
    assert top >= max(values) and top > 0
    assert max(values) < 1e-9 or top <= 2.5 * max(values) * (1 + 1e-9)


def naive_distance(p: list[float], q: list[float]) -> float:
    """Square root of the mean of both Kullback-Leibler divergences from the middle, in bits."""
    divergence = 0.0
    for a, b in zip(p, q, strict=True):
        middle = (a + b) / 2
        divergence += sum(x * math.log2(x / middle) / 2 for x in (a, b) if x > 0)
    return math.sqrt(max(0.0, divergence))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), bins=st.integers(2, 6))
def test_separability_is_what_loops_find(seed: int, bins: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    pictures, steps, concepts = 9, 3, 3
    values = torch.rand(pictures, steps, concepts, generator=noise) * (torch.rand(9, 3, 3, generator=noise) > 0.4)
    members = torch.arange(pictures)[:, None] % concepts == torch.arange(concepts)
    found = separability(values, members, [4, 5, 6], bins, shuffles=3)
    for i, one in enumerate(found):
        top = float(values[:, :, i].max()) or 1.0
        spread = []
        for c in range(concepts):
            histogram = [0] * bins
            for value in values[members[:, c], :, i].flatten().tolist():
                histogram[math.ceil(np.float32(value) / np.float32(top) * np.float32(bins - 1))] += 1
            spread.append([count / 9 for count in histogram])
        row = [naive_distance(spread[i], other) for other in spread]
        others = [distance for c, distance in enumerate(row) if c != i]
        pairs = [naive_distance(spread[a], spread[b]) for a, b in combinations(range(concepts), 2)]
        assert one["distances"] == pytest.approx(row, abs=1e-7)
        assert one["separability"] == pytest.approx(sum(others) / 2, abs=1e-7)
        assert one["all_pairs"] == pytest.approx(sum(pairs) / 3, abs=1e-7)
        assert one["nearest"] != i and row[one["nearest"]] == pytest.approx(min(others), abs=1e-7)
        mean = values[:, :, i].mean(1)
        assert one["auc"] == auc(mean[members[:, i]], mean[~members[:, i]])
        assert one["latent"] == 4 + i and 0 <= one["chance"] <= 1
    assert separability(values, members, [4, 5, 6], bins, shuffles=3) == found


def test_separability_of_the_perfect_and_of_the_useless_latent() -> None:
    members = torch.eye(4).bool().repeat_interleave(5, 0)
    alone = members[:, None, :].float().expand(-1, 3, -1)
    for one in separability(alone, members, range(4)):
        assert one["separability"] == pytest.approx(1.0) and one["auc"] == 1.0
        assert one["all_pairs"] == pytest.approx(2 / 4) and one["chance"] < 0.8
    for one in separability(torch.ones(20, 3, 4), members, range(4)):
        assert (one["separability"], one["all_pairs"], one["chance"], one["auc"]) == (0.0, 0.0, 0.0, 0.5)
    assert distances(torch.tensor([[1, 0], [0, 7]])).tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_separability_is_drawn_beside_what_chance_gives() -> None:
    reading = Reading("ours", "object", random_table(0))
    samples = [Sample(f"a c{n % 3}", n, (f"c{n % 3}",)) for n in range(9)]
    values = torch.rand(9, 2, 3, generator=torch.Generator().manual_seed(0))
    watched = Watched(torch.zeros(9, 3, 1, 1), torch.tensor([5, 1]), {reading.name: values})
    found = analyse_separability([reading], watched, samples)
    titles = [element.text for element in check_svg(found.plots["object"]).iter() if element.tag.endswith("title")]
    for name, one in found.numbers["ours"]["object"]["concepts"].items():
        assert f"ours, {name}: {100 * one['separability']:.1f}" in titles
        assert f"ours, shuffled, {name}: {100 * one['chance']:.1f}" in titles
    assert len(titles) == 6


@pytest.mark.parametrize("members", [torch.ones(3, 1), torch.tensor([[1, 0], [1, 0]])])
def test_separability_needs_pictures_of_two_concepts(members: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="a picture of every concept"):
        separability(torch.ones(len(members), 2, members.shape[1]), members.bool(), [0, 1])


def test_one_of_each_takes_different_samples() -> None:
    samples = [Sample(f"{obj} {style}", 0, (obj, style)) for obj in ("c0", "c1") for style in ("x", "y")]
    reading = Reading("ours", "object", random_table(0, concepts=2))
    assert [one.prompt for one in one_of_each([reading, reading], samples)] == ["c0 x", "c1 y"]
    with pytest.raises(ValueError, match="'c1'"):
        one_of_each([reading], samples[:2])


def test_maps_show_the_concepts_picture_and_scale_by_its_maximum() -> None:
    reading = Reading("ours", "object", random_table(0, concepts=2))
    activations = torch.zeros(2, 3, 2, 2, 2)
    activations[0, 0, 0] = torch.tensor([[4.0, 0.0], [2.0, 0.0]])
    activations[1, :, 0] = 1.0
    samples = [Sample("a c0", 0, ("c0",)), Sample("a c1", 1, ("c1",))]
    watched = Watched(torch.zeros(2, 3, 8, 8), torch.tensor([9, 5, 1]), {reading.name: activations})
    found = analyse_maps([reading], watched, samples, columns=2)
    one = found.numbers["ours"]["object"]["concepts"]["c0"]
    assert one["prompt"] == "a c0" and one["mean"] == [1.5, 0, 0] and one["active"] == [0.5, 0, 0]
    assert one["mean_elsewhere"] == [1, 1, 1]
    pixels = np.asarray(found.pictures["object"])
    left, row = 110 + 72 + 16, 46
    colours = [tuple(pixels[row + 20 + 36 * y, left + 20 + 36 * x]) for y in (0, 1) for x in (0, 1)]
    assert colours == [(0, 0, 0), (255, 255, 255), (255, 128, 0), (255, 255, 255)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, TopKSAE, ConceptTable]:
    """A pipeline, its table and prompts in a folder."""
    folder = tmp_path_factory.mktemp("analyse")
    pipe, sae = tiny_sd(), TopKSAE.init(CHANNELS[POINT], 60, 8)
    table = collect_concepts(pipe, sae, PROMPTS, POINT, kinds=KINDS, stream="residual", progress=False, **SAMPLING)
    table.assignment = table.assign()
    pipe.save_pretrained(folder / "model")
    sae.save_pretrained(folder / "sae")
    table.save(folder / "table")
    entries = {name: {"kind": KINDS.get(name, "object"), "prompts": texts} for name, texts in PROMPTS.items()}
    (folder / "prompts.json").write_text(json.dumps(entries))
    return folder, pipe, sae, table


def test_watched_activations_average_to_the_table(saved: tuple[Path, Any, TopKSAE, ConceptTable]) -> None:
    """Other code, the same noise: means over tokens and prompts are the table's mu; batches make no difference."""
    _, pipe, sae, table = saved
    reading = Reading("ours", "object", table, sae)
    texts = list(dict.fromkeys(text for some in PROMPTS.values() for text in some))
    samples = [
        Sample(text, _generator(0, text, 0).initial_seed(), tuple(c for c, some in PROMPTS.items() if text in some))
        for text in texts
    ]
    found = watch(pipe, [reading], samples, batch_size=3, output_type="latent", **SAMPLING)
    maps = found.activations[reading.name]
    assert maps.shape[:3] == (4, 2, 2) and found.images.shape[0] == 4
    assert found.timesteps.tolist() == table.timesteps.tolist()
    for c, name in enumerate(table.concepts):
        asking = [name in sample.concepts for sample in samples]
        mine = maps[asking].mean((0, 3, 4))
        torch.testing.assert_close(mine, table.mu[c][:, reading.latents()], rtol=1e-4, atol=1e-6)
    means = watch(
        pipe, [reading], samples, batch_size=4, output_type="latent", reduce=lambda z: z.mean((-2, -1)), **SAMPLING
    )
    torch.testing.assert_close(means.activations[reading.name], maps.mean((3, 4)), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="the table was made with SAE"):
        watch(
            pipe, [Reading("ours", "object", table, TopKSAE.init(CHANNELS[POINT], 60, 8, seed=1))], samples, **SAMPLING
        )


@pytest.mark.parametrize("what", ["scores", "timesteps", "maps", "separability"])
def test_the_command_on_a_table(what: str, saved: tuple[Path, Any, TopKSAE, ConceptTable], tmp_path: Path) -> None:
    folder = saved[0]
    paints = what in ("maps", "separability")
    given = ["--table", str(folder / "table"), "--out", str(tmp_path), "--top", "3"]
    if paints:
        given += [f"--{name}={folder / name}" for name in ("model", "sae")]
        given += ["--prompts", str(folder / "prompts.json"), "--device", "cpu", "--height", "32", "--width", "32"]
    main(["analyse", what, *given])
    numbers = json.loads((tmp_path / f"{what}.json").read_text())["table"]
    assert set(numbers["object"]["concepts"]) == {"cat", "dog"}
    assert set(numbers) == ({"object"} if what == "separability" else {"object", "style"})  # one style tells nothing
    files = list(tmp_path.glob(f"{what}-*"))
    assert files and {path.suffix for path in files} == ({".png"} if what == "maps" else {".svg"})
    for path in files:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert picture.size[0] > 200
        else:
            check_svg(path.read_text().replace(' xmlns="http://www.w3.org/2000/svg" font-family="sans-serif"', ""))


def test_the_command_on_minicanvas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["analyse", "timesteps", "--minicanvas", "--out", str(tmp_path)])
    numbers, printed = json.loads((tmp_path / "timesteps.json").read_text()), capsys.readouterr().out
    for kind, count in (("object", 8), ("style", 6)):
        for point in SETTINGS[kind].strength:
            assert len(numbers[f"SAeUron at {point}"][kind]["concepts"]) == count
            assert str(tmp_path / f"timesteps-SAeUron_at_{point}-{kind}.svg") in printed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["scores"], "either --minicanvas or --table"),
        (["scores", "--table", "nowhere", "--supervised", "nowhere"], "expected --minicanvas beside it"),
        (["maps", "--table", "TABLE"], "expected an SAE for each table"),
    ],
)
def test_mistakes_end_with_one_line(
    given: list[str], message: str, saved: tuple[Path, Any, TopKSAE, ConceptTable], capsys: pytest.CaptureFixture[str]
) -> None:
    table = str(saved[0] / "table")
    with pytest.raises(SystemExit) as stopped:
        main(["analyse", *(table if one == "TABLE" else one for one in given)])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
