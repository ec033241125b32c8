"""Training one SAE without supervision (SPEC 4.1)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from saemnesia_fast.files import remove_leftovers, write_json
from saemnesia_fast.sae import SAEConfig, TopKSAE
from saemnesia_fast.training.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_newest_checkpoint,
    save_checkpoint,
)
from saemnesia_fast.training.config import TrainConfig
from saemnesia_fast.training.loss import LossOutput, sae_loss, total_variance
from saemnesia_fast.training.metrics import MetricsLog, open_logs
from saemnesia_fast.training.optim import geometric_median, learning_rate, normalize_rows, remove_parallel_gradient

logger = logging.getLogger("saemnesia_fast")
CHECKPOINTS = "checkpoints"


class TokenBatches(Protocol):
    """What a trainer reads: batches of tokens [M, d], floating point, on any device."""

    def __iter__(self) -> Iterator[Tensor]: ...

    def state_dict(self) -> dict[str, Any]:
        """The position of the next batch, as plain JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iter() start at that position."""


class BadBatch(ValueError):
    """Tokens that cannot be trained on; nothing has changed."""


class StepMetrics(NamedTuple):
    """0-d tensors of one step; reading one waits for the device."""

    loss: Tensor
    fvu: Tensor
    auxk: Tensor
    dead: Tensor
    l0: Tensor


class Trainer:
    """Trains an SAE on batches from `data`.

    Each step: loss and backward for every micro-batch, clip the gradient's norm, remove from the decoder's gradient
    what is parallel to its rows, Adam, unit-norm rows. A new SAE is made from the first batch, whose geometric median
    becomes b_dec; a given one is trained in place, with its own N and k, unless a checkpoint is resumed. Weights are
    float32, or float64 where a given SAE is.
    """

    def __init__(self, config: TrainConfig, data: TokenBatches, sae: TopKSAE | None = None) -> None:
        self.config = config
        self.data = data
        self.device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.step = 0
        self.tokens = 0
        self.skipped = 0
        self.seconds = 0.0
        steps = config.steps or _steps_of_one_pass(data)
        if config.warmup_steps >= steps:
            raise ValueError(f"warmup_steps: expected fewer than steps={steps}, got {config.warmup_steps}")
        self.steps = steps
        self.folder = None if config.out_dir is None else config.out_dir / config.hook_point
        self.sae: TopKSAE | None = None
        self._optimizer: torch.optim.Optimizer
        self._tokens_since_fired: Tensor
        self._saved_step = -1
        self._fvu_sum: Tensor
        self._fvu_steps: int
        self._start_fvu_window()
        if self.folder is not None and self._found(self.folder):
            self._restore(self.folder / CHECKPOINTS)
        elif sae is not None:
            self._adopt(sae)

    def fit(self) -> TopKSAE:
        """Train to the last step, save where out_dir is given, and return the SAE."""
        logs = self._open_logs()
        started = time.monotonic() - self.seconds
        batches = iter(self.data)
        with ExitStack() as stack:
            for resource in (*logs, batches):
                stack.callback(getattr(resource, "close", lambda: None))
            bar = stack.enter_context(
                tqdm(total=self.steps, initial=self.step, unit="step", disable=not self.config.progress)
            )
            while self.step < self.steps:
                metrics = self._train_or_skip(self._next(batches))
                self.seconds = time.monotonic() - started
                bar.update()
                if self.step % self.config.log_every == 0 or self.step == self.steps:
                    numbers = self._numbers(metrics)
                    bar.set_postfix({name: numbers[name] for name in ("fvu", "dead", "skipped") if name in numbers})
                    for log in logs:
                        log.write(numbers)
                every = self.config.checkpoint_every
                if every and self.step % every == 0 and self.step < self.steps:
                    self.save_checkpoint()
        return self._finish()

    def train_step(self, batch: Tensor) -> StepMetrics:
        """One optimizer step on tokens [M, d]; ValueError, before anything changes, where they cannot be used."""
        config = self.config
        x = self._prepare(batch)
        variance = total_variance(x)
        if not 0 < variance < torch.inf:
            raise BadBatch(f"data: batch {self.step} has a total variance of {variance.item():.4g}")
        sae = self.sae or self._create(x)
        dead = self._tokens_since_fired >= config.dead_after
        self._optimizer.zero_grad()
        parts = []
        for tokens in x.chunk(config.micro_batches):
            part = sae_loss(
                sae,
                tokens,
                dead if config.auxk_alpha else None,
                variance=variance,
                auxk_alpha=config.auxk_alpha,
                multi_topk=config.multi_topk,
                batch_topk=config.batch_topk,
            )
            part.loss.backward()
            parts.append(part)
        norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), config.clip_norm)
        if not norm.isfinite():
            raise BadBatch(f"data: batch {self.step} has a gradient that is not finite")
        if sae.cfg.normalize_decoder and sae.W_dec.grad is not None:
            remove_parallel_gradient(sae.W_dec, sae.W_dec.grad)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self._optimizer.step()
        if sae.cfg.normalize_decoder:
            normalize_rows(sae.W_dec)

        whole = LossOutput(*(torch.stack(columns).detach().sum(0) for columns in zip(*parts, strict=True)))
        fired = whole.fired > 0
        self._tokens_since_fired = torch.where(fired, 0, self._tokens_since_fired + len(x))
        self._fvu_sum = self._fvu_sum + whole.fvu
        self._fvu_steps += 1
        self.step += 1
        self.tokens += len(x)
        return StepMetrics(whole.loss, whole.fvu, whole.auxk, dead=dead.sum(), l0=whole.firings / len(x))

    def save_checkpoint(self) -> None:
        """Write all that `resume` needs to out_dir; does nothing without one, or before the first SAE."""
        if self.folder is None or self.sae is None:
            return
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "fvu": self._fvu_sum.item() / self._fvu_steps if self._fvu_steps else None,
            "seconds": self.seconds,
            "data": self.data.state_dict(),
            "recipe": self._recipe(),
            "sae": self.sae.cfg.to_dict(),
        }
        adam = self._optimizer.state_dict()["state"]
        rng = torch.get_rng_state()
        checkpoint = Checkpoint(self.sae.state_dict(), adam, self._tokens_since_fired, rng, state)
        save_checkpoint(self.folder / CHECKPOINTS, checkpoint, self.config.keep_checkpoints)
        self._saved_step = self.step
        self._start_fvu_window()

    def _start_fvu_window(self) -> None:
        """Forget the FVUs whose mean the next checkpoint is rated by."""
        self._fvu_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._fvu_steps = 0

    def _found(self, folder: Path) -> bool:
        """Whether to continue a run in `folder`; FileExistsError where it holds one that must not be overwritten."""
        weights = sorted(path.name for path in folder.glob("*.safetensors"))
        if list_checkpoints(folder / CHECKPOINTS):
            if self.config.resume:
                return True
            raise FileExistsError(f"out_dir: {folder} holds {CHECKPOINTS}; resume or choose another folder")
        if weights:
            raise FileExistsError(f"out_dir: {folder} holds {', '.join(weights)}; choose another folder")
        return False

    def _restore(self, folder: Path) -> None:
        """Take up the run that wrote the newest whole checkpoint; a ValueError where its recipe is another."""
        path, saved = load_newest_checkpoint(folder, self.device)
        recipe = self._recipe()
        different = sorted(name for name in recipe if saved.state["recipe"].get(name) != recipe[name])
        if different:
            name = different[0]
            expected = f"{saved.state['recipe'].get(name)!r} as in {path}"
            raise ValueError(f"{name}: expected {expected}, got {recipe[name]!r}; resume takes the same recipe")
        sae = TopKSAE(SAEConfig.from_dict(saved.state["sae"]), dtype=saved.sae["W_dec"].dtype)
        sae.load_state_dict(saved.sae)
        self._adopt(sae)
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": saved.adam})
        self._tokens_since_fired = saved.tokens_since_fired
        for name in ("step", "tokens", "skipped", "seconds"):
            setattr(self, name, saved.state[name])
        self._saved_step = self.step
        self.data.load_state_dict(saved.state["data"])
        torch.set_rng_state(saved.rng)
        logger.info("train: continuing at step %d of %d from %s", self.step, self.steps, path)

    def _create(self, x: Tensor) -> TopKSAE:
        """A new SAE for tokens like the first batch x (SPEC 1.5)."""
        d = x.shape[1]
        num_latents = self.config.num_latents or self.config.expansion_factor * d
        sae = TopKSAE.init(d, num_latents, self.config.k, seed=self.config.seed)
        with torch.no_grad():
            sae.b_dec.copy_(geometric_median(x))
        return self._adopt(sae)

    def _adopt(self, sae: TopKSAE) -> TopKSAE:
        """Take `sae` as the one to train."""
        if sae.cfg.input_unit_norm:
            raise ValueError("sae: expected input_unit_norm=False, as standardised tokens are not trained on, got True")
        sae.cfg = sae.cfg.replace(batch_topk=self.config.batch_topk, multi_topk=self.config.multi_topk)
        dtype = torch.float64 if sae.W_dec.dtype == torch.float64 else torch.float32
        sae.to(self.device, dtype).requires_grad_(True)
        self.sae = sae
        self._optimizer = torch.optim.Adam(sae.parameters(), lr=self.config.lr, eps=self.config.adam_eps)
        self._tokens_since_fired = torch.zeros(sae.num_latents, dtype=torch.int64, device=self.device)
        return sae

    def _train_or_skip(self, batch: Tensor) -> StepMetrics | None:
        """The step's metrics; None where the batch was bad and is to be skipped: a step that changes nothing."""
        try:
            return self.train_step(batch)
        except BadBatch as error:
            if self.config.on_bad_batch == "raise":
                raise BadBatch(f"{error}; on_bad_batch='skip' leaves such batches out") from error
            logger.warning("train: skipped: %s", error)
        self.step += 1
        self.skipped += 1
        return None

    def _next(self, batches: Iterator[Tensor]) -> Tensor:
        try:
            return next(batches)
        except StopIteration:
            raise ValueError(f"data: expected {self.steps} batches, got {self.step}") from None

    def _prepare(self, batch: Tensor) -> Tensor:
        """The batch in the SAE's dtype and on its device, or a ValueError that names it."""
        expected = "[M, d]" if self.sae is None else f"[M, d={self.sae.d}]"
        if batch.ndim != 2 or (self.sae is not None and batch.shape[1] != self.sae.d):
            got = f"{list(batch.shape)} in batch {self.step}"
            raise ValueError(f"data: expected {expected} to match the SAE, got {got}")
        x = batch.to(self.device, torch.float32 if self.sae is None else self.sae.W_dec.dtype)
        if not x.isfinite().all():
            rows = (~x.isfinite().all(1)).nonzero().squeeze(1)
            where = f"{len(rows)} tokens of batch {self.step}, first in row {int(rows[0])}"
            raise BadBatch(f"data: NaN or inf in {where}")
        return x

    def _learning_rate(self) -> float:
        return learning_rate(self.step, self.steps, self.config.lr, self.config.warmup_steps)

    def _recipe(self) -> dict[str, Any]:
        return self.config.recipe() | {"steps": self.steps}

    def _open_logs(self) -> list[MetricsLog]:
        if self.folder is None:
            return []
        self.folder.mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, self.folder / CHECKPOINTS):
            remove_leftovers(folder)
        return open_logs(self.folder, self.config.log_to, self._recipe(), self.step)

    def _numbers(self, metrics: StepMetrics | None) -> dict[str, float]:
        """A line of metrics.jsonl; lr is the rate that the step used. A skipped step has neither."""
        numbers: dict[str, float] = {"step": self.step}
        if metrics is not None:
            numbers |= {name: value.item() for name, value in metrics._asdict().items()}
            numbers["lr"] = self._optimizer.param_groups[0]["lr"]
        return numbers | {"tokens": self.tokens, "skipped": self.skipped, "seconds": round(self.seconds, 3)}

    def _finish(self) -> TopKSAE:
        if self.sae is None:
            raise ValueError(f"data: all of the {self.steps} batches were skipped")
        sae = self.sae.requires_grad_(False)
        if self.folder is not None:
            if self._saved_step != self.step:
                self.save_checkpoint()
            sae.save_pretrained(self.folder)
            summary = {"recipe": self._recipe(), "tokens": self.tokens, "skipped": self.skipped}
            summary["seconds"] = round(self.seconds, 3)
            write_json(self.folder / "training.json", summary)
        return sae


def train_sae(config: TrainConfig, data: TokenBatches, sae: TopKSAE | None = None) -> TopKSAE:
    """Train a new SAE, or `sae` in place, on batches [M, d] from `data`, and return it.

    FileExistsError where out_dir holds an earlier run and `resume` is not set; ValueError for tokens that do not match
    the SAE, end too early, or are not finite (unless `on_bad_batch` skips these), where a resumed run's recipe is not
    that of its checkpoint, and where no checkpoint is whole.
    """
    return Trainer(config, data, sae).fit()


def _steps_of_one_pass(data: TokenBatches) -> int:
    num_tokens, batch_size = getattr(data, "num_tokens", None), getattr(data, "batch_size", None)
    if not num_tokens or not batch_size:
        raise ValueError("steps: expected a number for data whose length is not known, got None")
    return max(num_tokens // batch_size, 1)
