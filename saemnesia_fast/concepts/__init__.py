"""Concept statistics: what each latent does for each concept at each denoising step (SPEC 2)."""

from .collect import collect_concepts
from .scores import assign_latents, concept_scores
from .selection import Selection, nearest_row
from .statistics import ConceptStatistics
from .table import ConceptTable

__all__ = [
    "ConceptStatistics",
    "ConceptTable",
    "Selection",
    "assign_latents",
    "collect_concepts",
    "concept_scores",
    "nearest_row",
]
