"""The trainer on a GPU: no step waits for the host, and the SAE is that of the CPU (SPEC 4.1, 4.3)."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("tqdm")

from saemnesia_fast import ops
from saemnesia_fast.sae import TopKSAE
from saemnesia_fast.training import ShardActivations, TrainConfig, Trainer
from shards import shards
from triton_cases import assert_no_worse
from waiting import no_waiting
from weights import random_tokens

pytestmark = pytest.mark.gpu

D, N, K, M = 128, 2048, 8, 1024


class Batches:
    """The same tokens in every run, on the device asked for."""

    def __init__(self, device: str, bad: tuple[int, ...] = ()) -> None:
        self.device = device
        self.bad = bad

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        directions = torch.nn.functional.normalize(torch.randn(64, D, generator=generator), dim=1)
        step = 0
        while True:
            codes = torch.rand(M, 64, generator=generator) * (torch.rand(M, 64, generator=generator) < 0.05)
            batch = codes @ directions + 0.02 * torch.randn(M, D, generator=generator) + 0.3
            if step in self.bad:
                batch[7] = torch.nan
            step += 1
            yield batch.to(self.device)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def recipe(device: str, **options: Any) -> TrainConfig:
    sizes: dict[str, Any] = {"num_latents": N, "k": K, "steps": 40, "lr": 3e-3, "dead_after": 4 * M, "progress": False}
    return TrainConfig(device=device, **sizes | options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_topk": True, "micro_batches": 2},
        {"multi_topk": True, "compute_dtype": "float16", "moments": "bfloat16"},
        {"compute_dtype": "bfloat16", "k_start": 16, "k_steps": 20},
    ],
)
def test_steps_between_two_readings_do_not_wait_for_the_device(options: dict[str, Any]) -> None:
    """torch raises where the host would wait: it may before the first step of a window, as when metrics are read."""
    trainer = Trainer(recipe("cuda", log_every=16, **options), Batches("cuda"))
    batches = iter(Batches("cuda"))
    for _ in range(17):
        trainer.train_step(next(batches))
    tokens = [next(batches) for _ in range(15)]
    torch.cuda.synchronize()
    with no_waiting():
        metrics = [trainer.train_step(batch) for batch in tokens]
    assert trainer.check() == set()
    last = metrics[-1]
    assert last is not None
    assert 0 < last.fvu.item() < 0.6
    assert last.dead.item() > 0
    assert last.auxk.item() > 0


def test_learns_as_on_the_cpu() -> None:
    """The first step agrees to rounding; after 40 the losses do, though rounding has gone separate ways."""
    start = TopKSAE.init(D, N, K, seed=0)
    trainers = []
    for device in ("cpu", "cuda"):
        sae = TopKSAE(start.cfg)
        sae.load_state_dict(start.state_dict())
        trainers.append(Trainer(recipe(device), Batches(device), sae))
    on_cpu, on_gpu = (iter(Batches(device)) for device in ("cpu", "cuda"))
    for step in range(40):
        one, other = (t.train_step(next(b)) for t, b in zip(trainers, (on_cpu, on_gpu), strict=True))
        assert one is not None
        assert other is not None
        torch.testing.assert_close(other.fvu.cpu(), one.fvu, rtol=1e-4 if step == 0 else 0.02, atol=0)
        torch.testing.assert_close(other.l0.cpu(), one.l0, rtol=1e-3 if step == 0 else 0.02, atol=0)


def test_bad_batches_are_skipped_and_named_when_the_metrics_are_read(caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer(recipe("cuda", on_bad_batch="skip", log_every=10), Batches("cuda", bad=(0, 13, 14)))
    sae = trainer.fit()
    assert trainer.skipped == 3
    assert trainer.tokens == 37 * M
    assert all(parameter.isfinite().all() for parameter in sae.parameters())
    assert [f"batch {number}," in text for number, text in zip((0, 13, 14), caplog.messages, strict=True)] == [True] * 3
    with pytest.raises(ValueError, match=r"NaN or inf in 1 tokens of batch 13, first in row 7"):
        Trainer(recipe("cuda", log_every=10), Batches("cuda", bad=(13,))).fit()


def test_runs_are_bit_identical() -> None:
    first, second = (Trainer(recipe("cuda"), Batches("cuda")).fit() for _ in range(2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_windows_on_the_device_give_the_same_batches(tmp_path: Path) -> None:
    """Made on a stream of the thread's own, and kept until the reader's stream has used them."""
    shards(tmp_path, [8 * 1024] * 4, d=64, maps=32)
    options: dict[str, Any] = {"batch_size": 1024, "buffer_tokens": 4096}
    expected = list(islice(ShardActivations(tmp_path, "block", **options), 60))
    found = []
    for batch in islice(ShardActivations(tmp_path, "block", device="cuda", **options), 60):
        assert batch.is_cuda
        torch.cuda._sleep(1_000_000)
        found.append(batch + 0)
    assert all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))


def on_the_kept(indices: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """x_hat [M, d] by the latents that `indices` [M, k] name, in plain PyTorch."""
    rows = indices.long()
    values = (torch.einsum("md,mkd->mk", x - b_dec, W_enc[rows]) + b_enc[rows]).relu()
    return torch.einsum("mk,mkd->md", values, W_dec[rows]) + b_dec


def assert_backward_is_as_good_as_autograd(device: str, dtype: torch.dtype) -> None:
    """Of all parameters and of the tokens, where the kept latents are the same; against float64."""
    sae = TopKSAE.init(1280, 20480, 32, device=device, dtype=dtype)
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * random_tokens(20480))
        sae.b_dec.copy_(0.1 * random_tokens(1280))
    x = random_tokens(256, 1280).to(device, dtype).requires_grad_()
    wanted = (x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)

    def gradients(x_hat: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((x_hat - leaves[0]).double().square().sum(), leaves)

    x_hat, latents = sae(x)
    found = gradients(x_hat, *wanted)
    plain, exact = (
        gradients(on_the_kept(latents.indices, *leaves), *leaves)
        for leaves in ([t.detach().to(own).requires_grad_() for t in wanted] for own in (dtype, torch.float64))
    )
    for ours, theirs, want in zip(found, plain, exact, strict=True):
        assert ours.dtype == dtype
        assert_no_worse(ours, theirs, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_backward_is_as_good_as_autograd(dtype: torch.dtype) -> None:
    chosen = {choice.op: choice.backend for choice in ops.backend_report("cuda")}
    assert (chosen["encode_topk"], chosen["decode"]) == ("triton", "triton")
    assert {chosen[op] for op in ("encoder_gradients", "decoder_gradient", "gather_dot")} == {"cuda"}
    assert_backward_is_as_good_as_autograd("cuda", dtype)
