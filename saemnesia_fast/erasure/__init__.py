"""Erasing concepts from a live diffusers pipeline (SPEC 3)."""

from .apply import apply_erasure
from .handle import Erasure
from .report import ConceptReport

__all__ = ["ConceptReport", "Erasure", "apply_erasure"]
