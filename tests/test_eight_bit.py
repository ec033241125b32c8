"""Training with 8-bit moments: in the update of `optim.Adam`, and where it has none, for d of 8 here, torchao's.

torchao's compiled step runs eagerly here, but in the slow test.
"""

import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from saemnesia_fast.sae import TopKSAE
from saemnesia_fast.training import TensorActivations, TrainConfig, Trainer, train_sae, trainer
from saemnesia_fast.training.eight_bit import EightBitAdam
from test_training import Interrupted, Interrupting, data, metrics, sparse_tokens
from test_training_step import train

D = 256
RECIPE: dict[str, Any] = {"num_latents": 512, "k": 3, "progress": False, "device": "cpu", "lr": 3e-3, "log_every": 1}
RECIPE |= {"adam_eps": 1e-5}


def wide_tokens(n: int = 640, d: int = D) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(20, d, generator=generator), dim=1)
    codes = torch.rand(n, 20, generator=generator) * (torch.rand(n, 20, generator=generator) < 0.1)
    return codes @ directions + 0.01 * torch.randn(n, d, generator=generator)


def curve_of(moments: str, steps: int = 60, **more: Any) -> tuple[list[float], Trainer]:
    """The loss of each step of training on `wide_tokens`, and the trainer."""
    recipe = RECIPE | {"num_latents": 40, "steps": steps, "lr_schedule": "constant", "moments": moments} | more
    found = Trainer(TrainConfig(**recipe), (), TopKSAE.init(D, 40, 3, seed=1))
    batches = wide_tokens().split(64)
    return [float(found.train_step(batches[i % len(batches)]).loss) for i in range(steps)], found


@pytest.fixture
def _no_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)


@pytest.mark.usefixtures("_no_torchao")
def test_the_loss_is_nearly_that_of_float32_moments():
    wide, _ = curve_of("float32")
    narrow, found = curve_of("8bit")
    state = found._adam.state_dict()
    assert state["W_dec.exp_avg.codes"].dtype == torch.uint8
    assert state["W_dec.exp_avg.codes"].shape == (40, D)
    assert state["encoder.weight.exp_avg_sq.scale"].shape == (40, 1)
    assert state["encoder.bias.exp_avg"].dtype == torch.float32
    assert wide[-1] < 0.5 * wide[0]
    assert all(abs(b - a) < 0.05 * a for a, b in zip(wide, narrow, strict=True))


@pytest.mark.usefixtures("_torchao")
def test_equals_torchao(monkeypatch):
    """The same weights, scales and codes after a step, but where float32's last bit decides; the same curve later."""
    first, ours = curve_of("8bit", 1)
    long, _ = curve_of("8bit")
    monkeypatch.setattr(trainer, "needs_torchao", lambda d: True)
    first_of_theirs, theirs = curve_of("8bit", 1)
    long_of_theirs, _ = curve_of("8bit")
    assert isinstance(theirs._adam, EightBitAdam)
    assert first == first_of_theirs
    mine, other = ours._adam.state_dict(), theirs._adam.state_dict()
    for name in ("encoder.weight", "W_dec"):
        for moment in ("exp_avg", "exp_avg_sq"):
            codes, scale = (f"{name}.{moment}.{part}" for part in ("codes", "scale"))
            assert (mine[codes] != other[codes]).float().mean() < 1e-3, codes
            torch.testing.assert_close(mine[scale].flatten(), other[scale], rtol=1e-4, atol=1e-12)
    for one, another in zip(ours.sae.parameters(), theirs.sae.parameters(), strict=True):
        assert ((one - another).abs() > 1e-5).float().mean() < 1e-3
    assert all(abs(b - a) < 0.005 * a for a, b in zip(long, long_of_theirs, strict=True))


@pytest.mark.usefixtures("_no_torchao")
def test_rows_of_whole_blocks_resume_bit_identically(tmp_path):
    recipe = RECIPE | {"num_latents": 40, "steps": 12, "checkpoint_every": 4, "moments": "8bit"}
    recipe |= {"compute_dtype": "bfloat16"}
    straight = train_sae(TrainConfig(**recipe, out_dir=tmp_path / "straight"), TensorActivations(wide_tokens(), 32))
    config = TrainConfig(**recipe, out_dir=tmp_path / "resumed", resume=True)
    with pytest.raises(Interrupted):
        train_sae(config, Interrupting(10, wide_tokens(), 32))
    resumed = train_sae(config, TensorActivations(wide_tokens(), 32))
    assert resumed.content_hash() == straight.content_hash()
    assert metrics(tmp_path / "straight/sae") == metrics(tmp_path / "resumed/sae")


@pytest.mark.usefixtures("_no_torchao")
def test_a_bad_batch_leaves_all_bits_of_rows_of_whole_blocks():
    _, found = curve_of("8bit", 3, on_bad_batch="skip")
    before = [tensor.clone() for tensor in (*found.sae.state_dict().values(), *found._adam.state_dict().values())]
    assert found.train_step(torch.full((64, D), torch.nan)) is None
    after = (*found.sae.state_dict().values(), *found._adam.state_dict().values())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.fixture
def _torchao(monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.usefixtures("_torchao")
def test_learns_nearly_as_float32_does():
    """512 x 8 weights are more than the 4096 from which torchao quantises; the loss of both runs is alike."""
    fvu = []
    for moments in ("float32", "8bit"):
        found = Trainer(TrainConfig(**RECIPE, steps=60, moments=moments), data())
        found.fit()
        fvu.append(float(found.train_step(sparse_tokens()[:64]).fvu))
    state = found._adam.state_dict()
    assert state["W_dec.exp_avg.codes"].dtype == torch.uint8
    assert state["W_dec.exp_avg.codes"].any()
    assert fvu[1] < 1.05 * fvu[0] < 0.4
    torch.testing.assert_close(found.sae.W_dec.norm(dim=1), torch.ones(512))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_compiled_step_is_the_eager_one(monkeypatch):
    """As torch traces and differentiates it; the code that Inductor makes of that takes a minute to compile."""
    pytest.importorskip("torchao")
    trained = []
    for compiled in (partial(torch.compile, backend="aot_eager"), lambda function, **options: function):
        monkeypatch.setattr(torch, "compile", compiled)
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
