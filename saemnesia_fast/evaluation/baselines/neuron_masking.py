"""Concept-aware neuron masking, in the spirit of Forget-It-All: neurons that fire for a concept are cut out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from saemnesia_fast.hookpoints import get_unet

from .prompts import Prompts, asking, others
from .weights import swapped

FEED_FORWARD = "ff.net.2"
CROSS_ATTENTION = "attn2.to_out.0"


@dataclass(frozen=True)
class NeuronMasking:
    """Zeroes the neurons of the UNet's transformer blocks that tell a concept from the others.

    A neuron is one output of a GEGLU or of a cross-attention head: a column of the linear layer after it. With a(t) its
    mean magnitude over the tokens of a picture at a denoising step, its score is

        (mean of a over the concept's prompts - mean over all others) / (standard deviation over all prompts + 1e-6).

    It is cut where its score is among the best `share` of its layer in at least `agreement` of the steps: one that
    answers to the concept for a moment only is kept. Several concepts are erased by all of their neurons.

    Ours is written from the idea that Forget-It-All names in its title; scores, consistency over steps and the choice
    of layers are our own, so its published figures are not to be expected.
    """

    prompts: Prompts
    """{concept: prompts that ask for it}, of all concepts."""
    share: float = 0.02
    """Of each layer's neurons, at each step."""
    agreement: float = 0.5
    """Share of the steps in which a neuron has to be among the best."""
    layers: tuple[str, ...] = (FEED_FORWARD, CROSS_ATTENTION)
    """How the names of the linear layers end whose inputs are the neurons."""
    pictures: int = 1
    """Pictures of each prompt to measure on."""
    steps: int = 20
    guidance_scale: float = 7.5
    seed: int = 0
    name: str = "neuron_masking"
    source: str = "in the spirit of Forget-It-All, multi-concept unlearning by concept-aware neuron masking"
    _measured: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    @contextmanager
    def erased(self, pipe: Any, concepts: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """The UNet is measured at its first use, with the weights that it then has.

        Raises ValueError for an unknown concept, and where no prompt is left to compare with.
        """
        unet = get_unet(pipe)
        new = {}
        for name, neurons in self.neurons(pipe, concepts).items():
            weight = unet.get_parameter(f"{name}.weight").detach()
            new[f"{name}.weight"] = weight.masked_fill(neurons.to(weight.device), 0)
        with swapped(unet, new):
            yield {}

    def neurons(self, pipe: Any, concepts: Sequence[str]) -> dict[str, Tensor]:
        """{layer: [neurons] bool}, true where one is cut."""
        asking(self.prompts, concepts)
        everything = list(dict.fromkeys(text for texts in self.prompts.values() for text in texts))
        found: dict[str, Tensor] = {}
        for concept in concepts:
            asked = asking(self.prompts, [concept])
            if not others(self.prompts, asked):
                raise ValueError(f"prompts: expected some that do not ask for {concept!r}, got none")
            asks = torch.tensor([text in asked for text in everything])
            for name, activations in self._activations(pipe, everything).items():
                cut = self._selected(activations, asks)
                found[name] = found[name] | cut if name in found else cut
        return found

    def _selected(self, activations: Tensor, asks: Tensor) -> Tensor:
        """[neurons] bool of activations [steps, prompts, neurons]; asks [prompts] bool."""
        difference = activations[:, asks].mean(1) - activations[:, ~asks].mean(1)
        scores = difference / (activations.std(1) + 1e-6)
        count = max(1, round(self.share * scores.shape[1]))
        best = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(count, dim=1).indices, True)
        return best.double().mean(0) >= self.agreement

    def _activations(self, pipe: Any, texts: Sequence[str]) -> dict[str, Tensor]:
        """{layer: [steps, prompts, neurons]} mean magnitudes, of the conditional half, on the CPU."""
        unet = get_unet(pipe)
        if unet not in self._measured:
            rounds = [self._run(pipe, unet, texts, self.seed + n * len(texts)) for n in range(self.pictures)]
            self._measured[unet] = {name: torch.stack([one[name] for one in rounds]).mean(0) for name in rounds[0]}
        return self._measured[unet]

    @torch.no_grad()
    def _run(self, pipe: Any, unet: nn.Module, texts: Sequence[str], seed: int, batch: int = 16) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {}
        for first in range(0, len(texts), batch):
            some = list(texts[first : first + batch])
            calls: dict[str, list[Tensor]] = {}
            with ExitStack() as stack:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                for name, layer in unet.named_modules():
                    if isinstance(layer, nn.Linear) and name.endswith(tuple(self.layers)):
                        hook = _recorder(calls.setdefault(name, []), len(some))
                        stack.callback(layer.register_forward_pre_hook(hook).remove)
                pipe(
                    some,
                    num_inference_steps=self.steps,
                    guidance_scale=self.guidance_scale,
                    generator=[torch.Generator().manual_seed(seed + first + n) for n in range(len(some))],
                    output_type="latent",
                )
            for name, seen in calls.items():
                parts.setdefault(name, []).append(torch.stack(seen))
        if not parts:
            raise ValueError(f"layers: expected ends of linear layers' names, got {self.layers!r}")
        return {name: torch.cat(some, dim=1) for name, some in parts.items()}


def _recorder(into: list[Tensor], pictures: int) -> Any:
    def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        into.append(args[0][-pictures:].float().abs().mean(1).cpu())

    return hook
