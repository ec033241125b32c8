"""The table of mean activations that erasing reads: scores, selection and its file format (SPEC 2, 3.5, 6.3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .scores import Scorer, assign_latents, best_latents, concept_scores, latents_above_percentile
from .selection import SCALES, ClaimBoard, Selection, nearest_row
from .storage import load_table, save_table

if TYPE_CHECKING:
    from saemnesia_fast.sae import TopKSAE


@dataclass(repr=False, eq=False)
class ConceptTable:
    """Mean activation of every latent of one SAE, for each concept at each timestep.

    Raises:
        ValueError: shapes disagree, a name appears twice, timesteps do not descend, mu has a negative or non-finite
            entry, or the assignment names an unknown concept, a latent outside [0, N), or one latent twice.
    """

    mu: Tensor
    """[C, T, N] float32: mean over a concept's prompts and tokens, zeros included (SPEC 2.1)."""
    timesteps: Tensor
    """[T] int64: the scheduler's timestep values, descending (row 0 = noisiest)."""
    concepts: list[str]
    """C names."""
    kinds: list[str]
    """C kinds: "object", "style" or any other word."""
    hook_point: str
    """The UNet module whose activations the SAE reads."""
    sae_hash: str
    """`TopKSAE.content_hash()` of the SAE that the statistics were made with."""
    model_id: str = ""
    sampler: dict[str, Any] = field(default_factory=dict)
    """How the images were sampled: scheduler, num_inference_steps, guidance_scale, seed, stream."""
    assignment: dict[str, int] = field(default_factory=dict)
    """The one latent of a concept, where it has one (SPEC 4.2)."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What `saemnesia-fast sweep` found best: {concept: {"strength", "num_latents", "scale", "mode", ...}}; see
    `stored`."""

    def __post_init__(self) -> None:
        self.mu = self.mu.to("cpu", torch.float32)
        self.timesteps = self.timesteps.to("cpu", torch.int64)
        self.concepts, self.kinds = list(self.concepts), list(self.kinds)
        self._check_shapes()
        if len(set(self.concepts)) != len(self.concepts):
            raise ValueError(f"concepts: expected C different names, got {self.concepts}")
        if (self.timesteps.diff() >= 0).any():
            raise ValueError(f"timesteps: expected descending values, got {self.timesteps.tolist()}")
        low, high = (float(bound) for bound in self.mu.aminmax())
        if not (low >= 0 and math.isfinite(high)):
            raise ValueError(f"mu: expected finite values >= 0, got values from {low} to {high}")
        self._check_assignment()

    def _check_shapes(self) -> None:
        if self.mu.ndim != 3 or self.mu.numel() == 0:
            raise ValueError(f"mu: expected [C, T, N], none of them 0, got {list(self.mu.shape)}")
        num_concepts, num_steps, _ = self.mu.shape
        for name, names in (("concepts", self.concepts), ("kinds", self.kinds)):
            if len(names) != num_concepts:
                raise ValueError(f"{name}: expected C = {num_concepts} to match mu [C, T, N], got {len(names)}")
        if self.timesteps.shape != (num_steps,):
            raise ValueError(
                f"timesteps: expected [T] = [{num_steps}] to match mu [C, T, N], got {list(self.timesteps.shape)}"
            )

    def _check_assignment(self) -> None:
        self._rows(self.assignment)
        self._rows(self.settings)
        latents = list(self.assignment.values())
        if len(set(latents)) != len(latents) or any(not 0 <= i < self.num_latents for i in latents):
            raise ValueError(f"assignment: expected different latents in [0, N={self.num_latents}), got {latents}")

    def __repr__(self) -> str:
        sizes = "[C, T, N] = [{}, {}, {}]".format(*self.mu.shape)
        return f"ConceptTable({sizes}, hook_point={self.hook_point!r}, {len(self.assignment)} assigned)"

    @property
    def num_latents(self) -> int:
        """N."""
        return self.mu.shape[-1]

    def row(self, timestep: Tensor | float) -> int:
        """Index of the stored timestep nearest to `timestep` (SPEC 2.4)."""
        return int(nearest_row(self.timesteps, timestep))

    def scores(self, concept: str | None = None) -> Tensor:
        """Scores of SPEC 2.2: float32 [T, N] of one concept, or [C, T, N] of all."""
        if concept is None:
            return concept_scores(self.mu)
        return Scorer(self.mu)(self._rows([concept])[0])

    def assign(self) -> dict[str, int]:
        """One latent for every concept, objects first, by time-averaged score (SPEC 4.2); stored only if set.

        `table.assignment = table.assign()` makes these the latents that `select` steers by default.
        """
        scorer = Scorer(self.mu)
        mean_scores = torch.stack([scorer(c).mean(0) for c in range(len(self.concepts))])
        return assign_latents(mean_scores, self.concepts, self.kinds)

    def departure(self, concept: str, W_dec: Tensor) -> Tensor:
        """[T, d] float32: the concept's mean reconstruction less that of its kind, W_dec [N, d].

        Raises ValueError for the only concept of its kind, which departs from nothing.
        """
        (row,) = self._rows([concept])
        kind = [c for c, one in enumerate(self.kinds) if one == self.kinds[row]]
        if len(kind) == 1:
            raise ValueError(f"concept: expected one beside others of its kind, got {concept!r}, the only one")
        return (self.mu[row] - self.mu[kind].mean(0)) @ W_dec.detach().to("cpu", torch.float32)

    def check_sae(self, sae: TopKSAE) -> None:
        """Raise ValueError if the table was made with another SAE (SPEC 6.3)."""
        if sae.num_latents != self.num_latents:
            raise ValueError(f"sae: expected N = {self.num_latents} latents as in the table, got {sae.num_latents}")
        sae_hash = sae.content_hash()
        if sae_hash != self.sae_hash:
            raise ValueError(f"sae: the table was made with SAE {self.sae_hash[:12]}, got {sae_hash[:12]}")

    def select(
        self,
        concepts: str | Iterable[str],
        strength: float | Mapping[str, float] = -5.0,
        num_latents: int | Mapping[str, int | None] | None = None,
        percentile: float | None = None,
        scale: str = "mean",
        reselect: bool = False,
        decoder_norms: Tensor | None = None,
    ) -> Selection:
        """The latents to steer for `concepts` at every stored timestep (SPEC 2.3, 3.1, 3.5).

        By default a concept's assigned latent, or its best one per step where none is assigned. A latent that the
        concept never activated at a step (mu = 0) is not selected there. A latent that several concepts select goes to
        the most negative strength * mu, then to the concept that comes first in the table; the order of `concepts` and
        repetitions change nothing.

        Args:
            concepts: names, at least one.
            strength: gamma, for all or {concept: gamma}. Negative erases; any finite number is allowed.
            num_latents: select the best so many of each step, equal scores to the lowest index; for all or
                {concept: number}, None or no entry for the default.
            percentile: select the scores strictly above this percentile of the N scores of each step; 0 <= p < 100.
            scale: a factor is strength * mu ("mean"), strength ("constant") or strength / ||d_i|| ("norm").
            reselect: take the best latent of each step even where one is assigned, as SAEmnesia's released code does.
            decoder_norms: [N] norms ||d_i||, needed by and only by scale="norm".

        Raises:
            ValueError: an argument does not fit, or one of the concepts selects no latent at any step.
        """
        names = [concepts] if isinstance(concepts, str) else list(concepts)
        rows = sorted(set(self._rows(names)))
        if not rows:
            raise ValueError("concepts: expected at least one name, got none")
        strengths = self._strengths(strength, rows)
        numbers = self._numbers(num_latents, rows)
        self._check_choice(numbers, percentile, scale, decoder_norms)

        scorer = Scorer(self.mu)
        board = ClaimBoard(len(self.timesteps), self.num_latents)
        for position, c in enumerate(rows):
            mask = self._mask(c, scorer, numbers[position], percentile, reselect)
            if not mask.any():
                raise ValueError(
                    f"concepts: {self.concepts[c]!r} selects no latent of {self.hook_point} at any timestep"
                )
            board.claim(position, mask, self.mu[c], strengths[position])

        latents, owners = board.slots()
        padding = owners < 0
        thresholds = self.mu.gather(-1, latents.expand(len(self.mu), -1, -1)).mean(0, dtype=torch.float64).float()
        factors = torch.tensor(strengths)[owners]
        if scale == "mean":
            step = torch.arange(len(latents))[:, None]
            factors = factors * self.mu[torch.tensor(rows)[owners], step, latents]
        elif decoder_norms is not None:
            factors = factors / decoder_norms.float().to(factors.device)[latents]
        return Selection(
            timesteps=self.timesteps,
            latents=latents,
            thresholds=thresholds.masked_fill(padding, math.inf),
            factors=factors.masked_fill(padding, 1.0),
            owners=owners,
            concepts=tuple(self.concepts[c] for c in rows),
            scale=scale,
        )

    def stored(
        self, concepts: str | Iterable[str], mode: str | None = None, halves: str | None = None
    ) -> dict[str, Any]:
        """The arguments of `apply_erasure` that `settings` holds for these concepts: mode and halves where it has them.

        Args:
            mode, halves: those to erase with, if it is to be no others.

        Raises:
            ValueError: a concept has none, they differ in more than strength and number of latents, or they were found
                with another mode or halves.
        """
        names = [concepts] if isinstance(concepts, str) else list(concepts)
        self._rows(names)
        missing = [name for name in names if name not in self.settings]
        if missing:
            raise ValueError(f"concepts: expected those with stored settings, {list(self.settings)}, got {missing}")
        alike = ("scale", "reselect", "mode", "halves")
        shared = [{key: self.settings[name].get(key) for key in alike} for name in names]
        if any(one != shared[0] for one in shared):
            raise ValueError(
                f"concepts: expected stored settings of one scale, mode and halves, got {shared} for {names}"
            )
        for key, given in (("mode", mode), ("halves", halves)):
            known = shared[0][key]
            if None not in (known, given) and known != given:
                raise ValueError(f"{key}: expected {known!r}, with which stored settings were found, got {given!r}")
        by_name = {key: {name: self.settings[name].get(key) for name in names} for key in ("strength", "num_latents")}
        return by_name | {key: value for key, value in shared[0].items() if value is not None}

    def _mask(
        self, c: int, scorer: Scorer, num_latents: int | None, percentile: float | None, reselect: bool
    ) -> Tensor:
        active = self.mu[c] > 0
        if percentile is not None:
            return latents_above_percentile(scorer(c), active, percentile)
        if num_latents is None and not reselect and self.concepts[c] in self.assignment:
            assigned = torch.zeros_like(active)
            assigned[:, self.assignment[self.concepts[c]]] = True
            return assigned & active
        return best_latents(scorer(c), active, num_latents or 1)

    def _rows(self, names: Iterable[str]) -> list[int]:
        index = {name: c for c, name in enumerate(self.concepts)}
        unknown = sorted(set(names) - set(index))
        if unknown:
            raise ValueError(f"concepts: {unknown} not in the table, which has {self.concepts}")
        return [index[name] for name in names]

    def _strengths(self, strength: float | Mapping[str, float], rows: Sequence[int]) -> list[float]:
        names = [self.concepts[c] for c in rows]
        if isinstance(strength, Mapping):
            self._rows(strength)
            missing = sorted(set(names) - set(strength))
            if missing:
                raise ValueError(f"strength: expected a number for each of {names}, got none for {missing}")
            strengths = [float(strength[name]) for name in names]
        else:
            strengths = [float(strength)] * len(names)
        if not all(math.isfinite(s) for s in strengths):
            raise ValueError(f"strength: expected finite numbers, got {strength}")
        return strengths

    def _numbers(self, num_latents: int | Mapping[str, int | None] | None, rows: Sequence[int]) -> list[int | None]:
        if not isinstance(num_latents, Mapping):
            return [num_latents] * len(rows)
        self._rows(num_latents)
        return [num_latents.get(self.concepts[c]) for c in rows]

    def _check_choice(
        self, numbers: Sequence[int | None], percentile: float | None, scale: str, decoder_norms: Tensor | None
    ) -> None:
        for number in numbers:
            if number is not None and percentile is not None:
                raise ValueError(f"num_latents, percentile: expected at most one, got {number} and {percentile}")
            if number is not None and not 1 <= number <= self.num_latents:
                raise ValueError(f"num_latents: expected 1 to N={self.num_latents}, got {number}")
        if percentile is not None and not 0 <= percentile < 100:
            raise ValueError(f"percentile: expected 0 <= p < 100, got {percentile}")
        if scale not in SCALES:
            raise ValueError(f"scale: expected one of {SCALES}, got {scale!r}")
        if (scale == "norm") != (decoder_norms is not None):
            raise ValueError(f"decoder_norms: expected [N] with scale='norm' and only then, got scale={scale!r}")
        if decoder_norms is not None:
            if decoder_norms.shape != (self.num_latents,):
                raise ValueError(f"decoder_norms: expected [N] = [{self.num_latents}], got {list(decoder_norms.shape)}")
            if not (decoder_norms > 0).all():
                raise ValueError("decoder_norms: expected positive norms")

    def save(self, path: str | PathLike[str]) -> None:
        """Write `concepts.safetensors` and `concepts.json` into the folder `path`, mu as float16 (SPEC 6.3)."""
        metadata = {
            "concepts": self.concepts,
            "kinds": self.kinds,
            "hook_point": self.hook_point,
            "sae_hash": self.sae_hash,
            "model_id": self.model_id,
            "sampler": self.sampler,
            **({"settings": self.settings} if self.settings else {}),
        }
        assignment = torch.tensor([self.assignment.get(name, -1) for name in self.concepts])
        save_table(path, self.mu, self.timesteps, assignment, metadata)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> ConceptTable:
        """Read the folder that `save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: unknown format version, or the two files were not written together.
        """
        mu, timesteps, assignment, metadata = load_table(path)
        assigned = {name: i for name, i in zip(metadata["concepts"], assignment.tolist(), strict=True) if i >= 0}
        return cls(mu=mu, timesteps=timesteps, assignment=assigned, **metadata)
