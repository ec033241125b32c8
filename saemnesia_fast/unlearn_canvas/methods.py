"""The methods that UnlearnCanvas is evaluated with: baselines, and SAEs in the benchmark's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..concepts import ConceptTable
from ..sae import CONFIG_NAME, TopKSAE
from ..training.unlearn_canvas import OBJECTS, STYLES, prompt_for

if TYPE_CHECKING:
    from ..evaluation import Method

MODES = ("exact", "released", "replace", "contrast")
BASELINES = ("negative_prompt", "uce", "esd", "neuron_masking")


def methods(
    names: Sequence[str],
    folder: Path,
    *,
    strength: float | None = None,
    steps: int = 100,
    guidance_scale: float = 9.0,
    device: str = "cpu",
) -> list[Method]:
    """The named methods.

    Args:
        names: none, one of BASELINES, or NAME-MODE: steering by the SAEs and tables of `folder/NAME`, which has
            `sae/HOOK_POINT` and `concepts/HOOK_POINT`, in one of MODES.
        strength: for all concepts and their assigned latents; None for each concept's settings in its table, but with
            mode "contrast".

    Raises:
        ValueError: an unknown name, or a table was made with another SAE.
        FileNotFoundError: NAME has no SAE or a table is missing.
    """
    return [_method(name, folder, strength, steps, guidance_scale, device) for name in names]


def _method(name: str, folder: Path, strength: float | None, steps: int, guidance_scale: float, device: str) -> Method:
    from ..evaluation import NoErasure

    if name == "none":
        return NoErasure()
    if name in BASELINES:
        return _baseline(name, folder, steps, guidance_scale)
    group, _, mode = name.rpartition("-")
    if not group or mode not in MODES:
        known = ("none", *BASELINES, *(f"NAME-{mode}" for mode in MODES))
        raise ValueError(f"methods: expected some of {', '.join(known)}, got {name!r}")
    return _sparse(name, folder / group, mode, strength, device)


def _sparse(name: str, folder: Path, mode: str, strength: float | None, device: str) -> Method:
    from ..evaluation import ContrastErasure, Setting, SparseErasure

    points = sorted(path.parent.name for path in (folder / "sae").glob(f"*/{CONFIG_NAME}"))
    if not points:
        raise FileNotFoundError(f"{folder}: expected sae/HOOK_POINT with an SAE; see docs/unlearn_canvas.md")
    saes = {point: TopKSAE.from_pretrained(folder / "sae" / point, device=device) for point in points}
    tables = {point: ConceptTable.load(folder / "concepts" / point) for point in points}
    for point in points:
        tables[point].check_sae(saes[point])
    stored = strength is None
    settings = {
        kind: Setting({point: strength or 0.0 for point in points if kind in tables[point].kinds}, mode=mode)
        for kind in sorted({kind for table in tables.values() for kind in table.kinds})
    }
    erasure = ContrastErasure if mode == "contrast" else SparseErasure
    return erasure(name, f"SAEs of {folder.name}", saes, tables, settings, stored=stored)


def _baseline(name: str, folder: Path, steps: int, guidance_scale: float) -> Method:
    from ..evaluation.baselines import ESD, UCE, NegativePrompt, NeuronMasking

    prompts: dict[str, list[str]] = {o: [prompt_for(o), *(prompt_for(o, s) for s in STYLES)] for o in OBJECTS}
    prompts |= {s: [prompt_for(o, s) for o in OBJECTS] for s in STYLES}
    options: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale}
    if name == "negative_prompt":
        return NegativePrompt()
    if name == "uce":
        return UCE(prompts)
    if name == "esd":
        return ESD(prompts, folder=folder / "weights", **options)
    return NeuronMasking(prompts, **options)
