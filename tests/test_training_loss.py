"""The loss of SPEC 4.1 against a dense float64 autograd implementation written here."""

import pytest
import torch

from saemnesia_fast.sae import TopKSAE
from saemnesia_fast.training import sae_loss
from saemnesia_fast.training.loss import total_variance

D, N, K, M = 12, 40, 3, 17
PARAMETERS = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")


@pytest.fixture
def sae():
    generator = torch.Generator().manual_seed(1)
    sae = TopKSAE.init(D, N, K, seed=0).double().requires_grad_(True)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return sae


@pytest.fixture
def x():
    return torch.randn(M, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.5


def keep_largest(values, count):
    """`values` with all but the `count` largest of each row set to zero, by a full sort."""
    kept = torch.zeros_like(values)
    for row, best in enumerate(values.detach().argsort(dim=-1, descending=True)[:, :count]):
        kept[row, best] = values[row, best]
    return kept


def dense_loss(sae, x, dead=None, alpha=1 / 32, multi_topk=False, batch_topk=False):
    """(loss, fvu, auxk) with nothing shared with the package, every latent of every token kept as an entry."""
    W_enc, b_enc, W_dec, b_dec = (sae.get_parameter(name) for name in PARAMETERS)
    pre = ((x - b_dec) @ W_enc.T + b_enc).clamp_min(0)
    variance = ((x - x.mean(0)) ** 2).sum()

    def fvu(k):
        z = keep_largest(pre.reshape(1, -1), k * len(x)).reshape(pre.shape) if batch_topk else keep_largest(pre, k)
        e = x - (z @ W_dec + b_dec)
        return (e**2).sum() / variance, e

    main, e = fvu(K)
    auxk = torch.zeros((), dtype=x.dtype)
    if dead is not None and dead.any():
        n_dead = int(dead.sum())
        z = keep_largest(torch.where(dead, pre, torch.zeros_like(pre)), min(D // 2, n_dead))
        auxk = min(n_dead / (D / 2), 1) * ((z @ W_dec - e.detach()) ** 2).sum() / variance
    loss = main + alpha * auxk
    return (loss + fvu(4 * K)[0] / 8 if multi_topk else loss), main, auxk


def gradients(sae, loss):
    return dict(zip(PARAMETERS, torch.autograd.grad(loss, [sae.get_parameter(n) for n in PARAMETERS]), strict=True))


def dead_mask(count):
    dead = torch.zeros(N, dtype=torch.bool)
    dead[torch.randperm(N, generator=torch.Generator().manual_seed(count))[:count]] = True
    return dead


@pytest.mark.parametrize("batch_topk", [False, True])
@pytest.mark.parametrize("multi_topk", [False, True])
@pytest.mark.parametrize("n_dead", [0, 1, 4, 6, 25, N])
def test_loss_and_gradients_equal_dense_autograd(sae, x, n_dead, multi_topk, batch_topk):
    """SPEC 4.1, with fewer and with more dead latents than k_aux = d/2 = 6."""
    dead = dead_mask(n_dead)
    ours = sae_loss(sae, x, dead, multi_topk=multi_topk, batch_topk=batch_topk)
    loss, fvu, auxk = dense_loss(sae, x, dead, multi_topk=multi_topk, batch_topk=batch_topk)
    torch.testing.assert_close(ours.loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.fvu, fvu, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.auxk, auxk, rtol=1e-12, atol=0)
    expected = gradients(sae, loss)
    for name, gradient in gradients(sae, ours.loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-13)


def test_auxk_teaches_dead_latents_only(sae, x):
    """SPEC 4.1: e is detached, so AuxK moves the dead rows of encoder and decoder and nothing of the living ones."""
    dead = dead_mask(8)
    difference = sae_loss(sae, x, dead, auxk_alpha=1.0).loss - sae_loss(sae, x, dead, auxk_alpha=0.0).loss
    moved = gradients(sae, difference)
    for name in ("encoder.weight", "encoder.bias", "W_dec"):
        rows = moved[name].reshape(N, -1).abs().amax(1)
        assert (rows[~dead] < 1e-15).all()
        assert (rows[dead] > 1e-6).any()


def test_auxk_of_one_dead_latent_by_hand(sae, x):
    """SPEC 4.1: scale * |z d - e|^2 with e = x - x_hat and no b_dec, scale = 1 / (d/2)."""
    dead = dead_mask(1)
    with torch.no_grad():
        e = x - sae(x).x_hat
        direction = sae.W_dec[dead][0]
        z = ((x - sae.b_dec) @ sae.W_enc[dead][0] + sae.b_enc[dead]).clamp_min(0)
        by_hand = (z[:, None] * direction - e).square().sum() / (D / 2) / total_variance(x)
    assert z.max() > 0
    torch.testing.assert_close(sae_loss(sae, x, dead).auxk, by_hand, rtol=1e-12, atol=0)


def test_micro_batches_add_up(sae, x):
    """With the whole batch's variance the losses and gradients of the parts sum to the batch's."""
    dead, variance = dead_mask(9), total_variance(x)
    whole = sae_loss(sae, x, dead, multi_topk=True)
    parts = [sae_loss(sae, part, dead, variance=variance, multi_topk=True) for part in x.chunk(4)]
    loss = torch.stack([part.loss for part in parts]).sum()
    torch.testing.assert_close(loss, whole.loss, rtol=1e-12, atol=0)
    expected = gradients(sae, whole.loss)
    for name, gradient in gradients(sae, loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("batch_topk", [False, True])
def test_fired_counts_positive_values_only(sae, x, batch_topk):
    """SPEC 1.2, 4.1: a kept value of 0 has not fired."""
    with torch.no_grad():
        sae.encoder.bias[:] = -100
        sae.encoder.bias[5] = 100
    result = sae_loss(sae, x, batch_topk=batch_topk)
    assert result.fired.nonzero().flatten().tolist() == [5]
    assert result.firings.item() == M


def test_batch_topk_shares_the_budget(sae, x):
    """SPEC 1.4: k*M values in all, more for some tokens than for others."""
    with torch.no_grad():
        pre = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
        threshold = pre.flatten().sort(descending=True).values[K * M - 1]
    result = sae_loss(sae, x, batch_topk=True)
    assert result.firings.item() == K * M
    assert torch.equal(result.fired, (pre >= threshold).any(0))
    assert (pre >= threshold).sum(1).unique().numel() > 1
