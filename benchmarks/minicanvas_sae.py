"""minicanvas_sae: MiniCanvas' SAEs on the same tokens, trained by autograd as they once were, and by the Trainer."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from machine import describe

TOKENS_A_STEP = 2048
FORMER, PRESENT = "autograd, torch.optim.Adam", "Trainer"


def by_autograd(config: Any, data: Any) -> Any:
    """The recipe (SPEC 4.1) as a plain loop over `sae_loss`; `config` and `data` as `train_sae` takes them."""
    from saemnesia_fast.sae import TopKSAE
    from saemnesia_fast.training import sae_loss
    from saemnesia_fast.training.optim import geometric_median, learning_rate

    batches = iter(data)
    x = next(batches).float()
    sae = TopKSAE.init(x.shape[1], config.num_latents, config.k, seed=config.seed)
    with torch.no_grad():
        sae.b_dec.copy_(geometric_median(x))
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.lr, eps=config.adam_eps)
    since = torch.zeros(config.num_latents, dtype=torch.int64)
    W_dec = sae.W_dec
    for step in range(config.steps):
        if step:
            x = next(batches).float()
        out = sae_loss(sae, x, since >= config.dead_after, auxk_alpha=config.auxk_alpha)
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), config.clip_norm)
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) / W_dec.square().sum(1, keepdim=True) * W_dec
        optimizer.param_groups[0]["lr"] = learning_rate(step, config.steps, config.lr)
        optimizer.step()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)
        since = torch.where(out.fired, 0, since + len(x))
    batches.close()
    return sae.requires_grad_(False)


def compare(config: Any, data: Callable[[], Any], held_out: Tensor) -> dict[str, dict[str, float]]:
    """{way: seconds of training, and what `evaluate_sae` finds on held-out tokens [n, d]}; `data()` starts anew."""
    from saemnesia_fast.training import evaluate_sae, train_sae

    found = {}
    for name, train in ((FORMER, by_autograd), (PRESENT, train_sae)):
        source = data()
        before = time.perf_counter()
        sae = train(config, source)
        seconds = time.perf_counter() - before
        found[name] = {"seconds": round(seconds, 2)}
        found[name] |= {key: round(value, 5) for key, value in evaluate_sae(sae, held_out)._asdict().items()}
    return found


def main(out: Path, steps: int, images: int, work: Path | None, seeds: int) -> None:
    """Collects the tokens with the committed MiniCanvas, in `work` if they are to be kept, and writes the figures.

    Each of `seeds` has its own first weights and its own order of tokens, the same for both ways.
    """
    from saemnesia_fast.minicanvas.build import BuildConfig, Builder
    from saemnesia_fast.minicanvas.canvas import WEIGHTS
    from saemnesia_fast.minicanvas.settings import HOOK_POINTS
    from saemnesia_fast.training import ShardActivations, TrainConfig

    with tempfile.TemporaryDirectory() as folder:
        config = BuildConfig(
            work=work or Path(folder), start=WEIGHTS, sae_images_per_combination=images, progress=False
        )
        builder = Builder(config)
        builder.activations()
        points: dict[str, dict[str, list[dict[str, float]]]] = {}
        for seed, name in product(range(seeds), HOOK_POINTS):
            config = TrainConfig(
                num_latents=builder.config.num_latents,
                k=builder.config.k,
                steps=steps,
                lr=1e-3,
                dead_after=500_000,
                seed=seed,
                device="cpu",
                progress=False,
            )
            data = partial(ShardActivations, builder.work / "activations", name, TOKENS_A_STEP, seed=seed)
            for way, found in compare(config, data, builder.held_out(name)).items():
                points.setdefault(name, {}).setdefault(way, []).append(found)
                print(name, seed, way, json.dumps(found), flush=True)
    report = {**asdict(describe("cpu")), "steps": config.steps, "tokens_a_step": TOKENS_A_STEP, "points": points}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
