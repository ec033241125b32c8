"""`apply_erasure`: from names of concepts to hooks on a live pipeline."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from saemnesia_fast.hookpoints import STREAMS, find_hook_point, get_time_proj, get_unet, normalize_hook_point
from saemnesia_fast.ops.validation import MODES as EDITS
from saemnesia_fast.ops.validation import check_precision

from .clock import Clock
from .contrast import Contrast
from .guard import guard_pipeline, guard_unet, tells_guidance
from .handle import Erasure
from .point import ErasurePoint
from .report import Recorder
from .selecting import Concepts, NumLatents, Selector, Strength, per_prompt
from .tables import SteeringTables

if TYPE_CHECKING:
    from saemnesia_fast.concepts import ConceptTable
    from saemnesia_fast.sae import TopKSAE

HALVES = ("both", "cond")
MODES = (*EDITS, "replace", "contrast")
NUM_TRAIN_TIMESTEPS = 1000

logger = logging.getLogger("saemnesia_fast")


@torch.inference_mode(False)
def apply_erasure(
    pipe: Any,
    sae: TopKSAE | Mapping[str, TopKSAE],
    table: ConceptTable | Mapping[str, ConceptTable],
    concepts: Concepts,
    strength: Strength = -5.0,
    mode: str = "exact",
    halves: str = "both",
    start: float = 0.0,
    stop: float = 1.0,
    *,
    num_latents: NumLatents = None,
    percentile: float | None = None,
    scale: str = "mean",
    reselect: bool = False,
    anchor: str | None = None,
    stream: str | None = None,
    record: bool = False,
    max_latents: int | None = None,
    cfg: bool | None = None,
    precision: str = "default",
) -> Erasure:
    """Erase concepts from all images of a pipeline, or outputs of a UNet, until the handle is removed (SPEC 3).

    Takes effect before or after torch.compile. Every call of the pipeline is checked to have been erased, and raises
    RuntimeError otherwise; a bare UNet is checked at its first call and at the first of each device, dtype and shape,
    unless the object handed in gets compiled later: then call `Erasure.verify`. An earlier erasure at the same hook
    point is replaced; one at another hook point stays. The backend is the one that `use_backend` names now; compiled
    graphs ask for it again in every call.

    Args:
        pipe: a diffusers pipeline with a UNet, or the UNet, compiled or not.
        sae: the SAE of the table's hook point, or {hook point: SAE}.
        table: the concept table, or {hook point: table}.
        concepts: a name, names, or a list of names for each prompt of the batch, which may be empty. A prompt's images
            (`num_images_per_prompt`) share its list.
        strength: gamma, or {concept: gamma}; negative erases (SPEC 3.1).
        mode: "exact", "released" or "reconstruct" (SPEC 3.2), or "replace" (SPEC 3.8): tokens that "exact" would
            steer are overwritten by their nearest other token in the image, whatever the strength and scale. Or
            "contrast", our own: they are moved along what the prompt adds, the conditional token less its partner in
            the unconditional half (or that of the negative prompt), by the strength, whatever the scale: -1 takes it
            away, -1.5 is a good beginning. It needs guidance, and steers the conditional half.
        halves: steer "both" halves of a guided batch or only the conditional one, "cond".
        start, stop: fractions of the denoising between which to steer, by the true timestep, both ends included.
        num_latents, percentile, scale, reselect: choice of latents and factors, see `ConceptTable.select`.
        anchor: with mode="contrast", a concept of the table that comes into the place of what is removed, by what its
            mean reconstruction is more than that of its kind; none of the erased ones.
        stream: the SAE reads the block's "output", or "residual" = output - input (SPEC 3.6); as in the table if not
            given, "output" where that does not say.
        record: gather what `Erasure.report` gives; slower, and a break in compiled graphs.
        max_latents: room for so many latents a step in later `Erasure.set` calls; by default what `concepts` need,
            rounded up to a power of two, at least 8.
        cfg: whether batches hold an unconditional and a conditional half. Pipelines say so themselves; a bare UNet
            needs it with halves="cond" or a list for each prompt.
        precision: "default" or "exact", see `saemnesia_fast.ops`.

    Raises:
        ValueError: an unknown concept or hook point, a table of another SAE, a width d that differs, an option out of
            range.
        TypeError: `pipe` has no UNet, or `concepts` mixes names and lists.
    """
    check_precision(precision)
    for name, value, known in (("mode", mode, MODES), ("halves", halves, HALVES), ("stream", stream, (*STREAMS, None))):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(filter(None, known))}, got {value!r}")
    if not 0 <= start < stop <= 1:
        raise ValueError(f"start, stop: expected 0 <= start < stop <= 1, got {start} and {stop}")
    if max_latents is not None and max_latents < 1:
        raise ValueError(f"max_latents: expected >= 1, got {max_latents}")

    unet = get_unet(pipe)
    is_pipeline = not isinstance(pipe, nn.Module)
    saes, tables = _by_hook_point(sae, table)
    blocks = {name: find_hook_point(unet, name) for name in saes}
    for name, block in blocks.items():
        _check_fit(name, block, saes[name], tables[name])
    streams = {name: _stream(one, stream) for name, one in tables.items()}
    lists = per_prompt(concepts)
    contrast = mode == "contrast"
    conditional_only = contrast or halves == "cond"
    if cfg is None and (conditional_only or len(lists) > 1) and not (is_pipeline and tells_guidance(pipe)):
        raise ValueError(
            f"cfg: expected True or False with halves='cond', mode='contrast' or a list of concepts for each prompt, "
            f"since {type(pipe).__name__} does not say whether its batch holds two guidance halves"
        )
    if contrast and cfg is False:
        raise ValueError("cfg: expected guidance with mode='contrast', got False")
    if anchor is not None and not contrast:
        raise ValueError(f"anchor: expected none with mode={mode!r}, got {anchor!r}")
    scale = "constant" if contrast else scale

    selector = Selector(
        tables=tables,
        decoder_norms={n: s.W_dec.detach().float().norm(dim=1) for n, s in saes.items()} if scale == "norm" else {},
        num_latents=num_latents,
        percentile=percentile,
        scale=scale,
        reselect=reselect,
        anchor=anchor,
        settings={
            "mode": mode,
            **({"anchor": anchor} if contrast else {}),
            "halves": "cond" if conditional_only else halves,
            "start": start,
            "stop": stop,
            "stream": ", ".join(dict.fromkeys(streams.values())),
            "precision": precision,
        },
    )
    clock = Clock()
    window = _window(pipe, start, stop)
    points = {}
    for name in saes:
        steering = SteeringTables(tables[name].timesteps, selector(name, concepts, strength), max_latents)
        points[name] = ErasurePoint(
            name,
            saes[name],
            steering,
            clock,
            mode=mode,
            contrast=_contrast(saes[name], tables[name], anchor) if contrast else None,
            residual=streams[name] == "residual",
            conditional_only=conditional_only,
            norm_scaled=scale == "norm",
            precision=precision,
            window=window,
            recorder=Recorder() if record else None,
        )
    device = next(unet.parameters()).device
    if device.type != "meta":  # offloaded weights: the hooks follow the activations
        clock.follow(device)
        for point in points.values():
            point.follow(device)
    erasure = Erasure(unet, points, clock, selector, concepts, strength, cfg)
    guard = guard_pipeline if is_pipeline else guard_unet
    erasure.attach(get_time_proj(unet), blocks, partial(guard, pipe))
    logger.debug("erasure applied:\n%s", erasure.explain())
    return erasure


def _by_hook_point(
    sae: TopKSAE | Mapping[str, TopKSAE], table: ConceptTable | Mapping[str, ConceptTable]
) -> tuple[dict[str, TopKSAE], dict[str, ConceptTable]]:
    """Both as {name inside the UNet: ...}, with the same names in the same order."""
    if isinstance(table, Mapping):
        tables = {normalize_hook_point(name): one for name, one in table.items()}
    else:
        tables = {normalize_hook_point(table.hook_point): table}
    if isinstance(sae, Mapping):
        saes = {normalize_hook_point(name): one for name, one in sae.items()}
    else:
        saes = dict.fromkeys(tables, sae)
    if not saes or set(saes) != set(tables):
        raise ValueError(f"sae, table: expected the same hook points, got {sorted(saes)} and {sorted(tables)}")
    return saes, {name: tables[name] for name in saes}


def _check_fit(name: str, block: nn.Module, sae: TopKSAE, table: ConceptTable) -> None:
    config: Any = block.config
    channels = config.in_channels
    if sae.d != channels:
        raise ValueError(f"sae: expected d = {channels} to match the channels of {name}, got d = {sae.d}")
    if normalize_hook_point(table.hook_point) != name:
        raise ValueError(f"table: expected one made at {name}, got one made at {table.hook_point}")
    table.check_sae(sae)


def _stream(table: ConceptTable, given: str | None) -> str:
    known = table.sampler.get("stream")
    if known not in (*STREAMS, None):
        raise ValueError(f"table: expected one of {', '.join(STREAMS)} as its stream, got {known!r}")
    if known and given and known != given:
        raise ValueError(f"stream: expected {known!r} as in the table of {table.hook_point}, got {given!r}")
    return known or given or "output"


def _contrast(sae: TopKSAE, table: ConceptTable, anchor: str | None) -> Contrast:
    return Contrast(table.timesteps, None if anchor is None else table.departure(anchor, sae.W_dec))


def _window(pipe: Any, start: float, stop: float) -> tuple[float, float]:
    """First and last timestep inside: a fraction f of the denoising is at timestep (1 - f) * num_train_timesteps.

    Rounded, as 1 - 0.7 is a little more than 0.3.
    """
    scheduler = getattr(pipe, "scheduler", None)
    steps = getattr(getattr(scheduler, "config", None), "num_train_timesteps", NUM_TRAIN_TIMESTEPS)
    first, last = (round((1 - fraction) * steps, 3) for fraction in (start, stop))
    return (math.inf if start == 0 else first, -math.inf if stop == 1 else last)
