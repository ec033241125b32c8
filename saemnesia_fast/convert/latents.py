"""The concept statistics of SAeUron and SAEmnesia, from their pickles to a table (SPEC 2.1, 6.3, 6.4)."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..concepts import ConceptTable
from ..concepts.scores import latents_above_percentile
from ..sae import TopKSAE
from .unpickle import read_legacy


def concept_table(
    path: str | PathLike[str],
    sae: TopKSAE,
    hook_point: str,
    kind: str,
    *,
    params: str | PathLike[str] | None = None,
    strength: float | None = None,
    percentile: float = 99.999,
    guidance_scale: float = 9.0,
    timesteps: Tensor | None = None,
    model_id: str = "",
) -> ConceptTable:
    """The table of `cls_latents_dict_*.pkl` or `style_latents_dict_*.pkl`.

    These files hold {concept: [prompts, T, N]}, for each prompt and step the mean of the latents over the tokens; their
    mean over the prompts is mu. They name neither timesteps nor sampler: T steps of DDIM with the spacing of Stable
    Diffusion 1.5 ("leading", offset 1, 1000 training steps), noisiest first, are assumed unless `timesteps` are given.

    Args:
        path: the pickle; it takes about its own size in memory.
        sae: the SAE whose latents these are. The file does not say, so this is not checked beyond N.
        kind: "object" or "style", of all concepts in the file.
        params: `class_params.pth`, {concept: {"percentile", "multiplier"}}, to become the table's stored settings.
        strength: in place of `params`, one multiplier for all concepts, with `percentile`.
        guidance_scale: of the sampling, kept in the table.
        timesteps: [T], descending.
        model_id: kept in the table.

    Raises:
        ValueError: another content, or one that does not fit the SAE.
    """
    found = read_legacy(path, each=_mean_over_first)
    if not (isinstance(found, dict) and found and all(isinstance(name, str) for name in found)):
        raise ValueError(f"{path}: expected {{concept: latents [prompts, T, N]}}, got a {type(found).__name__}")
    rows = {name: _row(name, one, sae.num_latents) for name, one in found.items()}
    steps = {len(row) for row in rows.values()}
    if len(steps) != 1:
        raise ValueError(f"{path}: expected as many steps T for every concept, got {sorted(steps)}")
    (num_steps,) = steps
    sampler = {"scheduler": "DDIMScheduler", "num_inference_steps": num_steps, "guidance_scale": guidance_scale}
    table = ConceptTable(
        mu=torch.stack(list(rows.values())),
        timesteps=leading_timesteps(num_steps) if timesteps is None else timesteps,
        concepts=list(rows),
        kinds=[kind] * len(rows),
        hook_point=hook_point.removeprefix("unet."),
        sae_hash=sae.content_hash(),
        model_id=model_id,
        sampler={**sampler, "stream": "output", "source": Path(path).name},
    )
    if params is not None:
        table.settings = _settings(read_legacy(params), table)
    elif strength is not None:
        all_alike = {"percentile": percentile, "multiplier": strength}
        table.settings = _settings(dict.fromkeys(table.concepts, all_alike), table)
    return table


def leading_timesteps(num_steps: int, num_train_timesteps: int = 1000, offset: int = 1) -> Tensor:
    """[T] int64, descending: those of diffusers' DDIMScheduler with "leading" spacing."""
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(f"num_steps: expected 1 to {num_train_timesteps}, got {num_steps}")
    return torch.arange(num_steps).flip(0) * (num_train_timesteps // num_steps) + offset


def latents_above(percentile: float, num_latents: int) -> int:
    """How many of N different scores exceed the percentile: 99.999, 99.995, 99.99 of 20480 leave 1, 2, 3 (SPEC 2.3)."""
    different = torch.arange(num_latents)[None]
    return int(latents_above_percentile(different, different >= 0, percentile).sum())


def _mean_over_first(latents: Tensor) -> Tensor:
    """[prompts, T, N] -> [T, N] float32, summed in float64, one prompt at a time; anything else as it is."""
    if latents.ndim != 3 or not latents.is_floating_point() or not len(latents):
        return latents
    total = torch.zeros(latents.shape[1:], dtype=torch.float64)
    for one in latents:
        total += one
    return (total / len(latents)).float()


def _row(name: str, latents: Any, num_latents: int) -> Tensor:
    if isinstance(latents, Tensor):
        latents = _mean_over_first(latents)
    if not isinstance(latents, Tensor) or latents.ndim != 2 or latents.shape[1] != num_latents:
        got = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(f"{name}: expected [prompts, T, N = {num_latents}] to match the SAE, got {got}")
    return latents


def _settings(params: Any, table: ConceptTable) -> dict[str, dict[str, Any]]:
    """{concept: strength, number of latents and scale} of {concept: multiplier and percentile}."""
    if not isinstance(params, Mapping) or not all(isinstance(one, Mapping) for one in params.values()):
        raise ValueError("params: expected {concept: {'percentile': ..., 'multiplier': ...}}")
    settings = {}
    for name in table.concepts:
        one = params.get(name, {})
        if missing := {"percentile", "multiplier"} - set(one):
            raise ValueError(f"params: expected {' and '.join(sorted(missing))} of {name!r}, got {dict(one)}")
        number = latents_above(float(one["percentile"]), table.num_latents)
        settings[name] = {"strength": float(one["multiplier"]), "num_latents": number, "scale": "mean"}
    return settings
