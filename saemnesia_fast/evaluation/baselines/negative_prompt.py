"""Negative prompt: guidance away from the concept's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NegativePrompt:
    """The concepts' names take the place of the empty prompt in classifier-free guidance.

    Nothing else changes, so anybody who writes the prompt can undo it; without guidance it does nothing.
    """

    template: str = "{}"
    """Text for one concept; those of several are joined by commas."""
    name: str = "negative_prompt"
    source: str = "classifier-free guidance (arXiv 2207.12598) with the `negative_prompt` of diffusers"

    @contextmanager
    def erased(self, pipe: Any, concepts: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """Yields {"negative_prompt": text}: diffusers wants it once for every prompt where a call has a list of them.

        Raises ValueError where no concept is named.
        """
        if not concepts:
            raise ValueError("concepts: expected at least one, got none")
        yield {"negative_prompt": ", ".join(self.template.format(concept) for concept in concepts)}
