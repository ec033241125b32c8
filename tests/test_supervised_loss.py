"""The supervised terms of SPEC 4.2 and their gradient against a plain dense loss in float64, by autograd."""

import math

import pytest
import torch

from saemnesia_fast import ops
from saemnesia_fast.ops import validation
from saemnesia_fast.sae import TopKSAE
from saemnesia_fast.training import LabelledImages, TrainConfig, Trainer
from saemnesia_fast.training.step import Objective, batch_gradient
from saemnesia_fast.training.supervised_loss import Supervised, SupervisedLoss, Supervision, concept_terms
from test_training_loss import D, K, N, dead_mask, dense_loss, gradients, keep_largest
from test_training_step import NoLooking, gradient_of

T = 6
KINDS = {"cat": "object", "sea": "object", "bear": "object", "neon": "style", "ink": "style", "loud": "mood"}
ASSIGNMENT = dict(zip(KINDS, (31, 2, 17, 0, 39, 8), strict=True))


def pearson(a, b):
    """Of two lists of numbers; 0 where one is constant."""
    a, b = a - a.mean(), b - b.mean()
    constant = (a == a[0]).all() or (b == b[0]).all()
    return a.sum() * 0 if constant else (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()


def softplus(x):
    return torch.log1p(torch.exp(x))


def plain_terms(sae, x, labels, weights):
    """(L_CA, L_DC, L_1) written out image by image and pair by pair."""
    linear = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    pre = linear.clamp_min(0)
    pooled = pre if weights.rectified else linear
    v = [[pooled[b * T : (b + 1) * T, i].mean() for i in ASSIGNMENT.values()] for b in range(len(labels))]
    concepts = pre.sum() * 0
    for row, chosen in zip(v, labels.tolist(), strict=True):
        own = [softplus(-value) for value, wanted in zip(row, chosen, strict=True) if wanted]
        others = [softplus(value) for value, wanted in zip(row, chosen, strict=True) if not wanted]
        concepts = concepts + sum(own) / max(len(own), 1) / len(labels)
        if weights.negatives:
            concepts = concepts + sum(others) / max(len(others), 1) / len(labels)
    columns = dict(zip(ASSIGNMENT, torch.stack([torch.stack(row) for row in v]).T, strict=True))
    rhos = [
        pearson(columns[one], columns[other])
        for one, kind in KINDS.items()
        for other, another in KINDS.items()
        if (kind, another) == ("object", "style")
    ]
    correlation = sum(rho**2 for rho in rhos) / len(rhos)
    kept = keep_largest(pre, K) if weights.l1 == "kept" else pre
    l1 = kept.abs().sum() / (len(x) * (K if weights.l1 == "kept" else N))
    return concepts, correlation, l1


@pytest.fixture
def sae():
    generator = torch.Generator().manual_seed(1)
    sae = TopKSAE.init(D, N, K, seed=0, normalize_decoder=False).double()
    for parameter in sae.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return sae


def images(count, seed=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count * T, D, generator=generator, dtype=torch.float64) + 0.5
    return x, torch.rand(count, len(KINDS), generator=generator) < 0.4


def supervision(weights, assignment=ASSIGNMENT):
    return Supervision(assignment, KINDS, weights, N)


def check(sae, x, labels, weights, n_dead=0, **objective):
    dead = dead_mask(n_dead)
    candidates = dead.clone()
    candidates[list(ASSIGNMENT.values())] = True
    candidates = candidates.nonzero()[:, 0] if n_dead else None
    supervised = Supervised(supervision(weights), labels)
    arguments = (dead[candidates], candidates) if n_dead else ()
    found = batch_gradient(sae.requires_grad_(False), x, Objective(K, **objective), *arguments, supervised=supervised)
    got = gradient_of(sae, found)

    loss, fvu, _ = dense_loss(sae.requires_grad_(True), x, dead, **objective)
    concepts, correlation, l1 = plain_terms(sae, x, labels, weights)
    loss = loss + weights.beta * (concepts + weights.eta * correlation) + weights.l1_weight * l1
    for name, value in {"concepts": concepts, "correlation": correlation, "l1": l1}.items():
        wanted = value.detach() if weights.l1_weight or name != "l1" else torch.zeros_like(value)
        torch.testing.assert_close(getattr(found.taught, name), wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.fvu, fvu.detach(), rtol=1e-12, atol=0)
    expected = gradients(sae, loss)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)
    norm = sum(gradient.square().sum() for gradient in expected.values()).sqrt()
    torch.testing.assert_close(found.norm, norm, rtol=1e-10, atol=0)
    return found


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("n_dead", [0, 5, N])
@pytest.mark.parametrize("l1", ["kept", "dense"])
@pytest.mark.parametrize("negatives", [False, True])
def test_gradient_equals_dense_autograd(sae, negatives, l1, n_dead, backend):
    """With AuxK's rows among which some of the assigned are dead, and without."""
    x, labels = images(7)
    weights = SupervisedLoss(negatives=negatives, l1=l1, eta=0.7, l1_weight=0.3)
    with ops.use_backend(backend):
        found = check(sae, x, labels, weights, n_dead)
    assert found.taught.correlation > 0.01


@pytest.mark.parametrize("count", [1, 2])
def test_few_images_and_concepts(sae, count):
    """One image of one concept has no correlation; of two images every rho is 1 or -1."""
    x, _ = images(count)
    labels = torch.zeros(count, len(KINDS), dtype=torch.bool)
    labels[0, 1] = True
    for negatives in (False, True):
        found = check(sae, x, labels, SupervisedLoss(negatives=negatives, eta=2.0))
        v = torch.stack([x[b * T : (b + 1) * T] for b in range(count)])
        v = ((v - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu().mean(1)[:, list(ASSIGNMENT.values())]
        varies = [KINDS[name] for name, column in zip(KINDS, v.T, strict=True) if count == 2 and column[0] != column[1]]
        wanted = varies.count("object") * varies.count("style") / 6
        assert float(found.taught.correlation) == pytest.approx(wanted)


def test_constant_latents_are_not_correlated(sae):
    """One that never fires, and one that fires alike on all images."""
    x, labels = images(5)
    sae.b_enc.data[2] = -100
    sae.W_enc.data[39] = 0
    sae.b_enc.data[39] = 0.3
    found = check(sae, x, labels, SupervisedLoss(eta=3.0))
    assert found.db_dec.isfinite().all()
    v = torch.full((5, len(KINDS)), 0.1)
    for dtype in (torch.float32, torch.float64):
        of_constants = concept_terms(v.to(dtype), labels, supervision(SupervisedLoss(beta=1.0, eta=1e6)))
        assert of_constants[1] == 0
        assert of_constants[2].abs().max() < 1


def test_terms_join_others_of_the_objective(sae):
    x, labels = images(6)
    check(sae, x, labels, SupervisedLoss(), multi_topk=True)
    check(sae, x, labels, SupervisedLoss(beta=0.5, l1_weight=0.0), n_dead=9)
    check(sae, x, labels, SupervisedLoss(beta=0.0))
    check(sae, x, labels, SupervisedLoss(rectified=False, negatives=True), n_dead=5)


def test_correlation_has_the_value_of_the_formula():
    """v of a cat and of neon with rho = 0.5, all else constant: the mean of 6 pairs."""
    v = torch.zeros(3, len(KINDS), dtype=torch.float64)
    v[:, 0], v[:, 3] = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0])
    labels = torch.zeros(3, len(KINDS), dtype=torch.bool)
    labels[:, 0] = True
    concepts, correlation, _ = concept_terms(v, labels, supervision(SupervisedLoss()))
    assert float(correlation) == pytest.approx(0.25 / 6)
    assert float(concepts) == pytest.approx(sum(math.log1p(math.exp(-n)) for n in (1, 2, 3)) / 3)


@pytest.mark.parametrize("options", [{}, {"l1": "dense"}, {"negatives": True, "rectified": False}])
def test_steps_do_not_wait_for_the_device(options, monkeypatch):
    """Between two readings of the metrics, AuxK at work among the assigned latents."""
    monkeypatch.setattr(validation, "check_range", lambda *_: None)
    monkeypatch.setattr("saemnesia_fast.ops.registration.check_range", lambda *_: None)
    x, labels = images(8)
    batch = LabelledImages(x.float().view(8, T, D), labels)
    config = TrainConfig(k=K, steps=100, dead_after=len(x), device="cpu", progress=False)
    sae = TopKSAE.init(D, N, K, seed=3)
    with ops.use_backend("cpu"):
        trainer = Trainer(config, (), sae, supervision=supervision(SupervisedLoss(**options)))
        trainer.train_step(batch)
        trainer.check = set  # type: ignore[method-assign]
        with NoLooking():
            metrics = trainer.train_step(batch)
    assert metrics.dead > 0 and metrics.auxk > 0 and metrics.concepts > 0
    with pytest.raises(ValueError, match=r"labels: expected \[B, C\] = \[8, 6\] to match .*, got \[8, 5\] in batch 2"):
        trainer.train_step(LabelledImages(batch.x, labels[:, 1:]))
    with pytest.raises(ValueError, match="data: expected tokens without labels, as the trainer has no supervision"):
        Trainer(config, (), sae).train_step(batch)


def test_refusals():
    with pytest.raises(ValueError, match=r"l1: expected kept or dense, got 'none'"):
        SupervisedLoss(l1="none")
    with pytest.raises(ValueError, match=r"beta: expected a number >= 0, got -1"):
        SupervisedLoss(beta=-1)
    for latents in ({}, {"cat": 1, "sea": 1}, {"cat": N}):
        with pytest.raises(ValueError, match=r"assignment: expected different latents in \[0, N=40\)"):
            supervision(SupervisedLoss(), latents)
