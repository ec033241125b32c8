"""`saemnesia-fast erase` writes what the Python interface generates."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from erasing import HOOK_POINT, sae_and_table
from pipelines import generate, tiny_sd
from saemnesia_fast.cli.main import main
from saemnesia_fast.concepts import ConceptTable
from saemnesia_fast.erasure import apply_erasure


def arguments(folder, *more):
    model, sae, table, out = (str(folder / name) for name in ("model", "sae", "table", "out"))
    return ["erase", "--model", model, "--sae", sae, "--table", table, "--out", out, "--device", "cpu", *more]


@pytest.fixture
def saved(tmp_path):
    pipe = tiny_sd()
    sae, table = sae_and_table()
    pipe.save_pretrained(tmp_path / "model")
    sae.save_pretrained(tmp_path / "sae" / HOOK_POINT)
    table.save(tmp_path / "table")
    return pipe, sae, tmp_path


def test_images_are_those_of_apply_erasure(saved):
    pipe, sae, folder = saved
    options = ["--sae-subfolder", HOOK_POINT, "--strength", "-40", "--num-latents", "12", "--mode", "released"]
    options += ["--precision", "exact"]
    sampling = ["--steps", "2", "--guidance", "5", "--seed", "7"]
    main(arguments(folder, "--concept", "cat", "dog", "--prompt", "a cat", "a dog", *options, *sampling))
    table = ConceptTable.load(folder / "table")
    with apply_erasure(pipe, sae, table, ["cat", "dog"], -40.0, "released", num_latents=12):
        for i, prompt in enumerate(["a cat", "a dog"]):
            (expected,) = generate(pipe, prompt, seed=7 + i, num_inference_steps=2, output_type="pil")
            with Image.open(folder / "out" / f"{i:03}.png") as written:
                assert np.array_equal(np.asarray(written), np.asarray(expected))


def test_contrast_begins_with_a_strength_of_its_own(saved, capsys):
    pipe, sae, folder = saved
    options = ["--sae-subfolder", HOOK_POINT, "--concept", "cat", "--prompt", "a cat", "--mode", "contrast"]
    main(arguments(folder, *options, "--anchor", "dog", "--steps", "2"))
    table = ConceptTable.load(folder / "table")
    with apply_erasure(pipe, sae, table, "cat", -1.5, "contrast", anchor="dog"):
        (expected,) = generate(pipe, "a cat", seed=0, num_inference_steps=2, guidance_scale=7.5, output_type="pil")
    with Image.open(folder / "out" / "000.png") as written:
        assert np.array_equal(np.asarray(written), np.asarray(expected))
    with pytest.raises(SystemExit):
        main(arguments(folder, *options, "--stored"))
    assert "stored: expected a strength with contrast" in capsys.readouterr().err


def test_stored_settings_come_before_what_is_given(saved):
    pipe, sae, folder = saved
    table = ConceptTable.load(folder / "table")
    table.settings = {"cat": {"strength": -40.0, "num_latents": 12, "scale": "constant"}}
    table.save(folder / "table")
    main(
        arguments(
            folder, "--sae-subfolder", HOOK_POINT, "--concept", "cat", "--prompt", "a cat", "--stored", "--steps", "2"
        )
    )
    with apply_erasure(pipe, sae, table, "cat", -40.0, num_latents=12, scale="constant"):
        (expected,) = generate(pipe, "a cat", seed=0, num_inference_steps=2, guidance_scale=7.5, output_type="pil")
    with Image.open(folder / "out" / "000.png") as written:
        assert np.array_equal(np.asarray(written), np.asarray(expected))


def test_stored_settings_bring_their_mode_and_halves(saved, capsys):
    pipe, sae, folder = saved
    table = ConceptTable.load(folder / "table")
    searched = {"scale": "constant", "mode": "released", "halves": "cond"}
    table.settings = {"cat": {"strength": -40.0, "num_latents": 12, **searched}}
    table.save(folder / "table")
    options = ["--sae-subfolder", HOOK_POINT, "--concept", "cat", "--prompt", "a cat", "--stored", "--steps", "2"]
    with apply_erasure(pipe, sae, table, "cat", -40.0, num_latents=12, **searched):
        (expected,) = generate(pipe, "a cat", seed=0, num_inference_steps=2, guidance_scale=7.5, output_type="pil")
    main(arguments(folder, *options))
    with Image.open(folder / "out" / "000.png") as written:
        assert np.array_equal(np.asarray(written), np.asarray(expected))
    for option, given, known in (("mode", "exact", "released"), ("halves", "both", "cond")):
        with pytest.raises(SystemExit):
            main(arguments(folder, *options, f"--{option}", given))
        error = f"{option}: expected '{known}', with which stored settings were found, got '{given}'"
        assert error in capsys.readouterr().err


def test_an_unknown_concept_ends_with_one_line(saved, capsys):
    _, _, folder = saved
    with pytest.raises(SystemExit) as stopped:
        main(arguments(folder, "--sae-subfolder", HOOK_POINT, "--concept", "horse", "--prompt", "a horse"))
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "horse" in error
    assert "cat" in error
    assert not (folder / "out").exists()
