"""Erases every concept of MiniCanvas alone and scores each (SPEC 5.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..evaluation import ErasureScores, mean_scores
from .canvas import KINDS, MiniCanvas, Setting, requests


def evaluate_kind(
    canvas: MiniCanvas,
    kind: str,
    *,
    per_combination: int = 3,
    seed: int = 5_000_000,
    settings: Mapping[str, Setting] | None = None,
    progress: bool = True,
) -> dict[str, ErasureScores]:
    """Scores of every concept of a kind, each erased alone from the same pictures: {concept: scores}.

    Paints 48 * per_combination pictures a concept.
    """
    wanted = requests(per_combination, seed)
    result = {}
    for concept in KINDS[kind]:
        with canvas.erased([concept], settings):
            images = canvas.paint(wanted, progress=f"without {concept}" if progress else None)
        result[concept] = canvas.scores(images, wanted, [concept])[kind]
    return result


def evaluate(
    canvas: MiniCanvas, *, per_combination: int = 3, seed: int = 5_000_000, progress: bool = True
) -> dict[str, Any]:
    """Both kinds: {"object": {"mean": scores, "concepts": {name: scores}}, "style": ...}, scores in percent."""
    report: dict[str, Any] = {
        "images_per_concept": len(requests(per_combination, seed)),
        "seed": seed,
        "settings": {kind: asdict(setting) for kind, setting in canvas.settings.items()},
    }
    for kind in KINDS:
        scores = evaluate_kind(canvas, kind, per_combination=per_combination, seed=seed, progress=progress)
        report[kind] = {
            "mean": mean_scores(list(scores.values())).as_dict(),
            "concepts": {name: one.as_dict() for name, one in scores.items()},
        }
    return report
