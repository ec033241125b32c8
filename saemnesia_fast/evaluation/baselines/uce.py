"""Unified Concept Editing: cross-attention that reads another text, in closed form (arXiv 2308.14761)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saemnesia_fast.hookpoints import get_unet

from .prompts import Prompts, asking, last_word, others, text_states
from .weights import swapped


@dataclass(frozen=True)
class UCE:
    """Keys and values of an erased concept's prompt become those of its guide, and of all other prompts stay.

    For every `to_k` and `to_v` of cross-attention, W minimises, over text states c of the erased concepts' prompts,
    c* of their guides and p of all other prompts,

        erase_scale sum |W c - W_old c*|^2 + preserve_scale sum |W p - W_old p|^2 + ridge |W - W_old|^2.

    As W_old occurs in every term, W = W_old A B^-1 with the same A and B for all layers: one float64 solve of D x D.
    A prompt and its guide are laid side by side by their last words, so that the rest of both texts, the end and the
    padding, are edited as well.
    """

    prompts: Prompts
    """{concept: prompts that ask for it}, those to preserve included."""
    guides: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    """{concept: {what it becomes: the text that is read instead of each of its prompts}}. The first that is not itself
    being erased is taken, and the empty text where there is none."""
    erase_scale: float = 1.0
    preserve_scale: float = 1.0
    ridge: float = 0.5
    name: str = "uce"
    source: str = "Unified Concept Editing in Diffusion Models, arXiv 2308.14761, equation 7"

    @contextmanager
    def erased(self, pipe: Any, concepts: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """Raises ValueError for an unknown concept, and for guides that are not as many as the concept's prompts."""
        change = self.change(pipe, concepts)
        unet = get_unet(pipe)
        layers = [name for name, layer in unet.named_modules() if _reads_text(name, layer)]
        new = {}
        for name in layers:
            weight = unet.get_parameter(f"{name}.weight").detach()
            new[f"{name}.weight"] = weight.double() @ change
        with swapped(unet, new):
            yield {}

    def change(self, pipe: Any, concepts: Sequence[str]) -> Tensor:
        """A B^-1 [D, D] float64: the text state that edited weights read in the place of each."""
        asked = asking(self.prompts, concepts)
        old, new = self._pairs(pipe, concepts)
        kept = text_states(pipe, others(self.prompts, asked) or [""]).flatten(0, 1).double()
        identity = torch.eye(old.shape[1], dtype=torch.float64, device=old.device)
        fixed = self.preserve_scale * kept.T @ kept + self.ridge * identity
        A = self.erase_scale * new.T @ old + fixed
        B = self.erase_scale * old.T @ old + fixed
        return torch.linalg.solve(B, A, left=False)

    def _pairs(self, pipe: Any, concepts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Text states [n, D] of the concepts' prompts and, row by row, of what is to be read instead."""
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        for concept in dict.fromkeys(concepts):
            texts = self.prompts[concept]
            choices = (guides for other, guides in self.guides.get(concept, {}).items() if other not in concepts)
            guides = next(choices, [""] * len(texts))
            if len(guides) != len(texts):
                raise ValueError(f"guides: expected {len(texts)} for {concept!r}, one a prompt, got {len(guides)}")
            for text, guide in zip(texts, guides, strict=True):
                state, target = text_states(pipe, [text, guide]).double()
                shift = last_word(pipe, text) - last_word(pipe, guide)
                length = len(state) - abs(shift)
                sides[0].append(state[max(shift, 0) :][:length])
                sides[1].append(target[max(-shift, 0) :][:length])
        return torch.cat(sides[0]), torch.cat(sides[1])


def _reads_text(name: str, layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and name.endswith(("attn2.to_k", "attn2.to_v"))
