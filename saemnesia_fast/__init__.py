"""Concept erasure in diffusion models with sparse autoencoders (SAeUron, SAEmnesia)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_HOMES = {
    "ConceptTable": "concepts",
    "Erasure": "erasure",
    "SAEOutput": "sae",
    "Selection": "concepts",
    "SparseLatents": "ops",
    "TopKSAE": "sae",
    "apply_erasure": "erasure",
    "collect_concepts": "concepts",
    "use_backend": "ops",
}

__all__ = [
    "ConceptTable",
    "Erasure",
    "SAEOutput",
    "Selection",
    "SparseLatents",
    "TopKSAE",
    "__version__",
    "apply_erasure",
    "collect_concepts",
    "ops",
    "use_backend",
]

if TYPE_CHECKING:
    from . import ops
    from .concepts import ConceptTable, Selection, collect_concepts
    from .erasure import Erasure, apply_erasure
    from .ops import SparseLatents, use_backend
    from .sae import SAEOutput, TopKSAE


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module(".ops", __name__)
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
