"""What an autoencoder's training gets as gradients, by `loss.backward()` and by `ops.latent_gradients`: SPEC 4.1 - 4.3.

Both against dense float64 autograd written here. At the end eai-sparsify's encoder on the same cases: it sends the
encoder no gradient of AuxK and multi-TopK, and one through kept zeros.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peers import peer
from saemnesia_fast import ops
from saemnesia_fast.ops import LatentGradients, PairTerms
from saemnesia_fast.sae import TopKSAE
from saemnesia_fast.training.optim import Adam
from saemnesia_fast.training.step import Objective, batch_gradient
from weights import random_tokens, random_weights

D, N, M = 12, 40, 17
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


class Case(NamedTuple):
    """One loss: sum |x - x_hat|^2 and what is added to it."""

    name: str
    k: int = 3
    bias: float = 0.0
    """Added to all of b_enc: -20 leaves most tokens without k positive latents."""
    always: bool = False
    """Latent 5 fires on every token, latent 6 on none."""
    auxk: bool = False
    multi: bool = False
    supervised: bool = False


CASES = [
    Case("plain"),
    Case("AuxK", auxk=True),
    Case("multi-TopK", multi=True),
    Case("supervised", supervised=True),
    Case("zeros that ReLU made", k=20, bias=-3.0),
    Case("a latent in every row and one in none", always=True),
    Case("k=1", k=1),
    Case("k=N", k=N),
    Case("all together", auxk=True, multi=True, supervised=True, always=True),
]
DEAD = torch.arange(N) % 5 == 0
ASSIGNED = torch.tensor([7, 11, 13])
ALPHA, BETA = 1 / 32, 0.3


def parameters(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_enc, b_enc, W_dec, b_dec, which want gradients."""
    (W_enc, b_enc, b_dec), W_dec = random_weights(D, N)
    b_enc += case.bias
    if case.always:
        b_enc[5], b_enc[6] = 100, -100
    return tuple(t.requires_grad_() for t in (W_enc, b_enc, W_dec, b_dec))  # type: ignore[return-value]


def tokens() -> Tensor:
    return random_tokens(M, D, seed=2)


def keep(pre: Tensor, k: int) -> Tensor:
    """All but the k largest of each row set to zero, by a full sort."""
    best = pre.detach().sort(dim=1, descending=True, stable=True).indices[:, :k]
    return pre * torch.zeros_like(pre).scatter(1, best, 1.0)


def supervised_loss(pre: Tensor) -> Tensor:
    """softplus of the assigned latents' mean pre-activations (SPEC 4.2)."""
    return F.softplus(-pre.mean(0)).sum()


def dense_loss(case: Case, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    pre = ((x - b_dec) @ W_enc.T + b_enc).relu()
    e = x - keep(pre, case.k) @ W_dec - b_dec
    loss = e.square().sum()
    if case.auxk:
        e_hat = keep(torch.where(DEAD, pre, 0), D // 2) @ W_dec
        loss = loss + ALPHA * (e_hat - e.detach()).square().sum()
    if case.multi:
        loss = loss + (x - keep(pre, 4 * case.k) @ W_dec - b_dec).square().sum() / 8
    if case.supervised:
        loss = loss + BETA * supervised_loss(pre[:, ASSIGNED])
    return loss


def sparse_loss(
    case: Case, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, encode: Callable[..., Any]
) -> Tensor:
    """The same on the kept latents alone, as an ordinary training loop would write it."""
    weights = (W_enc, b_enc, b_dec)
    values, indices = encode(x, *weights, case.k)
    e = x - ops.decode(values, indices, W_dec, b_dec)
    loss = e.square().sum()
    if case.auxk:
        rows = DEAD.nonzero().squeeze(1)
        aux, columns = encode(x, W_enc[rows], b_enc[rows], b_dec, D // 2)
        e_hat = ops.decode(aux, columns, W_dec[rows], torch.zeros_like(b_dec))
        loss = loss + ALPHA * (e_hat - e.detach()).square().sum()
    if case.multi:
        loss = loss + (x - ops.decode(*encode(x, *weights, 4 * case.k), W_dec, b_dec)).square().sum() / 8
    if case.supervised:
        pre = ((x - b_dec) @ W_enc[ASSIGNED].T + b_enc[ASSIGNED]).relu()
        loss = loss + BETA * supervised_loss(pre)
    return loss


def terms_of(case: Case, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> list[PairTerms]:
    """The same as pairs with their d loss / d x_hat, as a fused trainer step has them."""
    weights = (W_enc, b_enc, b_dec)
    values, indices = ops.encode_topk(x, *weights, case.k)
    e = x - ops.decode(values, indices, W_dec, b_dec)
    terms = [PairTerms(values, indices, -2 * e)]
    if case.auxk:
        rows = DEAD.nonzero().squeeze(1)
        aux, columns = ops.encode_topk(x, W_enc[rows], b_enc[rows], b_dec, D // 2)
        e_hat = ops.decode(aux, rows[columns.long()], W_dec, torch.zeros_like(b_dec))
        terms.append(PairTerms(aux, rows[columns.long()], 2 * ALPHA * (e_hat - e), None, False))
    if case.multi:
        many = ops.encode_topk(x, *weights, 4 * case.k)
        terms.append(PairTerms(*many, (ops.decode(*many, W_dec, b_dec) - x) / 4))
    if case.supervised:
        pre = ((x - b_dec) @ W_enc[ASSIGNED].T + b_enc[ASSIGNED]).relu().detach().requires_grad_()
        (d_pre,) = torch.autograd.grad(BETA * supervised_loss(pre), pre)
        d_value = torch.where(pre > 0, d_pre, 0)
        terms.append(PairTerms(torch.zeros_like(d_value), ASSIGNED.expand(M, 3), e, d_value, False))
    return terms


def expected(case: Case) -> list[Tensor]:
    wanted = parameters(case)
    return list(torch.autograd.grad(dense_loss(case, tokens(), *wanted), wanted))


def assert_equal(got: Any, want: list[Tensor]) -> None:
    for name, ours, theirs in zip(NAMES, got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_the_cases_are_what_they_say() -> None:
    with torch.no_grad():
        for case in CASES:
            W_enc, b_enc, _, b_dec = parameters(case)
            values, indices = ops.encode_topk(tokens(), W_enc, b_enc, b_dec, case.k)
            assert bool((values == 0).any()) == (case.name in ("zeros that ReLU made", "k=N"))
            if case.always:
                assert (indices == 5).any(1).all() and not (indices == 6).any()


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_backward_equals_dense_autograd(case: Case) -> None:
    wanted = parameters(case)
    sparse_loss(case, tokens(), *wanted, encode=ops.encode_topk).backward()
    assert_equal([parameter.grad for parameter in wanted], expected(case))


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_single_pass_equals_dense_autograd(case: Case) -> None:
    W_enc, b_enc, W_dec, b_dec = (parameter.detach() for parameter in parameters(case))
    x = tokens()
    first, *more = terms_of(case, x, W_enc, b_enc, W_dec, b_dec)
    got = ops.latent_gradients(*first[:3], x, W_dec, b_dec, W_enc, None, more)
    assert_equal([got.dW_enc, got.db_enc, got.dW_dec, got.db_dec], expected(case))


def first_moments(sae: TopKSAE, gradient: Any) -> list[Tensor]:
    """The gradient that the first step of the trainer's Adam has seen; it is stored nowhere."""
    adam = Adam(sae, eps=1.0)
    adam.step(gradient, 1, 0.0, torch.ones((), dtype=torch.float64))
    names = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
    return [adam.state_dict()[f"{name}.exp_avg"] / (1 - 0.9) for name in names]


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_trainers_step_equals_dense_autograd(case: Case, micro_batches: int) -> None:
    """Its losses are over the variance; supervised terms go as pairs here; test_supervised_loss has its own."""
    W_enc, b_enc, W_dec, b_dec = (parameter.detach() for parameter in parameters(case))
    x, weights = tokens(), (W_enc, b_enc, W_dec, b_dec)
    sae = TopKSAE.init(D, N, case.k, dtype=torch.float64, normalize_decoder=False).requires_grad_(False)
    for parameter, weight in zip((sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), weights, strict=True):
        parameter.copy_(weight)
    scale = 1.0
    if case.supervised:
        terms = terms_of(case, x, *weights)
        sparse = ops.sparse_gradients(terms, x, W_dec, b_dec)
        db_dec = sum(t.grad_x_hat.sum(0) for t in terms if t.adds_b_dec) - sparse.db_enc @ W_enc
        gradient: Any = SimpleNamespace(sparse=sparse, db_dec=db_dec)
    else:
        objective = Objective(case.k, ALPHA if case.auxk else 0.0, case.multi)
        candidates = torch.arange(N)[DEAD | (torch.arange(N) == 3)]
        dead = DEAD[candidates]
        gradient = batch_gradient(sae, x, objective, dead, candidates, micro_batches=micro_batches)
        scale = float((x - x.mean(0)).square().sum())
    assert_equal([scale * moment for moment in first_moments(sae, gradient)], expected(case))


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[2]], ids=lambda case: case.name)
def test_micro_batches_accumulate(case: Case) -> None:
    """By repeated backward, and into the buffers that the single pass is given."""
    want = expected(case)
    wanted = parameters(case)
    for part in tokens().chunk(4):
        sparse_loss(case, part, *wanted, encode=ops.encode_topk).backward()
    assert_equal([parameter.grad for parameter in wanted], want)

    W_enc, b_enc, W_dec, b_dec = (parameter.detach() for parameter in wanted)
    out = LatentGradients(*(torch.zeros(shape, dtype=W_dec.dtype) for shape in LatentGradients.shapes(W_dec)))
    for part in tokens().chunk(4):
        first, *more = terms_of(case, part, W_enc, b_enc, W_dec, b_dec)
        ops.latent_gradients(*first[:3], part, W_dec, b_dec, W_enc, None, more, out)
    assert_equal([out.dW_enc, out.db_enc, out.dW_dec, out.db_dec], want)


@pytest.mark.usefixtures("each_backend")
def test_an_index_that_occurs_twice_counts_twice() -> None:
    _, _, W_dec, b_dec = parameters(CASES[0])
    values = random_tokens(M, 4, seed=3).requires_grad_()
    indices = torch.randint(3, (M, 4), dtype=torch.int32)
    x_hat = ops.decode(values, indices, W_dec, b_dec)
    dense = torch.zeros(M, N, dtype=values.dtype).scatter_add(1, indices.long(), values) @ W_dec + b_dec
    grad = random_tokens(M, D, seed=4)
    got, want = (torch.autograd.grad(y, (values, W_dec, b_dec), grad) for y in (x_hat, dense))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=lambda case: case.name)
def test_gradcheck(case: Case) -> None:
    """In the tokens, too."""
    wanted = parameters(case)
    x = tokens()[:3].requires_grad_()
    loss = partial(sparse_loss, case, encode=ops.encode_topk)
    assert torch.autograd.gradcheck(lambda x, *weights: loss(x, *weights), (x, *wanted))


@pytest.mark.usefixtures("each_backend")
def test_a_second_derivative_is_refused() -> None:
    wanted = parameters(CASES[0])
    loss = sparse_loss(CASES[0], tokens(), *wanted, encode=ops.encode_topk)
    gradient = torch.autograd.grad(loss, wanted, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_backward_errs_no_more_than_eager(dtype: torch.dtype) -> None:
    def backward() -> list[Tensor]:
        wanted = [p.detach().to(dtype).requires_grad_() for p in parameters(CASES[2])]
        sparse_loss(CASES[2], tokens().to(dtype), *wanted, encode=ops.encode_topk).backward()
        assert all(p.grad is not None and p.grad.dtype == dtype for p in wanted)
        return [p.grad.double() for p in wanted if p.grad is not None]

    rounded = [p.detach().to(dtype).double().requires_grad_() for p in parameters(CASES[2])]
    exact = torch.autograd.grad(dense_loss(CASES[2], tokens().to(dtype).double(), *rounded), rounded)
    ours = backward()
    with ops.use_backend("eager"):
        eager = backward()
    for got, reference, want in zip(ours, eager, exact, strict=True):
        floor = torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).abs().max() <= 2 * (reference - want).abs().max() + floor


@pytest.mark.usefixtures("each_backend")
def test_backward_can_be_compiled() -> None:
    """One graph, as the gradients are opaque ops."""
    wanted = parameters(CASES[0])
    loss = partial(sparse_loss, CASES[0], encode=ops.encode_topk)
    torch.compile(loss, backend="aot_eager", fullgraph=True)(tokens(), *wanted).backward()
    assert_equal([parameter.grad for parameter in wanted], expected(CASES[0]))


@pytest.fixture(scope="module")
def fused_encoder() -> Callable[..., Any]:
    """eai-sparsify's encoder with its own autograd."""
    return peer("sparsify.fused_encoder").fused_encoder


def sparsify_gradients(case: Case, fused_encoder: Callable[..., Any]) -> list[Tensor]:
    """Of the same loss, on its encoder: AuxK and multi-TopK select from the pre-activations that it returns."""
    wanted = W_enc, b_enc, W_dec, b_dec = parameters(case)
    x = tokens()
    encoded = fused_encoder(x - b_dec, W_enc, b_enc, case.k, "topk")
    none = torch.zeros_like(b_dec)
    e = x - ops.decode(encoded.top_acts, encoded.top_indices, W_dec, b_dec)
    loss = e.square().sum()
    if case.auxk:
        e_hat = ops.decode(*torch.where(DEAD, encoded.pre_acts, -torch.inf).topk(D // 2), W_dec, none)
        loss = loss + ALPHA * (e_hat - e.detach()).square().sum()
    if case.multi:
        loss = loss + (x - ops.decode(*encoded.pre_acts.topk(4 * case.k), W_dec, b_dec)).square().sum() / 8
    return list(torch.autograd.grad(loss, wanted))


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["plain", "a latent in every row and one in none", "k=1"])
def test_sparsify_agrees_where_there_is_one_selection(fused_encoder: Callable[..., Any], name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    assert_equal(sparsify_gradients(case, fused_encoder), expected(case))


@pytest.mark.parametrize("name", ["AuxK", "multi-TopK"])
def test_sparsify_sends_the_encoder_nothing_of_a_second_selection(fused_encoder: Callable[..., Any], name: str) -> None:
    """Its encoder's gradient is that of the plain loss; the decoder's is right."""
    case = next(case for case in CASES if case.name == name)
    W_enc, b_enc, W_dec, _ = sparsify_gradients(case, fused_encoder)
    want, plain = expected(case), expected(CASES[0])
    assert close(W_dec, want[2])
    for ours, right, without in ((W_enc, want[0], plain[0]), (b_enc, want[1], plain[1])):
        assert close(ours, without)
        assert (right - without).norm() > 1e-2 * right.norm()


def test_sparsify_teaches_latents_that_did_not_fire(fused_encoder: Callable[..., Any]) -> None:
    """It forgets ReLU's mask: a kept 0 moves the encoder."""
    case = next(case for case in CASES if case.bias)
    W_enc, b_enc, W_dec, _ = sparsify_gradients(case, fused_encoder)
    want = expected(case)
    assert close(W_dec, want[2])
    assert (b_enc - want[1]).norm() > 1e-2 * want[1].norm()
    assert (W_enc - want[0]).norm() > 1e-2 * want[0].norm()
