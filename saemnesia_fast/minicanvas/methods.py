"""The methods that MiniCanvas is evaluated with, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..evaluation import ContrastErasure, Method, NoErasure, SparseErasure
from .baselines import BASELINES, REPLACE, baseline
from .canvas import WEIGHTS, MiniCanvas, load_sparse
from .settings import CONTRAST_SETTINGS

SUPERVISED = WEIGHTS / "supervised"
SAEURON = "SAeUron, arXiv 2501.18052"
SAEMNESIA = "SAEmnesia, arXiv 2509.21379"
VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {},
    "released": {"mode": "released"},
    "replace": {},
    "contrast": {},
    "exact-reselected": {"num_latents": 1, "reselect": True},
    "released-reselected": {"mode": "released", "num_latents": 1, "reselect": True},
}
"""Changes to the setting: how a token is edited, and the best latent of each step in place of the assigned one. What
does not steer latents has settings of its own; SAEmnesia's acts where the assigned latent fires."""
OWN_SETTINGS = {"replace": REPLACE, "contrast": CONTRAST_SETTINGS}
SPARSE = {
    **{f"saeuron-{name}": (SAEURON, name) for name in ("exact", "released", *OWN_SETTINGS)},
    **{f"saemnesia-{name}": (SAEMNESIA, name) for name in VARIANTS},
}
METHODS = ("none", *SPARSE, *BASELINES)


def methods(
    names: Sequence[str], canvas: MiniCanvas, supervised: Path = SUPERVISED, work: Path | None = None
) -> list[Method]:
    """The named methods, ready for `canvas`.

    Args:
        names: some of METHODS. "NAME-stored" erases each concept with what `saemnesia-fast sweep` left in its table.
        canvas: its SAEs are SAeUron's.
        supervised: folder of SAEmnesia's SAEs, as `load_sparse` reads it.
        work: where fine-tuned weights are kept.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: SAEmnesia is named and `supervised` lacks a file.
    """
    for name in names:
        if name not in METHODS and name.removesuffix("-stored") not in SPARSE:
            raise ValueError(f"methods: expected some of {', '.join(METHODS)}, got {name!r}")
    return [_method(name, canvas, supervised, work) for name in names]


def _method(name: str, canvas: MiniCanvas, supervised: Path, work: Path | None) -> Method:
    if name == "none":
        return NoErasure()
    if name in BASELINES:
        return baseline(name, canvas, work)
    return sparse_erasure(name, canvas, supervised)


def sparse_erasure(name: str, canvas: MiniCanvas, supervised: Path = SUPERVISED) -> SparseErasure:
    """The method of a name in SPARSE, or of one with "-stored" behind it."""
    source, variant = SPARSE[name.removesuffix("-stored")]
    if source is SAEMNESIA and not (supervised / "settings.json").exists():
        raise FileNotFoundError(f"supervised: expected settings.json, sae/ and concepts/ in {supervised}")
    sparse = (canvas.saes, canvas.tables, canvas.settings) if source is SAEURON else load_sparse(supervised)
    changes = VARIANTS[variant]
    given = sparse[2]
    if variant in OWN_SETTINGS:
        given, changes = OWN_SETTINGS[variant], {} if source is SAEURON else {"num_latents": None}
    settings = {kind: replace(setting, **changes) for kind, setting in given.items()}
    erasure = ContrastErasure if variant == "contrast" else SparseErasure
    return erasure(name, source, *sparse[:2], settings, stored=name.endswith("-stored"))
