"""The step without autograd: its gradient against dense float64 autograd, and what a bad batch leaves behind."""

import logging
from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saemnesia_fast import ops
from saemnesia_fast.ops import validation
from saemnesia_fast.sae import TopKSAE
from saemnesia_fast.training import TrainConfig, Trainer
from saemnesia_fast.training.activity import LatentActivity
from saemnesia_fast.training.optim import Adam, scheduled_k
from saemnesia_fast.training.step import Objective, batch_gradient
from test_training import RECIPE, D, K, N, data, sparse_tokens
from test_training_loss import dead_mask, dense_loss, gradients

WIDE, LATENTS, M = 12, 40, 17
BACKENDS = ["eager", "cpu"]


@pytest.fixture(params=BACKENDS)
def _backend(request):
    with ops.use_backend(request.param):
        yield


@pytest.fixture
def sae():
    generator = torch.Generator().manual_seed(1)
    sae = TopKSAE.init(WIDE, LATENTS, K, seed=0, normalize_decoder=False).double()
    for parameter in sae.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return sae


@pytest.fixture
def x():
    return torch.randn(M, WIDE, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.5


def gradient_of(sae, found):
    """The four gradients, as the first moments that a step of Adam leaves behind tell them."""
    adam = Adam(sae, eps=1.0)
    adam.step(found, 1, 0.0, torch.ones((), dtype=torch.float64))
    state = adam.state_dict()
    return {name: state[f"{name}.exp_avg"] / (1 - 0.9) for name, _ in sae.named_parameters()}


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("batch_topk", [False, True])
@pytest.mark.parametrize("multi_topk", [False, True])
@pytest.mark.parametrize(("n_dead", "n_alive"), [(0, 0), (0, 3), (1, 0), (4, 5), (6, 1), (25, 7), (LATENTS, 0)])
def test_gradient_equals_dense_autograd(sae, x, n_dead, n_alive, multi_topk, batch_topk):
    """SPEC 4.1, with fewer and with more dead latents than k_aux = d/2 = 6, and living ones among the candidates."""
    dead = dead_mask(n_dead)
    candidates = torch.cat([dead.nonzero()[:, 0], (~dead).nonzero()[:n_alive, 0]]).sort().values
    objective = Objective(K, 1 / 32, multi_topk, batch_topk)
    found = batch_gradient(
        sae.requires_grad_(False), x, objective, *((dead[candidates], candidates) if len(candidates) else ())
    )
    got = gradient_of(sae, found)
    loss, fvu, auxk = dense_loss(sae.requires_grad_(True), x, dead, multi_topk=multi_topk, batch_topk=batch_topk)
    torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.fvu, fvu.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.auxk, auxk.detach(), rtol=1e-12, atol=1e-14)
    expected = gradients(sae, loss)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)
    norm = sum(gradient.square().sum() for gradient in expected.values()).sqrt()
    torch.testing.assert_close(found.norm, norm, rtol=1e-10, atol=0)


def test_encoding_in_parts_changes_nothing(sae, x):
    """Of the whole batch, also where BatchTopK shares one budget."""
    for batch_topk in (False, True):
        objective = Objective(K, multi_topk=True, batch_topk=batch_topk)
        whole, parts = (batch_gradient(sae, x, objective, micro_batches=count) for count in (1, 4))
        for name, gradient in gradient_of(sae, whole).items():
            torch.testing.assert_close(gradient_of(sae, parts)[name], gradient, rtol=1e-12, atol=1e-15)
        assert torch.equal(whole.hits, parts.hits)


def train(batches, **options):
    """A trainer after steps on `batches`, which reads what was refused only at the end, as on a GPU."""
    trainer = Trainer(TrainConfig(**RECIPE | options, steps=100, lr=1e-2), data(), TopKSAE.init(D, N, K, seed=3))
    check, trainer.check = trainer.check, lambda: set()  # type: ignore[method-assign]
    for batch in batches:
        trainer.train_step(batch)
    trainer.check = check  # type: ignore[method-assign]
    return trainer


def state_of(trainer):
    return [*trainer.sae.state_dict().values(), *trainer._adam.state_dict().values(), trainer.activity.firings]


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("options", [{}, {"batch_topk": True, "moments": "bfloat16", "compute_dtype": "float16"}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30, "constant"])
def test_a_bad_batch_changes_nothing(bad, options, caplog):
    """Refused on the device: weights, moments and counters are those from before, and the batch is named later."""
    good = sparse_tokens()[:64]
    batch = torch.full((64, D), 0.5)
    if bad != "constant":
        batch = sparse_tokens(seed=1)[:64]
        batch[5:7, 2] = bad
    before = train([good, good], **options)
    after = train([good, good, batch], **options)
    for one, other in zip(state_of(before), state_of(after), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(before._fvu_sum, after._fvu_sum)
    assert torch.equal(before.activity.tokens_since_fired, after.activity.tokens_since_fired)
    reasons: dict[Any, str] = {"constant": "batch 2 has a total variance of 0", 1e30: "batch 2 has a"}
    reason = reasons.get(bad, "NaN or inf in 2 tokens of batch 2, first in row 5")
    with pytest.raises(ValueError, match=f"data: {reason}.*; on_bad_batch='skip' leaves such batches out"):
        after.check()
    skipping = train([good, batch, good], **options, on_bad_batch="skip")
    with caplog.at_level(logging.WARNING):
        assert skipping.check() == {1}
    assert (skipping.step, skipping.tokens, skipping.skipped) == (3, 128, 1)
    assert "train: skipped: data: " in caplog.text


class NoLooking(TorchDispatchMode):
    """Raises where the host would wait for a GPU."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        looks = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "is_pinned")
        assert not any(function._schema.name.split("::")[1].startswith(name) for name in looks), function
        if "copy" in function._schema.name:
            assert len({t.device for t in arguments if isinstance(t, torch.Tensor)}) == 1
        return function(*arguments, **(options or {}))


class Counting(TorchDispatchMode):
    """Counts calls that launch something on a GPU: views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if not function.is_view:
            self.calls.append(str(function))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("_backend", ["cpu"], indirect=True)
@pytest.mark.usefixtures("_backend")
def test_a_step_is_few_calls():
    """So that a host that needs some microseconds for each is ahead of a GPU that needs a millisecond for the step."""
    batch = sparse_tokens()[:64]
    trainer = train([batch, batch], auxk_alpha=0.0)
    with Counting() as counting:
        trainer.train_step(batch)
    assert len(counting.calls) < 80, counting.calls


@pytest.mark.parametrize("options", [{}, {"batch_topk": True}, {"multi_topk": True, "micro_batches": 2}])
def test_steps_between_two_readings_do_not_wait_for_the_device(options, monkeypatch):
    """But once every `log_every` steps, here before the first of them; AuxK is at work."""
    monkeypatch.setattr(validation, "check_range", lambda *_: None)
    monkeypatch.setattr("saemnesia_fast.ops.registration.check_range", lambda *_: None)
    batch = sparse_tokens()[:64]
    with ops.use_backend("cpu"):
        trainer = train([batch], **options, dead_after=64)
        trainer.check = lambda: set()  # type: ignore[method-assign]
        with NoLooking():
            metrics = trainer.train_step(batch)
    assert metrics.dead > 0
    assert metrics.auxk > 0


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize(("d", "latents", "k", "tokens"), [(1, 5, 5, 7), (3, 1, 1, 2), (6, 33, 33, 4)])
def test_odd_sizes_train(d, latents, k, tokens):
    """One channel, one latent, all latents kept, fewer tokens than parts: the loss falls and stays finite."""
    x = torch.randn(tokens, d, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(k=k, steps=40, lr=1e-2, micro_batches=8, dead_after=1, device="cpu", progress=False)
    trainer = Trainer(config, data(), TopKSAE.init(d, latents, k, seed=1))
    first, *_, last = (float(trainer.train_step(x).fvu) for _ in range(40))
    assert last < first
    with pytest.raises(ValueError, match=rf"data: expected \[M, d={d}\] to match the SAE, got \[0, {d}\] in batch 40"):
        trainer.train_step(x[:0])


def test_dead_latents_are_foreseen():
    """At every step the dead among the candidates are all the dead there are, over many windows."""
    generator = torch.Generator().manual_seed(0)
    activity = LatentActivity(100, 400, "cpu", steps_ahead=16)
    rates = torch.rand(100, generator=generator) ** 6
    seen = 0
    for _ in range(160):
        expected = (activity.tokens_since_fired >= 400).nonzero()[:, 0]
        found = activity.dead(16)
        dead = torch.tensor([], dtype=torch.int64) if found is None else found[1][found[0]]
        assert torch.equal(dead, expected)
        seen += len(dead)
        activity.add((torch.rand(100, generator=generator) < rates).long(), 16, torch.tensor(True))
    assert seen > 0
    report = activity.report(tokens=160 * 16)
    assert report["dead"] == int((activity.tokens_since_fired >= 400).sum())
    assert report["never_fired"] == int((activity.firings == 0).sum())
    assert report["log10_firings_per_token"]["0.5"] < 0


def test_k_falls_to_its_value():
    assert [scheduled_k(step, 4, 12, 4) for step in range(6)] == [12, 10, 8, 6, 4, 4]
    assert scheduled_k(0, 4, None, 4) == 4
    seen = []
    trainer = Trainer(TrainConfig(**RECIPE, steps=9, k_start=6, k_steps=6), data())
    for batch in islice(data(), 9):
        seen.append(round(float(trainer.train_step(batch).l0)))
    assert seen[0] == 6
    assert seen[-1] == K
    assert trainer.sae.k == K


@pytest.mark.parametrize(
    ("options", "worse"), [({"compute_dtype": "bfloat16"}, 1.15), ({"compute_dtype": "float16"}, 1.05),
                           ({"moments": "bfloat16"}, 1.05)]
)  # fmt: skip
def test_short_formats_learn_as_well(options, worse):
    """bf16 or fp16 encoding over float32 weights, and bf16 moments: the loss is that of float32, nearly."""
    batches = [sparse_tokens(4096, seed=seed)[:512] for seed in range(60)]
    fvu = []
    for choice in ({}, options):
        trainer = train(batches, **choice, dead_after=1000)
        fvu.append(float(trainer.train_step(sparse_tokens(4096, seed=99)[:512]).fvu))
        assert trainer.sae.W_dec.dtype == torch.float32
    assert fvu[1] < worse * fvu[0] < worse * 0.6


def test_sixteen_bit_weights_follow_the_masters():
    trainer = train([sparse_tokens()[:64]] * 5, compute_dtype="bfloat16")
    assert torch.equal(trainer._adam.encoder, trainer.sae.W_enc.bfloat16())
