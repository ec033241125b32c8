"""The files of a concept table and the refusal of other SAEs (SPEC 6.3, 6.4)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from saemnesia_fast import TopKSAE
from saemnesia_fast.concepts import ConceptTable
from saemnesia_fast.concepts.storage import METADATA_FILE, TENSOR_FILE


def make_table(mu: Tensor, sae_hash: str = "5ae", **fields: Any) -> ConceptTable:
    names = ["cat", "dog", "néon"]
    return ConceptTable(
        mu=mu,
        timesteps=torch.tensor([981, 1]),
        concepts=names,
        kinds=["object", "object", "style"],
        hook_point="up_blocks.1.attentions.1",
        sae_hash=sae_hash,
        model_id="some/model",
        sampler={"scheduler": "DDIMScheduler", "guidance_scale": 9.0},
        **fields,
    )


def random_mu(density: float, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mu = torch.rand(3, 2, 500, generator=generator) * (torch.rand(3, 2, 500, generator=generator) < density)
    return (mu * scale).half().float()


@pytest.mark.parametrize(("density", "names"), [(0.9, {"mu"}), (0.05, {"mu_values", "mu_indices"}), (0.0, None)])
def test_round_trip_is_exact_for_float16_values_spec_6_3(
    tmp_path: Path, density: float, names: set[str] | None
) -> None:
    table = make_table(random_mu(density), assignment={"dog": 7})
    table.save(tmp_path / "table")
    loaded = ConceptTable.load(tmp_path / "table")
    assert torch.equal(loaded.mu, table.mu)
    assert torch.equal(loaded.timesteps, table.timesteps)
    for name in ("concepts", "kinds", "hook_point", "sae_hash", "model_id", "sampler", "assignment"):
        assert getattr(loaded, name) == getattr(table, name), name
    stored = set(load_file(tmp_path / "table" / TENSOR_FILE)) - {"timesteps", "assignment", "mu_scale"}
    assert stored == (names or {"mu_values", "mu_indices"})


def test_float16_takes_subnormal_and_largest_values_spec_6_3(tmp_path: Path) -> None:
    mu = torch.zeros(3, 2, 4)
    mu[0, 0] = torch.tensor([2.0**-24, 65504.0, 3 * 2.0**-24, 1.0])
    make_table(mu).save(tmp_path)
    assert torch.equal(ConceptTable.load(tmp_path).mu, mu)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 65519.9, 65535.9, 1e7])
def test_range_beyond_float16_keeps_its_precision_spec_6_3(tmp_path: Path, scale: float) -> None:
    mu = torch.rand(3, 2, 500, generator=torch.Generator().manual_seed(1)) * scale
    mu[0, 0, 0] = scale
    make_table(mu).save(tmp_path)
    loaded = ConceptTable.load(tmp_path)
    torch.testing.assert_close(loaded.mu, mu, rtol=2**-11, atol=scale * 2**-40)
    assert load_file(tmp_path / TENSOR_FILE)["mu"].isfinite().all()


@pytest.mark.parametrize("density", [0.9, 0.05])
def test_saving_a_loaded_table_repeats_its_bytes(tmp_path: Path, density: float) -> None:
    make_table(random_mu(density, 0.77), assignment={"cat": 3, "néon": 4}).save(tmp_path / "a")
    ConceptTable.load(tmp_path / "a").save(tmp_path / "b")
    for name in (TENSOR_FILE, METADATA_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_files_of_two_tables_do_not_mix_spec_6_4(tmp_path: Path) -> None:
    make_table(random_mu(0.5)).save(tmp_path / "a")
    make_table(random_mu(0.6)).save(tmp_path / "b")
    (tmp_path / "a" / TENSOR_FILE).replace(tmp_path / "b" / TENSOR_FILE)
    with pytest.raises(ValueError, match="were not written together"):
        ConceptTable.load(tmp_path / "b")


def test_unknown_versions_and_missing_parts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ConceptTable.load(tmp_path)
    make_table(random_mu(0.5)).save(tmp_path)
    metadata = json.loads((tmp_path / METADATA_FILE).read_text())
    (tmp_path / METADATA_FILE).write_text(json.dumps({**metadata, "version": 2}))
    with pytest.raises(ValueError, match="expected format version 1, got 2"):
        ConceptTable.load(tmp_path)
    del metadata["sae_hash"]
    (tmp_path / METADATA_FILE).write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=r"\['sae_hash'\] missing"):
        ConceptTable.load(tmp_path)


def test_another_sae_is_refused_spec_6_3() -> None:
    sae = TopKSAE.init(4, 500, 2, seed=0)
    table = make_table(random_mu(0.5), sae_hash=sae.content_hash())
    table.check_sae(TopKSAE.init(4, 500, 2, seed=0))
    with pytest.raises(ValueError, match=f"made with SAE {sae.content_hash()[:12]}"):
        table.check_sae(TopKSAE.init(4, 500, 2, seed=1))
    with pytest.raises(ValueError, match="N = 500 latents as in the table, got 400"):
        table.check_sae(TopKSAE.init(4, 400, 2, seed=0))
