"""The gradient of the kept values by the triton backend in the interpreter: SPEC 4.3, 7.1."""

import pytest
import torch

from saemnesia_fast import ops
from saemnesia_fast.ops import reference
from triton_cases import IN_INTERPRETER, amid_nan, assert_no_worse, doubled, poisoned_allocations
from weights import random_tokens, random_weights

pytestmark = IN_INTERPRETER
OP = torch.ops.saemnesia_fast.gather_dot


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    with ops.use_backend("triton"), poisoned_allocations(monkeypatch):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("k", "d"), [(1, 7), (6, 80), (19, 300)])
def test_is_as_good_as_eager(k, d, dtype):
    W = random_weights(d, 40, dtype)[1]
    indices = torch.randint(40, (6, k), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    indices, W, grad = amid_nan(indices, W, random_tokens(6, d, dtype=dtype))
    found = OP(indices.view(2, 3, k), W, grad.view(2, 3, d))
    assert found.dtype == torch.float32
    flat = (indices, W.float(), grad.float())
    assert_no_worse(found.view(6, k), reference.gather_dot(*flat), reference.gather_dot(*doubled(*flat)))


def test_an_index_out_of_range_is_nan_alone():
    W, grad = random_weights(7, 20, torch.float32)[1], random_tokens(3, 7, dtype=torch.float32)
    indices = torch.tensor([[0, 19], [20, 3], [-1, 5]], dtype=torch.int32)
    found = OP(indices, W, grad)
    assert torch.equal(found.isnan(), torch.tensor([[False, False], [True, False], [True, False]]))


@pytest.mark.parametrize("mode", ["exact", "released", "reconstruct"])
def test_erasure_is_differentiable_in_x(mode):
    """As good as eager's gradient in float32."""
    weights, W_dec = random_weights(16, 64, torch.float32)
    latents, thresholds, factors = torch.arange(5), torch.zeros(5), torch.full((5,), -3.0)
    x, direction = random_tokens(9, 16), random_tokens(9, 16, seed=3)

    def gradient(dtype, backend):
        with ops.use_backend(backend):
            given = x.to(dtype, copy=True).requires_grad_()
            arguments = [t.to(dtype) for t in (*weights, W_dec)]
            erased = ops.erase(given, *arguments, 8, latents, thresholds, factors, mode)
            return torch.autograd.grad((erased * direction.to(dtype)).sum(), given)[0]

    found, eager = gradient(torch.float32, "triton"), gradient(torch.float32, "eager")
    assert_no_worse(found, eager, gradient(torch.float64, "eager"))
