"""What several commands are given: a pipeline and prompts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger("saemnesia_fast")


def load_pipeline(model: str, revision: str | None, device: str | None, dtype: str) -> Any:
    """A diffusers pipeline from a folder or a Hub repository, from safetensors only, on `device` in `dtype`.

    The default device is cuda where there is one, else the CPU.
    """
    import torch
    from diffusers import DiffusionPipeline

    if revision is None and not Path(model).exists():
        logger.warning("model: %s is read from the Hub without a pinned revision", model)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = DiffusionPipeline.from_pretrained(
        model, revision=revision, dtype=getattr(torch, dtype), use_safetensors=True
    )
    return pipe.to(device)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line; blank lines do not count."""
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"prompts: expected at least one line in {path}, got none")
    return prompts


def quiet_libraries() -> None:
    """No bars for loading the files of a model that takes a second to load."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
