"""How one SAE's training lies over processes; here, the layout of a process that trains alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from saemnesia_fast import ops
from saemnesia_fast.sae import TopKSAE


class Layout:
    """A process alone: it has all tokens and all latents, and nothing is exchanged.

    In general processes form a grid. Along "data" they share a batch's tokens, along "latents" the SAE's rows.
    """

    rank: int = 0
    size: int = 1
    """This process's number, and how many there are."""
    data_size: int = 1
    """Processes that share the tokens of a batch."""
    latents_size: int = 1
    """Processes that share the SAE's latents."""
    device: str | None = None
    """This process's device; None leaves it to the trainer."""
    writes: bool = True
    """Whether this process writes logs, metrics and the finished SAE."""

    def rows_of(self, batch: Tensor) -> Tensor:
        """This process's tokens [m, d] of a batch [M, d]."""
        return batch

    def gather_tokens(self, part: Tensor) -> Tensor:
        """[M, ...] of every process's [m, ...], in the order of the batch's shares."""
        return part

    def sum_over_data(self, part: Tensor) -> Tensor:
        """The sum over the processes that share the tokens."""
        return part

    def sum_over_latents(self, part: Tensor) -> Tensor:
        """The sum over the processes that share the latents."""
        return part

    def shard(self, num_latents: int) -> slice:
        """Which of N latents this process holds."""
        return slice(0, num_latents)

    def own_latents(self, sae: TopKSAE) -> TopKSAE:
        """`sae` with this process's latents alone, in place; its configuration still tells of all of them."""
        return sae

    def whole(self, sae: TopKSAE) -> TopKSAE:
        """`sae` with every process's latents again, in place."""
        return sae

    def all_latents(self, rows: Tensor, num_latents: int) -> Tensor:
        """[N, ...] of every process's rows [n, ...]."""
        return rows

    def as_whole(self, rows: Tensor) -> Tensor:
        """[N, ...] as a tensor over the processes, of which this one's part is `rows` [n, ...]: their memory."""
        return rows

    def top_latents(self, values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest [m, k] of all processes' candidates: values, 0 where another process has the latent, and
        this process's indices."""
        return values, indices

    def keep_largest(self, z: Tensor, k: int) -> Tensor:
        """z [m, C] with all but each token's k largest, over all processes' columns, set to 0."""
        if k >= z.shape[1]:
            return z
        values, columns = z.topk(k, dim=1, sorted=False)
        return torch.zeros_like(z).scatter_(1, columns, values)

    def decode(self, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        """x_hat [m, d] of all processes' latents."""
        return ops.decode(values, indices, W_dec, b_dec)

    def agree(self, verdict: bool) -> bool:
        """Whether all processes say yes."""
        return verdict

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """Let what fails in one process end the block in all of them, which leave it together."""
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        if not self.agree(error is None):
            raise error or RuntimeError("train: another process has failed")


ALONE = Layout()
