"""How the concepts' scores are spread over the latents: peak, overlap, latents needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from saemnesia_fast.concepts import ConceptTable

from .. import plots
from .reading import Analysis, Reading, by_kind

RANKS = 20


def score_profile(
    table: ConceptTable, concepts: Sequence[str] | None = None, top: int = 10, share: float = 0.9
) -> dict[str, Any]:
    """The scores of SPEC 2.2 of each concept, averaged over the steps and sorted.

    Per concept, s being its N average scores:

    - latent, peak: the latent of the largest s, and that; peak_of_a_step: the largest score of any latent and step.
    - assigned, assigned_score: the assigned latent and its s, None without one.
    - needed: the smallest m such that the m largest s hold `share` of the sum of all positive s.
    - shared: {other concept of the table: how many of its `top` best latents are among this concept's}, without zeros.
    - overlap: share of this concept's `top` best latents that are also among another's.
    - ranked: the largest s, best first.

    Args:
        table: scores compare with all of its concepts.
        concepts: those to describe; all if not given.
        top: how many best latents to compare between concepts.
        share: 0 < share <= 1.

    Returns:
        {"concepts": {name: the above}, "mean": {"peak", "peak_of_a_step", "needed", "overlap"}}.

    Raises:
        ValueError: `share` or `top` is out of range, or a concept is unknown.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: expected 0 < share <= 1, got {share}")
    if not 1 <= top <= table.num_latents:
        raise ValueError(f"top: expected 1 to N={table.num_latents}, got {top}")
    names = table.concepts if concepts is None else list(concepts)
    if unknown := sorted(set(names) - set(table.concepts)):
        raise ValueError(f"concepts: {unknown} not in the table, which has {table.concepts}")
    best = {name: _best(table, name, top) for name in table.concepts}
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        scores = table.scores(name)
        mean = scores.mean(0)
        values, latents = mean.sort(descending=True, stable=True)
        mass = values.clamp_min(0).double().cumsum(0)
        others = {other: len(best[name] & best[other]) for other in table.concepts if other != name}
        elsewhere = set().union(*(best[other] for other in others))
        assigned = table.assignment.get(name)
        found[name] = {
            "latent": int(latents[0]),
            "peak": float(values[0]),
            "peak_of_a_step": float(scores.max()),
            "assigned": assigned,
            "assigned_score": None if assigned is None else float(mean[assigned]),
            "needed": int((mass < share * mass[-1]).sum()) + 1,
            "shared": {other: count for other, count in others.items() if count},
            "overlap": len(best[name] & elsewhere) / top,
            "ranked": values[:RANKS].tolist(),
        }
    means = ("peak", "peak_of_a_step", "needed", "overlap")
    return {
        "concepts": found,
        "mean": {key: sum(one[key] for one in found.values()) / len(found) for key in means},
    }


def analyse_scores(readings: Sequence[Reading], top: int = 10, share: float = 0.9) -> Analysis:
    """`score_profile` of each reading; the plots put the methods side by side, scores in percent."""
    numbers: dict[str, Any] = {}
    drawn = {}
    for kind, some in by_kind(readings).items():
        profiles = {one.method: score_profile(one.table, one.concepts, top, share) for one in some}
        for method, profile in profiles.items():
            numbers.setdefault(method, {})[kind] = profile
        peaks = {method: {c: 100 * one["peak"] for c, one in p["concepts"].items()} for method, p in profiles.items()}
        needed = {method: {c: one["needed"] for c, one in p["concepts"].items()} for method, p in profiles.items()}
        overlap = {
            method: {c: 100 * one["overlap"] for c, one in p["concepts"].items()} for method, p in profiles.items()
        }
        latents = f"latents that hold {share:.0%} of a concept's positive score"
        drawn[f"peak-{kind}"] = plots.bars(f"{kind}: peak score, percent", _groups(peaks), plots.ceiling(_all(peaks)))
        drawn[f"needed-{kind}"] = plots.bars(f"{kind}: {latents}", _groups(needed), plots.ceiling(_all(needed)))
        drawn[f"overlap-{kind}"] = plots.bars(
            f"{kind}: percent of the {top} best latents that another concept has too", _groups(overlap)
        )
        ranked = {
            method: torch.tensor([one["ranked"] for one in p["concepts"].values()]).mean(0)
            for method, p in profiles.items()
        }
        highest = plots.ceiling([100 * float(one[0]) for one in ranked.values()])
        series = {
            method: [(100 * value, None) for value in one.clamp_min(0).tolist()] for method, one in ranked.items()
        }
        drawn[f"ranked-{kind}"] = plots.lines(
            f"{kind}: score of the best, second best, ... latent, percent, mean over concepts", series, highest
        )
    return Analysis(numbers, drawn)


def _best(table: ConceptTable, concept: str, top: int) -> set[int]:
    return set(table.scores(concept).mean(0).sort(descending=True, stable=True).indices[:top].tolist())


def _groups(values: dict[str, dict[str, float]]) -> dict[str, dict[str, plots.Value]]:
    """{method: {concept: value}} as {concept: {method: (value, None)}}."""
    concepts = list(dict.fromkeys(concept for some in values.values() for concept in some))
    return {
        concept: {method: (some[concept], None) for method, some in values.items() if concept in some}
        for concept in concepts
    }


def _all(values: dict[str, dict[str, float]]) -> list[float]:
    return [value for some in values.values() for value in some.values()]
