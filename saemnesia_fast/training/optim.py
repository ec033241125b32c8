"""What updates an SAE: initialisation, schedules, and Adam with unit-norm rows of W_dec (SPEC 1.5, 4.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saemnesia_fast import ops
from saemnesia_fast.ops import EightBit, LatentMoments
from saemnesia_fast.sae import TopKSAE

if TYPE_CHECKING:
    from saemnesia_fast.training.step import BatchGradient


class Adam:
    """Adam on an SAE's parameters, whose large gradients are used where they arise and never stored.

    Moments of W_enc and W_dec are of `moments` dtype (None: that of the weights; bfloat16: half the memory, rounded so
    that their mean is kept; uint8: a quarter, in torchao's format). `encoder` is W_enc in `encoder_dtype`, kept up to
    date.
    """

    collect = staticmethod(ops.sparse_gradients)
    """Makes the form of the gradients that `step` takes."""

    def __init__(
        self,
        sae: TopKSAE,
        eps: float,
        moments: torch.dtype | None = None,
        encoder_dtype: torch.dtype | None = None,
    ) -> None:
        self._sae = sae
        self._eps = eps
        rows = (sae.W_enc.data, sae.W_enc.data, sae.W_dec.data, sae.W_dec.data)
        self._latents = LatentMoments(
            *(EightBit.zeros_like(W) if moments == torch.uint8 else torch.zeros_like(W, dtype=moments) for W in rows)
        )
        self._b_enc, self._b_dec = (
            (torch.zeros_like(b), torch.zeros_like(b)) for b in (sae.b_enc.data, sae.b_dec.data)
        )
        self.encoder = None if encoder_dtype is None else sae.W_enc.detach().to(encoder_dtype)

    def step(self, gradient: BatchGradient, number: int, lr: float, scale: Tensor) -> None:
        """Step `number`, from 1, with `scale` (0-d) times the gradient; nothing changes where that is NaN.

        From the gradient of W_dec the part along its rows is taken away, and the rows keep unit length, where the SAE's
        configuration says so.
        """
        sae, sparse, eps = self._sae, gradient.sparse, self._eps
        ops.adam_latents(
            sparse,
            sae.W_enc,
            sae.W_dec,
            self._latents,
            number,
            lr,
            eps=eps,
            scale=scale,
            shadow=self.encoder,
            unit_norm=sae.cfg.normalize_decoder,
        )
        ops.adam_rows(sae.b_enc, sparse.db_enc, *self._b_enc, number, lr, eps=eps, scale=scale)
        ops.adam_rows(sae.b_dec, gradient.db_dec, *self._b_dec, number, lr, eps=eps, scale=scale)

    def state_dict(self) -> dict[str, Tensor]:
        """The moments, named after the parameters; those in 8 bits in their parts."""
        names = ("exp_avg", "exp_avg_sq")
        parameters = ("encoder.weight", "W_dec", "encoder.bias", "b_dec")
        moments = zip((f"{p}.{name}" for p in parameters for name in names), self._moments(), strict=True)
        return {f"{name}{ending}": part for name, moment in moments for ending, part in named_parts(moment).items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up moments, and the SAE's present weights."""
        for name, moment in self.state_dict().items():
            moment.copy_(state[name])
        if self.encoder is not None:
            self.encoder.copy_(self._sae.W_enc.detach())

    def _moments(self) -> list[Tensor | EightBit]:
        return [*self._latents, *self._b_enc, *self._b_dec]


def named_parts(moment: Any) -> dict[str, Tensor]:
    """The tensors of which an 8-bit one, ours or torchao's, consists, by the endings of their names; or itself."""
    if type(moment) is Tensor:
        return {"": moment}
    return {f".{part}": getattr(moment, part) for part in ("codes", "scale")}


def clip_scale(norm: Tensor, largest: float) -> Tensor:
    """What a gradient of `norm` is multiplied by to be no longer than `largest`; NaN where that is NaN (0-d)."""
    return (largest / (norm + 1e-6)).clamp(max=1)


def scheduled_k(step: int, k: int, start: int | None, steps: int) -> int:
    """Latents per token in `step`: from `start` linearly to k within so many steps."""
    if start is None or step >= steps:
        return k
    return round(start + (k - start) * step / steps)


def geometric_median(x: Tensor, max_iterations: int = 200, tolerance: float = 1e-7) -> Tensor:
    """The point [d] with the least sum of distances to the rows of x [M, d], by Weiszfeld's iteration.

    Computed in float64, returned in x.dtype; stops when the point moves by less than `tolerance` of its distance scale.
    """
    points = x.double()
    median = points.mean(0)
    for _ in range(max_iterations):
        distances = (points - median).norm(dim=1)
        weights = 1 / distances.clamp_min(1e-12 * distances.mean() + 1e-300)
        moved = (weights @ points) / weights.sum()
        step, median = (moved - median).norm(), moved
        if step <= tolerance * distances.mean():
            break
    return median.to(x.dtype)


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int = 0) -> float:
    """The rate of step 0 <= step < steps: up linearly over the warm-up, then linearly to 0 (reached after the last)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (steps - step) / (steps - warmup_steps)


@torch.no_grad()
def remove_parallel_gradient(W_dec: Tensor, gradient: Tensor) -> None:
    """Take from each row of `gradient` [N, d], in place, its component along that row of W_dec [N, d]."""
    squared = W_dec.square().sum(1, keepdim=True).clamp_min(torch.finfo(W_dec.dtype).tiny)
    gradient.sub_((gradient * W_dec).sum(1, keepdim=True) / squared * W_dec)


@torch.no_grad()
def normalize_rows(W_dec: Tensor) -> None:
    """Scale the rows of W_dec [N, d] to unit length, in place; a row of zeros stays."""
    W_dec.div_(W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(W_dec.dtype).tiny))
