"""Adam with 8-bit moments where `optim.Adam` has none: through the `torchao` package, whose format both keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from saemnesia_fast import ops
from saemnesia_fast.ops import DenseRows, PairTerms
from saemnesia_fast.sae import TopKSAE
from saemnesia_fast.training.optim import named_parts, normalize_rows, remove_parallel_gradient

if TYPE_CHECKING:
    from saemnesia_fast.training.step import BatchGradient


LEAST_BLOCK = 64
"""Numbers to a scale, from which on `optim.Adam` has moments in 8 bits."""


def needs_torchao(d: int) -> bool:
    """Whether the blocks of numbers that share a scale do not lie in the rows of weights [N, d]."""
    return math.gcd(d, 256) < LEAST_BLOCK


class StoredGradients(NamedTuple):
    """Gradients of W_enc, b_enc and W_dec as torch's optimizers take them."""

    dW_enc: Tensor
    db_enc: Tensor
    dW_dec: Tensor
    squared_norm: Tensor
    """0-d, |dW_enc|^2 + |dW_dec|^2."""


class EightBitAdam:
    """`optim.Adam` with a quarter of its memory for moments; but gradients are stored, [N, d], and the host waits for
    the device once a step, to leave out a bad batch."""

    def __init__(self, sae: TopKSAE, eps: float, encoder_dtype: torch.dtype | None = None) -> None:
        try:
            from torchao.optim import Adam8bit
        except ImportError as error:
            raise ImportError("moments: '8bit' needs `pip install torchao`") from error
        self._sae = sae
        self._parameters = dict(sae.named_parameters())
        self._torchao: Any = Adam8bit(self._parameters.values(), lr=0.0, eps=eps)
        self.encoder = None if encoder_dtype is None else sae.W_enc.detach().to(encoder_dtype)

    @staticmethod
    def collect(
        terms: Sequence[PairTerms], x: Tensor, W_dec: Tensor, b_dec: Tensor, dense: DenseRows | None = None
    ) -> StoredGradients:
        """`ops.sparse_gradients`, stored."""
        first, *more = terms
        found = ops.latent_gradients(*first[:3], x, W_dec, b_dec, extra_d_value=first.extra_d_value, more=more)
        if dense is not None:
            for total, rows in zip(found, dense[1:], strict=False):
                total.index_add_(0, dense.latents, rows)
        squared_norm = found.dW_enc.square().sum() + found.dW_dec.square().sum()
        return StoredGradients(found.dW_enc, found.db_enc, found.dW_dec, squared_norm)

    @torch.no_grad()
    def step(self, gradient: BatchGradient, number: int, lr: float, scale: Tensor) -> None:
        """See `optim.Adam`; torchao counts the steps itself."""
        if scale.isnan():
            return
        sae, stored = self._sae, gradient.sparse
        gradients = {"encoder.weight": stored.dW_enc, "encoder.bias": stored.db_enc, "W_dec": stored.dW_dec}
        for name, grad in (gradients | {"b_dec": gradient.db_dec}).items():
            self._parameters[name].grad = grad.mul_(scale)
        if sae.cfg.normalize_decoder:
            remove_parallel_gradient(sae.W_dec, stored.dW_dec)
        self._torchao.param_groups[0]["lr"].fill_(lr)
        self._torchao.step()
        self._torchao.zero_grad()
        if sae.cfg.normalize_decoder:
            normalize_rows(sae.W_dec)
        if self.encoder is not None:
            self.encoder.copy_(sae.W_enc.detach())

    def state_dict(self) -> dict[str, Tensor]:
        """What torchao keeps of each parameter, 8-bit tensors in their parts."""
        state: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            for key, kept in self._torchao.state[parameter].items():
                state |= {f"{name}.{key}{part}": tensor for part, tensor in named_parts(kept).items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up moments, and the SAE's present weights."""
        for name, parameter in self._parameters.items():
            if f"{name}.step" not in state:
                continue
            kept = self._torchao.state[parameter]
            kept["step"] = torch.zeros(())
            for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                kept[key] = self._torchao._new_buffer(parameter, signed)
            for key, tensor in kept.items():
                for part, own in named_parts(tensor).items():
                    own.copy_(state[f"{name}.{key}{part}"])
        if self.encoder is not None:
            self.encoder.copy_(self._sae.W_enc.detach())
