"""The gradient that an attack takes through an erased UNet is that of SPEC 3.2, at the right timestep (SPEC 5.4)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from erasing import HOOK_POINT, STRONG, sae_and_table
from oracles import dense_erasure
from pipelines import tiny_unet
from saemnesia_fast.erasure import apply_erasure
from saemnesia_fast.hookpoints import find_hook_point

TIMES = (740, 260)
MODES = ("exact", "released", "reconstruct")


@pytest.fixture(scope="module")
def unet() -> Any:
    return tiny_unet().double()


def call(unet: Any, states: Tensor, times: tuple[int, ...] = TIMES) -> Tensor:
    """A scalar of one call with a timestep for each row."""
    generator = torch.Generator().manual_seed(3)
    sample, direction = torch.randn(2, len(times), 4, 8, 8, generator=generator, dtype=torch.float64)
    return (unet(sample, torch.tensor(times), encoder_hidden_states=states).sample * direction).sum()


def gradient(unet: Any, **options: Any) -> Tensor:
    states = random_states().requires_grad_()
    return torch.autograd.grad(call(unet, states, **options), states)[0]


def random_states() -> Tensor:
    return torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@contextmanager
def densely_erased(unet: Any, mode: str, times: tuple[int, ...] = TIMES) -> Iterator[None]:
    """The block edited by the dense re-expression, each row by the line of its timestep, autograd doing the rest."""
    sae, table = sae_and_table()
    selection = table.select("cat", **STRONG)
    lines = [
        (selection.latents[row], selection.thresholds[row], selection.factors[row]) for row in map(selection.row, times)
    ]

    def edit(module: Any, args: Any, output: Any) -> Any:
        rows = [dense_erasure(one[None], sae, *line, mode=mode) for one, line in zip(output[0], lines, strict=True)]
        return (torch.cat(rows), *output[1:])

    hook = find_hook_point(unet, HOOK_POINT).register_forward_hook(edit)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("mode", MODES)
def test_gradient_to_the_text_is_that_of_the_dense_re_expression(unet, mode, each_backend):
    with densely_erased(unet, mode):
        expected = gradient(unet)
    sae, table = sae_and_table()
    with apply_erasure(unet, sae, table, "cat", mode=mode, **STRONG):
        ours = gradient(unet)
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)


def test_a_wrong_timestep_gives_another_gradient(unet):
    """Lines of swapped timesteps, and no line at all."""
    sae, table = sae_and_table()
    with apply_erasure(unet, sae, table, "cat", **STRONG):
        ours = gradient(unet)
    with densely_erased(unet, "exact", times=TIMES[::-1]):
        misaligned = gradient(unet)
    for other in (misaligned, gradient(unet)):
        assert (ours - other).norm() > 0.01 * ours.norm()


@pytest.mark.parametrize(
    "options", [{"mode": "replace"}, {"mode": "contrast", "anchor": "dog", "strength": -1.5, "cfg": True}]
)
def test_gradient_of_moved_tokens_is_a_difference_quotient(unet, options, each_backend):
    sae, table = sae_and_table()
    direction = torch.randn(2, 16, 32, dtype=torch.float64)
    with apply_erasure(unet, sae, table, "cat", **(STRONG | {"num_latents": 6} | options)):
        ours = gradient(unet)
        with torch.no_grad():
            up, down = (call(unet, random_states() + shift * direction) for shift in (1e-5, -1e-5))
    assert (ours - gradient(unet)).norm() > 0.01 * ours.norm()
    torch.testing.assert_close((ours * direction).sum(), (up - down) / 2e-5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", ["exact", "released"])
def test_whether_parameters_want_gradients_does_not_matter(unet, mode):
    sae, table = sae_and_table()
    with apply_erasure(unet, sae, table, "cat", mode=mode, **STRONG):
        wanting = gradient(unet)
        for parameter in [*unet.parameters(), *sae.parameters()]:
            parameter.requires_grad_(False)
        try:
            frozen = gradient(unet)
            with torch.no_grad():
                number = call(unet, random_states())
        finally:
            unet.requires_grad_(True)
        value = call(unet, random_states().requires_grad_())
    assert torch.equal(wanting, frozen)
    torch.testing.assert_close(number, value.detach(), rtol=1e-10, atol=1e-10)
    assert all(parameter.grad is None for parameter in unet.parameters())
