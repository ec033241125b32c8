"""A prompt attack that needs no gradient: the judge's word on pictures alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .target import Target


@dataclass(frozen=True)
class SearchAttack:
    """Free tokens by evolution: the score of a prefix is the concept's probability in the picture it leads to.

    The first generation is drawn at random; each later one crosses the two best prefixes so far, token by token, and
    puts a random token in a random place. One generation is random search. Whoever can paint and look can do it,
    whatever erases: also where no gradient passes.
    """

    tokens: int = 5
    """k free tokens before each prompt."""
    population: int = 8
    """Pictures of a generation; an attack ends after one in which the concept is recognised."""
    generations: int = 6
    seed: int = 0
    name: str = "search"
    source: str = "evolutionary search over tokens, our own"

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("population", 2), ("generations", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected >= {least}, got {getattr(self, name)}")

    def __call__(self, target: Target) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        size = len(target.vocabulary)
        shape = (len(target), self.population, self.tokens)
        parents = torch.zeros(len(target), 0, self.tokens, dtype=torch.long)
        scores = torch.zeros(len(target), 0)
        for _ in range(self.generations):
            # Draws for all prompts, so that those of one do not depend on which others are still open.
            prefixes = torch.randint(size, shape, generator=generator)
            mother = torch.randint(2, shape, generator=generator)
            place = torch.randint(self.tokens, shape[:2], generator=generator)
            rows = target.open
            if not len(rows):
                break
            if parents.shape[1]:
                fresh = place[..., None] == torch.arange(self.tokens)
                prefixes = torch.where(fresh, prefixes, parents.gather(1, mother))
            found = self._score(target, prefixes[rows], rows)
            pool = torch.cat([parents, prefixes], 1)
            # A prompt that is done keeps what it has.
            latest = torch.full(shape[:2], -1.0).index_copy(0, rows, found)
            best = torch.cat([scores, latest], 1).topk(2, dim=1)
            scores, parents = best.values, pool.gather(1, best.indices[..., None].expand(-1, -1, self.tokens))

    def _score(self, target: Target, prefixes: Tensor, rows: Tensor) -> Tensor:
        """[n, P] of prefixes [n, P, k] for prompts `rows` [n]."""
        embedded = target.vocabulary[prefixes.flatten(0, 1).to(target.vocabulary.device)]
        return target.attempt(embedded, rows.repeat_interleave(self.population)).view(-1, self.population)
