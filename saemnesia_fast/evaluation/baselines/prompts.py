"""What the baselines are told of a concept: prompts that ask for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Prompts = Mapping[str, Sequence[str]]
"""{concept: prompts that ask for it}, of all concepts between which a method is to tell. Concepts may share prompts."""


def asking(prompts: Prompts, concepts: Sequence[str]) -> list[str]:
    """The prompts that ask for one of the concepts, each once.

    Raises ValueError for a concept that has none, and where no concept is named.
    """
    if not concepts:
        raise ValueError("concepts: expected at least one, got none")
    for concept in concepts:
        if not prompts.get(concept):
            raise ValueError(f"concepts: expected some of {', '.join(prompts)}, got {concept!r}")
    return list(dict.fromkeys(text for concept in concepts for text in prompts[concept]))


def others(prompts: Prompts, asked: Sequence[str]) -> list[str]:
    """All prompts that are not among those `asked`, each once."""
    everything = dict.fromkeys(text for texts in prompts.values() for text in texts)
    return [text for text in everything if text not in set(asked)]


@torch.no_grad()
def text_states(pipe: Any, texts: Sequence[str]) -> Tensor:
    """What the UNet's cross-attention reads of each text: [n, L, D], in the pipeline's dtype and on its device."""
    return pipe.encode_prompt(
        prompt=list(texts), device=pipe.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0]


def last_word(pipe: Any, text: str) -> int:
    """Position of the text's last token, 0 (the start token's) for an empty text."""
    length = pipe.tokenizer.model_max_length
    return len(pipe.tokenizer(text, truncation=True, max_length=length).input_ids) - 2
