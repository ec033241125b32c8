"""The text side of MiniCanvas: a CLIP tokenizer whose vocabulary we write, and a small CLIP text model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .drawing import OBJECTS, PROMPT_TEMPLATES, STYLES, prompt_for
from .loop import fit

PROMPT_LENGTH = 16
HIDDEN = 64


def build_tokenizer() -> CLIPTokenizer:
    """Byte-pair tokenizer in which every word of the prompts is one token; other words are spelt out."""
    words = sorted({word for o in OBJECTS for s in STYLES for t in range(4) for word in _words(prompt_for(o, s, t))})
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[str] = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merge = f"{pieces[-2]} {pieces[-1]}"
            pieces[-2:] = [pieces[-2] + pieces[-1]]
            if merge not in merges:
                merges.append(merge)
                vocabulary.append(pieces[-1])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=[tuple(merge.split(" ")) for merge in merges],
        model_max_length=PROMPT_LENGTH,
    )


def _words(text: str) -> list[str]:
    return text.replace(",", " , ").split()


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text model of two layers, width 64."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=4 * HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=PROMPT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Token ids [n, 16] int64, padded as a Stable Diffusion pipeline pads."""
    return tokenizer(
        prompts, padding="max_length", max_length=PROMPT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def train_text_encoder(
    folder: Path, *, steps: int = 300, seed: int = 0, progress: bool = True
) -> tuple[CLIPTokenizer, CLIPTextModel, dict[str, Any]]:
    """Trains until the end and padding tokens know the prompt's object and style, as those of the real CLIP do."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    encoder = build_text_encoder(tokenizer)
    heads = nn.Linear(HIDDEN, len(OBJECTS) + len(STYLES))
    combinations = [
        (o, s, t) for o in range(len(OBJECTS)) for s in range(len(STYLES)) for t in range(len(PROMPT_TEMPLATES))
    ]
    ids = tokenize(tokenizer, [prompt_for(OBJECTS[o], STYLES[s], t) for o, s, t in combinations])
    objects = torch.tensor([o for o, _, _ in combinations])
    styles = torch.tensor([s for _, s, _ in combinations])
    module = nn.ModuleDict({"encoder": encoder, "heads": heads})

    def loss(step: int, generator: torch.Generator) -> Tensor:
        picked = torch.randperm(len(ids), generator=generator)[:64]
        after = ids[picked] == tokenizer.eos_token_id
        logits = heads(encoder(ids[picked]).last_hidden_state)[after]
        times = after.sum(1)
        object_logits, style_logits = logits.split([len(OBJECTS), len(STYLES)], dim=1)
        return F.cross_entropy(object_logits, objects[picked].repeat_interleave(times)) + F.cross_entropy(
            style_logits, styles[picked].repeat_interleave(times)
        )

    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    record = fit(
        "text_encoder",
        module,
        loss,
        steps=steps,
        optimizer=optimizer,
        schedule=schedule,
        folder=folder,
        seed=seed,
        clip=1.0,
        progress=progress,
    )
    return tokenizer, encoder, record
