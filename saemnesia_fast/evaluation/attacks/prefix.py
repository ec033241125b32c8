"""Prompts with free tokens before their words, and a pipeline that paints from what was computed of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class FreePrefix:
    """k free tokens between the start token and the words of R prompts, of a Stable Diffusion pipeline.

    Raises ValueError where a prompt leaves no room for them, as no word is cut off, and for SDXL with its two encoders.
    """

    def __init__(self, pipe: Any, prompts: Sequence[str], tokens: int) -> None:
        if getattr(pipe.unet.config, "addition_embed_type", None) is not None:
            raise ValueError("pipe: expected a UNet that reads nothing but text, got one with further embeddings")
        self.pipe = pipe
        self.tokens = tokens
        length = pipe.tokenizer.model_max_length
        for prompt in prompts:
            room = length - len(pipe.tokenizer(prompt).input_ids)
            if not 1 <= tokens <= room:
                raise ValueError(f"tokens: expected 1 to {room} before {prompt!r}, got {tokens}")
        ids = pipe.tokenizer(list(prompts), padding="max_length", max_length=length, return_tensors="pt").input_ids
        embedding = pipe.text_encoder.get_input_embeddings()
        self._ids = torch.cat([ids[:, :1].expand(-1, 1 + tokens), ids[:, 1 : length - tokens]], 1)
        self._ids = self._ids.to(embedding.weight.device)
        special = set(pipe.tokenizer.all_special_ids)
        self.allowed = [token for token in range(len(embedding.weight)) if token not in special]
        """Ids of the tokens that a prefix may hold: all but the special ones."""
        self.vocabulary: Tensor = embedding.weight.detach()[self.allowed].float()
        """[V, D] float32: their embeddings."""
        empty = pipe.tokenizer("", padding="max_length", max_length=length, return_tensors="pt").input_ids
        with torch.no_grad():
            self.empty: Tensor = pipe.text_encoder(empty.to(embedding.weight.device))[0]
        """[1, L, C]: what cross-attention reads of no prompt."""

    def states(self, prefix: Tensor, rows: Tensor) -> Tensor:
        """What cross-attention reads [n, L, C] of prompts `rows` [n] behind prefixes [n, k, D]. Differentiable."""

        def insert(module: torch.nn.Module, args: Any, embedded: Tensor) -> Tensor:
            free = prefix.to(embedded.device, embedded.dtype)
            return torch.cat([embedded[:, :1], free, embedded[:, 1 + self.tokens :]], 1)

        hook = self.pipe.text_encoder.get_input_embeddings().register_forward_hook(insert)
        try:
            return self.pipe.text_encoder(self._ids[rows.to(self._ids.device)])[0]
        finally:
            hook.remove()

    def nearest(self, prefix: Tensor) -> Tensor:
        """Positions in the vocabulary [..., k] of the tokens nearest to embeddings [..., k, D]."""
        return (prefix @ self.vocabulary.T - self.vocabulary.square().sum(1) / 2).argmax(-1)

    def ids(self, positions: Tensor) -> list[int]:
        """Token ids of positions [k] in the vocabulary."""
        return [self.allowed[position] for position in positions.tolist()]


@contextmanager
def reading(pipe: Any, states: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, `pipe` takes states [L, C] for the prompts that have some; negative prompts are read as ever."""
    own = vars(pipe).get("encode_prompt")
    encode = pipe.encode_prompt

    def encode_prompt(prompt: Any, *args: Any, **kwargs: Any) -> Any:
        texts = [prompt] if isinstance(prompt, str) else prompt
        return encode(prompt, *args, **(kwargs | {"prompt_embeds": torch.stack([states[text] for text in texts])}))

    pipe.encode_prompt = encode_prompt
    try:
        yield
    finally:
        del pipe.encode_prompt
        if own is not None:
            pipe.encode_prompt = own
