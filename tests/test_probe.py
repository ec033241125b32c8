"""ops.probe: SPEC 3.1."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import naive
from saemnesia_fast import ops
from weights import SPLIT_CASES, random_tokens, random_weights, same_bits, threads

OP = torch.ops.saemnesia_fast.probe
pytestmark = pytest.mark.usefixtures("each_backend")


@given(st.integers(1, 3), st.integers(0, 4), st.integers(1, 20), st.data(), st.integers(0, 99))
def test_equals_the_loops(groups: int, per_group: int, n: int, data: st.DataObject, seed: int) -> None:
    """On whole numbers: activation of each selected latent, and steered = kept and above threshold."""
    k, s = data.draw(st.integers(1, n)), data.draw(st.integers(0, 8))
    weights, _ = random_weights(3, n, torch.float32, integer=True, seed=seed)
    x = random_tokens(groups, per_group, 3, dtype=torch.float32, integer=True, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randint(n, (groups, s), generator=generator)
    thresholds = torch.randint(-1, 4, (groups, s), generator=generator).float()
    activations, steered = ops.probe(x, *weights, k, latents, thresholds)
    assert activations.dtype == torch.float32
    assert activations.shape == steered.shape == (groups, per_group, s)
    for group in range(groups):
        for token, pre in enumerate(naive.pre_activations(x[group], *weights)):
            kept = naive.topk(pre, k)
            for entry, latent in enumerate(latents[group].tolist()):
                want = latent in kept and pre[latent] > max(thresholds[group, entry].item(), 0)
                assert activations[group, token, entry].item() == pre[latent]
                assert steered[group, token, entry].item() == want


def test_says_which_tokens_erase_touches() -> None:
    weights, W_dec = random_weights(7, 30, torch.float32)
    x = random_tokens(80, 7, dtype=torch.float32)
    latents, thresholds = torch.tensor([3, 11]), torch.tensor([0.5, 0.2])
    _, steered = ops.probe(x, *weights, 8, latents, thresholds)
    erased = ops.erase(x, *weights, W_dec, 8, latents, thresholds, torch.tensor([-3.0, -2.0]))
    assert torch.equal(steered.any(-1), (erased != x).any(-1))
    assert 0 < steered.any(-1).sum() < 80


def test_a_bad_token_becomes_nan_and_is_not_steered() -> None:
    """SPEC 7.1."""
    weights, _ = random_weights(7, 30, torch.float32)
    x = random_tokens(5, 7, dtype=torch.float32)
    latents, thresholds = torch.arange(30), torch.zeros(30)
    clean = ops.probe(x, *weights, 8, latents, thresholds)
    x[1, 0] = torch.inf
    activations, steered = ops.probe(x, *weights, 8, latents, thresholds)
    assert activations[1].isnan().all()
    assert not steered[1].any()
    others = [0, 2, 3, 4]
    assert same_bits(activations[others], clean[0][others])
    assert torch.equal(steered[others], clean[1][others])


@pytest.mark.parametrize(("d", "n", "dtype"), SPLIT_CASES)
def test_batch_splits_agree_bit_for_bit(d: int, n: int, dtype: torch.dtype) -> None:
    weights, _ = random_weights(d, n, dtype)
    x = random_tokens(140, d, dtype=dtype)
    latents, thresholds = torch.arange(8), torch.zeros(8, dtype=dtype)
    with threads(2):
        activations, steered = ops.probe(x, *weights, 8, latents, thresholds)
        for start, stop in ((0, 1), (1, 4), (4, 140)):
            part = ops.probe(x[start:stop], *weights, 8, latents, thresholds)
            assert same_bits(part[0], activations[start:stop])
            assert torch.equal(part[1], steered[start:stop])


def test_opcheck() -> None:
    weights, _ = random_weights(4, 12, torch.float32)
    arguments = (torch.tensor([[1, 2], [3, 0]]), torch.zeros(2, 2))
    torch.library.opcheck(OP.default, (random_tokens(2, 3, 4, dtype=torch.float32), *weights, 5, *arguments, "default"))


def test_is_not_differentiable() -> None:
    weights, _ = random_weights(4, 12)
    x = random_tokens(3, 4).requires_grad_()
    assert not ops.probe(x, *weights, 5, torch.tensor([1]), torch.tensor([0.0]))[0].requires_grad


def test_bad_arguments_are_named() -> None:
    """SPEC 7.1."""
    weights, _ = random_weights(4, 12)
    x = random_tokens(3, 4)
    with pytest.raises(ValueError, match=r"latents: expected indices in \[0, N=12\), got 12 to 12"):
        ops.probe(x, *weights, 5, torch.tensor([12]), torch.tensor([0.0]))
    with pytest.raises(ValueError, match=r"thresholds: expected \[S\] or \[G, S\] = \[1\] to match latents, got \[2\]"):
        ops.probe(x, *weights, 5, torch.tensor([1]), torch.zeros(2))
