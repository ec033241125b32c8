"""A concept of one's own from a few prompts, without training (SPEC 2.1 to 2.3)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import CHANNELS, HOOK_POINTS, tiny_sd
from saemnesia_fast import ConceptTable, TopKSAE, collect_concepts
from saemnesia_fast.cli.concepts import Concepts
from saemnesia_fast.concepts.own import add_concept, auc
from saemnesia_fast.files import read_json
from saemnesia_fast.minicanvas.canvas import MiniCanvas, Request
from saemnesia_fast.minicanvas.drawing import OBJECTS, STYLES, prompt_for

POINT = HOOK_POINTS[1]
OWN = ["a red fox", "a fox", "two foxes"]
PROMPTS = {"cat": ["a cat", "cats"], "dog": ["a dog", "dogs"]}
SAMPLING: dict[str, Any] = {
    "num_inference_steps": 2,
    "guidance_scale": 5.0,
    "height": 32,
    "width": 32,
    "progress": False,
}


def make_sae(seed: int = 0) -> TopKSAE:
    return TopKSAE.init(CHANNELS[POINT], 60, 8, seed=seed)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_sd()


@pytest.fixture(scope="module")
def table(pipe: Any) -> ConceptTable:
    return collect_concepts(pipe, make_sae(), PROMPTS, POINT, **SAMPLING)


def test_the_row_is_that_of_a_table_collected_whole(pipe: Any, table: ConceptTable) -> None:
    """The steps and the guidance are the table's, whatever is asked for."""
    sae = make_sae()
    table = replace(table, assignment={"dog": 3}, settings={"cat": {"strength": -2.0}})
    whole, report = add_concept(
        pipe, sae, "fox", OWN, table=table, kind="animal", **SAMPLING | {"num_inference_steps": 7}
    )
    want = collect_concepts(pipe, sae, PROMPTS | {"fox": OWN}, POINT, **SAMPLING)
    assert whole.concepts == want.concepts and whole.kinds == ["object", "object", "animal"]
    torch.testing.assert_close(whole.mu, want.mu, rtol=1e-5, atol=1e-7)
    assert torch.equal(whole.mu[:2], table.mu) and torch.equal(whole.timesteps, want.timesteps)
    assert whole.assignment == table.assignment == {"dog": 3} and whole.settings == table.settings
    assert (report.prompts, report.against) == (3, "the means of 2 concepts")
    scores = want.scores("fox").mean(0)
    assert report.best[0].latent == int(scores.argmax())
    assert report.best[0].score == pytest.approx(float(scores.max()), rel=1e-3)


def test_a_table_of_ones_own_and_an_assigned_latent(pipe: Any) -> None:
    sae = make_sae()
    whole, report = add_concept(
        pipe, sae, "fox", OWN, hook_point=POINT, others=["a cat", "a dog"], assign=True, top=4, **SAMPLING
    )
    assert whole.concepts == ["others", "fox"] and whole.kinds == ["others", "object"]
    others = collect_concepts(pipe, sae, {"others": ["a cat", "a dog"]}, POINT, **SAMPLING)
    torch.testing.assert_close(whole.mu[0], others.mu[0], rtol=1e-5, atol=1e-7)
    assert whole.assignment == {"fox": report.best[0].latent}
    assert report.against == "2 other prompts" and len(report.best) == 4
    means = torch.cosine_similarity(whole.mu[0].mean(0), whole.mu[1].mean(0), dim=0)
    assert report.cosine == {"others": pytest.approx(float(means))}
    again, _ = add_concept(pipe, sae, "wolf", ["a wolf"], table=whole, assign=True)
    assert again.assignment["fox"] == whole.assignment["fox"] != again.assignment["wolf"]


def test_auc_is_the_share_of_pairs() -> None:
    positive, negative = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 2.0])
    pairs = [(p > n) + (p == n) / 2 for p in positive.tolist() for n in negative.tolist()]
    assert auc(positive, negative) == pytest.approx(sum(pairs) / 6)
    assert auc(positive, positive) == 0.5 and auc(positive, positive - 5) == 1.0


def test_twenty_prompts_are_enough_to_erase_from_minicanvas() -> None:
    """The moon is taken out of the table, found again from 18 prompts, and erased."""
    canvas = MiniCanvas.load()
    point = next(iter(canvas.settings["object"].strength))
    full, moon = canvas.tables[point], canvas.tables[point].concepts.index("moon")
    keep = [row for row in range(len(full.concepts)) if row != moon and full.kinds[row] == "object"]
    rest = replace(
        full,
        mu=full.mu[keep],
        concepts=[full.concepts[row] for row in keep],
        kinds=["object"] * len(keep),
        assignment={},
        settings={},
    )
    prompts = [prompt_for("moon", style, template) for style in STYLES for template in range(3)]
    others = [prompt_for(other, style) for n, other in enumerate(OBJECTS) for style in STYLES[n % 3 :: 3] if n != 2]
    whole, report = add_concept(
        canvas.pipe, canvas.saes[point], "moon", prompts, table=rest, others=others, batch_size=20, progress=False
    )
    cosine = torch.cosine_similarity(whole.mu[-1], full.mu[moon], dim=-1)
    assert cosine.min() > 0.95
    assert report.best[0].auc > 0.95 and max(report.shared.values()) <= 5

    wanted = [Request(2, style, 10 * style + n) for style in range(6) for n in range(1)]
    before = canvas.judge.predict(canvas.paint(wanted))[0].argmax(1)
    canvas.tables[point] = whole
    with canvas.erased(["moon"]):
        after = canvas.judge.predict(canvas.paint(wanted))[0].argmax(1)
    assert (before == 2).double().mean() >= 0.9 and (after == 2).double().mean() <= 0.34


def test_the_command_begins_a_table_and_adds_to_it(
    pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe.save_pretrained(tmp_path / "model")
    make_sae().save_pretrained(tmp_path / "sae")
    for name, texts in {"fox": OWN, "wolf": ["a wolf"], "rest": ["a cat", "a dog"]}.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(texts))
    command = Concepts(
        model=str(tmp_path / "model"),
        sae=str(tmp_path / "sae"),
        prompts=tmp_path / "fox.txt",
        hook_point=POINT,
        out=tmp_path / "table",
        name="red fox",
        others=tmp_path / "rest.txt",
        steps=2,
        height=32,
        width=32,
        device="cpu",
    )
    command.run()
    report = read_json(tmp_path / "table" / "red_fox.separability.json")
    assert report["concept"] == "red fox" and len(report["best"]) == 10
    assert f"latent {report['best'][0]['latent']} " in capsys.readouterr().out
    replace(command, name="wolf", prompts=tmp_path / "wolf.txt", others=None, steps=9, kind="animal").run()
    table = ConceptTable.load(tmp_path / "table")
    assert table.concepts == ["others", "red fox", "wolf"] and table.kinds == ["others", "object", "animal"]
    assert len(table.timesteps) == 2
    with pytest.raises(ValueError, match="name: expected one that the table does not have yet, got 'wolf'"):
        replace(command, name="wolf").run()
    with pytest.raises(ValueError, match="others: expected --name beside it"):
        replace(command, name=None).run()
    with pytest.raises(ValueError, match="assignment: expected --assign with --name"):
        replace(command, assignment=tmp_path).run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "cat"}, "name: expected one that the table does not have yet, got 'cat'"),
        ({"name": "others"}, "name: expected one that the table does not have yet"),
        ({"prompts": []}, "prompts: expected at least one, got none"),
        ({"prompts": ["a", "a"]}, r"prompts, others: expected different ones, got \['a'\] more than once"),
        ({"others": OWN[:1]}, "prompts, others: expected different ones"),
        ({"table": None}, "others: expected prompts of other things, or a table of other concepts, got neither"),
        ({"table": None, "others": ["a cat"]}, "hook_point: expected a name without a table, got None"),
        ({"hook_point": HOOK_POINTS[0]}, r"hook_point: expected up_blocks\.1\.attentions\.0, the table's"),
        ({"sae": make_sae(seed=9)}, "sae: the table was made with SAE"),
    ],
)
def test_what_cannot_be_added(pipe: Any, table: ConceptTable, changes: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"sae": make_sae(), "name": "fox", "prompts": OWN, "table": table, **changes}
    with pytest.raises(ValueError, match=message):
        add_concept(pipe, **options, **SAMPLING)


def test_a_table_of_other_timesteps_is_refused(pipe: Any, table: ConceptTable) -> None:
    moved = replace(table, timesteps=table.timesteps - 1)
    with pytest.raises(
        ValueError, match="table: expected timesteps as the pipeline has them, 501 to 1 in 2 steps, got 500"
    ):
        add_concept(pipe, make_sae(), "fox", OWN, table=moved, **SAMPLING)
