"""How the score of each concept's latent goes over the denoising."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import plots
from .reading import Analysis, Reading


def analyse_timesteps(readings: Sequence[Reading]) -> Analysis:
    """Score (SPEC 2.2) of the assigned or on average best latent of each concept at every stored timestep.

    Returns numbers {method: {kind: {"timesteps": [T], "concepts": {name: {"latent", "scores": [T], "best": [T] the
    best latent of each step}}}}} and one plot a reading, in percent; a negative score is drawn as 0.
    """
    numbers: dict[str, Any] = {}
    drawn = {}
    found = {one.name: _over_time(one) for one in readings}
    for one in readings:
        here = numbers.setdefault(one.method, {})[one.kind] = found[one.name]
        alike = [found[other.name] for other in readings if other.kind == one.kind]
        highest = plots.ceiling(
            [100 * score for some in alike for c in some["concepts"].values() for score in c["scores"]]
        )
        series = {name: [(100 * score, None) for score in c["scores"]] for name, c in here["concepts"].items()}
        drawn[f"{one.method}-{one.kind}"] = plots.lines(
            f"{one.name}: score of the concept's latent at timesteps, percent",
            series,
            highest,
            [str(timestep) for timestep in here["timesteps"]],
        )
    return Analysis(numbers, drawn)


def _over_time(reading: Reading) -> dict[str, Any]:
    concepts = {}
    for name, latent in zip(reading.concepts, reading.latents(), strict=True):
        scores = reading.table.scores(name)
        concepts[name] = {
            "latent": latent,
            "scores": scores[:, latent].tolist(),
            "best": scores.argmax(-1).tolist(),
        }
    return {"timesteps": reading.table.timesteps.tolist(), "concepts": concepts}
