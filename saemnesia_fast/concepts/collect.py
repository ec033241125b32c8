"""Concept statistics of a live pipeline (SPEC 2.1)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from tqdm.auto import tqdm

from saemnesia_fast.hookpoints import capture, streams_at

from .statistics import ConceptStatistics
from .table import ConceptTable

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from saemnesia_fast.sae import TopKSAE

_SET_HERE = ("prompt", "generator", "num_images_per_prompt", "return_dict")


@overload
def collect_concepts(
    pipe: DiffusionPipeline, sae: TopKSAE, prompts: Mapping[str, Sequence[str]], hook_point: str, **kwargs: Any
) -> ConceptTable: ...


@overload
def collect_concepts(
    pipe: DiffusionPipeline, sae: Mapping[str, TopKSAE], prompts: Mapping[str, Sequence[str]], **kwargs: Any
) -> dict[str, ConceptTable]: ...


def collect_concepts(
    pipe: DiffusionPipeline,
    sae: TopKSAE | Mapping[str, TopKSAE],
    prompts: Mapping[str, Sequence[str]],
    hook_point: str | None = None,
    *,
    kinds: Mapping[str, str] | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    seed: int = 0,
    batch_size: int = 8,
    stream: str | Mapping[str, str] = "output",
    model_id: str | None = None,
    progress: bool = True,
    **pipe_kwargs: Any,
) -> ConceptTable | dict[str, ConceptTable]:
    """Sample the prompts of every concept and average the latents of the conditional half (SPEC 2.1).

    A prompt's noise follows from `seed`, its text and, where a concept repeats it, the number of the repetition: the
    result depends on neither batch size nor the other concepts, beyond the order of sums. A prompt of several concepts
    (an object and a style) is sampled once. No picture is decoded unless `output_type` asks for it.

    Args:
        pipe: a text-to-image pipeline with a UNet.
        sae: the SAE of `hook_point`, or {hook point: SAE} to collect several in a single pass.
        prompts: concept -> its prompts, at least one each.
        hook_point: name of a UNet module; None if `sae` is a mapping.
        kinds: concept -> "object", "style" or any other word; "object" where not given.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance.
        seed: of all noise.
        batch_size: prompts sampled together.
        stream: "output" of the module, or "residual" = output - input (SPEC 3.6); {hook point: stream} where they
            differ.
        model_id: name of the model in the table; by default the one that the pipeline was loaded from.
        progress: show a progress bar.
        pipe_kwargs: anything else for the pipeline, for instance height, width or eta.

    Returns:
        A table without assignment, or {hook point: table} if `sae` is a mapping.

    Raises:
        ValueError: no prompt, an unknown hook point or kind, a number of rows that is neither once nor twice the batch.
        TypeError: `hook_point` does not go with `sae`, or `pipe_kwargs` has an argument that is set here.
    """
    saes = _saes_by_hook_point(sae, hook_point)
    streams = streams_at(saes, stream)
    reserved = sorted(set(pipe_kwargs) & set(_SET_HERE))
    if reserved:
        raise TypeError(f"pipe_kwargs: {reserved} are set by collect_concepts")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected >= 1, got {batch_size}")
    concepts = list(prompts)
    kinds = _checked_kinds(kinds or {}, concepts)
    samples = _distinct_samples(prompts)
    statistics = {name: ConceptStatistics(len(concepts), s.num_latents) for name, s in saes.items()}
    members: list[list[int]] = []

    def add(name: str, activation: Tensor, timestep: Tensor) -> None:
        one, rows = saes[name], len(activation)
        if rows not in (len(members), 2 * len(members)):
            raise ValueError(f"activation of {name}: expected B or 2B rows for B = {len(members)}, got {rows}")
        conditional = activation[rows - len(members) :]
        tokens = conditional.permute(0, 2, 3, 1).flatten(1, 2).to(one.W_enc.device)
        # Half-precision pipelines: select and average in float32 (SPEC 1.6).
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        statistics[name].update(one.encode(tokens), int(timestep), members)

    pipe_kwargs.setdefault("output_type", "latent")
    with torch.no_grad(), capture(pipe, list(saes), add, stream=streams), _inner_bars_off(pipe):
        for batch in _batches(list(samples), batch_size, progress):
            members[:] = [samples[sample] for sample in batch]
            pipe(
                prompt=[text for text, _ in batch],
                generator=[_generator(seed, text, repetition) for text, repetition in batch],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                **pipe_kwargs,
            )

    sampler = {
        "scheduler": type(pipe.scheduler).__name__,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
    }
    tables = {}
    for name in saes:
        mu, timesteps = statistics.pop(name).finish()
        tables[name] = ConceptTable(
            mu=mu,
            timesteps=timesteps,
            concepts=concepts,
            kinds=[kinds[concept] for concept in concepts],
            hook_point=name,
            sae_hash=saes[name].content_hash(),
            model_id=_model_id(pipe) if model_id is None else model_id,
            sampler=sampler | {"stream": streams[name]},
        )
    return tables if hook_point is None else tables[hook_point]


def _saes_by_hook_point(sae: TopKSAE | Mapping[str, TopKSAE], hook_point: str | None) -> dict[str, TopKSAE]:
    if isinstance(sae, Mapping):
        if hook_point is not None:
            raise TypeError(f"hook_point: expected None with a mapping of SAEs, got {hook_point!r}")
        if not sae:
            raise ValueError("sae: expected at least one hook point, got an empty mapping")
        return dict(sae)
    if hook_point is None:
        raise TypeError("hook_point: expected a name with a single SAE, got None")
    return {hook_point: sae}


def _checked_kinds(kinds: Mapping[str, str], concepts: Sequence[str]) -> dict[str, str]:
    unknown = sorted(set(kinds) - set(concepts))
    if unknown:
        raise ValueError(f"kinds: {unknown} are not concepts of prompts, which has {list(concepts)}")
    return {concept: kinds.get(concept, "object") for concept in concepts}


def _distinct_samples(prompts: Mapping[str, Sequence[str]]) -> dict[tuple[str, int], list[int]]:
    """(prompt, repetition) -> rows of the concepts that it belongs to."""
    if not prompts:
        raise ValueError("prompts: expected at least one concept, got none")
    samples: dict[tuple[str, int], list[int]] = {}
    for row, (concept, texts) in enumerate(prompts.items()):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"prompts: expected a list of one or more prompts for {concept!r}, got {texts!r}")
        seen: dict[str, int] = {}
        for text in texts:
            repetition = seen.get(text, 0)
            seen[text] = repetition + 1
            samples.setdefault((text, repetition), []).append(row)
    return samples


def _generator(seed: int, text: str, repetition: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{repetition}/{text}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "little"))


def _batches(samples: list[tuple[str, int]], batch_size: int, progress: bool) -> Iterator[list[tuple[str, int]]]:
    with tqdm(total=len(samples), desc="concept statistics", unit="prompt", disable=not progress) as bar:
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            yield batch
            bar.update(len(batch))


@contextmanager
def _inner_bars_off(pipe: DiffusionPipeline) -> Iterator[None]:
    """One bar for the whole collection: the pipeline's own, one per batch, is off meanwhile."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe.set_progress_bar_config(**before)


def _model_id(pipe: DiffusionPipeline) -> str:
    """The Hub id, or of a local folder its name only: a table may be published."""
    name = str(pipe.name_or_path or "")
    return Path(name).name if Path(name).is_dir() else name
