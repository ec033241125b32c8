"""Measures of how well a concept was erased and the rest was kept (SPEC 5.3)."""

from saemnesia_fast.evaluation.metrics import ErasureScores, erasure_scores, mean_scores

__all__ = ["ErasureScores", "erasure_scores", "mean_scores"]
