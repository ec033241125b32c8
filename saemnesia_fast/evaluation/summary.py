"""All numbers of a finished evaluation as one JSON object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .frechet import Gaussian, frechet_distance
from .intervals import CONFIDENCE, mean_and_half_width
from .methods import Method
from .metrics import NAMES, ErasureScores, mean_scores
from .outcome import Outcome
from .protocols import Case
from .units import PLAIN, Plan


def summarize(plan: Plan, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Scores of every protocol, method and group of cases, each with its t-interval over the seeds.

    {"protocols": {protocol: {method: {group: {"scores": {name: {"mean", "plus_minus"}}, "fid", "cases": [...]}}}}},
    beside the benchmark, the methods with their settings and times, the seeds, the number of plain pictures of a seed,
    the least and the largest number of an erasure and seed, and what `about` adds (versions, machine). A group's score
    is the mean over its cases, in a sequence that of the last; the interval is that of the means of the seeds. `fid` is
    the Fréchet distance of the retained pictures, those that ask for no erased concept, from the plain pictures of the
    same requests, over all cases of the mean and all seeds.

    Raises:
        ValueError: units are missing.
    """
    missing = plan.missing()
    if missing:
        raise ValueError(f"units: expected all to be painted, got {len(missing)} missing in {plan.folder}")
    reader = _Reader(plan)
    counts = [len(reader(one.method, one.erased, one.seed).features) for units in plan.groups() for one in units]
    erasing = counts[len(plan.seeds) :] or counts
    protocols: dict[str, Any] = {}
    for case in plan.cases:
        protocols.setdefault(case.protocol, {}).setdefault(case.group, []).append(case)
    return {
        "benchmark": {
            **plan.descriptions[""],
            "classes": {kind: list(names) for kind, names in plan.benchmark.classes.items()},
            "features": plan.benchmark.features,
        },
        "seeds": list(plan.seeds),
        "pictures_per_seed": counts[0],
        "pictures_per_erasure": [min(erasing), max(erasing)],
        "threads": plan.threads,
        "confidence": CONFIDENCE,
        **(about or {}),
        "methods": [_method(plan, reader, method) for method in plan.methods],
        "protocols": {
            protocol: {
                method.name: {group: _group(plan, reader, method, cases) for group, cases in groups.items()}
                for method in plan.methods
            }
            for protocol, groups in protocols.items()
        },
    }


class _Reader:
    """Outcomes, each kept without its features [n, D]: [n, 0]."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.known: dict[Path, Outcome] = {}
        self.plain = {seed: self.features(PLAIN, (), seed) for seed in plan.seeds}

    def __call__(self, method: Method, erased: Sequence[str], seed: int) -> Outcome:
        path = self.plan.unit(method, erased, seed).path
        if path not in self.known:
            outcome = Outcome.load(path)
            self.known[path] = replace(outcome, features=outcome.features.new_empty(len(outcome.features), 0))
        return self.known[path]

    def features(self, method: Method, erased: Sequence[str], seed: int) -> Tensor:
        """[n, D], read again each time."""
        return Outcome.load(self.plan.unit(method, erased, seed).path).features


def _method(plan: Plan, reader: _Reader, method: Method) -> dict[str, Any]:
    erased = {case.erased for case in plan.cases}
    outcomes = [reader(method, some, seed) for some in erased for seed in plan.seeds]
    pictures = sum(len(one.features) for one in outcomes)
    ready = [reader(method, some, plan.seeds[0]).ready_seconds for some in erased]
    return {
        "name": method.name,
        "source": method.source,
        "settings": plan.descriptions[method.name],
        "seconds_per_picture": round(sum(one.paint_seconds for one in outcomes) / pictures, 5),
        "seconds_to_get_ready": round(sum(ready) / len(ready), 3),
    }


def _group(plan: Plan, reader: _Reader, method: Method, cases: Sequence[Case]) -> dict[str, Any]:
    by_case = [[_scores(plan, reader, method, case, seed) for seed in plan.seeds] for case in cases]
    counted = slice(-1, None) if cases[0].protocol == "sequence" else slice(None)
    means = [mean_scores(of_seed) for of_seed in zip(*by_case[counted], strict=True)]
    return {
        "scores": _over_seeds(means),
        "fid": _fid(plan, reader, method, cases[counted]),
        "cases": [
            {"erased": list(case.erased), "scores": _over_seeds(scores), "by_seed": _by_seed(scores)}
            for case, scores in zip(cases, by_case, strict=True)
        ],
    }


def _scores(plan: Plan, reader: _Reader, method: Method, case: Case, seed: int) -> ErasureScores:
    outcome = reader(method, case.erased, seed)
    return mean_scores(list(outcome.scores(plan.benchmark.classes, case.erased).values()))


def _over_seeds(scores: Sequence[ErasureScores]) -> dict[str, Any]:
    return {name: mean_and_half_width([getattr(one, name) for one in scores]) for name in NAMES}


def _by_seed(scores: Sequence[ErasureScores]) -> dict[str, list[float]]:
    return {name: [round(getattr(one, name), 2) for one in scores] for name in ("UA", "IRA", "CRA", "debris")}


def _fid(plan: Plan, reader: _Reader, method: Method, cases: Sequence[Case]) -> float | None:
    """None where too few pictures are retained for a Gaussian, or where only some were painted."""
    if plan.retained is not None:
        return None
    width = reader.plain[plan.seeds[0]].shape[1]
    found, reference = Gaussian(width), Gaussian(width)
    for case in cases:
        for seed in plan.seeds:
            kept = reader(method, case.erased, seed).retained(plan.benchmark.classes, case.erased)
            found.add(reader.features(method, case.erased, seed)[kept])
            reference.add(reader.plain[seed][kept])
    return round(frechet_distance(found, reference), 4) if found.count > 1 else None
