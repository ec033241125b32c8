"""The trainer on a GPU: no step waits for the host, and the SAE is that of the CPU (SPEC 4.1, 4.3)."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("tqdm")

from saemnesia_fast.sae import TopKSAE
from saemnesia_fast.training import TrainConfig, Trainer

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
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = [trainer.train_step(batch) for batch in tokens]
    finally:
        torch.cuda.set_sync_debug_mode("default")
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
