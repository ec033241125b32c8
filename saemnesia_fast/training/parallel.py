"""Training one SAE on several processes: tokens shared out one way, latents the other."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from saemnesia_fast import ops
from saemnesia_fast.sae import TopKSAE
from saemnesia_fast.training.layout import ALONE, Layout

if TYPE_CHECKING:
    from torch.distributed import Store
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger("saemnesia_fast")
FAILURE = "failure"


class Grid(Layout):
    """Processes ("ranks") in a grid of data ranks x latent ranks, as torchrun starts them; see `connect`.

    A rank takes an equal share of every batch's tokens, and holds consecutive rows of W_enc, b_enc and W_dec with their
    moments; b_dec is held by all. Nothing is stale: ranks exchange the values, indices and errors of their tokens, of
    which each makes the whole batch's gradient of its rows. So ranks that hold the same rows stay equal, bit for bit.
    All ranks must call the methods alike.

    Symbols: M tokens of the batch, m those of this rank; N latents, n those of this rank.
    """

    def __init__(self, mesh: DeviceMesh, device: str) -> None:
        self.mesh = mesh
        """Of the dimensions "data" and "latents"."""
        self.device = device
        self.data_size, self.latents_size = mesh.shape
        self.data_rank, self.latents_rank = mesh.get_local_rank("data"), mesh.get_local_rank("latents")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.writes = self.rank == 0

    def rows_of(self, batch: Tensor) -> Tensor:
        """This rank's tokens [m, d] of a batch [M, d], a run of them; a ValueError where data ranks do not divide M."""
        m, rest = divmod(len(batch), self.data_size)
        if rest:
            expected = f"a number of tokens that the {self.data_size} processes can share equally"
            raise ValueError(f"data: expected {expected}, got {len(batch)}")
        return batch[self.data_rank * m : (self.data_rank + 1) * m]

    def gather_tokens(self, part: Tensor) -> Tensor:
        """[M, ...] of every data rank's [m, ...], in the batch's order."""
        return part if self.data_size == 1 else self._gather(part, "data").flatten(0, 1)

    def sum_over_data(self, part: Tensor) -> Tensor:
        """The sum of the data ranks' tensors, the same bits on each of them."""
        return part if self.data_size == 1 else self._sum(part, "data")

    def sum_over_latents(self, part: Tensor) -> Tensor:
        """The sum of the latent ranks' tensors, the same bits on each of them."""
        return part if self.latents_size == 1 else self._sum(part, "latents")

    def shard(self, num_latents: int) -> slice:
        """Which of N latents this rank holds: N / latent ranks, rounded up, and the last rank what is left."""
        rows = -(-num_latents // self.latents_size)
        if rows * (self.latents_size - 1) >= num_latents:
            raise ValueError(f"latent_ranks: {num_latents} latents cannot be shared by {self.latents_size} processes")
        return slice(self.latents_rank * rows, min((self.latents_rank + 1) * rows, num_latents))

    def own_latents(self, sae: TopKSAE) -> TopKSAE:
        """`sae` with this rank's latents alone, in place; its configuration still tells of all of them."""
        if len(sae.W_dec) == sae.num_latents and self.latents_size > 1:
            rows = self.shard(sae.num_latents)
            _exchange(sae, lambda whole: whole[rows].clone())
        return sae

    def whole(self, sae: TopKSAE) -> TopKSAE:
        """`sae` with every rank's latents again, in place; in host memory, as a device may have no room for it."""
        if self.latents_size > 1:
            _exchange(sae, lambda rows: self.all_latents(rows, sae.num_latents).cpu())
            sae.to("cpu")
        return sae

    def all_latents(self, rows: Tensor, num_latents: int) -> Tensor:
        """[N, ...] of every latent rank's [n, ...]."""
        if self.latents_size == 1:
            return rows
        missing = -(-num_latents // self.latents_size) - len(rows)
        padded = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
        return self._gather(padded, "latents").flatten(0, 1)[:num_latents]

    def as_whole(self, rows: Tensor) -> Tensor:
        """The distributed tensor [N, ...] of which this rank holds `rows` [n, ...]; it shares their memory."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        num_latents = int(self.sum_over_latents(torch.tensor(len(rows), device=self.device)))
        shape = torch.Size((num_latents, *rows.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        placements = [Replicate(), Shard(0)]
        return DTensor.from_local(rows, self.mesh, placements, run_check=False, shape=shape, stride=stride)

    def top_latents(self, values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Which of this rank's latents are among the k largest of all: (values [m, k], indices [m, k]).

        values [m, w <= k]: this rank's largest, >= 0 and descending, equal ones by ascending index; indices: theirs
        among its rows. In the result a latent has the column that it has among all, so the largest k' < k are the first
        columns; equal values go to the lowest index of all, as without ranks. Columns of other ranks' latents have
        value 0 and index 0. A token with NaN has values NaN.
        """
        if self.latents_size == 1:
            return values, indices
        # -1 is below every value: what fills up is taken last. A stable sort keeps the order of ranks, hence indices.
        padded = torch.nn.functional.pad(values, (0, k - values.shape[1]), value=-1.0)
        candidates = self._gather(padded, "latents").movedim(0, 1).flatten(1)
        top, columns = (part[:, :k] for part in candidates.sort(dim=1, descending=True, stable=True))
        column = columns - self.latents_rank * k
        own = (column >= 0) & (column < values.shape[1])
        local = torch.nn.functional.pad(indices, (0, k - values.shape[1])).gather(1, torch.where(own, column, 0))
        own_values = torch.where(own, top, 0).masked_fill(top[:, :1].isnan(), torch.nan)
        return own_values, torch.where(own, local, 0)

    def keep_largest(self, z: Tensor, k: int) -> Tensor:
        """z [m, C] >= 0 of this rank's C latents, with 0 in place of what is not among a token's k largest of all."""
        if self.latents_size == 1:
            return super().keep_largest(z, k)
        own = z.topk(min(k, z.shape[1]), sorted=False).values
        largest = self._gather(torch.nn.functional.pad(own, (0, k - own.shape[1]), value=-1.0), "latents")
        everyone = largest.movedim(0, 1).flatten(1)
        least = everyone.kthvalue(everyone.shape[1] - k + 1, dim=1, keepdim=True).values
        # Of those equal to the least, earlier ranks' and then earlier columns' are kept.
        before = (largest[: self.latents_rank] == least).sum((0, 2)) + (everyone > least).sum(1)
        equal = z == least
        return torch.where((z > least) | (equal & (equal.cumsum(1) <= k - before[:, None])), z, 0)

    def decode(self, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        """x_hat [m, d] of all ranks' latents, for each rank's `top_latents`."""
        if self.latents_size == 1:
            return ops.decode(values, indices, W_dec, b_dec)
        return self._sum(ops.decode(values, indices, W_dec, torch.zeros_like(b_dec)), "latents") + b_dec

    def agree(self, verdict: bool) -> bool:
        """Whether all ranks say yes. Returns when all have been asked."""
        votes = torch.tensor(int(verdict), device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MIN)
        return bool(votes)

    def _gather(self, tensor: Tensor, dimension: str) -> Tensor:
        """[ranks, ...] of one dimension's ranks."""
        group = self.mesh.get_group(dimension)
        gathered = tensor.new_empty(group.size(), *tensor.shape)
        # Torch 2.13 deprecates the older name.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(gathered.view(-1), tensor.reshape(-1), group=group)
        return gathered

    def _sum(self, tensor: Tensor, dimension: str) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.mesh.get_group(dimension))
        return total


def _exchange(sae: TopKSAE, make: Callable[[Tensor], Tensor]) -> None:
    """Put what `make` makes of them in place of `sae`'s weights that have a row for each latent."""
    for module, name in ((sae.encoder, "weight"), (sae.encoder, "bias"), (sae, "W_dec")):
        weight = getattr(module, name)
        setattr(module, name, torch.nn.Parameter(make(weight.detach()), weight.requires_grad))


@contextmanager
def connect(
    latent_ranks: int = 1, device: str | None = None, timeout: timedelta = timedelta(minutes=10)
) -> Iterator[Layout]:
    """The processes that torchrun started, in a `Grid` of `latent_ranks` columns; without torchrun, `ALONE`.

    Reads torchrun's RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Talks by NCCL where `device` is cuda,
    which it is by default if there is one, else by gloo. Within, only the first rank logs what is no error. Where a
    rank fails the others do too, as soon as they miss it and after `timeout` at the latest, with a RuntimeError that
    says what happened to it.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if latent_ranks < 1 or size % latent_ranks:
        raise ValueError(f"latent_ranks: expected a divisor of the {size} processes, got {latent_ranks}")
    if size == 1:
        yield ALONE
        return
    from torch.distributed.device_mesh import init_device_mesh

    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    options: dict[str, Any] = {}
    if kind == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
        options["device_id"] = torch.device(device)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore("saemnesia_fast", store)
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, **options)

    def is_logged(record: logging.LogRecord) -> bool:
        return rank == 0 or record.levelno >= logging.ERROR

    logger.addFilter(is_logged)
    try:
        mesh = init_device_mesh(kind, (size // latent_ranks, latent_ranks), mesh_dim_names=("data", "latents"))
        yield Grid(mesh, device or kind)
    except BaseException as error:
        what = f"{type(error).__name__}: {error}"
        first = _first_failure(store, f"rank {rank}: {what}")
        if backend == "gloo":  # This is what the others notice. NCCL might wait for them here.
            dist.destroy_process_group()
        if first.endswith(f": {what}"):
            raise
        raise RuntimeError(f"train: rank {rank} of {size} stops, as another has failed: {first}") from error
    finally:
        logger.removeFilter(is_logged)
    dist.destroy_process_group()


def _first_failure(store: Store, failure: str) -> str:
    """What the rank that failed first has left in the store: `failure` where this is that rank."""
    with suppress(RuntimeError):
        return store.compare_set(FAILURE, "", failure).decode()
    return failure
