"""From names of concepts to selections of latents, for each hook point and prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from saemnesia_fast.concepts import ConceptTable, Selection

Concepts = str | Sequence[str] | Sequence[Sequence[str]]
Strength = float | Mapping[str, float]
NumLatents = int | Mapping[str, int | None] | None


@dataclass(frozen=True)
class Selector:
    """The tables of an erasure and how it chooses latents in them."""

    tables: Mapping[str, ConceptTable]
    decoder_norms: Mapping[str, Tensor]
    """[N] for each hook point, with scale="norm" only."""
    num_latents: NumLatents
    percentile: float | None
    scale: str
    reselect: bool
    anchor: str | None
    """A concept that is not to be erased."""
    settings: Mapping[str, object]
    """What else `explain` tells."""

    def __call__(self, hook_point: str, concepts: Concepts, strength: Strength) -> list[Selection | None]:
        """One selection for all prompts, or one for each, None where a prompt's list is empty.

        Raises ValueError for unknown concepts, naming the known ones, and for no concept at all.
        """
        done: dict[frozenset[str], Selection | None] = {frozenset(): None}
        selections = []
        for names in per_prompt(concepts):
            if self.anchor in names:
                raise ValueError(f"concepts: expected others than the anchor {self.anchor!r}, got {names}")
            key = frozenset(names)
            if key not in done:
                done[key] = self.tables[hook_point].select(
                    names,
                    strength=strength,
                    num_latents=self.num_latents,
                    percentile=self.percentile,
                    scale=self.scale,
                    reselect=self.reselect,
                    decoder_norms=self.decoder_norms.get(hook_point),
                )
            selections.append(done[key])
        return selections

    def explain(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in (*self.settings.items(), ("scale", self.scale)))


def per_prompt(concepts: Concepts) -> list[list[str]]:
    """Lists of names: one for all prompts, or one for each.

    Raises:
        TypeError: neither a name, nor names, nor lists of names.
        ValueError: no name at all.
    """
    if isinstance(concepts, str):
        return [[concepts]]
    entries = list(concepts)
    if not entries:
        raise ValueError("concepts: expected at least one name, got none; a prompt's own list may be empty")
    if all(isinstance(entry, str) for entry in entries):
        return [entries]  # type: ignore[list-item]
    if any(isinstance(entry, str) for entry in entries):
        raise TypeError(f"concepts: expected names, or one list of names for each prompt, got {concepts!r}")
    lists = [list(entry) for entry in entries]
    if not all(isinstance(name, str) for names in lists for name in names):
        raise TypeError(f"concepts: expected one list of names for each prompt, got {concepts!r}")
    return lists
