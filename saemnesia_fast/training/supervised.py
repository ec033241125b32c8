"""SAEmnesia's second stage: a trained SAE is taught one latent for each concept (SPEC 4.2)."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

import torch
from tqdm import tqdm

from saemnesia_fast.concepts import ConceptTable
from saemnesia_fast.concepts.assignment import save_assignment
from saemnesia_fast.sae import TopKSAE
from saemnesia_fast.training.checkpoint import list_checkpoints, load_checkpoint
from saemnesia_fast.training.config import RUNTIME_FIELDS, TrainConfig
from saemnesia_fast.training.labelled import LabelledImages
from saemnesia_fast.training.layout import ALONE, Layout
from saemnesia_fast.training.step import encode
from saemnesia_fast.training.supervised_loss import (
    SupervisedLoss,
    Supervision,
    assigned_pre,
    combined,
    concept_terms,
    dense_mean,
)
from saemnesia_fast.training.trainer import CHECKPOINTS, Trainer

logger = logging.getLogger("saemnesia_fast")
OF_THE_SAE = frozenset({"num_latents", "expansion_factor", "k"})


@dataclass(kw_only=True)
class SuperviseConfig(TrainConfig, SupervisedLoss):
    """The recipe of supervised training (SPEC 4.2); the defaults are SAEmnesia's.

    N and k are those of the SAE. Checkpoints are written after each epoch, and every `checkpoint_every` steps.
    """

    lr: float = 5e-6
    """Learning rate."""
    lr_schedule: Literal["linear", "constant"] = "constant"
    """After the warm-up: constant, or falling linearly to 0 after the last epoch."""
    adam_eps: float = 1e-8
    """Epsilon of Adam."""
    epochs: int = 150
    """Most passes over the images."""
    patience: int = 5
    """Passes without a lower validation loss after which to stop."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        SupervisedLoss.__post_init__(self)
        if self.out_dir is None:
            raise ValueError("out_dir: expected a folder, as the best weights are kept there, got None")
        if self.steps is not None:
            raise ValueError(f"steps: expected None, as epochs tells how long to train, got {self.steps}")
        for name in ("epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number >= 1, got {getattr(self, name)}")

    def recipe(self) -> dict[str, Any]:
        names = {f.name for f in fields(SuperviseConfig)} - RUNTIME_FIELDS - OF_THE_SAE
        return {name: getattr(self, name) for name in sorted(names)}


class LabelledBatches(Protocol):
    """What supervised training reads, as `LabelledActivations` gives it; positions as for `TokenBatches`."""

    concepts: list[str]
    batches_per_epoch: int

    def __iter__(self) -> Iterator[LabelledImages]: ...
    def validation(self) -> Iterator[LabelledImages]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def assignment_of(table: ConceptTable) -> dict[str, int]:
    """The table's assignment, or `table.assign()` where it has none; ValueError unless every concept has a latent."""
    assignment = table.assignment or table.assign()
    missing = [name for name in table.concepts if name not in assignment]
    if missing:
        raise ValueError(f"table: expected a latent assigned to every concept, got none for {missing}")
    return {name: assignment[name] for name in table.concepts}


def supervise_sae(
    config: SuperviseConfig, data: LabelledBatches, sae: TopKSAE, table: ConceptTable, layout: Layout = ALONE
) -> TopKSAE:
    """Train `sae` in place, with `table`'s assignment (`assignment_of`), and return it with its best weights.

    The validation loss, of all images of `data.validation()` as one batch and without AuxK, is taken before the first
    epoch and after each; training ends when it has not fallen for `patience` epochs. out_dir / hook_point then holds
    the SAE of the lowest one, `assignment.json` and `training.json`. The SAE's statistics are others now: collect a new
    table with it and let that take over the assignment (`concepts.load_assignment`).

    With the `layout` of `parallel.connect` several processes train it together, each calling this alike.

    Raises:
        ValueError: the table is of another SAE, or `data` of other concepts than the table; and as `train_sae`.
        FileExistsError: as `train_sae`.
    """
    table.check_sae(sae)
    if data.concepts != table.concepts:
        raise ValueError(f"data: expected labels of the table's concepts {table.concepts}, got {data.concepts}")
    assignment, kinds = assignment_of(table), dict(zip(table.concepts, table.kinds, strict=True))
    config = copy.copy(config)
    config.steps = config.epochs * data.batches_per_epoch
    device = layout.device or config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    supervision = Supervision(assignment, kinds, config, sae.num_latents, device, layout)
    trainer = Trainer(config, data, sae, layout, supervision=supervision)
    losses = trainer.extra.setdefault("validation_loss", [])
    with ExitStack() as stack:
        trainer.begin(stack)
        batches = iter(data)
        stack.callback(getattr(batches, "close", lambda: None))
        shown = layout.writes and config.progress
        bar = stack.enter_context(tqdm(total=config.steps, initial=trainer.step, unit="step", disable=not shown))
        while True:
            if trainer.step == len(losses) * data.batches_per_epoch:
                terms = validate(trainer, data)
                losses.append(terms["validation_loss"])
                trainer.log({"epoch": len(losses) - 1} | terms)
                trainer.save_checkpoint(rating=losses[-1])
            if len(losses) > config.epochs or len(losses) - 1 - _best(losses) >= config.patience:
                break
            images = next(batches)
            trainer.advance(images)
            bar.update()
            bar.set_postfix({"epoch": len(losses) - 1, "validation": losses[-1]})
    _take_best(trainer, _best(losses) * data.batches_per_epoch)
    trained = trainer.finish()
    with layout.as_one():
        if trainer.folder is not None and layout.writes:
            save_assignment(trainer.folder, assignment, kinds, trained)
    best = _best(losses)
    logger.info("supervise: best after %d of %d epochs, validation loss %.6g", best, len(losses) - 1, losses[best])
    return trained


@torch.no_grad()
def validate(trainer: Trainer, data: LabelledBatches) -> dict[str, float]:
    """The loss and its terms of all validation images as one batch, without AuxK, by names as in metrics.jsonl.

    Each process takes an equal share of every batch; what they gather does not depend on how many they are.
    """
    sae, supervision, layout = trainer.sae, trainer.supervision, trainer.layout
    if sae is None or supervision is None:
        raise ValueError("trainer: expected one with an SAE and supervision")
    pooled, labels, squares, l1 = [], [], [], []
    sums = torch.zeros(2, sae.d, dtype=torch.float64, device=trainer.device)
    tokens = 0
    for images in data.validation():
        count = len(images.x)
        # Repeated images fill the last share, and are cut off again.
        padded = torch.arange(-(-count // layout.data_size) * layout.data_size) % count
        everything = images.x.to(trainer.device, sae.W_dec.dtype)
        x = layout.rows_of(everything[padded])
        own = x.flatten(0, 1)
        values, indices = encode(sae, own, sae.k, None, layout)
        error = own - layout.decode(values, indices, sae.W_dec, sae.b_dec)
        dense = supervision.loss.l1 == "dense"
        activation = dense_mean(sae, x) if dense else values.view(len(x), -1).mean(1)
        pre = assigned_pre(sae, own, supervision, layout).view(len(padded), x.shape[1], -1)
        pooled.append(pre[:count].mean(1))
        labels.append(images.labels)
        squares.append(layout.gather_tokens(error.view(x.shape).square().sum((1, 2)))[:count])
        l1.append(layout.gather_tokens(layout.sum_over_latents(activation))[:count])
        sums += torch.stack([one.sum((0, 1), dtype=torch.float64) for one in (everything, everything.square())])
        tokens += everything[..., 0].numel()
    variance = (sums[1] - sums[0].square() / tokens).sum()
    fvu = torch.cat(squares).double().sum() / variance
    v, chosen = torch.cat(pooled), torch.cat(labels).to(trainer.device)
    concepts, correlation, _ = concept_terms(v, chosen, supervision)
    taught = combined(concepts, correlation, torch.cat(l1).mean(), supervision.loss)
    found = {"validation_loss": (fvu + taught.loss).item(), "validation_fvu": fvu.item()}
    found |= {f"validation_{name}": term.item() for name, term in taught._asdict().items() if name != "loss"}
    if not math.isfinite(found["validation_loss"]):
        raise ValueError(f"data: expected validation images with a finite loss, got {found}")
    return found


def _best(losses: list[float]) -> int:
    """The number of the epoch with the lowest loss, the first of equal ones."""
    return min(range(len(losses)), key=losses.__getitem__)


def _take_best(trainer: Trainer, step: int) -> None:
    """Put the weights of the checkpoint of `step` in place of the last ones."""
    if trainer.folder is None or trainer.sae is None or step == trainer.step:
        return
    paths = [path for path in list_checkpoints(trainer.folder / CHECKPOINTS) if path.stem == f"step-{step:08d}"]
    if not paths:
        raise ValueError(f"out_dir: the best checkpoint, of step {step}, is no longer in {trainer.folder}")
    trainer.sae.load_state_dict(load_checkpoint(paths[0], "cpu", trainer.layout).sae)
