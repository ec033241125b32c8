"""Training with torchao's 8-bit moments; its compiled step runs eagerly here, but in the slow test."""

import sys
from typing import Any

import pytest
import torch

from saemnesia_fast.sae import TopKSAE
from saemnesia_fast.training import TensorActivations, TrainConfig, Trainer, train_sae
from test_training import Interrupted, Interrupting, data, metrics, sparse_tokens
from test_training_step import train

RECIPE: dict[str, Any] = {"num_latents": 512, "k": 3, "progress": False, "device": "cpu", "lr": 3e-3, "log_every": 1}
RECIPE |= {"adam_eps": 1e-5}


@pytest.fixture
def _torchao(monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.usefixtures("_torchao")
def test_learns_nearly_as_float32_does():
    """512 x 8 weights are more than the 4096 from which torchao quantises; the loss of both runs is alike."""
    fvu = []
    for moments in ("float32", "8bit"):
        trainer = Trainer(TrainConfig(**RECIPE, steps=60, moments=moments), data())
        trainer.fit()
        fvu.append(float(trainer.train_step(sparse_tokens()[:64]).fvu))
    state = trainer._adam.state_dict()
    assert state["W_dec.exp_avg.codes"].dtype == torch.uint8
    assert state["W_dec.exp_avg.codes"].any()
    assert fvu[1] < 1.05 * fvu[0] < 0.4
    torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(512))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_compiled_step_is_the_eager_one(monkeypatch):
    pytest.importorskip("torchao")
    trained = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        trained.append(Trainer(TrainConfig(**RECIPE, steps=5, moments="8bit"), data()).fit())
    for one, other in zip(*(sae.parameters() for sae in trained), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)


@pytest.mark.usefixtures("_torchao")
def test_resume_is_bit_identical(tmp_path):
    recipe = RECIPE | {"steps": 12, "checkpoint_every": 4, "moments": "8bit", "compute_dtype": "bfloat16"}
    straight = train_sae(TrainConfig(**recipe, out_dir=tmp_path / "straight"), data())
    config = TrainConfig(**recipe, out_dir=tmp_path / "resumed", resume=True)
    with pytest.raises(Interrupted):
        train_sae(config, Interrupting(10, sparse_tokens(), 64))
    resumed = train_sae(config, data())
    assert resumed.content_hash() == straight.content_hash()
    assert metrics(tmp_path / "straight/sae") == metrics(tmp_path / "resumed/sae")


@pytest.mark.usefixtures("_torchao")
def test_a_bad_batch_changes_nothing():
    good = sparse_tokens()[:64]
    bad = torch.full_like(good, torch.nan)
    before, after = (train(batches, moments="8bit", adam_eps=1e-5) for batches in ([good, good], [good, good, bad]))
    for one, other in zip(before.sae.parameters(), after.sae.parameters(), strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(t, after._adam.state_dict()[name]) for name, t in before._adam.state_dict().items())


def test_an_absent_torchao_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ImportError, match="moments: '8bit' needs `pip install torchao`"):
        Trainer(
            TrainConfig(**RECIPE, steps=1, moments="8bit"),
            TensorActivations(sparse_tokens(), 64),
            TopKSAE.init(8, 512, 3),
        )
    with pytest.raises(ValueError, match="adam_eps: expected a number >= 1e-06 with 8-bit moments"):
        TrainConfig(moments="8bit")
