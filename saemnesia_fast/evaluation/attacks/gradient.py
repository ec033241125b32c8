"""A prompt attack by gradients through the erased UNet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .target import Target


@dataclass(frozen=True)
class GradientAttack:
    """Free tokens by descent on the denoising loss of the plain pipeline's pictures, after UnlearnDiffAtk.

    Adam's steps on free embeddings u, from tokens drawn at random. space="vocabulary": the gradient is taken at the
    tokens nearest to u, and these are painted. space="continuous": at u, which no text can say: a stronger attack, on
    whoever lets embeddings in. Prompts are attacked side by side and do not depend on each other.

    The published attack takes one step for one timestep with the gradient's sign; this one averages over several
    timesteps and noises. It needs an erasure that is differentiable and knows the timestep, which ours is (SPEC 5.4).
    """

    tokens: int = 5
    """k free tokens before each prompt."""
    space: Literal["vocabulary", "continuous"] = "vocabulary"
    iterations: int = 60
    every: int = 10
    """Iterations from one picture to the next; an attack ends where the concept is recognised."""
    draws: int = 4
    """Timesteps and noises of an iteration."""
    learning_rate: float = 0.3
    """In units of the vocabulary's standard deviation."""
    seed: int = 0
    name: str = "gradient"
    source: str = "in the manner of UnlearnDiffAtk, arXiv 2310.11868"

    def __post_init__(self) -> None:
        if self.space not in ("vocabulary", "continuous"):
            raise ValueError(f"space: expected vocabulary or continuous, got {self.space!r}")
        for name in ("tokens", "iterations", "every", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected >= 1, got {getattr(self, name)}")

    @torch.enable_grad()
    def __call__(self, target: Target) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        vocabulary = target.vocabulary
        first = torch.randint(len(vocabulary), (len(target), self.tokens), generator=generator)
        free = vocabulary[first].requires_grad_()
        optimizer = torch.optim.Adam([free], lr=self.learning_rate * float(vocabulary.std()))
        for iteration in range(1, self.iterations + 1):
            rows = target.open
            if not len(rows):
                break
            point = self._point(target, free.detach()).requires_grad_()
            losses = target.loss(point[rows], rows, self.draws, generator)
            (free.grad,) = torch.autograd.grad(losses.sum(), point)
            optimizer.step()
            if iteration % self.every == 0 or iteration == self.iterations:
                target.attempt(self._point(target, free.detach())[rows], rows)

    def _point(self, target: Target, free: torch.Tensor) -> torch.Tensor:
        """The embeddings that a prompt is given for the free ones [R, k, D]."""
        return free.clone() if self.space == "continuous" else target.vocabulary[target.nearest(free)]
