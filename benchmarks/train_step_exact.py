"""What a training step comes to in float64: dense autograd over a block of latents at a time.

Neither [M, N] numbers nor a float64 copy of the weights are ever held, so a case fits wherever its weights do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import activations
from activations import Weights
from harness import Case
from train_step_dense import ALPHA, CLIP, Plain, Setting, pre_activations

LR = 4e-4
CHECKED_ROWS = 1024
DEAD = "N/10 dead"
BLOCK = 2**23
"""Pre-activations at a time."""
PAIRS = 2**15
"""Rows of W_dec that are gathered at a time."""


class Expected(NamedTuple):
    """What one step comes to in float64."""

    losses: dict[str, float]
    """By formula."""
    weights: Weights
    """The new ones, float64, at `checked_rows`; without the rest of W_enc, b_enc and W_dec."""
    margins: Tensor
    """[rows]: by how much, relatively, the checked latent is among a token's k largest or not, at least."""
    dead: Tensor | None
    """[N] bool."""

    def save(self, path: Path) -> None:
        torch.save(self._asdict() | {"weights": tuple(self.weights)}, path)

    @classmethod
    def load(cls, path: Path, device: str) -> Expected:
        entries = torch.load(path, map_location=device, weights_only=True)
        return cls(**entries | {"weights": Weights(*entries["weights"])})


class Pairs(NamedTuple):
    """Activations, the tokens that have them, and the latents; of one shape."""

    values: Tensor
    tokens: Tensor
    latents: Tensor

    def first(self, count: int | None = None) -> Pairs:
        """Of the first `count` columns those > 0, [P] each."""
        columns = [column[:, :count] for column in self]
        return Pairs(*(column[columns[0] > 0] for column in columns))


def checked_rows(num_latents: int, device: str) -> Tensor:
    return torch.linspace(0, num_latents - 1, min(num_latents, CHECKED_ROWS), device=device).long()


def at_rows(own: Weights, rows: Tensor | slice) -> Weights:
    """A float64 copy of some latents' weights."""
    some = (own.W_enc[rows], own.b_enc[rows], own.b_dec, own.W_dec[rows])
    return Weights(*(tensor.detach().to(torch.float64, copy=True) for tensor in some))


def fresh_weights(case: Case, device: str) -> Weights:
    """The case's weights, held by nobody else."""
    own = activations.weights(case.d, case.N, case.torch_dtype, device)
    activations.weights.cache_clear()
    return own


def tokens(case: Case, device: str) -> Tensor:
    x = activations.tokens(case, device)
    activations.weights.cache_clear()
    return x


def num_dead(case: Case) -> int:
    return case.N // 10 if case.variant == DEAD else 0


def write_expected(case: Case, device: str, formulas: set[str], path: Path) -> None:
    expected(case, device, formulas).save(path)


def expected(case: Case, device: str, formulas: set[str]) -> Expected:
    """The losses before a step by the formula "topk", also by other `formulas`, and the weights after it."""
    own, x = fresh_weights(case, device), tokens(case, device).double()
    candidates = largest(own, x, case.k + 1)
    kept = candidates.first(case.k)
    variance = (x - x.mean(0)).square().sum()
    error = x - own.b_dec - sum_directions(own, kept, len(x))
    losses = {"topk": error.square().sum() / variance, "dictionary-learning": error.square().sum(1).mean()}
    targets, dead = [(kept, -2 * error / variance)], None
    if "released" in formulas:
        shared = largest(own, x, case.k * len(x), shared=True).first()
        released = x - own.b_dec - sum_directions(own, shared, len(x))
        losses["released"] = released.square().sum() / variance
    if count := num_dead(case):
        dead, half = silent_latents(kept.latents, case.N, count), case.d // 2
        scale = ALPHA * min(count / half, 1.0)
        aux = largest(own, x, min(half, count), among=dead).first()
        e_hat = sum_directions(own, aux, len(x))
        missed = (e_hat - error).square().sum()
        targets.append((aux, 2 * scale * (e_hat - error) / variance))
        losses["topk"] += scale * missed / variance
        losses["dictionary-learning"] += ALPHA * missed / (error - error.mean(0)).square().sum()
        if "released" in formulas:  # with b_dec, and of the error with the other sign
            losses["released"] += scale * (e_hat + own.b_dec + released).square().sum() / variance

    rows = checked_rows(case.N, device)
    step = Plain(at_rows(own, rows), Setting(case.k, LR, None))
    for weight, gradient in zip(step.weights, clipped_gradient(own, x, targets, rows), strict=True):
        weight.grad = gradient
    step.apply_gradient()
    weights = Weights(*(weight.detach() for weight in step.weights))
    found = {name: float(loss) for name, loss in losses.items()}
    return Expected(found, weights, margins(candidates, case.N)[rows], dead)


def blocks(num_latents: int, num_tokens: int) -> Iterator[slice]:
    """The latents in runs of equal length, but for the last."""
    size = max(1, BLOCK // num_tokens)
    for first in range(0, num_latents, size):
        yield slice(first, min(first + size, num_latents))


def largest(own: Weights, x: Tensor, count: int, among: Tensor | None = None, shared: bool = False) -> Pairs:
    """Each token's `count` largest activations, descending: [M, count]; `shared` those of all tokens: [1, count].

    `among` [N] bool: the others count as 0.
    """
    num_tokens, num_latents = len(x), len(own.W_enc)
    values = x.new_zeros(1 if shared else num_tokens, 0)
    numbers = values.long()
    for rows in blocks(num_latents, num_tokens):
        pre = pre_activations(at_rows(own, rows), x)
        if among is not None:
            pre = torch.where(among[rows], pre, 0)
        number = torch.arange(num_tokens, device=x.device)[:, None] * num_latents
        number = number + torch.arange(rows.start, rows.stop, device=x.device)
        candidates = torch.cat([values, pre.view(len(values), -1)], 1)
        values, places = candidates.topk(min(count, candidates.shape[1]))
        numbers = torch.cat([numbers, number.view(len(values), -1)], 1).gather(1, places)
    return Pairs(values, numbers // num_latents, numbers % num_latents)


def margins(candidates: Pairs, num_latents: int) -> Tensor:
    """[N]: see `Expected`, for the k + 1 largest of each token; inf for a latent that is among none's."""
    last = candidates.values[:, -1:]
    above = torch.where(last > 0, candidates.values / last - 1, torch.inf)
    above[:, -1] = above[:, -2]
    least = above.new_full((num_latents,), torch.inf)
    return least.scatter_reduce(0, candidates.latents.flatten(), above.flatten(), "amin")


def sum_directions(own: Weights, pairs: Pairs, num_tokens: int) -> Tensor:
    """sum of value * W_dec[latent] over the pairs of each token: [M, d]."""
    out = pairs.values.new_zeros(num_tokens, own.W_dec.shape[1])
    for values, rows, latents in zip(*(column.split(PAIRS) for column in pairs), strict=True):
        out.index_add_(0, rows, values[:, None] * own.W_dec[latents].double())
    return out


def silent_latents(fired: Tensor, num_latents: int, count: int) -> Tensor:
    """[N] bool: the first `count` latents that are not among `fired`."""
    silent = torch.ones(num_latents, dtype=torch.bool, device=fired.device).index_fill(0, fired, False)
    return torch.zeros_like(silent).index_fill(0, silent.nonzero().squeeze(1)[:count], True)


def clipped_gradient(own: Weights, x: Tensor, targets: Sequence[tuple[Pairs, Tensor]], checked: Tensor) -> Weights:
    """The gradient, by autograd, of a loss of which d loss / d (sum of directions) is given for some `targets`.

    Of all latents for its norm, and returned for those `checked` and for b_dec, which is added to the first sum.
    """
    db_dec, squares = targets[0][1].sum(0), x.new_zeros(())
    found = []
    for rows in blocks(len(own.W_enc), len(x)):
        some = Weights(*(weight.requires_grad_() for weight in at_rows(own, rows)))
        pre = pre_activations(some, x)
        sums = [(pre * _kept(pairs, rows, pre)) @ some.W_dec for pairs, _ in targets]
        torch.autograd.backward(sums, [grad for _, grad in targets])
        W_enc, b_enc, b_dec, W_dec = (weight.grad for weight in some)
        squares += W_enc.square().sum() + b_enc.square().sum() + W_dec.square().sum()
        db_dec = db_dec + b_dec
        here = checked[(checked >= rows.start) & (checked < rows.stop)] - rows.start
        found.append((W_enc[here], b_enc[here], W_dec[here]))
    scale = (CLIP / ((squares + db_dec.square().sum()).sqrt() + 1e-6)).clamp(max=1)
    dW_enc, db_enc, dW_dec = (scale * torch.cat(column) for column in zip(*found, strict=True))
    return Weights(dW_enc, db_enc, scale * db_dec, dW_dec)


def _kept(pairs: Pairs, rows: slice, pre: Tensor) -> Tensor:
    """1 where a pair is, of the latents `rows`; like their `pre`."""
    here = (pairs.latents >= rows.start) & (pairs.latents < rows.stop)
    mask = torch.zeros_like(pre, requires_grad=False)
    mask[pairs.tokens[here], pairs.latents[here] - rows.start] = 1
    return mask
