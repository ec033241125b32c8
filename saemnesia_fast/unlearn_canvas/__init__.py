"""The UnlearnCanvas benchmark (arXiv 2402.11846, SPEC 5.2), as published, for whoever has its weights and a GPU."""

from .benchmark import SEEDS, SEQUENCE, Request, UnlearnCanvas
from .cost import Cost, estimate, measure
from .judge import Judge, load_judge
from .methods import methods

__all__ = [
    "SEEDS",
    "SEQUENCE",
    "Cost",
    "Judge",
    "Request",
    "UnlearnCanvas",
    "estimate",
    "load_judge",
    "measure",
    "methods",
]
