"""One resumable training loop for every network of MiniCanvas."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from ..files import load_tensors, read_metadata, save_tensors

SAVE_EVERY_SECONDS = 60.0


class Average:
    """Exponential moving average of a module's parameters, with the usual warm-up of the decay."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = module
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.module.named_parameters():
            self.shadow[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Writes the averaged weights into the module."""
        for name, parameter in self.module.named_parameters():
            parameter.copy_(self.shadow[name])


def fit(
    name: str,
    module: nn.Module,
    loss: Callable[[int, torch.Generator], Tensor],
    *,
    steps: int,
    optimizer: Optimizer,
    schedule: LRScheduler,
    folder: Path,
    seed: int,
    clip: float | None = None,
    average: Average | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains `module` for `steps` steps and returns {"steps", "training_seconds", "loss"}.

    `loss(step, generator)` computes one batch's loss; its generator is seeded by (seed, step) alone, so that a run that
    was interrupted goes on as if it had not been. The state is kept in `folder/<name>.state.safetensors`.
    """
    state_file = folder / f"{name}.state.safetensors"
    first, seconds = 0, 0.0
    if state_file.exists():
        first, seconds = _restore(state_file, module, optimizer, schedule, average)
    started = saved = time.monotonic()
    recent: list[Tensor] = []
    module.train()
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=name, disable=not progress, mininterval=1.0)
    for step in bar:
        value = loss(step, torch.Generator().manual_seed(seed * 1_000_003 + step))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        schedule.step()
        if average is not None:
            average.update(step)
        recent = [*recent[-99:], value.detach()]
        if step % 25 == 0:
            bar.set_postfix(loss=f"{torch.stack(recent).mean().item():.4f}")
        if time.monotonic() - saved > SAVE_EVERY_SECONDS:
            saved = time.monotonic()
            _save(state_file, step + 1, seconds + saved - started, module, optimizer, average)
    if average is not None:
        average.apply()
    module.eval()
    state_file.unlink(missing_ok=True)
    final = torch.stack(recent).mean().item() if recent else float("nan")
    return {"steps": steps, "training_seconds": round(seconds + time.monotonic() - started, 1), "loss": final}


def _save(
    path: Path, step: int, seconds: float, module: nn.Module, optimizer: Optimizer, average: Average | None
) -> None:
    tensors = {f"module.{key}": value for key, value in module.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
    if average is not None:
        tensors |= {f"average.{key}": value for key, value in average.shadow.items()}
    tensors = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    save_tensors(path, tensors, {"step": str(step), "seconds": str(seconds)})


def _restore(
    path: Path, module: nn.Module, optimizer: Optimizer, schedule: LRScheduler, average: Average | None
) -> tuple[int, float]:
    tensors: Mapping[str, Tensor] = load_tensors(path)
    metadata = read_metadata(path)
    step = int(metadata["step"])

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    module.load_state_dict(part("module."))
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in part("optimizer.").items():
        index, field = key.split(".", 1)
        moments.setdefault(int(index), {})[field] = value
    for _ in range(step):
        optimizer._opt_called = True  # type: ignore[attr-defined]
        schedule.step()
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    if average is not None:
        average.shadow = part("average.")
    return step, float(metadata["seconds"])
