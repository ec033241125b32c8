"""What is analysed, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from saemnesia_fast.concepts import ConceptTable
from saemnesia_fast.sae import TopKSAE


@dataclass(frozen=True)
class Reading:
    """The concepts of one kind, as an SAE sees them at one hook point."""

    method: str
    """Whose SAE: the name in tables and plots."""
    kind: str
    """Of the concepts: "object", "style" or any other word of the table."""
    table: ConceptTable
    sae: TopKSAE | None = None
    """That of the table; needed where pictures are painted."""

    @property
    def name(self) -> str:
        return f"{self.method}, {self.kind}"

    @property
    def concepts(self) -> list[str]:
        """C names."""
        return [name for name, kind in zip(self.table.concepts, self.table.kinds, strict=True) if kind == self.kind]

    def latents(self) -> list[int]:
        """[C]: the assigned latent of each concept, or where there is none the one of the best average score."""
        assigned = self.table.assignment
        return [
            assigned[name] if name in assigned else int(self.table.scores(name).mean(0).argmax())
            for name in self.concepts
        ]


@dataclass(frozen=True)
class Analysis:
    """Numbers, as JSON, and how they look."""

    numbers: dict[str, Any]
    """{method: {kind: ...}}."""
    plots: dict[str, str] = field(default_factory=dict)
    """{name: SVG}."""
    pictures: dict[str, Image.Image] = field(default_factory=dict)


def by_kind(readings: Sequence[Reading]) -> dict[str, list[Reading]]:
    """The readings of each kind, in order."""
    kinds: dict[str, list[Reading]] = {}
    for one in readings:
        kinds.setdefault(one.kind, []).append(one)
    return kinds
