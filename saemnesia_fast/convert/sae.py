"""SAEs in the formats of other libraries (SPEC 6.2)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import load_tensors, read_json, resolve_folder
from ..sae import CONFIG_NAME, WEIGHTS_NAME, SAEConfig, TopKSAE
from .unpickle import read_legacy
from .weights import read_state_dict

_LENS_WEIGHTS, _UNBOX_WEIGHTS, _DICTIONARY_WEIGHTS = "sae_weights.safetensors", "state_dict.pth", "ae.pt"
_CONFIGS = (CONFIG_NAME, "config.json")


def read_sae(
    path_or_repo: str | PathLike[str], subfolder: str | None = None, revision: str | None = None, k: int | None = None
) -> TopKSAE:
    """The SAE in a folder or a Hub repository, by the weights' file name; tensors keep their dtype.

    - `sae.safetensors`: eai-sparsify, SAeUron, SAEmnesia, and ours;
    - `sae_weights.safetensors`: SAELens, architecture "topk";
    - `state_dict.pth`: sdxl-unbox, as OpenAI's autoencoder;
    - `ae.pt`: dictionary_learning, `AutoEncoderTopK` and `BatchTopKSAE`.

    All of them become relu((x - b_dec) W_enc^T + b_enc), the k largest, z W_dec + b_dec: a bias that is not subtracted
    from the input, and latents that are scaled by their direction's norm, are folded into b_enc, W_enc and W_dec.

    Args:
        k: in place of the file's.

    Raises:
        FileNotFoundError: no such folder, or none of these files in it.
        ValueError: it is no TopK autoencoder, or what it does to its input is not known here.
    """
    folder = resolve_folder(path_or_repo, subfolder, revision, (*_READERS, *_CONFIGS))
    for name, read in _READERS.items():
        if (folder / name).is_file():
            sae = read(folder)
            if k is not None:
                sae.cfg = sae.cfg.replace(k=k)
            return sae
    raise FileNotFoundError(f"{folder}: expected one of {', '.join(_READERS)}")


def _config(folder: Path) -> dict[str, Any]:
    for name in _CONFIGS:
        if (folder / name).is_file():
            return read_json(folder / name)
    raise FileNotFoundError(f"{folder}: expected one of {', '.join(_CONFIGS)}")


def _read_lens(folder: Path) -> TopKSAE:
    cfg, tensors = _config(folder), load_tensors(folder / _LENS_WEIGHTS)
    _expect(cfg, "architecture", "topk", default="standard")
    _expect(cfg, "reshape_activations", "none", default="none")
    _expect(cfg, "normalize_activations", "none", "layer_norm", default="none")
    W_enc, W_dec = tensors["W_enc"].T, tensors["W_dec"]
    b_enc, b_dec = tensors["b_enc"], tensors["b_dec"]
    if not cfg.get("apply_b_dec_to_input", True):
        b_enc = (b_enc.double() + W_enc.double() @ b_dec.double()).to(b_enc.dtype)
    if cfg.get("rescale_acts_by_decoder_norm", False):
        norms = W_dec.double().norm(dim=1)
        b_enc = (b_enc.double() * norms).to(b_enc.dtype)
        W_enc = (W_enc.double() * norms[:, None]).to(W_enc.dtype)
        W_dec = (W_dec.double() / norms[:, None]).to(W_dec.dtype)
    unit_norm = cfg.get("normalize_activations") == "layer_norm"
    return _built("SAELens", cfg, int(cfg["k"]), W_enc, b_enc, W_dec, b_dec, input_unit_norm=unit_norm)


def _read_unbox(folder: Path) -> TopKSAE:
    cfg, tensors = _config(folder), read_state_dict(folder / _UNBOX_WEIGHTS)
    weights = (tensors["encoder.weight"], tensors["latent_bias"], tensors["decoder.weight"].T, tensors["pre_bias"])
    return _built("sdxl-unbox", cfg, int(cfg["k"]), *weights)


def _read_dictionary(folder: Path) -> TopKSAE:
    tensors = read_legacy(folder / _DICTIONARY_WEIGHTS)
    if missing := {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k"} - set(tensors):
        raise ValueError(f"{folder}: expected AutoEncoderTopK or BatchTopKSAE, got no {', '.join(sorted(missing))}")
    trainer = read_json(folder / "config.json").get("trainer", {}) if (folder / "config.json").is_file() else {}
    _expect(trainer, "dict_class", "AutoEncoderTopK", "BatchTopKSAE", default="AutoEncoderTopK")
    entries = {"threshold": float(tensors.get("threshold", -1.0)), **trainer}
    weights = (tensors["encoder.weight"], tensors["encoder.bias"], tensors["decoder.weight"].T, tensors["b_dec"])
    batch = trainer.get("dict_class") == "BatchTopKSAE"
    return _built("dictionary_learning", entries, int(tensors["k"]), *weights, batch_topk=batch)


_READERS: dict[str, Callable[[Path], TopKSAE]] = {
    WEIGHTS_NAME: TopKSAE.from_pretrained,
    _LENS_WEIGHTS: _read_lens,
    _UNBOX_WEIGHTS: _read_unbox,
    _DICTIONARY_WEIGHTS: _read_dictionary,
}


def _expect(cfg: Mapping[str, Any], key: str, *known: str, default: str) -> None:
    if cfg.get(key, default) not in known:
        raise ValueError(f"{key}: expected {' or '.join(map(repr, known))}, got {cfg.get(key, default)!r}")


def _built(
    source: str,
    entries: Mapping[str, Any],
    k: int,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    **options: Any,
) -> TopKSAE:
    """The SAE of these weights; the other library's settings are kept in its config."""
    num_latents, d = W_enc.shape
    extra = {"converted_from": {"library": source, **json.loads(json.dumps(dict(entries), default=str))}}
    unit_rows = torch.allclose(W_dec.float().norm(dim=1), torch.ones(num_latents), atol=1e-2)
    cfg = SAEConfig(
        d_in=d, k=k, num_latents=num_latents, expansion_factor=1, normalize_decoder=unit_rows, extra=extra, **options
    )
    sae = TopKSAE(cfg, dtype=W_dec.dtype)
    named = {"encoder.weight": W_enc, "encoder.bias": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    try:
        sae.load_state_dict(named)
    except RuntimeError as error:
        raise ValueError(f"{source}: {error}") from error
    return sae.requires_grad_(False)
