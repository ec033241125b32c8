"""unet: one UNet call, plain and erased. SD 1.5's size in float16 on a GPU, a small one on the CPU; random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from activations import CONCEPT_LATENTS, FACTOR, Lines, Weights, concept_lines
from erase import reference
from harness import Absent, Case, Contest, Provider, Work
from oracles import released_hook
from saemnesia_fast.sae import TopKSAE

BASELINE = "plain"
LIMIT = {"float32": 1e-4, "float16": 5e-3}
TIMESTEP = 501
FLOPS_SD15 = 1_607_000_000_000
"""Of one call with guidance at 512x512."""


def cases(device: str) -> list[Case]:
    if device == "cpu":
        return [Case("unet", M=512, d=320, N=5120, variant="eager")]
    return [Case("unet", M=512, dtype="float16", variant=variant) for variant in ("eager", "graphed")]


def work(case: Case) -> Work:
    """Of SD 1.5's UNet; unknown, and so no floor, for the small one."""
    return Work(1_720_000_000, FLOPS_SD15) if case.d == 1280 else Work(0, 0)


def contest(case: Case, device: str) -> Contest:
    try:
        unet = _unet(case, device)
    except ImportError as error:
        return Contest(case, work(case), _absent(str(error)), lambda answer: answer, 0.0, BASELINE)
    setup = Setup(unet, case, device)
    capturable = case.variant == "graphed"
    plain = setup.against(None, 0)
    providers = [Provider(BASELINE, partial(setup.call, setup.unet), errors=plain, capturable=capturable)]
    for mode, flagged in (
        ("exact", 0),
        ("exact", 64),
        ("exact", case.M),
        ("released", case.M),
        ("contrast", case.M),
    ):
        name = f"ours {mode}, {flagged} flagged"
        providers.append(
            Provider(
                name, partial(setup.erased, mode, flagged), errors=setup.against(mode, flagged), capturable=capturable
            )
        )
    providers.append(
        Provider(
            "released hook",
            partial(setup.hooked, case.M),
            errors=setup.against("released", case.M),
            tolerance=setup.limit,
            capturable=False,
        )
    )
    return Contest(case, work(case), providers, plain, setup.limit, BASELINE)


class Setup:
    """A UNet, inputs, and an SAE whose latent 0 fires on every token that the inputs give at the hook point."""

    def __init__(self, unet: nn.Module, case: Case, device: str) -> None:
        from saemnesia_fast.hookpoints import capture

        self.unet, self.case, self.limit = unet, case, LIMIT[case.dtype]
        self.hook_point = "up_blocks.1.attentions.1" if case.d == 1280 else "up_blocks.0.attentions.1"
        generator = torch.Generator(device).manual_seed(3)
        size, width = unet.config.sample_size, unet.config.cross_attention_dim

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(case.torch_dtype)

        self.inputs = (draw(2, 4, size, size), torch.tensor(TIMESTEP, device=device), draw(2, 77, width))
        seen: list[Tensor] = []
        with capture(unet, [self.hook_point], lambda name, activation, timestep: seen.append(activation)):
            self.unet(*self.inputs)
        self.tokens = seen[0].permute(0, 2, 3, 1).flatten(0, 2)
        self.sae = TopKSAE.init(case.d, case.N, case.k, device=device)
        self.sae.b_dec.copy_(self.tokens.float().mean(0))
        concept = self.tokens.float() @ self.sae.W_enc[0]
        self.sae.encoder.bias[0] = 2 * concept.abs().max() + self.sae.W_enc[0] @ self.sae.b_dec
        self.sae = self.sae.to(case.torch_dtype)
        self.weights = Weights(*(p.detach() for p in (self.sae.W_enc, self.sae.b_enc, self.sae.b_dec, self.sae.W_dec)))

    def call(self, unet: nn.Module) -> Callable[[], Tensor]:
        return lambda: unet(*self.inputs, return_dict=False)[0]

    def clone(self) -> nn.Module:
        """Another UNet on the same weights, to be hooked."""
        shared = [*self.unet.parameters(), *self.unet.buffers()]
        return copy.deepcopy(self.unet, {id(tensor): tensor for tensor in shared})

    def lines(self, flagged: int) -> Lines:
        return concept_lines(self.tokens, self.weights, flagged)

    def erased(self, mode: str, flagged: int) -> Callable[[], Tensor]:
        from saemnesia_fast import ConceptTable, apply_erasure

        threshold = self.lines(flagged).thresholds[0].float().cpu()
        mu = torch.zeros(2, 1, self.case.N)
        mu[0, 0, :CONCEPT_LATENTS] = 2 * threshold
        mu[1, 0, CONCEPT_LATENTS] = 1.0
        table = ConceptTable(
            mu=mu,
            timesteps=torch.tensor([TIMESTEP]),
            concepts=["erased", "other"],
            kinds=["object", "object"],
            hook_point=f"unet.{self.hook_point}",
            sae_hash=self.sae.content_hash(),
        )
        unet = self.clone()
        apply_erasure(
            unet, self.sae, table, "erased", FACTOR, mode, num_latents=CONCEPT_LATENTS, scale="constant", cfg=True
        )
        return self.call(unet)

    def hooked(self, flagged: int) -> Callable[[], Tensor]:
        line = [entry[0] for entry in self.lines(flagged)]
        return self.call(self._with_edit(lambda block: released_hook(block, *self.weights, self.case.k, *line)))

    def against(self, mode: str | None, flagged: int) -> Callable[[Tensor], Tensor]:
        """Errors of each image against a UNet whose block is edited in float64."""

        def edit(block: Tensor) -> Tensor:
            if mode is None:
                return block
            tokens = block.permute(0, 2, 3, 1)
            if mode == "contrast":  # every conditional token: all are flagged
                without, given = block.double()
                return torch.stack([without, given + FACTOR * (given - without)]).to(block.dtype)
            exact, _ = reference(tokens.flatten(0, 2), self.weights, self.lines(flagged), self.case.k, mode, 0.0)
            return exact.view(tokens.shape).permute(0, 3, 1, 2).to(block.dtype)

        def errors(sample: Tensor) -> Tensor:
            expected = self.call(self._with_edit(edit))().double().flatten(1)
            return (sample.double().flatten(1) - expected).norm(dim=1) / expected.norm(dim=1)

        return errors

    def _with_edit(self, edit: Callable[[Tensor], Tensor]) -> nn.Module:
        from saemnesia_fast.hookpoints import find_hook_point

        unet = self.clone()
        find_hook_point(unet, self.hook_point).register_forward_hook(
            lambda module, arguments, output: (edit(output[0]), *output[1:])
        )
        return unet


def _unet(case: Case, device: str) -> Any:
    from diffusers import UNet2DConditionModel

    small: dict[str, Any] = {
        "sample_size": 32,
        "block_out_channels": (160, 320),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 256,
    }
    sd15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**(sd15 if case.d == 1280 else small))
    return nn.Module.to(unet, case.torch_dtype).eval().requires_grad_(False)


def _absent(reason: str) -> list[Provider]:
    def start() -> Callable[[], Any]:
        raise Absent(reason)

    return [Provider(name, start) for name in (BASELINE, "ours", "released hook")]
