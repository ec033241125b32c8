"""One attack on one erased concept, and the table of many."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor

from ..intervals import mean_and_half_width
from ..methods import Benchmark, Method
from .target import Target

SHARES = ("plain", "before", "after")


class Attack(Protocol):
    """Something that looks for prompts which bring a concept back. Its fields say what it does."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def tokens(self) -> int:
        """Free tokens before each prompt."""
        ...

    def __call__(self, target: Target) -> None:
        """Have `target` paint, which notes what was found."""
        ...


def attack_concept(
    benchmark: Benchmark, method: Method, concept: str, attack: Attack, seed: int, prompts: int | None = None
) -> dict[str, Any]:
    """Attack the erasure of one concept, on its requests of one seed, or the first so many of them: a JSON object.

    "before" and "after" are UA in percent without and with the attack. After it, a prompt counts as unlearned only if
    the concept is recognised in none of the pictures that were tried, the bare prompt's included; "plain" is UA where
    nothing is erased. The pipeline is as before when it returns or raises.

    Raises:
        ValueError: an unknown concept, or a prompt that leaves no room for the attack's tokens.
    """
    kinds = {name: kind for kind, names in benchmark.classes.items() for name in names}
    if concept not in kinds:
        raise ValueError(f"concept: expected one of {', '.join(kinds)}, got {concept!r}")
    kind = kinds[concept]
    index = list(benchmark.classes[kind]).index(concept)
    wanted = [one for one in benchmark.requests(seed) if getattr(one, kind) == index][:prompts]
    started = time.perf_counter()
    images = benchmark.paint(wanted)
    seen = benchmark.judged(images).probabilities[kind].argmax(1)
    latents, timesteps = encoded(benchmark.pipe, images), benchmark.pipe.scheduler.timesteps.clone()
    with method.erased(benchmark.pipe, [concept]) as arguments:
        target = Target(benchmark, wanted, kind, arguments, latents, timesteps, attack.tokens)
        attack(target)
    findings = target.findings
    return {
        "method": method.name,
        "attack": attack.name,
        "concept": concept,
        "kind": kind,
        "seed": seed,
        "plain": _percent([int(one) != index for one in seen]),
        "before": _percent([not one.found_before for one in findings]),
        "after": _percent([not one.found for one in findings]),
        "pictures": sum(one.pictures for one in findings),
        "gradients": sum(one.gradients for one in findings),
        "seconds": round(time.perf_counter() - started, 3),
        "prompts": target.records(),
    }


@torch.no_grad()
def encoded(pipe: Any, images: Tensor) -> Tensor:
    """Latents [n, C, h, w] float32 of images [n, 3, H, W] in [0, 1], as the UNet denoises them."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents

    vae = pipe.vae
    given = (2 * images - 1).to(vae.device, vae.dtype)
    latents = torch.cat([retrieve_latents(vae.encode(one), sample_mode="argmax") for one in given.split(1)])
    return (latents - (getattr(vae.config, "shift_factor", None) or 0)).float() * vae.config.scaling_factor


def summarize(units: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{method: {kind: {"plain", "before", "after"}, "concepts": {concept: the same as means}}} of UA in percent.

    Of a kind: mean over its concepts, with the interval over seeds (`intervals`).
    """
    methods: dict[str, Any] = {}
    for method in dict.fromkeys(unit["method"] for unit in units):
        mine = [unit for unit in units if unit["method"] == method]
        groups = {}
        for kind in dict.fromkeys(unit["kind"] for unit in mine):
            of_kind = [unit for unit in mine if unit["kind"] == kind]
            seeds = dict.fromkeys(unit["seed"] for unit in of_kind)
            by_seed = [[unit for unit in of_kind if unit["seed"] == seed] for seed in seeds]
            groups[kind] = {
                share: mean_and_half_width([fmean(unit[share] for unit in some) for some in by_seed])
                for share in SHARES
            }
        concepts = {
            concept: {
                share: round(fmean(unit[share] for unit in mine if unit["concept"] == concept), 2) for share in SHARES
            }
            for concept in dict.fromkeys(unit["concept"] for unit in mine)
        }
        methods[method] = groups | {"concepts": concepts}
    return methods


def _percent(hits: Sequence[bool]) -> float:
    return round(100 * fmean(hits), 2)
