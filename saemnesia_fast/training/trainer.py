"""Training one SAE, without supervision unless a batch has labels (SPEC 4.1)."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from saemnesia_fast.files import remove_leftovers, write_json
from saemnesia_fast.sae import SAEConfig, TopKSAE
from saemnesia_fast.training.activity import LatentActivity
from saemnesia_fast.training.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_newest_checkpoint,
    save_checkpoint,
)
from saemnesia_fast.training.config import TrainConfig
from saemnesia_fast.training.eight_bit import LEAST_BLOCK, EightBitAdam, needs_torchao
from saemnesia_fast.training.labelled import LabelledImages
from saemnesia_fast.training.layout import ALONE, Layout
from saemnesia_fast.training.loss import total_variance
from saemnesia_fast.training.metrics import MetricsLog, open_logs
from saemnesia_fast.training.optim import Adam, clip_scale, geometric_median, learning_rate, scheduled_k
from saemnesia_fast.training.step import Objective, batch_gradient
from saemnesia_fast.training.supervised_loss import Supervised, Supervision

logger = logging.getLogger("saemnesia_fast")
CHECKPOINTS = "checkpoints"


class TokenBatches(Protocol):
    """What a trainer reads: batches of tokens [M, d], floating point, on any device; or {hook point: such a batch}."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]:
        """The position of the next batch, as plain JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iter() start at that position."""


class BadBatch(ValueError):
    """Tokens that cannot be trained on; no weight, moment or counter of latents has changed."""


class StepMetrics(NamedTuple):
    """0-d tensors of one step; reading one waits for the device."""

    loss: Tensor
    fvu: Tensor
    auxk: Tensor
    dead: Tensor
    l0: Tensor


class SupervisedStepMetrics(NamedTuple):
    """Those of `StepMetrics`, and the terms of supervision (SPEC 4.2)."""

    loss: Tensor
    fvu: Tensor
    auxk: Tensor
    dead: Tensor
    l0: Tensor
    concepts: Tensor
    correlation: Tensor
    l1: Tensor


Metrics = StepMetrics | SupervisedStepMetrics


class Unread(NamedTuple):
    """What the device alone knows of a step so far."""

    step: int
    accepted: Tensor
    """0-d bool: whether its batch could be trained on."""
    variance: Tensor
    """0-d."""
    sums: Tensor
    """[M]: of each token's channels, not finite where one of them is not."""


class Trainer:
    """Trains an SAE on batches from `data`.

    Each step: the gradient of the batch's loss (`step`), clipped to a norm, less the part of W_dec's that is parallel
    to its rows, into Adam, and the rows back to unit norm. A new SAE is made from the first batch, whose geometric
    median becomes b_dec; a given one is trained in place, with its own N and k, unless a checkpoint is resumed. Weights
    are float32, or float64 where a given SAE is. `newest` is the last step whose checkpoint may be resumed. With
    `supervision` a batch may be labelled images, to whose loss that adds its terms (SPEC 4.2).

    On a GPU the host waits for the device every `log_every` steps: to read the metrics, and to find out which latents
    may be dead in the next ones. Whether a batch could be trained on is decided there: one that could not changes
    nothing, and is reported when the metrics are read.

    In a `layout` of several processes all of them read the same batches from `data`, `sae` is this process's part while
    it is trained, and the first process alone writes.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: TokenBatches,
        sae: TopKSAE | None = None,
        layout: Layout = ALONE,
        newest: int | None = None,
        supervision: Supervision | None = None,
    ) -> None:
        self.config = config
        self.data = data
        self.layout = layout
        self.supervision = supervision
        self.extra: dict[str, Any] = {}
        """Plain JSON of the caller's for checkpoints, from which it is restored, and for the record of the run."""
        self.device = layout.device or config.device or ("cuda" if torch.cuda.is_available() else "cpu")
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
        self.activity: LatentActivity
        self._adam: Adam | EightBitAdam
        self._logs: list[MetricsLog] = []
        self._started = 0.0
        self._unread: list[Unread] = []
        self._saved_step = -1
        self._fvu_sum: Tensor
        self._fvu_steps: Tensor
        self._start_fvu_window()
        if self.folder is not None and self._found(self.folder, newest):
            self._restore(self.folder / CHECKPOINTS, newest)
        elif sae is not None:
            self._adopt(sae)

    def fit(self) -> TopKSAE:
        """Train to the last step, save where out_dir is given, and return the SAE, whole in every process."""
        return _fit([self], self.data)[0]

    def begin(self, stack: ExitStack) -> None:
        """Open the logs, until the stack is closed."""
        self._logs = self._open_logs()
        for log in self._logs:
            stack.callback(log.close)
        self._started = time.monotonic() - self.seconds

    def advance(self, batch: Tensor | LabelledImages) -> dict[str, float]:
        """`train_step`, with the logging and the checkpoint that are due; the numbers that were logged."""
        metrics = self.train_step(batch)
        self.seconds = time.monotonic() - self._started
        numbers: dict[str, float] = {}
        if self.step % self.config.log_every == 0 or self.step == self.steps:
            numbers = self._numbers(None if self.step - 1 in self.check() else metrics)
            self.log(numbers)
        every = self.config.checkpoint_every
        if every and self.step % every == 0 and self.step < self.steps:
            self.save_checkpoint()
        return numbers

    def log(self, numbers: Mapping[str, float]) -> None:
        """Write a line of the present step to metrics.jsonl and wherever else."""
        for log in self._logs:
            log.write({"step": self.step} | dict(numbers))

    @torch.no_grad()
    def train_step(self, batch: Tensor | LabelledImages) -> Metrics | None:
        """One step on tokens [M, d], or on images, whose labels supervision takes; ValueError where they do not fit.

        A batch that cannot be trained on takes the step and changes nothing, see `check`: on the CPU and for a new SAE
        this is known at once, and None is returned.
        """
        config = self.config
        x = self._prepare(batch if isinstance(batch, Tensor) else batch.tokens)
        supervised = None if isinstance(batch, Tensor) else self._supervised(batch)
        step, tokens = self.step, len(x)
        self.step += 1
        self.tokens += tokens
        sae = self.sae or self._create(x, step)
        if sae is None:
            return None
        adam = self._adam
        num_dead = self.layout.sum_over_latents((self.activity.tokens_since_fired >= config.dead_after).sum())
        dead, candidates = (self.activity.dead(tokens) if config.auxk_alpha else None) or (None, None)
        k = scheduled_k(step, sae.k, config.k_start, config.k_steps)
        objective = Objective(k, config.auxk_alpha, config.multi_topk, config.batch_topk)
        gradient = batch_gradient(
            sae,
            x,
            objective,
            dead,
            candidates,
            micro_batches=config.micro_batches,
            encoder=adam.encoder,
            collect=adam.collect,
            layout=self.layout,
            supervised=supervised,
        )
        accepted = gradient.norm == gradient.norm  # not NaN
        adam.step(gradient, step + 1, self._learning_rate(step), clip_scale(gradient.norm, config.clip_norm))
        self.activity.add(gradient.hits, tokens, accepted)
        self._fvu_sum += torch.where(accepted, gradient.fvu, 0)
        self._fvu_steps += accepted
        self._unread.append(Unread(step, accepted, gradient.variance, x.sum(1)))
        if x.device.type == "cpu" and step in self.check():
            return None
        firings = self.layout.sum_over_latents(gradient.hits.sum())
        metrics = StepMetrics(gradient.loss, gradient.fvu, gradient.auxk, num_dead, firings / tokens)
        return metrics if gradient.taught is None else SupervisedStepMetrics(*metrics, *gradient.taught[1:])

    def _supervised(self, images: LabelledImages) -> Supervised:
        """The images' labels on the device, with what they are labels of."""
        if self.supervision is None:
            raise ValueError("data: expected tokens without labels, as the trainer has no supervision")
        shape = (len(images.x), len(self.supervision.assignment))
        if images.labels.shape != shape:
            got = f"{list(images.labels.shape)} in batch {self.step}"
            raise ValueError(f"labels: expected [B, C] = {list(shape)} to match the images and the concepts, got {got}")
        return Supervised(self.supervision, images.labels.to(self.device, torch.bool))

    def check(self) -> set[int]:
        """Read which steps since the last call had batches that could not be trained on, counting from 0.

        Unless such batches are to be skipped, BadBatch names the first.
        """
        unread, self._unread = self._unread, []
        accepted = torch.stack([one.accepted for one in unread]).tolist() if unread else []
        refused = set()
        for one in (one for one, good in zip(unread, accepted, strict=True) if not good):
            reason = _reason(one)
            self.tokens -= len(one.sums)
            if self.config.on_bad_batch == "raise":
                raise BadBatch(f"{reason}; on_bad_batch='skip' leaves such batches out")
            logger.warning("train: skipped: %s", reason)
            refused.add(one.step)
            self.skipped += 1
        return refused

    def save_checkpoint(self, rating: float | None = None) -> None:
        """Write all that `resume` needs to out_dir; does nothing without one, or before the first SAE.

        With supervision the best checkpoint is that of the lowest `rating`, not of the lowest FVU.
        """
        if self.folder is None or self.sae is None:
            return
        self.check()
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "fvu": (self._fvu_sum / self._fvu_steps).item() if self._fvu_steps else None,
            "seconds": self.seconds,
            "data": self.data.state_dict(),
            "recipe": self._recipe(),
            "sae": self.sae.cfg.to_dict(),
            "extra": self.extra,
        }
        if self.supervision is not None:
            state["rating"] = rating
        counters = {"tokens_since_fired": self.activity.tokens_since_fired, "firings": self.activity.firings}
        checkpoint = Checkpoint(self.sae.state_dict(), self._adam.state_dict(), counters, torch.get_rng_state(), state)
        save_checkpoint(self.folder / CHECKPOINTS, checkpoint, self.config.keep_checkpoints, self.layout)
        self._saved_step = self.step
        self._start_fvu_window()
        self.activity.look_again()

    def _start_fvu_window(self) -> None:
        """Forget the FVUs whose mean the next checkpoint is rated by."""
        self._fvu_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._fvu_steps = torch.zeros((), dtype=torch.int64, device=self.device)

    def _found(self, folder: Path, newest: int | None) -> bool:
        """Whether to continue a run in `folder`; FileExistsError where it holds one that must not be overwritten."""
        weights = sorted(path.name for path in folder.glob("*.safetensors"))
        if list_checkpoints(folder / CHECKPOINTS):
            if self.config.resume:
                return bool(list_checkpoints(folder / CHECKPOINTS, newest))
            raise FileExistsError(f"out_dir: {folder} holds {CHECKPOINTS}; resume or choose another folder")
        if weights:
            raise FileExistsError(f"out_dir: {folder} holds {', '.join(weights)}; choose another folder")
        return False

    def _restore(self, folder: Path, newest: int | None) -> None:
        """Take up the run that wrote the newest whole checkpoint; a ValueError where its recipe is another."""
        path, saved = load_newest_checkpoint(folder, self.device, newest, self.layout)
        recipe = self._recipe()
        different = sorted(name for name in recipe if saved.state["recipe"].get(name) != recipe[name])
        if different:
            name = different[0]
            expected = f"{saved.state['recipe'].get(name)!r} as in {path}"
            raise ValueError(f"{name}: expected {expected}, got {recipe[name]!r}; resume takes the same recipe")
        sae = TopKSAE(SAEConfig.from_dict(saved.state["sae"]), dtype=saved.sae["W_dec"].dtype)
        sae = self.layout.own_latents(sae)
        sae.load_state_dict(saved.sae)
        self._adopt(sae)
        self._adam.load_state_dict(saved.adam)
        self.activity.tokens_since_fired = saved.counters["tokens_since_fired"]
        self.activity.firings = saved.counters["firings"]
        for name in ("step", "tokens", "skipped", "seconds"):
            setattr(self, name, saved.state[name])
        self.extra = saved.state.get("extra", {})
        self._saved_step = self.step
        self.data.load_state_dict(saved.state["data"])
        torch.set_rng_state(saved.rng)
        logger.info("train: continuing at step %d of %d from %s", self.step, self.steps, path)

    def _create(self, x: Tensor, step: int) -> TopKSAE | None:
        """A new SAE for tokens like the first batch x (SPEC 1.5); None where x cannot be trained on."""
        variance = total_variance(x)
        accepted = (variance > 0) & variance.isfinite()
        self._unread.append(Unread(step, accepted, variance, x.sum(1)))
        if step in self.check():
            return None
        d = x.shape[1]
        num_latents = self.config.num_latents or self.config.expansion_factor * d
        sae = TopKSAE.init(d, num_latents, self.config.k, seed=self.config.seed)
        with torch.no_grad():
            sae.b_dec.copy_(geometric_median(x))
        return self._adopt(sae)

    def _adopt(self, sae: TopKSAE) -> TopKSAE:
        """Take `sae` as the one to train."""
        config = self.config
        if sae.cfg.input_unit_norm:
            raise ValueError("sae: expected input_unit_norm=False, as standardised tokens are not trained on, got True")
        sae.cfg = sae.cfg.replace(batch_topk=config.batch_topk, multi_topk=config.multi_topk)
        dtype = torch.float64 if sae.W_dec.dtype == torch.float64 else torch.float32
        self.sae = self.layout.own_latents(sae).to(self.device, dtype).requires_grad_(False)
        encoder, moments = _short(config.compute_dtype), _short(config.moments)
        if moments != torch.uint8 or not needs_torchao(sae.d):
            self._adam = Adam(sae, config.adam_eps, moments, encoder)
        elif self.layout.latents_size > 1:
            raise ValueError(
                "moments: expected float32 or bfloat16 where processes share the latents, unless d is a multiple of "
                f"{LEAST_BLOCK}, got 8bit with d={sae.d}"
            )
        else:
            self._adam = EightBitAdam(sae, config.adam_eps, encoder)
        self.activity = LatentActivity(
            sae.num_latents,
            config.dead_after,
            self.device,
            self.layout,
            config.log_every,
            None if self.supervision is None else self.supervision.latents,
        )
        return sae

    def _prepare(self, batch: Tensor) -> Tensor:
        """The batch in the SAE's dtype and on its device, or a ValueError that names it."""
        expected = "[M, d]" if self.sae is None else f"[M, d={self.sae.d}]"
        if batch.ndim != 2 or not batch.numel() or (self.sae is not None and batch.shape[1] != self.sae.d):
            got = f"{list(batch.shape)} in batch {self.step}"
            raise ValueError(f"data: expected {expected} to match the SAE, got {got}")
        return batch.to(self.device, torch.float32 if self.sae is None else self.sae.W_dec.dtype)

    def _learning_rate(self, step: int) -> float:
        config = self.config
        if config.lr_schedule == "constant" and step >= config.warmup_steps:
            return config.lr
        return learning_rate(step, self.steps, config.lr, config.warmup_steps)

    def _recipe(self) -> dict[str, Any]:
        recipe = self.config.recipe() | {"steps": self.steps}
        return recipe if self.supervision is None else recipe | {"assignment": self.supervision.assignment}

    def _open_logs(self) -> list[MetricsLog]:
        if self.folder is None or not self.layout.writes:
            return []
        self.folder.mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, self.folder / CHECKPOINTS):
            remove_leftovers(folder)
        return open_logs(self.folder, self.config.log_to, self._recipe(), self.step)

    def _numbers(self, metrics: Metrics | None) -> dict[str, float]:
        """A line of metrics.jsonl; lr is the rate that the step used. A skipped step has neither."""
        numbers: dict[str, float] = {"step": self.step}
        if metrics is not None:
            numbers |= {name: value.item() for name, value in metrics._asdict().items()}
            numbers["lr"] = self._learning_rate(self.step - 1)
        return numbers | {"tokens": self.tokens, "skipped": self.skipped, "seconds": round(self.seconds, 3)}

    def finish(self) -> TopKSAE:
        """Save the last checkpoint, the SAE and the record of the run, where out_dir is given; the whole SAE."""
        if self.sae is None:
            raise ValueError(f"data: all of the {self.steps} batches were skipped")
        if self._saved_step != self.step:
            self.save_checkpoint()
        latents = self.activity.report(self.tokens)
        sae = self.layout.whole(self.sae)
        with self.layout.as_one():
            if self.folder is not None and self.layout.writes:
                sae.save_pretrained(self.folder)
                summary = {"recipe": self._recipe(), "tokens": self.tokens, "skipped": self.skipped}
                summary |= {"seconds": round(self.seconds, 3), "latents": latents} | self.extra
                write_json(self.folder / "training.json", summary)
        return sae


def train_sae(config: TrainConfig, data: TokenBatches, sae: TopKSAE | None = None, layout: Layout = ALONE) -> TopKSAE:
    """Train a new SAE, or `sae` in place, on batches [M, d] from `data`, and return it.

    With the `layout` of `parallel.connect` several processes train it together, each calling this alike. Where they
    share the latents, the SAE is returned in host memory.

    FileExistsError where out_dir holds an earlier run and `resume` is not set; ValueError for tokens that do not match
    the SAE, end too early, or are not finite (unless `on_bad_batch` skips these), where a resumed run's recipe is not
    that of its checkpoint, and where no checkpoint is whole.
    """
    return Trainer(config, data, sae, layout).fit()


def train_saes(configs: Sequence[TrainConfig], data: TokenBatches, layout: Layout = ALONE) -> list[TopKSAE]:
    """Train a new SAE for each of `configs` on one stream of activations, and return them in that order.

    They may differ in all but their numbers of steps and what concerns checkpoints. Of batches of several hook points
    each takes that of its own. Resumed runs continue from the newest step of which all have a whole checkpoint.

    Errors are those of `train_sae`; ValueError where two would write into one folder, or runs that are to be resumed
    have no step in common.
    """
    folders = [config.out_dir / config.hook_point for config in configs if config.out_dir is not None]
    if not configs or len(set(folders)) < len(folders):
        raise ValueError(
            f"configs: expected some, with folders of their own, got {[str(folder) for folder in folders]}"
        )
    if len(configs) > 1 and (
        len({config.checkpoint_every for config in configs}) > 1 or min(c.keep_checkpoints for c in configs) < 2
    ):
        raise ValueError(
            "checkpoint_every, keep_checkpoints: expected one interval for all, and two or more to be kept"
        )
    start, newest = data.state_dict(), None
    while True:
        data.load_state_dict(start)
        trainers: list[Trainer] = []
        trainers += (Trainer(config, data, newest=newest, layout=layout) for config in configs)
        steps = [trainer.step for trainer in trainers]
        if len(set(steps)) == 1:
            break
        # Killed before all had their first checkpoint, they start afresh; else one is not of this run.
        if min(steps) == 0 and max(steps) > configs[0].checkpoint_every:
            raise ValueError(f"resume: expected a checkpoint of one step for all in {folders}, got steps {steps}")
        newest = min(steps)
    if len({trainer.steps for trainer in trainers}) > 1:
        raise ValueError(f"steps: expected one number for all, got {[trainer.steps for trainer in trainers]}")
    return _fit(trainers, data)


def _fit(trainers: Sequence[Trainer], data: TokenBatches) -> list[TopKSAE]:
    """Train all to the last step on the same batches."""
    first = trainers[0]
    batches = iter(data)
    with ExitStack() as stack:
        stack.callback(getattr(batches, "close", lambda: None))
        for trainer in trainers:
            trainer.begin(stack)
        progress = first.layout.writes and any(trainer.config.progress for trainer in trainers)
        bar = stack.enter_context(tqdm(total=first.steps, initial=first.step, unit="step", disable=not progress))
        while first.step < first.steps:
            batch = next(batches, None)
            if batch is None:
                raise ValueError(f"data: expected {first.steps} batches, got {first.step}")
            for trainer in trainers:
                tokens = batch if isinstance(batch, Tensor) else batch[trainer.config.hook_point]
                numbers = trainer.advance(tokens)
                if trainer is first and numbers:
                    bar.set_postfix({name: numbers[name] for name in ("fvu", "dead", "skipped") if name in numbers})
            bar.update()
    return [trainer.finish() for trainer in trainers]


def _steps_of_one_pass(data: TokenBatches) -> int:
    num_tokens, batch_size = getattr(data, "num_tokens", None), getattr(data, "batch_size", None)
    if not num_tokens or not batch_size:
        raise ValueError("steps: expected a number for data whose length is not known, got None")
    return max(num_tokens // batch_size, 1)


def _short(name: str) -> torch.dtype | None:
    """The dtype of that name; None for that of the weights."""
    short = {"float32": None, "8bit": torch.uint8}
    return short[name] if name in short else getattr(torch, name)


def _reason(refused: Unread) -> str:
    """Why the batch could not be trained on."""
    bad, variance = ~refused.sums.isfinite(), refused.variance.item()
    if bad.any():
        first = int(bad.byte().argmax())
        return f"data: NaN or inf in {int(bad.sum())} tokens of batch {refused.step}, first in row {first}"
    if not 0 < variance < math.inf:
        return f"data: batch {refused.step} has a total variance of {variance:.4g}"
    return f"data: batch {refused.step} has a gradient that is not finite"
