"""Training steps in plain PyTorch: dense autograd as one would write it first, and the released trainer's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from activations import Weights

ALPHA = 1 / 32
EPS = 6.25e-10
CLIP = 1.0
DEAD_AFTER = 10_000_000


class Setting(NamedTuple):
    """What a step is started with besides the weights."""

    k: int
    lr: float
    dead: Tensor | None
    """[N] bool, latents that count as dead from the first step on."""


class Loss(NamedTuple):
    loss: Tensor
    """0-d: FVU + AuxK / 32, or what stands for it."""
    fired: Tensor
    """[N] bool."""


LossFunction = Callable[[Weights, Tensor, int, Tensor, Tensor, int], Loss]


def pre_activations(own: Weights, x: Tensor) -> Tensor:
    """[M, N], relu'd."""
    return torch.relu((x - own.b_dec) @ own.W_enc.T + own.b_enc)


def largest(z: Tensor, k: int) -> Tensor:
    """z [M, N] with all but the k largest of each row set to 0."""
    values, indices = z.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(z).scatter(-1, indices, values)


def topk_loss(own: Weights, x: Tensor, k: int, variance: Tensor, dead: Tensor, num_dead: int) -> Loss:
    """FVU + AuxK / 32 (SPEC 4.1) of tokens x [M, d]."""
    pre = pre_activations(own, x)
    kept = largest(pre, k)
    error = x - (kept @ own.W_dec + own.b_dec)
    loss = error.square().sum() / variance
    if num_dead:
        half = x.shape[1] // 2
        e_hat = largest(torch.where(dead, pre, 0), min(half, num_dead)) @ own.W_dec
        auxk = (e_hat - error.detach()).square().sum() / variance
        loss = loss + ALPHA * min(num_dead / half, 1.0) * auxk
    return Loss(loss, (kept.detach() > 0).any(0))


def released_loss(own: Weights, x: Tensor, k: int, variance: Tensor, dead: Tensor, num_dead: int) -> Loss:
    """What SAeUron's released trainer minimises: BatchTopK, and AuxK with the faults that SPEC 4.1 lists."""
    pre = pre_activations(own, x)
    values, places = pre.flatten().topk(k * len(x), sorted=False)
    kept = torch.zeros_like(pre).flatten().scatter(0, places, values).view_as(pre)
    error = kept @ own.W_dec + own.b_dec - x
    loss = error.square().sum() / variance
    if num_dead:
        half = x.shape[1] // 2
        e_hat = largest(torch.where(dead, pre, 0), min(half, num_dead)) @ own.W_dec + own.b_dec
        loss = loss + ALPHA * min(num_dead / half, 1.0) * (e_hat - error).square().sum() / variance
    fired = torch.zeros_like(dead)
    fired[places % pre.shape[1]] = True
    return Loss(loss, fired)


class Plain:
    """Autograd over dense [M, N] latents, the papers' recipe, torch.optim.Adam (SPEC 4.1)."""

    def __init__(
        self,
        own: Weights,
        setting: Setting,
        loss: LossFunction = topk_loss,
        chunk: int | None = None,
        compiled: bool = False,
        reads_loss: bool = False,
    ) -> None:
        """`own` becomes the parameters. `chunk` tokens go through at a time. `reads_loss`: the host waits for it."""
        self.weights = Weights(*(tensor.requires_grad_() for tensor in own))
        self.k = setting.k
        self.chunk = chunk
        self.reads_loss = reads_loss
        self.since = first_counts(own, setting.dead)
        self.optimizer = torch.optim.Adam(self.weights, lr=setting.lr, eps=EPS)
        self.loss, self.update = loss, self._update
        if compiled:
            self.loss = torch.compile(loss, dynamic=False)
            self.update = torch.compile(self._update, dynamic=False)

    def __call__(self, x: Tensor) -> Tensor | float:
        """One step; the loss before it."""
        dead = self.since >= DEAD_AFTER
        num_dead = int(dead.sum())
        variance = (x - x.mean(0)).square().sum()
        total, fired = x.new_zeros(()), torch.zeros_like(dead)
        for tokens in x.split(self.chunk or len(x)):
            part = self.loss(self.weights, tokens, self.k, variance, dead, num_dead)
            part.loss.backward()
            total += part.loss.detach()
            fired |= part.fired
        self.update()
        self.optimizer.zero_grad()
        self.since = torch.where(fired, 0, self.since + len(x))
        return total.item() if self.reads_loss else total

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.apply_gradient()

    def apply_gradient(self) -> None:
        """What follows clipping."""
        W_dec = self.weights.W_dec
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) / W_dec.square().sum(1, keepdim=True) * W_dec
        self.optimizer.step()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)


def first_counts(own: Weights, dead: Tensor | None) -> Tensor:
    """[N] int64, tokens since each latent fired, for a step that is to find `dead` dead."""
    counts = torch.zeros(len(own.W_enc), dtype=torch.int64, device=own.W_enc.device)
    return counts if dead is None else counts.masked_fill(dead, DEAD_AFTER + 1)
