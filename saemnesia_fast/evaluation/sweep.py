"""Search for the setting that erases a concept best: SAEmnesia's 7 strengths against SAeUron's 30 set sizes x 7."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .methods import Benchmark, Setting, SparseErasure
from .metrics import ErasureScores, mean_scores
from .outcome import Outcome
from .protocols import cases
from .units import Plan

if TYPE_CHECKING:
    from ..concepts import ConceptTable

STRENGTHS = (-1.0, -5.0, -10.0, -15.0, -20.0, -25.0, -30.0)
SET_SIZES = tuple(range(1, 31))


@dataclass(frozen=True)
class Search:
    """A grid of settings, tried on every concept by itself."""

    sparse: SparseErasure
    """What is searched for: its settings, but for strength and number of latents, are kept."""
    strengths: Sequence[float] = STRENGTHS
    num_latents: Sequence[int | None] = (None,)
    """Set sizes; None is the assigned latent."""
    kinds: Collection[str] = field(default=("object", "style"))
    concepts: Collection[str] = ()
    """All of the kinds if empty."""

    def __post_init__(self) -> None:
        if not self.strengths or not self.num_latents:
            raise ValueError("strengths, num_latents: expected at least one of each")

    def plan(
        self, benchmark: Benchmark, seeds: Sequence[int], folder: Path, retained: int | None, threads: int = 1
    ) -> Plan:
        """Every setting as a method of its own, erasing every concept alone."""
        found = cases("single", benchmark.classes, self.kinds)
        unknown = set(self.concepts) - {name for case in found for name in case.erased}
        if unknown:
            raise ValueError(f"concepts: expected some of the kinds {', '.join(self.kinds)}, got {sorted(unknown)}")
        found = [case for case in found if not self.concepts or case.erased[0] in self.concepts]
        return Plan(benchmark, self.methods(), found, seeds, folder, retained, threads)

    def methods(self) -> list[SparseErasure]:
        """The smallest sets and the weakest strengths first."""
        grid = product(sorted(self.num_latents, key=lambda n: n or 0), sorted(self.strengths, key=abs))
        return [self.method(number, strength) for number, strength in grid]

    def method(self, number: int | None, strength: float) -> SparseErasure:
        settings = {
            kind: replace(setting, strength=dict.fromkeys(setting.strength, strength), num_latents=number)
            for kind, setting in self.sparse.settings.items()
        }
        name = f"{self.sparse.name}{strength:+g}x{'assigned' if number is None else number}"
        return replace(self.sparse, name=name, settings=settings, stored=False)


def best_settings(search: Search, plan: Plan) -> dict[str, Any]:
    """What a painted plan found: {"runs", "seconds", "concepts": {concept: {"best", "scores", "tried"}}}.

    A run is one setting on one concept; "seconds" are those of all runs, whatever the number of processes. The best
    setting has the highest mean of UA, IRA and CRA over the seeds; of equal ones the smallest set, then the weakest
    strength.
    """
    concepts: dict[str, Any] = {}
    seconds = 0.0
    for case in plan.cases:
        (concept,) = case.erased
        tried: list[tuple[ErasureScores, dict[str, Any]]] = []
        for method in search.methods():
            outcomes = [Outcome.load(plan.unit(method, case.erased, seed).path) for seed in plan.seeds]
            seconds += outcomes[0].ready_seconds + sum(one.paint_seconds for one in outcomes)
            by_seed = [one.scores(plan.benchmark.classes, case.erased)[case.group] for one in outcomes]
            tried.append((mean_scores(by_seed), _stored(method.settings[case.group])))
        scores, best = max(tried, key=lambda one: one[0].average)
        concepts[concept] = {
            "best": best,
            "scores": scores.as_dict(),
            "tried": [setting | scores.as_dict() for scores, setting in tried],
        }
    runs = len(search.methods())
    return {"runs_per_concept": runs, "runs": runs * len(concepts), "seconds": round(seconds, 3), "concepts": concepts}


def store(
    found: Mapping[str, Any], search: Search, tables: Mapping[str, ConceptTable], kinds: Mapping[str, Collection[str]]
) -> None:
    """Put the best settings into the tables of the hook points at which their kind is erased."""
    for kind, setting in search.sparse.settings.items():
        for point in setting.strength:
            best = {name: one["best"] for name, one in found["concepts"].items() if name in kinds[kind]}
            tables[point].settings = tables[point].settings | best


def _stored(setting: Setting) -> dict[str, Any]:
    """As a table's `settings` have it."""
    (strength,) = set(setting.strength.values())
    return {
        "strength": strength,
        "num_latents": setting.num_latents,
        **{name: getattr(setting, name) for name in ("scale", "reselect", "mode", "halves")},
    }
