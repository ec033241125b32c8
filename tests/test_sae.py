"""TopKSAE and its files: SPEC 1, 6.1, 6.3, 8."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peers import peer
from saemnesia_fast import SparseLatents, TopKSAE, ops
from saemnesia_fast.files import load_tensors, save_tensors
from saemnesia_fast.sae import SAEConfig
from weights import random_tokens, same_bits

PEER = Path(__file__).parent / "data" / "eai_sparsify"


def random_sae(dtype: torch.dtype = torch.float32, **options: Any) -> TopKSAE:
    sae = TopKSAE.init(8, 32, 4, seed=3, dtype=dtype, **options)
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.encoder.bias.normal_()
    return sae


def dense_forward(sae: TopKSAE, x: Tensor) -> Tensor:
    pre = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
    values, indices = pre.topk(sae.k)
    return torch.zeros_like(pre).scatter(-1, indices, values) @ sae.W_dec + sae.b_dec


def test_forward_is_the_formula_of_the_spec() -> None:
    sae = random_sae(torch.float64)
    x = random_tokens(2, 5, 8)
    out = sae(x)
    torch.testing.assert_close(out.x_hat, dense_forward(sae, x), rtol=1e-12, atol=1e-12)
    assert torch.equal(sae.decode(sae.encode(x)), out.x_hat)
    assert isinstance(out.latents, SparseLatents)
    assert torch.equal(out.latents.indices, sae.encode(x).indices)


def test_unit_norm_is_mapped_back() -> None:
    """SPEC 1.4: the reconstruction lives on the scale of the input."""
    sae = random_sae(torch.float64, input_unit_norm=True)
    x = 3 + 7 * random_tokens(5, 8)
    mean = x.mean(1, keepdim=True)
    std = ((x - mean).square().sum(1, keepdim=True) / 7).sqrt() + 1e-5
    want = dense_forward(sae, (x - mean) / std) * std + mean
    torch.testing.assert_close(sae(x).x_hat, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sae.encode(x).values, sae(x).latents.values, rtol=0, atol=0)
    half = sae(x.half())
    assert half.x_hat.dtype == half.latents.values.dtype == sae.encode(x.half()).values.dtype == torch.float16


def test_a_sae_trained_with_batch_topk_serves_per_token() -> None:
    """SPEC 1.4: the flag is kept in the file and changes nothing at serving."""
    plain, batch = random_sae(), random_sae()
    batch.load_state_dict(plain.state_dict())
    batch.cfg = batch.cfg.replace(batch_topk=True)
    x = random_tokens(50, 8, dtype=torch.float32)
    assert same_bits(batch(x).x_hat, plain(x).x_hat)


def test_init_follows_the_spec_and_its_seed() -> None:
    """SPEC 1.5."""
    torch.manual_seed(7)
    state = torch.get_rng_state()
    sae = TopKSAE.init(50, 400, 4, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    bound = 50**-0.5
    assert 0.99 * bound < sae.W_enc.abs().max() <= bound
    assert sae.W_enc.mean().abs() < 0.01 * bound
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(400))
    torch.testing.assert_close(sae.W_dec * sae.W_enc.norm(dim=1, keepdim=True), sae.W_enc)
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
    assert torch.equal(sae.W_enc, TopKSAE.init(50, 400, 8, seed=1).W_enc)
    assert not torch.equal(sae.W_enc, TopKSAE.init(50, 400, 4, seed=2).W_enc)


def test_gradients_reach_every_parameter() -> None:
    sae = random_sae(torch.float64)
    x = random_tokens(40, 8)
    (sae(x).x_hat - x).square().sum().backward()
    got = [parameter.grad.clone() for parameter in sae.parameters() if parameter.grad is not None]
    sae.zero_grad()
    (dense_forward(sae, x) - x).square().sum().backward()
    assert len(got) == 4
    for ours, parameter in zip(got, sae.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_files_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    """SPEC 6.1: names and shapes of the tensors, keys of the config."""
    sae = random_sae(dtype, batch_topk=True)
    sae.save_pretrained(tmp_path / "unet.up_blocks.1")
    tensors = load_tensors(tmp_path / "unet.up_blocks.1" / "sae.safetensors")
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        "encoder.weight": [32, 8],
        "encoder.bias": [32],
        "W_dec": [32, 8],
        "b_dec": [8],
    }
    assert json.loads((tmp_path / "unet.up_blocks.1" / "cfg.json").read_text()) == {
        "d_in": 8,
        "k": 4,
        "num_latents": 32,
        "expansion_factor": 32,
        "normalize_decoder": True,
        "activation": "topk",
        "multi_topk": False,
        "batch_topk": True,
        "sample_topk": False,
        "input_unit_norm": False,
    }
    loaded = TopKSAE.from_pretrained(tmp_path, subfolder="unet.up_blocks.1")
    assert loaded.cfg == sae.cfg
    assert loaded.W_dec.dtype == dtype
    x = random_tokens(20, 8, dtype=torch.float32)
    assert same_bits(loaded(x).x_hat, sae(x).x_hat)
    assert TopKSAE.from_pretrained(tmp_path, "unet.up_blocks.1", dtype=torch.float64).W_dec.dtype == torch.float64


def test_loading_leaves_the_random_state_alone(tmp_path: Path) -> None:
    random_sae().save_pretrained(tmp_path)
    state = torch.get_rng_state()
    TopKSAE.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_config_reads_derived_size_and_keeps_unknown_keys() -> None:
    entries = {"d_in": 8, "k": 4, "num_latents": 0, "expansion_factor": 16, "signed": False, "skip_connection": False}
    cfg = SAEConfig.from_dict(entries)
    assert cfg.resolved_num_latents == 128
    assert cfg.extra == {"signed": False, "skip_connection": False}
    assert cfg.to_dict().items() >= entries.items()
    assert cfg.replace(k=5).extra == cfg.extra


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "groupmax"}, "activation: expected 'topk', got 'groupmax'"),
        ({"transcode": True}, "transcode: expected false"),
        ({"skip_connection": True}, "skip_connection: expected false"),
        ({"k": 33}, "k: expected 1 <= k <= N = 32, got 33"),
        ({"d_in": 9}, r"encoder\.weight: expected \[N, d\] = \[32, 9\] to match cfg\.json, got \[32, 8\]"),
        ({"num_latents": 31}, r"encoder\.weight: expected \[N, d\] = \[31, 8\]"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    random_sae().save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(entries | change))
    with pytest.raises(ValueError, match=message):
        TopKSAE.from_pretrained(tmp_path)


def test_files_of_other_models_are_refused(tmp_path: Path) -> None:
    sae = random_sae()
    sae.save_pretrained(tmp_path)
    save_tensors(tmp_path / "sae.safetensors", sae.state_dict() | {"W_skip": torch.zeros(8, 8)})
    with pytest.raises(ValueError, match=r"expected the tensors .* got .*'W_skip'"):
        TopKSAE.from_pretrained(tmp_path)
    (tmp_path / "sae.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no sae\.safetensors"):
        TopKSAE.from_pretrained(tmp_path)


def test_a_missing_subfolder_argument_is_suggested(tmp_path: Path) -> None:
    random_sae().save_pretrained(tmp_path / "unet.a")
    random_sae().save_pretrained(tmp_path / "unet.b")
    with pytest.raises(FileNotFoundError, match=r"no cfg\.json; it has the subfolders unet\.a, unet\.b"):
        TopKSAE.from_pretrained(tmp_path)


def test_content_hash_names_the_latents(tmp_path: Path) -> None:
    """SPEC 6.3: equal for the same SAE on disk in float32 or float16, different for any other."""
    sae = random_sae()
    digest = sae.content_hash()
    assert len(digest) == 64
    sae.save_pretrained(tmp_path / "full")
    assert TopKSAE.from_pretrained(tmp_path / "full").content_hash() == digest
    TopKSAE.from_pretrained(tmp_path / "full", dtype=torch.float16).save_pretrained(tmp_path / "half")
    half = TopKSAE.from_pretrained(tmp_path / "half")
    assert half.content_hash() == half.float().content_hash() == digest
    sae.cfg = sae.cfg.replace(k=5)
    assert sae.content_hash() != digest
    sae.cfg = sae.cfg.replace(k=4, input_unit_norm=True)
    assert sae.content_hash() != digest
    sae.cfg = sae.cfg.replace(input_unit_norm=False, batch_topk=True)
    assert sae.content_hash() == digest
    with torch.no_grad():
        sae.W_dec[3, 2] += 0.01
    assert sae.content_hash() != digest


def test_reads_what_eai_sparsify_wrote_and_gives_its_forward() -> None:
    """SPEC 6.2; provenance in tests/data/eai_sparsify/README.md."""
    sae = TopKSAE.from_pretrained(PEER, subfolder="blocks.1")
    assert (sae.d, sae.num_latents, sae.k) == (16, 64, 4)
    theirs = load_tensors(PEER / "forward.safetensors")
    x_hat, latents = sae(theirs["x"])
    assert torch.equal(latents.indices.long(), theirs["indices"])
    torch.testing.assert_close(latents.values, theirs["values"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x_hat, theirs["x_hat"], rtol=1e-6, atol=1e-6)


def test_eai_sparsify_reads_what_we_write(tmp_path: Path) -> None:
    coder = peer("sparsify.sparse_coder").SparseCoder
    sae = random_sae(batch_topk=True)
    sae.save_pretrained(tmp_path)
    x = random_tokens(20, 8, dtype=torch.float32)
    theirs = coder.load_from_disk(tmp_path)(x)
    torch.testing.assert_close(theirs.sae_out, sae(x).x_hat, rtol=1e-6, atol=1e-6)


def test_wrong_tokens_are_named() -> None:
    """SPEC 7.1."""
    with pytest.raises(ValueError, match=r"W_enc: expected \[N, d\] = \[N, 9\] to match x \[\*, d=9\], got \[32, 8\]"):
        random_sae().encode(torch.zeros(3, 9))


def test_compiles_as_one_graph() -> None:
    sae = random_sae(input_unit_norm=True)
    x = random_tokens(5, 8, dtype=torch.float32)
    compiled = torch.compile(sae, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(x).x_hat.detach(), sae(x).x_hat.detach())
    assert ops.current_backend() == "auto"
