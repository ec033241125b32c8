"""The technique for the PyPI package eval-unlearn, and that package running it where it is installed."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from erasing import HOOK_POINT, sae_and_table
from pipelines import tiny_sd
from saemnesia_fast import apply_erasure
from saemnesia_fast.concepts import ConceptTable
from saemnesia_fast.eval_unlearn import SaemnesiaFast

GROUP = "eval_unlearn.techniques"
PROMPTS = ["a cat", "a dog", "a cow"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("technique")
    sae, table = sae_and_table()
    table.settings = {table.concepts[1]: {"strength": -2.0, "num_latents": 2, "scale": "constant"}}
    tiny_sd().save_pretrained(folder / "model")
    sae.save_pretrained(folder / "sae" / HOOK_POINT)
    table.save(folder / "table")
    return {
        "model_id": str(folder / "model"),
        "sae": str(folder / "sae"),
        "sae_subfolder": HOOK_POINT,
        "table": str(folder / "table"),
        "erase_concept": table.concepts[0],
        "num_inference_steps": 2,
        "batch_size": 2,
        "device": "cpu",
    }


def test_pictures_are_those_of_apply_erasure(config: dict[str, Any]) -> None:
    pipe = tiny_sd()
    sae, table = sae_and_table()
    technique = SaemnesiaFast(**config, strength=-3.0, mode="released", guidance_scale=5.0)
    images = technique.generate(PROMPTS, seed=7)
    plain = pipe(PROMPTS[0], num_inference_steps=2, guidance_scale=5.0, generator=torch.Generator().manual_seed(7))
    assert np.abs(np.asarray(images[0], int) - np.asarray(plain.images[0], int)).max() > 5
    with apply_erasure(pipe, sae, table, table.concepts[0], strength=-3.0, mode="released"):
        for place, prompt in enumerate(PROMPTS):
            noise = torch.Generator().manual_seed(7 + place)
            want = pipe(prompt, num_inference_steps=2, guidance_scale=5.0, generator=noise).images[0]
            assert np.abs(np.asarray(images[place], int) - np.asarray(want, int)).max() <= 1
    other = technique.generate(PROMPTS[:1], seed=7, guidance_scale=1.0)
    assert np.asarray(other[0]).tobytes() != np.asarray(images[0]).tobytes()


def test_several_concepts_and_settings_of_the_table(config: dict[str, Any]) -> None:
    second = sae_and_table()[1].concepts[1]
    both = SaemnesiaFast(**config | {"erase_concept": f"{config['erase_concept']}, {second}"}, strength=-1.0)
    assert len(both.generate(PROMPTS[:1])) == 1
    stored = SaemnesiaFast(**config | {"erase_concept": second})
    assert len(stored.generate(PROMPTS[:1], seed=0)) == 1
    assert "mode='exact'" in stored.erasure.explain() and "halves='both'" in stored.erasure.explain()
    with pytest.raises(ValueError, match="expected those with stored settings"):
        SaemnesiaFast(**config)
    with pytest.raises(ValueError, match="not in the table"):
        SaemnesiaFast(**config | {"erase_concept": "nobody"}, strength=-1.0)


def test_settings_bring_their_mode_and_halves(config: dict[str, Any], tmp_path: Path) -> None:
    table = ConceptTable.load(config["table"])
    table.settings[table.concepts[1]] |= {"mode": "released", "halves": "cond"}
    table.save(tmp_path)
    options = config | {"erase_concept": table.concepts[1], "table": str(tmp_path)}
    explained = SaemnesiaFast(**options).erasure.explain()
    assert "mode='released'" in explained and "halves='cond'" in explained
    with pytest.raises(ValueError, match="mode: expected 'released', with which stored settings were found"):
        SaemnesiaFast(**options, mode="exact")
    with pytest.raises(ValueError, match="halves: expected 'cond', with which stored settings were found"):
        SaemnesiaFast(**options, halves="both")


def test_the_entry_point_is_ours() -> None:
    (found,) = entry_points(group=GROUP, name="saemnesia_fast")
    assert found.load() is SaemnesiaFast


def test_eval_unlearn_runs_it(config: dict[str, Any], tmp_path: Path) -> None:
    """Its runner finds the technique, makes it, and hands its pictures to a metric."""
    pytest.importorskip("eval_unlearn", reason="eval-unlearn is not installed")
    from eval_unlearn.registry import register_metric
    from eval_unlearn.runners import SingleBenchmarkRunner
    from eval_unlearn.types import Dataset, MetricResult

    seen: list[Any] = []

    def update(images: list[Any], prompts: list[str], metadata: dict[str, Any]) -> None:
        seen.extend(zip(images, prompts, strict=True))

    metric = SimpleNamespace(
        load_dataset=lambda: [Dataset(PROMPTS[:2], {"source": "test"}), Dataset(PROMPTS[2:], {"source": "test"})],
        update=update,
        compute=lambda: MetricResult("count", float(len(seen))),
    )
    register_metric("count")(lambda: metric)
    runner = SingleBenchmarkRunner(
        "saemnesia_fast", "count", config | {"strength": -3.0}, output_dir=str(tmp_path), seed=7
    )
    runner.run()
    assert [prompt for _, prompt in seen] == PROMPTS
    want = SaemnesiaFast(**config, strength=-3.0).generate(PROMPTS[:2], seed=7)
    assert [np.asarray(image).tobytes() for image, _ in seen[:2]] == [np.asarray(image).tobytes() for image in want]
