"""hooks: what an applied erasure costs the host per UNet call, the edit itself left out.

A UNet that does nothing but call its `time_proj` and one block that has its output ready; behind `erase`, and once
behind the lookup of the step's line too, stands an implementation that returns at once. What is left is hooks, checks
and dispatch. On a GPU nothing waits for the device, so this is the time to launch. Where there is no GPU, that is told
by Triton's launches with a driver that does nothing: all that the host does, but for the driver's own share. A pipeline
verifies its erasure once per picture, a bare UNet in every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness import Absent, Case, Contest, Provider, Work
from no_device import no_device
from saemnesia_fast import ops
from saemnesia_fast.ops import backend
from saemnesia_fast.sae import TopKSAE

BASELINE = "plain"
CLOCK = "cpu"
HOOK_POINT = "up_blocks.0"


def cases(device: str) -> list[Case]:
    return [Case("hooks", M=32, d=8, N=32, k=4)]


def work(case: Case) -> Work:
    return Work(0, 0)


def contest(case: Case, device: str) -> Contest:
    sample = torch.randn(2, case.d, 4, 4, device=device)
    timestep = torch.tensor(501, device=device)

    def plain() -> Callable[[], Tensor]:
        unet = _unet(sample)
        return lambda: unet(sample, timestep)[0]

    def erased(on_host: bool | None = None, bare: bool = False) -> Callable[[], Tensor]:
        unet = _unet(sample)
        erasure = _apply(unet if bare else Pipeline(unet), case, device)
        unet(sample, timestep)
        for point in erasure._points.values():
            point.tables._on_host = point.tables._on_host if on_host is None else on_host
        return lambda: unet(sample, timestep)[0]

    providers = [
        Provider(BASELINE, plain),
        Provider("ours, hooks alone", erased, context=partial(_stubbed, ("erase", "steering_lines"), device)),
        Provider("ours, hooks and lookup", erased, context=partial(_stubbed, ("erase",), device)),
    ]
    if device == "cpu":
        launched = partial(erased, on_host=False)
        providers += [
            Provider("ours, Triton without a device", launched, context=no_device),
            Provider("ours, that in a bare UNet", partial(launched, bare=True), context=no_device),
        ]
    return Contest(case, work(case), providers, lambda out: (out - sample).abs().flatten(), 0.0, BASELINE)


@contextmanager
def _stubbed(names: Sequence[str], device: str) -> Iterator[None]:
    """The ops `names` return at once on whatever backend computes them."""
    chosen = {choice.op: choice.backend for choice in ops.backend_report(device) if choice.op in names}
    before = {slot: backend._slots[slot] for slot in chosen.items()}
    try:
        for name, own in chosen.items():
            backend.register(name, own, STUBS[name](before[name, own].implementation))
        yield
    finally:
        for slot, filled in before.items():
            backend.register(*slot, *filled)


def _remembered(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """`implementation`, asked once."""
    answers: list[Any] = []

    def stub(*arguments: Any, **options: Any) -> Any:
        if not answers:
            answers.append(implementation(*arguments, **options))
        return answers[0]

    return stub


def _untouched(implementation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, *arguments, in_place=False: x if in_place else x.clone()


STUBS = {"erase": _untouched, "steering_lines": _remembered}


def _unet(sample: Tensor) -> nn.Module:
    try:
        from diffusers.models.transformers.transformer_2d import Transformer2DModel
    except ImportError as error:
        raise Absent(str(error)) from error

    ready, channels = sample.clone(), sample.shape[1]

    class Block(Transformer2DModel):
        def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
            return (ready,)

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time_proj = nn.Identity()
            self.up_blocks = nn.ModuleList([Block(2, channels // 2, in_channels=channels, norm_num_groups=1)])

        def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
            self.time_proj(timestep.expand(len(sample)))
            return self.up_blocks[0](sample)

    return UNet().to(sample.device)


class Pipeline:
    """What an erasure wants to know of one."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet

    def __call__(self) -> None:
        raise NotImplementedError


def _apply(pipe: Any, case: Case, device: str) -> Any:
    from saemnesia_fast import ConceptTable, apply_erasure

    sae = TopKSAE.init(case.d, case.N, case.k, device=device)
    table = ConceptTable(
        mu=torch.rand(2, 50, case.N),
        timesteps=torch.arange(981, 0, -20)[:50],
        concepts=["erased", "other"],
        kinds=["object", "object"],
        hook_point=HOOK_POINT,
        sae_hash=sae.content_hash(),
    )
    return apply_erasure(pipe, sae, table, "erased", num_latents=2)
