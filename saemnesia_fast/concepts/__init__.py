"""Concept statistics: what each latent does for each concept at each denoising step (SPEC 2)."""

from .assignment import load_assignment, save_assignment
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
    "load_assignment",
    "nearest_row",
    "save_assignment",
]
