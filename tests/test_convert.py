"""Other projects' files become ours, and what a pickle wants to run is never run (SPEC 6.2, 6.4)."""

from __future__ import annotations

import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from legacy import UnboxAutoencoder, write_latents, write_pickle
from saemnesia_fast import ConceptTable, TopKSAE
from saemnesia_fast.cli.convert import Convert
from saemnesia_fast.convert import concept_table, convert_pipeline, read_legacy, read_sae, read_state_dict
from saemnesia_fast.convert.latents import latents_above, leading_timesteps
from saemnesia_fast.files import load_tensors, read_json, write_json

FORMATS = Path(__file__).parent / "data" / "sae_formats"


class Calls:
    """Pickles to a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


VALUES = {
    "tensor": torch.arange(6, dtype=torch.float16).view(2, 3).T,
    "parameter": nn.Parameter(torch.ones(2)),
    "array": np.arange(6, dtype=np.float32).reshape(2, 3),
    "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big-endian": np.arange(3, dtype=">i4"),
    "half": np.float16([0.5, 1.5]),
    "flags": np.array([True, False]),
    "numpy number": np.float64(2.5),
    "nested": [1, (2.5, "drei"), {"vier": None, 5: True}],
    "ordered": OrderedDict(a=1),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_are_read_as_pickle_reads_them(tmp_path: Path, protocol: int) -> None:
    found = read_legacy(write_pickle(tmp_path / "values.pkl", VALUES, protocol))
    assert list(found) == list(VALUES)
    for name in ("tensor", "parameter"):
        assert torch.equal(found[name], VALUES[name].detach()) and not found[name].requires_grad
    for name in ("array", "columns", "big-endian", "half", "flags"):
        assert np.array_equal(found[name].numpy(), VALUES[name]) and found[name].is_contiguous()
    assert found["half"].dtype == torch.float16
    assert type(found["numpy number"]) is float and found["numpy number"] == 2.5
    assert found["nested"] == [1, [2.5, "drei"], {"vier": None, 5: True}]
    assert found["ordered"] == {"a": 1} and type(found["ordered"]) is dict


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_are_read_in_both_of_their_formats(tmp_path: Path, zipped: bool) -> None:
    module = nn.Linear(2, 3)
    content = {"model_state_dict": module.state_dict(), "epoch": 3, "shape": torch.Size([2])}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert read_legacy(tmp_path / "a.pth")["shape"] == [2]
    found = read_state_dict(tmp_path / "a.pth")
    assert set(found) == {"weight", "bias"} and torch.equal(found["weight"], module.weight.detach())


def attacks() -> dict[str, Any]:
    mark = "import pathlib; pathlib.Path('ran').touch()"
    inner = pickle.dumps(Calls(exec, mark))
    storage = torch.storage._load_from_bytes
    return {
        "os.system": Calls(os.system, "touch ran"),
        "exec": Calls(exec, mark),
        "eval": Calls(eval, f"exec({mark!r})"),
        "getattr": Calls(getattr, "a text", "upper"),
        "nested": {"Cats": [torch.zeros(2), Calls(exec, mark)]},
        "in a key": {("a", 1): 1, Calls(exec, mark): 2},
        "torch.load": Calls(torch.load, "other.pth"),
        "pickle.loads": Calls(pickle.loads, inner),
        "storage bytes": Calls(storage, inner),
        "a tensor's storage": Calls(torch._utils._rebuild_tensor_v2, Calls(storage, inner), 0, (1,), (1,), False, {}),
        "encode with a codec": Calls(__import__("_codecs").encode, "touch ran", "rot13"),
        "a class": Path("ran"),
        "array of objects": np.array([Calls(exec, mark)], dtype=object),
        "records": np.zeros(2, dtype=[("a", "f4")]),
        "a function": print,
        "a module": np.random.default_rng(0),
        "set": {1, 2},
    }


@pytest.mark.parametrize("name", attacks())
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_what_wants_to_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_pickle(tmp_path / "bad.pkl", attacks()[name], protocol)
    with pytest.raises(ValueError, match=r"bad\.pkl: expected .*, got"):
        read_legacy(path)
    assert os.listdir(tmp_path) == ["bad.pkl"]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["os.system", "exec", "nested", "a class"])
def test_torch_files_that_want_to_run_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(attacks()[name], tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"bad\.pth: expected tensors, .* alone, got (posix|exec|pathlib)") as error:
        read_legacy(tmp_path / "bad.pth")
    assert "weights_only" not in str(error.value)
    assert os.listdir(tmp_path) == ["bad.pth"]


def test_makers_cannot_be_changed_by_a_pickle(tmp_path: Path) -> None:
    """BUILD sets attributes of whatever lies on the stack, a resolved function included."""
    state = b"}(X\x08\x00\x00\x00__call__K\x01u"
    for name in (b"_codecs\nencode", b"numpy\ndtype", b"collections\nOrderedDict", b"torch._utils\n_rebuild_tensor_v2"):
        for build in (state + b"b.", b"N" + state + b"\x86b."):
            (tmp_path / "bad.pkl").write_bytes(b"\x80\x02c" + name + b"\n" + build)
            with pytest.raises(ValueError, match="got a change of a function"):
                read_legacy(tmp_path / "bad.pkl")


def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    class Beyond:
        def __reduce__(self) -> Any:
            storage = torch.arange(4.0)._typed_storage()
            return torch._utils._rebuild_tensor_v2, (storage, 2, (4,), (1,), False, OrderedDict())

    path = write_pickle(tmp_path / "bad.pkl", Beyond())
    with pytest.raises(ValueError, match=r"bad\.pkl: expected a whole pickle .*storage"):
        read_legacy(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04junk", b"\x80\x04\x95", b"not a pickle", struct.pack("<q", 7)])
def test_damaged_files_are_errors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.pth: expected"):
        read_legacy(tmp_path / "bad.pth")


def test_what_refers_to_itself_many_times_is_read_once(tmp_path: Path) -> None:
    value: Any = [0]
    for _ in range(60):
        value = [value, value]
    found = read_legacy(write_pickle(tmp_path / "deep.pkl", value))
    assert found[0] is found[1]
    loop: list[Any] = []
    loop.append(loop)
    found = read_legacy(write_pickle(tmp_path / "loop.pkl", loop))
    assert found[0] is found


SAE_TOKENS = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))


def assert_same_forward(sae: TopKSAE, x_hat: Tensor, x: Tensor = SAE_TOKENS) -> None:
    assert (x_hat - x).std() > 0.1
    torch.testing.assert_close(sae(x).x_hat, x_hat.detach(), rtol=1e-4, atol=1e-5)


def test_sdxl_unbox(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = UnboxAutoencoder(16, 64, 4)
    theirs.save_to_disk(tmp_path / "unbox")
    sae = read_sae(tmp_path / "unbox")
    assert (sae.d, sae.num_latents, sae.k) == (16, 64, 4)
    assert sae.cfg.extra["converted_from"]["library"] == "sdxl-unbox"
    assert_same_forward(sae, theirs(SAE_TOKENS))
    Convert(what="sae", source=str(tmp_path / "unbox"), out=tmp_path / "ours", k=5).run()
    ours = TopKSAE.from_pretrained(tmp_path / "ours")
    assert ours.k == 5 and torch.equal(ours.W_dec, sae.W_dec)


@pytest.mark.parametrize("name", ["saelens", "saelens_rescaled", "AutoEncoderTopK", "BatchTopKSAE"])
def test_reads_what_other_libraries_wrote_and_gives_their_forward(name: str) -> None:
    """SPEC 6.2; provenance in tests/data/sae_formats/README.md."""
    theirs = load_tensors(FORMATS / "forward.safetensors")
    sae = read_sae(FORMATS / name)
    assert (sae.d, sae.num_latents, sae.k) == (16, 64, 4)
    assert sae.cfg.batch_topk == (name == "BatchTopKSAE")
    assert sae.cfg.input_unit_norm == (name == "saelens_rescaled")
    assert_same_forward(sae, theirs[name], theirs["x"])


def test_dictionaries_that_are_no_topk_are_refused(tmp_path: Path) -> None:
    state = read_state_dict(FORMATS / "AutoEncoderTopK" / "ae.pt")
    torch.save({key: value for key, value in state.items() if key != "k"}, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="expected AutoEncoderTopK or BatchTopKSAE, got no k"):
        read_sae(tmp_path)
    torch.save(state, tmp_path / "ae.pt")
    write_json(tmp_path / "config.json", {"trainer": {"dict_class": "GatedAutoEncoder"}})
    with pytest.raises(ValueError, match="dict_class: expected 'AutoEncoderTopK' or 'BatchTopKSAE', got 'GatedAuto"):
        read_sae(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "jumprelu"}, "architecture: expected 'topk', got 'jumprelu'"),
        (
            {"normalize_activations": "constant_norm_rescale"},
            "normalize_activations: expected 'none' or 'layer_norm', got",
        ),
        ({"reshape_activations": "hook_z"}, "reshape_activations: expected 'none', got 'hook_z'"),
    ],
)
def test_saelens_saes_that_compute_something_else_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / "sae_weights.safetensors").write_bytes((FORMATS / "saelens" / "sae_weights.safetensors").read_bytes())
    write_json(tmp_path / "cfg.json", read_json(FORMATS / "saelens" / "cfg.json") | settings)
    with pytest.raises(ValueError, match=message):
        read_sae(tmp_path)


def test_ours_and_no_sae_at_all(tmp_path: Path) -> None:
    sae = TopKSAE.init(16, 64, 4)
    sae.save_pretrained(tmp_path / "unet.a")
    assert read_sae(tmp_path, subfolder="unet.a").content_hash() == sae.content_hash()
    with pytest.raises(
        FileNotFoundError, match=r"expected one of sae\.safetensors, sae_weights\.safetensors, state_dict"
    ):
        read_sae(tmp_path)


CONCEPTS = ("Cats", "Dogs", "Sea")


@pytest.fixture
def small_sae(tmp_path: Path) -> TopKSAE:
    sae = TopKSAE.init(8, 40, 4, seed=3)
    sae.save_pretrained(tmp_path / "sae")
    return sae


def test_latents_statistics_become_a_table(tmp_path: Path, small_sae: TopKSAE) -> None:
    """SPEC 2.1; the settings are those of `find_best_params`, percentiles as numbers of latents (SPEC 2.3)."""
    point = "unet.up_blocks.1.attentions.1"
    path = tmp_path / f"cls_latents_dict_{point}.pkl"
    latents = write_latents(path, CONCEPTS, prompts=5, steps=10, num_latents=40)
    params = {name: {"percentile": 99.0 - 3 * c, "multiplier": -1.0 - c} for c, name in enumerate(CONCEPTS)}
    torch.save(params, tmp_path / "class_params.pth")
    command = Convert(
        what="concepts",
        source=str(path),
        out=tmp_path / "table",
        sae=tmp_path / "sae",
        hook_point=point,
        params=tmp_path / "class_params.pth",
    )
    command.run()
    table = ConceptTable.load(tmp_path / "table")
    table.check_sae(small_sae)
    assert table.concepts == list(CONCEPTS) and table.kinds == ["object"] * 3
    assert table.hook_point == "up_blocks.1.attentions.1"
    for row, name in zip(table.mu, CONCEPTS, strict=True):
        torch.testing.assert_close(row, latents[name].double().mean(0).float(), rtol=1e-3, atol=1e-6)
    assert table.timesteps.tolist() == list(range(901, 0, -100))
    assert table.sampler["guidance_scale"] == 9.0 and table.sampler["num_inference_steps"] == 10
    assert table.settings["Dogs"] == {"strength": -2.0, "num_latents": 2, "scale": "mean"}
    chosen = table.select(["Cats", "Sea"], **table.stored(["Cats", "Sea"]))
    assert (chosen.owners == 0).sum() == 10 and (chosen.owners == 1).sum() == 3 * 10
    by_percentile = table.select("Dogs", strength=-2.0, percentile=96.0)
    assert torch.equal(by_percentile.latents, table.select("Dogs", **table.stored("Dogs")).latents)


def test_percentiles_of_the_papers_as_numbers_of_latents() -> None:
    """SPEC 2.3."""
    assert [latents_above(p, 20480) for p in (99.999, 99.995, 99.99)] == [1, 2, 3]


def test_assumed_timesteps_are_those_of_the_scheduler() -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(steps_offset=1)
    for steps in (100, 50, 7):
        scheduler.set_timesteps(steps)
        assert torch.equal(leading_timesteps(steps), scheduler.timesteps)


def test_one_setting_for_all_styles_and_arrays_for_tensors(tmp_path: Path, small_sae: TopKSAE) -> None:
    latents = write_latents(tmp_path / "a.pkl", CONCEPTS, prompts=2, steps=4, num_latents=40)
    write_pickle(tmp_path / "b.pkl", {name: one.numpy() for name, one in latents.items()})
    for name in ("a.pkl", "b.pkl"):
        table = concept_table(tmp_path / name, small_sae, "up_blocks.1.attentions.2", "style", strength=-1.0)
        assert table.settings == {key: {"strength": -1.0, "num_latents": 1, "scale": "mean"} for key in CONCEPTS}
        assert torch.equal(table.mu[1], latents["Dogs"].double().mean(0).float())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], r"expected \{concept: latents \[prompts, T, N\]\}, got a list"),
        ({}, "got a dict"),
        ({"Cats": torch.zeros(2, 3, 39)}, r"Cats: expected \[prompts, T, N = 40\] to match the SAE, got \[3, 39\]"),
        ({"Cats": torch.zeros(40)}, r"Cats: expected .*, got \[40\]"),
        ({"Cats": {"a": 1}}, "Cats: expected .*, got dict"),
        (
            {"Cats": torch.zeros(2, 3, 40), "Dogs": torch.zeros(2, 4, 40)},
            r"as many steps T for every concept, got \[3, 4\]",
        ),
        ({"Cats": torch.full((2, 3, 40), torch.nan)}, "mu: expected finite values"),
    ],
)
def test_statistics_that_do_not_fit(tmp_path: Path, small_sae: TopKSAE, content: Any, message: str) -> None:
    path = write_pickle(tmp_path / "latents.pkl", content)
    with pytest.raises(ValueError, match=message):
        concept_table(path, small_sae, "up_blocks.1.attentions.1", "object")


@pytest.mark.parametrize("params", [{"Cats": {"percentile": 99.9}}, {"Cats": 3}, [1]])
def test_params_that_do_not_fit(tmp_path: Path, small_sae: TopKSAE, params: Any) -> None:
    write_latents(tmp_path / "latents.pkl", CONCEPTS, prompts=2, steps=3, num_latents=40)
    torch.save(params, tmp_path / "params.pth")
    with pytest.raises(ValueError, match="params: expected"):
        concept_table(tmp_path / "latents.pkl", small_sae, "a", "object", params=tmp_path / "params.pth")


def test_the_command_asks_for_what_the_file_does_not_say(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sae, hook_point: expected both with --what concepts"):
        Convert(what="concepts", source="a.pkl", out=tmp_path).run()
    given = {"sae": tmp_path, "hook_point": "a", "params": tmp_path, "strength": -1.0}
    with pytest.raises(ValueError, match="params, strength: expected at most one"):
        Convert(what="concepts", source="a.pkl", out=tmp_path, **given).run()


def test_weights_as_safetensors(tmp_path: Path) -> None:
    """As UnlearnCanvas' classifiers come; tied weights are written twice."""
    state = {"head.weight": torch.randn(3, 4), "head.bias": torch.randn(3)}
    state["tied"] = state["head.weight"]
    torch.save({"model_state_dict": state, "optimizer": {"lr": 1e-4}}, tmp_path / "style50.pth")
    Convert(what="weights", source=str(tmp_path / "style50.pth"), out=tmp_path / "style.safetensors").run()
    found = load_tensors(tmp_path / "style.safetensors")
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    torch.save([state], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="expected tensors by name, perhaps under model_state_dict or state_dict"):
        read_state_dict(tmp_path / "list.pth")


def test_a_pipeline_of_pickles(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    from pipelines import generate, tiny_sd

    pipe = tiny_sd()
    source, out = tmp_path / "style50", tmp_path / "pipeline"
    pipe.save_pretrained(source, safe_serialization=False)
    for part in ("text_encoder",):
        weights = (
            load_tensors(source / part / "model.safetensors")
            if (source / part / "model.safetensors").exists()
            else None
        )
        if weights is not None:
            torch.save(weights, source / part / "pytorch_model.bin")
            (source / part / "model.safetensors").unlink()
    assert not list(source.rglob("*.safetensors")) and len(list(source.rglob("*.bin"))) == 3
    written = convert_pipeline(source, out)
    assert len(written) == 3 and not list(out.rglob("*.bin"))
    loaded = StableDiffusionPipeline.from_pretrained(out, use_safetensors=True, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(generate(loaded, num_inference_steps=2), generate(pipe, num_inference_steps=2))
    with pytest.raises(ValueError, match="out: expected a folder outside"):
        convert_pipeline(source, source / "inside")
    with pytest.raises(FileNotFoundError, match=r"got no model_index\.json"):
        convert_pipeline(tmp_path, out)
