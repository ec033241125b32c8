"""How well a concept was erased and the rest was kept (SPEC 5.3): methods, protocols, scores and reports."""

from .frechet import frechet_distance
from .methods import Benchmark, ContrastErasure, Judgement, Method, NoErasure, Request, Setting, SparseErasure
from .metrics import ErasureScores, erasure_scores, mean_scores
from .outcome import Outcome
from .protocols import PROTOCOLS, Case, cases
from .report import html
from .summary import summarize
from .units import Plan, paint

__all__ = [
    "PROTOCOLS",
    "Benchmark",
    "Case",
    "ContrastErasure",
    "ErasureScores",
    "Judgement",
    "Method",
    "NoErasure",
    "Outcome",
    "Plan",
    "Request",
    "Setting",
    "SparseErasure",
    "cases",
    "erasure_scores",
    "frechet_distance",
    "html",
    "mean_scores",
    "paint",
    "summarize",
]
