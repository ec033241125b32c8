"""supervised_step: what supervision adds to a training step of the same tokens (SPEC 4.2), paired."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import ceil, floor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import activations
from harness import Case, percentile
from machine import describe

LR = 1e-9
"""Weights that stay keep the same work to do."""
WARM_UP = 2


@dataclass(frozen=True)
class Size:
    """Of the UnlearnCanvas recipe, but for the tokens of an image, of which SD 1.5 has 256."""

    images: int = 128
    tokens: int = 16
    d: int = 1280
    num_latents: int = 20480
    objects: int = 20
    styles: int = 50
    k: int = 32


SMALL = Size(images=6, tokens=4, d=32, num_latents=256, objects=3, styles=2, k=4)
WAYS: dict[str, dict[str, Any] | None] = {
    "unsupervised": None,
    "supervised": {},
    "negatives": {"negatives": True},
    "dense L1": {"l1": "dense"},
}


def steps(size: Size, device: str) -> dict[str, Callable[[], None]]:
    """A step of each way of one trainer, on always the same images; waits for the device."""
    from saemnesia_fast.sae import SAEConfig, TopKSAE
    from saemnesia_fast.training import LabelledImages, SupervisedLoss, Supervision, TrainConfig, Trainer

    case = Case("supervised_step", M=size.images * size.tokens, d=size.d, N=size.num_latents, k=size.k)
    own, x = activations.weights(size.d, size.num_latents, torch.float32, device), activations.tokens(case, device)
    sae = TopKSAE(SAEConfig(d_in=size.d, num_latents=size.num_latents, k=size.k), device=device)
    with torch.no_grad():
        for weight, tensor in zip((sae.W_enc, sae.b_enc, sae.b_dec, sae.W_dec), own, strict=True):
            weight.copy_(tensor)
    kinds = {f"object {n}": "object" for n in range(size.objects)} | {f"style {n}": "style" for n in range(size.styles)}
    assignment = {name: 7 * n for n, name in enumerate(kinds)}
    config = TrainConfig(k=size.k, steps=10**6, lr=LR, adam_eps=1e-8, device=device, progress=False)
    trainer = Trainer(config, (), sae)
    images = LabelledImages(x.view(size.images, size.tokens, size.d), _labels(size, device))

    def way(options: dict[str, Any] | None) -> Callable[[], None]:
        loss = SupervisedLoss(**(options or {}))
        supervision = Supervision(assignment, kinds, loss, size.num_latents, device)

        def step() -> None:
            trainer.supervision = supervision
            trainer.train_step(x if options is None else images)
            if device == "cuda":
                torch.cuda.synchronize()

        return step

    return {name: way(options) for name, options in WAYS.items()}


def _labels(size: Size, device: str) -> Tensor:
    """[B, C] bool: an object and a style each."""
    labels = torch.zeros(size.images, size.objects + size.styles, dtype=torch.bool)
    image = torch.arange(size.images)
    labels[image, image % size.objects] = True
    labels[image, size.objects + image % size.styles] = True
    return labels.to(device)


def measure(size: Size, device: str, rounds: int, ways: list[str]) -> dict[str, dict[str, float]]:
    """For each way its ms a step, and its extra cost in percent: the median over rounds in which all take turns."""
    step = steps(size, device)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(WARM_UP + rounds):
        for name in [*ways[turn % len(ways) :], *ways[: turn % len(ways)]]:
            before = time.perf_counter()
            step[name]()
            if turn >= WARM_UP:
                taken[name].append(1e3 * (time.perf_counter() - before))
    found = {}
    for name, samples in taken.items():
        ratios = [100 * (one / plain - 1) for one, plain in zip(samples, taken[ways[0]], strict=True)]
        found[name] = {f"p{percent}_ms": round(percentile(samples, percent), 3) for percent in (20, 50, 80)}
        found[name]["extra_percent"] = round(median(ratios), 2)
        found[name]["extra_interval"] = [round(percent, 2) for percent in of_median(ratios)]
    return found


def of_median(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the median of what `values` are a sample of, by ranks: a fair coin's heads are normal."""
    ordered, reach = sorted(values), 0.98 * len(values) ** 0.5
    low, high = floor(len(ordered) / 2 - reach), ceil(len(ordered) / 2 + reach)
    return ordered[max(low, 0)], ordered[min(high, len(ordered) - 1)]


def main(out: Path, device: str, rounds: int, images: int, tokens: int, small: bool, dense: bool) -> None:
    """Prints the figures and writes them."""
    size = SMALL if small else Size(images=images, tokens=tokens)
    ways = [name for name in WAYS if dense or name != "dense L1"]
    found = measure(size, device, rounds, ways)
    for name, figures in found.items():
        print(f"{name:<14}{figures['p50_ms']:>10.2f} ms  {figures['extra_percent']:>+7.2f} %", flush=True)
    report = {**asdict(describe(device)), "size": asdict(size), "rounds": rounds, "ways": found}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
