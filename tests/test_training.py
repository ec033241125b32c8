"""The training loop: order of a step, schedule, resuming, and what it refuses (SPEC 1.5, 4.1)."""

import json
import sys
import threading
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from saemnesia_fast.files import load_tensors, save_tensors
from saemnesia_fast.sae import TopKSAE
from saemnesia_fast.training import TensorActivations, TrainConfig, Trainer, evaluate_fvu, evaluate_sae, sae_loss
from saemnesia_fast.training.optim import geometric_median, learning_rate, normalize_rows, remove_parallel_gradient
from saemnesia_fast.training.trainer import train_sae

D, N, K = 8, 32, 3
RECIPE: dict[str, Any] = {"num_latents": N, "k": K, "progress": False, "device": "cpu"}


def sparse_tokens(n=600, seed=0):
    """Tokens that are sparse sums of 20 directions around a mean."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(20, D, generator=generator), dim=1)
    codes = torch.rand(n, 20, generator=generator) * (torch.rand(n, 20, generator=generator) < 0.1)
    return codes @ directions + 0.02 * torch.randn(n, D, generator=generator) + 1.0


def data(batch_size=64, **options):
    return TensorActivations(sparse_tokens(**options), batch_size)


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


class Interrupted(Exception):
    """Stands for whatever ends a process."""


class Interrupting(TensorActivations):
    """Gives `count` batches and then fails."""

    def __init__(self, count, *arguments):
        super().__init__(*arguments)
        self.count = count

    def __iter__(self):
        yield from islice(super().__iter__(), self.count)
        raise Interrupted


def test_steps_are_clip_project_adam_normalize():
    """Four steps in float64 against the same written out: the loss's gradient, then SPEC 4.1's order, then Adam."""
    config = TrainConfig(**RECIPE, steps=4, lr=0.01, adam_eps=1e-4, clip_norm=0.1, dead_after=100, warmup_steps=1)
    batches = list(islice(TensorActivations(sparse_tokens().double(), 64), 4))
    sae, by_hand = (TopKSAE.init(D, N, K, seed=3).double().requires_grad_(True) for _ in range(2))
    for start in (sae, by_hand):
        start.W_dec.data /= start.W_dec.data.norm(dim=1, keepdim=True)
    trainer = Trainer(config, data(), sae)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in by_hand.named_parameters()}
    silent = torch.zeros(N, dtype=torch.int64)
    any_dead = False
    for step, (batch, rate) in enumerate(zip(batches, (0.01, 0.01, 0.01 * 2 / 3, 0.01 / 3), strict=True), start=1):
        trainer.train_step(batch)

        dead = silent >= 100
        any_dead |= bool(dead.any())
        result = sae_loss(by_hand, batch, dead)
        silent = (silent + len(batch)) * ~result.fired
        names, parameters = zip(*by_hand.named_parameters(), strict=True)
        gradients = dict(zip(names, torch.autograd.grad(result.loss, parameters), strict=True))
        norm = sum(gradient.square().sum() for gradient in gradients.values()).sqrt()
        assert norm > 0.1
        with torch.no_grad():
            for name, parameter in by_hand.named_parameters():
                gradient = gradients[name] * (0.1 / (norm + 1e-6))
                if name == "W_dec":
                    gradient = gradient - torch.einsum("nd,nd->n", gradient, parameter)[:, None] * parameter
                first, second = moments[name]
                first.mul_(0.9).add_(gradient, alpha=0.1)
                second.mul_(0.999).add_(gradient**2, alpha=0.001)
                update = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-4)
                parameter.sub_(rate * update)
            by_hand.W_dec.div_(by_hand.W_dec.norm(dim=1, keepdim=True))
        for name, parameter in sae.named_parameters():
            torch.testing.assert_close(parameter, by_hand.get_parameter(name), rtol=1e-10, atol=1e-12)
    assert any_dead


def test_micro_batches_give_the_step_of_the_whole_batch():
    batch = next(iter(TensorActivations(sparse_tokens().double(), 64)))
    trained = []
    for micro_batches in (1, 3):
        sae = TopKSAE.init(D, N, K, seed=3).double()
        trainer = Trainer(TrainConfig(**RECIPE, steps=5, micro_batches=micro_batches), data(), sae)
        numbers = trainer.train_step(batch)
        trained.append([*sae.parameters(), *numbers])
    for one, three in zip(*trained, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-9, atol=1e-12)


def test_parallel_gradient_is_removed_from_rows_of_any_length():
    generator = torch.Generator().manual_seed(0)
    W_dec, gradient = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    projected = gradient.clone()
    remove_parallel_gradient(W_dec, projected)
    assert (projected * W_dec).sum(1).abs().max() < 1e-14
    zeros = torch.zeros(1, 4, dtype=torch.float64)
    remove_parallel_gradient(zeros, untouched := gradient[:1].clone())
    normalize_rows(zeros)
    assert torch.equal(untouched, gradient[:1])
    assert torch.equal(zeros, torch.zeros_like(zeros))
    along = gradient - projected
    torch.testing.assert_close(along, (gradient * W_dec).sum(1, True) / (W_dec**2).sum(1, True) * W_dec)


def test_learning_rate_falls_to_zero_after_the_last_step():
    assert [learning_rate(step, 4, 1.0) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [learning_rate(step, 6, 1.0, 2) for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_geometric_median():
    """SPEC 1.5: the Fermat point of a triangle, the median on a line, and a point that is itself a row."""
    triangle = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]], dtype=torch.float64)
    torch.testing.assert_close(geometric_median(triangle), triangle.mean(0))
    line = torch.tensor([[0.0], [1.0], [2.0], [50.0], [900.0]])
    torch.testing.assert_close(geometric_median(line), torch.tensor([2.0]), rtol=1e-4, atol=0)
    x = sparse_tokens().double()
    median = geometric_median(x)
    pull = torch.nn.functional.normalize(x - median, dim=1).mean(0)
    assert pull.norm() < 1e-5
    assert geometric_median(torch.ones(4, 3)).equal(torch.ones(3))


def test_new_sae_starts_at_the_first_batch_s_median():
    trainer = Trainer(TrainConfig(**RECIPE | {"num_latents": None}, expansion_factor=3, steps=1, lr=1e-30), data())
    sae = trainer.fit()
    expected = geometric_median(next(iter(data())))
    torch.testing.assert_close(sae.b_dec.data, expected, rtol=0, atol=1e-6)
    assert (sae.d, sae.num_latents, sae.k) == (D, 3 * D, K)


def test_training_explains_the_variance(tmp_path):
    recipe = RECIPE | {"steps": 200, "lr": 1e-2, "dead_after": 1000, "log_every": 1}
    sae = train_sae(TrainConfig(**recipe, out_dir=tmp_path, hook_point="block"), data())
    curve = metrics(tmp_path / "block")
    assert curve[0]["fvu"] > 0.4
    assert evaluate_fvu(sae, sparse_tokens()) < 0.15
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N))
    again = TopKSAE.from_pretrained(tmp_path, subfolder="block")
    assert again.content_hash() == sae.content_hash()


@pytest.mark.parametrize("options", [{}, {"micro_batches": 2, "multi_topk": True}, {"batch_topk": True}])
def test_resume_is_bit_identical(options, tmp_path):
    """Interrupted after 25 of 40 steps, continued from the checkpoint at 20: weights, moments, counters, curve."""
    recipe = RECIPE | options | {"steps": 40, "lr": 3e-3, "dead_after": 256, "checkpoint_every": 20, "log_every": 1}
    straight = train_sae(TrainConfig(**recipe, out_dir=tmp_path / "straight"), data())

    config = TrainConfig(**recipe, out_dir=tmp_path / "resumed", resume=True)
    with pytest.raises(Interrupted):
        train_sae(config, Interrupting(25, sparse_tokens(), 64))
    assert len(metrics(tmp_path / "resumed/sae")) == 25
    resumed = train_sae(config, data())

    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    last = "sae/checkpoints/step-00000040.safetensors"
    first, second = (load_tensors(tmp_path / run / last) for run in ("straight", "resumed"))
    assert first.keys() == second.keys()
    assert {
        "sae.W_dec",
        "adam.W_dec.exp_avg",
        "adam.b_dec.exp_avg_sq",
        "counters.tokens_since_fired",
        "rng",
    } <= first.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    curve = metrics(tmp_path / "straight/sae")
    assert curve == metrics(tmp_path / "resumed/sae")
    assert any(line["dead"] > 0 and line["auxk"] > 0 for line in curve[20:])


def test_resume_of_a_finished_run_gives_its_sae(tmp_path):
    config = TrainConfig(**RECIPE, out_dir=tmp_path, steps=10, resume=True)
    first = train_sae(config, data())
    again = train_sae(config, Interrupting(0, sparse_tokens(), 64))
    assert again.content_hash() == first.content_hash()


def test_resume_refuses_another_recipe_or_order(tmp_path):
    train_sae(TrainConfig(**RECIPE, out_dir=tmp_path, steps=10), data())
    with pytest.raises(ValueError, match=r"lr: expected 0.0004 as in .*step-00000010.safetensors, got 0.001"):
        Trainer(TrainConfig(**RECIPE, out_dir=tmp_path, steps=10, lr=1e-3, resume=True), data())
    with pytest.raises(ValueError, match="batch_size: expected 64 as in the saved state, got 32"):
        Trainer(TrainConfig(**RECIPE, out_dir=tmp_path, steps=10, resume=True), data(batch_size=32))


def test_resume_drops_a_torn_line(tmp_path):
    """A process killed while it wrote leaves half a line of metrics.jsonl."""
    recipe = RECIPE | {"steps": 20, "checkpoint_every": 10, "log_every": 1, "out_dir": tmp_path, "resume": True}
    with pytest.raises(Interrupted):
        train_sae(TrainConfig(**recipe), Interrupting(15, sparse_tokens(), 64))
    with (tmp_path / "sae/metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "lo')
    train_sae(TrainConfig(**recipe), data())
    assert [line["step"] for line in metrics(tmp_path / "sae")] == list(range(1, 21))


@pytest.mark.parametrize(
    ("left", "resume", "advice"),
    [
        ("checkpoints/step-00000001.safetensors", False, "checkpoints; resume or choose another folder"),
        ("sae.safetensors", False, "sae.safetensors; choose another folder"),
        ("sae.safetensors", True, "sae.safetensors; choose another folder"),
    ],
)
def test_an_earlier_run_is_not_overwritten(left, resume, advice, tmp_path):
    save_tensors(tmp_path / "sae" / left, {"x": torch.zeros(1)})
    with pytest.raises(FileExistsError, match=f"holds {advice}"):
        Trainer(TrainConfig(**RECIPE, out_dir=tmp_path, steps=10, resume=resume), data())


def test_a_float16_sae_is_trained_in_float32():
    """SPEC 4.1: master weights are float32."""
    sae = train_sae(TrainConfig(**RECIPE, steps=2), data(), TopKSAE.init(D, N, K, dtype=torch.float16))
    assert all(parameter.dtype == torch.float32 for parameter in sae.parameters())
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N))


def test_training_flags_stay_in_the_configuration(tmp_path):
    """SPEC 1.4: a BatchTopK SAE says so and serves with per-token TopK."""
    config = TrainConfig(**RECIPE, out_dir=tmp_path, steps=3, batch_topk=True, multi_topk=True)
    sae = train_sae(config, data())
    cfg = json.loads((tmp_path / "sae/cfg.json").read_text())
    assert cfg["batch_topk"] is True
    assert cfg["multi_topk"] is True
    assert ((sae(sparse_tokens()).latents.values > 0).sum(1) <= K).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tokens_that_are_not_finite_are_never_trained_on(value):
    x = sparse_tokens()
    x[100] = value
    trainer = Trainer(TrainConfig(**RECIPE, steps=9), TensorActivations(x, 64))
    number = next(i for i, batch in enumerate(TensorActivations(x, 64)) if not batch.isfinite().all())
    with pytest.raises(ValueError, match=f"data: NaN or inf in 1 tokens of batch {number}, first in row"):
        trainer.fit()
    assert trainer.step == number + 1
    assert [thread.name for thread in threading.enumerate()].count("one_ahead") == 0
    if trainer.sae is not None:
        assert all(parameter.isfinite().all() for parameter in trainer.sae.parameters())


def test_batches_that_do_not_fit_are_refused():
    sae = TopKSAE.init(6, N, K, seed=0)
    standardised = TopKSAE.init(D, N, K, input_unit_norm=True)
    with pytest.raises(ValueError, match="sae: expected input_unit_norm=False"):
        Trainer(TrainConfig(**RECIPE, steps=2), data(), standardised)
    with pytest.raises(ValueError, match=r"data: expected \[M, d=6\] to match the SAE, got \[64, 8\] in batch 0"):
        train_sae(TrainConfig(**RECIPE, steps=2), data(), sae)
    with pytest.raises(ValueError, match="data: batch 0 has a total variance of 0"):
        train_sae(TrainConfig(**RECIPE, steps=2), TensorActivations(torch.ones(64, D), 64))
    one_batch: Any = [sparse_tokens()[:64]]
    with pytest.raises(ValueError, match="data: expected 2 batches, got 1"):
        train_sae(TrainConfig(**RECIPE, steps=2), one_batch)
    with pytest.raises(ValueError, match="steps: expected a number"):
        Trainer(TrainConfig(**RECIPE), one_batch)


def test_one_pass_is_the_default_length():
    trainer = Trainer(TrainConfig(**RECIPE), data())
    trainer.fit()
    assert (trainer.step, trainer.tokens) == (600 // 64, 64 * (600 // 64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: expected a number >= 1, got 0"),
        ({"lr": 0.0}, "lr: expected a number > 0"),
        ({"auxk_alpha": float("nan")}, "auxk_alpha"),
        ({"resume": True}, "out_dir: expected a folder"),
        ({"log_to": ("paper",), "out_dir": "x"}, r"log_to: expected tensorboard or wandb, got \['paper'\]"),
    ],
)
def test_bad_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_an_absent_logger_is_named_before_training(name, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    trainer = Trainer(TrainConfig(**RECIPE, steps=2, out_dir=tmp_path, log_to=(name,)), data())
    with pytest.raises(ImportError, match=f"log_to: '{name}' needs `pip install {name}`"):
        trainer.fit()
    assert trainer.step == 0


def test_tensorboard_gets_the_scalars(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = TrainConfig(**RECIPE, steps=4, log_every=2, out_dir=tmp_path, log_to=("tensorboard",))
    train_sae(config, data())
    events = accumulator.EventAccumulator(str(tmp_path / "sae/tensorboard")).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("fvu")]
    assert logged == [(line["step"], pytest.approx(line["fvu"], rel=1e-6)) for line in metrics(tmp_path / "sae")]


def test_wandb_gets_the_recipe_and_the_scalars(tmp_path, monkeypatch):
    """Against a stand-in for the package with the three calls of its documented interface."""
    seen: list[Any] = []

    def init(dir, config):
        seen.append((dir, config["lr"]))
        return SimpleNamespace(
            log=lambda numbers, step: seen.append((step, numbers["fvu"])), finish=lambda: seen.append("end")
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    train_sae(TrainConfig(**RECIPE, steps=4, log_every=2, out_dir=tmp_path, log_to=("wandb",)), data())
    curve = [(line["step"], line["fvu"]) for line in metrics(tmp_path / "sae")]
    assert seen == [(str(tmp_path / "sae"), 4e-4), *curve, "end"]


def test_evaluation_over_chunks_equals_the_whole():
    """FVU against the mean over all tokens, dead latents and L0, in a dense float64 form."""
    sae = TopKSAE.init(D, N, K, seed=0).double()
    x = sparse_tokens(n=100).double()
    pre = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
    threshold = pre.sort(dim=1, descending=True).values[:, K - 1 : K]
    z = torch.where(pre >= threshold, pre, 0)
    fvu = ((x - z @ sae.W_dec - sae.b_dec) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    result = evaluate_sae(sae, x, batch_size=7)
    assert result.fvu == pytest.approx(fvu.item(), rel=1e-12)
    assert result.dead_fraction == pytest.approx((z == 0).all(0).double().mean().item(), rel=1e-12)
    assert result.l0 == pytest.approx((z > 0).sum(1).double().mean().item(), rel=1e-12)
    with pytest.raises(ValueError, match=r"activations: expected \[n, d\] = \[>= 2, 8\]"):
        evaluate_sae(sae, x[:, :5])
