"""I2P's file, painting with its seeds and guidance, and counting with a detector that stands in for NudeNet."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from erasing import sae_and_table
from pipelines import tiny_sd
from saemnesia_fast import ConceptTable, apply_erasure
from saemnesia_fast.cli.nudity import Nudity
from saemnesia_fast.evaluation.units import described
from saemnesia_fast.files import read_json
from saemnesia_fast.nudity import Found, Prompt, counts, examine, nudenet, read_i2p

HEADER = (
    "prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,sd_safety_percentage,"
    "prompt_toxicity,lexica_url,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height,sd_model"
)
ROWS = [
    '"a cat, sitting","shocking, sexual",0,50.0,10.0,60.0,0.1,0.05,https://lexica.art/prompt/1,11,7.0,64,64,stable',
    "a dog,violence,1,50.0,0.0,60.0,0.1,0.05,https://lexica.art/prompt/2,12,7.5,64,32,stable",
    "a cow,sexual,1,50.0,0.0,60.0,0.1,0.05,https://lexica.art/prompt/3,13,7.0,64,64,stable",
]


@pytest.fixture
def i2p(tmp_path: Path) -> Path:
    path = tmp_path / "i2p_benchmark.csv"
    path.write_text("\n".join([HEADER, *ROWS]) + "\n", encoding="utf-8")
    return path


class Bright:
    """Finds a bare belly wherever red is above its mean, surely where it is far above; counts its calls."""

    def __init__(self, level: float = 0.0) -> None:
        self.level = level
        self.seen: list[np.ndarray] = []

    def __call__(self, images: Any) -> list[Found]:
        arrays = [np.asarray(image) for image in images]
        self.seen += arrays
        return [[("BELLY_EXPOSED", 0.9), ("FACE_FEMALE", 0.9)] if a[..., 0].mean() > self.level else [] for a in arrays]


def test_i2p_is_read_with_each_prompts_seed_guidance_and_size(i2p: Path) -> None:
    first, second, third = read_i2p(i2p)
    assert first == Prompt("a cat, sitting", 11, 7.0, 64, 64)
    assert second == Prompt("a dog", 12, 7.5, 32, 64)
    assert read_i2p(i2p, ["sexual"]) == [first, third]
    assert read_i2p(i2p, size=512)[1] == Prompt("a dog", 12, 7.5, 512, 512)
    i2p.write_text("prompt,evaluation_seed,evaluation_guidance\na cat,3,7.5\n")
    assert read_i2p(i2p, size=64) == [Prompt("a cat", 3, 7.5, 64, 64)]


@pytest.mark.parametrize(
    ("content", "categories", "message"),
    [
        (
            "prompt,sd_seed\na,1\n",
            [],
            "expected a column sd_guidance_scale or evaluation_guidance, got prompt, sd_seed",
        ),
        ("prompt,sd_seed,sd_guidance_scale\na,1,7\n", [], "expected a column sd_image_height"),
        ("\n".join([HEADER, *ROWS]), ["hate"], "categories: expected some that .* has, got hate"),
        (HEADER, [], "got an empty file"),
        ("\n".join([HEADER, ROWS[1].replace(",12,", ",x,")]), [], "expected numbers for seed, guidance and size"),
    ],
)
def test_files_that_are_not_i2p(tmp_path: Path, content: str, categories: list[str], message: str) -> None:
    path = tmp_path / "i2p.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_i2p(path, categories)


def test_every_prompt_is_painted_once_with_its_own_noise(i2p: Path, tmp_path: Path) -> None:
    """Also when the run was cut off in between; batches share guidance and size."""
    pipe, prompts, detector = tiny_sd(), read_i2p(i2p), Bright()
    path = tmp_path / "plain.json"
    options: dict[str, Any] = {"settings": {"model": "tiny"}, "steps": 2}
    found = examine(pipe, prompts, detector, path, **options)
    assert len(found) == 3 and len(detector.seen) == 3
    content = read_json(path)
    assert content["found"]["1"] == [["BELLY_EXPOSED", 0.9], ["FACE_FEMALE", 0.9]]
    order = [0, 2, 1]
    for place, image in zip(order, detector.seen, strict=True):
        one = prompts[place]
        want = pipe(
            one.text,
            num_inference_steps=2,
            guidance_scale=one.guidance,
            height=one.height,
            width=one.width,
            generator=torch.Generator().manual_seed(one.seed),
        ).images[0]
        assert np.abs(image.astype(int) - np.asarray(want, int)).max() <= 1
    del content["found"]["2"]
    path.write_text(json.dumps(content))
    again = Bright()
    assert examine(pipe, prompts, again, path, **options) == found and len(again.seen) == 1
    with pytest.raises(ValueError, match="out: .* is of other prompts or settings"):
        examine(pipe, prompts, again, path, settings={"model": "other"}, steps=2)


def test_counts_are_of_bare_parts_above_the_threshold() -> None:
    found: list[Found] = [
        [("BELLY_EXPOSED", 0.6), ("BELLY_EXPOSED", 0.7), ("FACE_MALE", 0.9)],
        [("FEET_EXPOSED", 0.59)],
        [("FEET_EXPOSED", 0.9), ("BELLY_EXPOSED", 0.9)],
    ]
    numbers = counts(found)
    assert {name: n for name, n in numbers.items() if n} == {
        "BELLY_EXPOSED": 3,
        "FEET_EXPOSED": 1,
        "total": 4,
        "pictures": 2,
    }
    assert counts(found, 0.5)["pictures"] == 3 and len(numbers) == 10


def test_nudenet_is_asked_as_opencv_would(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[np.ndarray] = []

    class NudeDetector:
        def detect(self, image: np.ndarray) -> list[dict[str, Any]]:
            asked.append(image)
            return [{"class": "FEET_EXPOSED", "score": np.float32(0.5), "box": [0, 0, 1, 1]}]

    module = ModuleType("nudenet")
    module.NudeDetector = NudeDetector  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nudenet", module)
    found = nudenet()([Image.new("RGB", (4, 2), (255, 10, 20)), Image.new("L", (3, 3))])
    assert found == [[("FEET_EXPOSED", 0.5)]] * 2
    assert asked[0].shape == (2, 4, 3) and asked[0][0, 0].tolist() == [20, 10, 255] and asked[1].shape == (3, 3, 3)
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(ImportError, match=r"pip install saemnesia-fast\[nudity\]"):
        nudenet()


def test_nudenet_itself() -> None:
    pytest.importorskip("nudenet", reason="nudenet is not installed")
    assert nudenet()([Image.new("RGB", (64, 64), (255, 255, 255))]) == [[]]


def test_the_command_counts_before_and_after(
    i2p: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tiny_sd()
    sae, table = sae_and_table()
    pipe.save_pretrained(tmp_path / "model")
    sae.save_pretrained(tmp_path / "sae")
    table.save(tmp_path / "table")
    detector = Bright()
    monkeypatch.setattr("saemnesia_fast.nudity.nudenet", lambda: detector)
    command = Nudity(
        model=str(tmp_path / "model"),
        prompts=i2p,
        sae=str(tmp_path / "sae"),
        table=tmp_path / "table",
        concept=table.concepts[0],
        strength=-4.0,
        mode="released",
        categories=("sexual",),
        out=tmp_path / "out",
        steps=2,
        dtype="float32",
        device="cpu",
    )
    command.run()
    assert "2 prompts, painted twice: 8 denoising steps" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    command.yes = True
    command.run()
    assert "pictures                  2 -> 2" in capsys.readouterr().out
    result = read_json(tmp_path / "out" / "nudity.json")
    assert result["before"]["BELLY_EXPOSED"] == 2 and result["prompts"] == 2 and result["strength"] == -4.0
    assert len(detector.seen) == 4 and not np.array_equal(detector.seen[0], detector.seen[2])
    with apply_erasure(pipe, sae, table, table.concepts[0], strength=-4.0, mode="released"):
        noise = [torch.Generator().manual_seed(seed) for seed in (11, 13)]
        prompts = ["a cat, sitting", "a cow"]
        sizes = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 7.0}
        want = pipe(prompts, generator=noise, **sizes).images
    assert [np.asarray(one).tobytes() for one in want] == [one.tobytes() for one in detector.seen[2:]]

    table.save(tmp_path / "table")
    command.run()
    assert read_json(tmp_path / "out" / "nudity.json")["table"] == described(ConceptTable.load(tmp_path / "table"))
    replace(table, mu=table.mu / 2).save(tmp_path / "table")
    with pytest.raises(ValueError, match=r"out: .*erased\.json is of other prompts or settings"):
        command.run()
    tiny_sd(seed=1).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"out: .*plain\.json is of other prompts or settings"):
        command.run()
    pipe.save_pretrained(tmp_path / "model")
    assert len(detector.seen) == 4

    settings = {"strength": -4.0, "num_latents": None, "scale": "mean", "mode": "released"}
    replace(table, settings={table.concepts[0]: settings}).save(tmp_path / "table")
    replace(command, strength=None, mode=None, out=tmp_path / "stored").run()
    assert [one.tobytes() for one in detector.seen[4:]] == [one.tobytes() for one in detector.seen[:4]]
