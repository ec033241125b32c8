"""What several commands are given: a pipeline and prompts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger("saemnesia_fast")
UNLEARN_CANVAS = "unlearn-canvas"


def load_pipeline(model: str, revision: str | None, device: str | None, dtype: str) -> Any:
    """A diffusers pipeline from a folder or a Hub repository, from safetensors only, on `device` in `dtype`.

    The default device is cuda where there is one, else the CPU.
    """
    import torch
    from diffusers import DiffusionPipeline

    if revision is None and not Path(model).exists():
        logger.warning("model: %s is read from the Hub without a pinned revision", model)
    pipe = DiffusionPipeline.from_pretrained(
        model, revision=revision, dtype=getattr(torch, dtype), use_safetensors=True
    )
    return pipe.to(resolve_device(device))


def resolve_device(device: str | None) -> str:
    """`device`, or cuda where there is one, else cpu."""
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def read_prompts(source: str) -> list[str]:
    """The prompts of a text file, one a line without the blank ones, or UnlearnCanvas's for `unlearn-canvas`."""
    if source == UNLEARN_CANVAS:
        from saemnesia_fast.training import unlearn_canvas

        return unlearn_canvas.prompts()
    prompts = [line.strip() for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"prompts: expected at least one line in {source}, got none")
    return prompts


def quiet_libraries() -> None:
    """No bars for loading the files of a model that takes a second to load."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
