"""The `supervise` command."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from saemnesia_fast.concepts import ConceptTable
from saemnesia_fast.sae import TopKSAE
from saemnesia_fast.training.labelled import LabelledActivations
from saemnesia_fast.training.parallel import connect
from saemnesia_fast.training.supervised import SuperviseConfig, assignment_of, supervise_sae

from .inputs import UNLEARN_CANVAS, resolve_device

logger = logging.getLogger("saemnesia_fast")
MINICANVAS = "minicanvas"


@dataclass(kw_only=True)
class Supervise(SuperviseConfig):
    """Teach a trained autoencoder one latent for each concept of a table.

    The latents are the table's assigned ones, or are assigned and stored in it. Afterwards
    `saemnesia-fast concepts --assignment OUT_DIR/HOOK_POINT` makes a table for the new autoencoder.
    """

    out_dir: Path = field()
    """Folder for the checkpoints, the metrics and the finished SAE, in a subfolder named after the hook point."""
    sae: str
    """SAE to start from: a folder or a Hugging Face repository."""
    table: Path
    """Concept table of that SAE: the folder that `saemnesia-fast concepts` wrote."""
    activations: Path
    """Folder that `collect` wrote."""
    labels: str
    """JSON lines {"prompt": ..., "concepts": [...]}; or unlearn-canvas or minicanvas for the prompts of these."""
    hook_point: str = ""
    """Block of the UNet whose activations are read; default: the table's."""
    sae_subfolder: str | None = None
    """Folder of the SAE inside `sae`, often named after the hook point."""
    sae_revision: str | None = None
    """Commit or tag of the SAE's repository."""
    images: int = 128
    """Images per step, each with all its tokens."""
    validation: float = 0.2
    """Share of the prompts whose images are only validated on."""
    latent_ranks: int = 1
    """Under torchrun: how many processes share the latents. Groups of so many share the tokens of each batch."""
    num_latents: Annotated[int | None, tyro.conf.Suppress] = None
    expansion_factor: Annotated[int, tyro.conf.Suppress] = 16
    k: Annotated[int, tyro.conf.Suppress] = 32
    steps: Annotated[int | None, tyro.conf.Suppress] = None

    def run(self) -> None:
        import torch

        table = ConceptTable.load(self.table)
        labels = read_labels(self.labels)
        config = replace(self, hook_point=self.hook_point or table.hook_point)
        sae = TopKSAE.from_pretrained(self.sae, self.sae_subfolder, self.sae_revision, dtype=torch.float32)
        with connect(self.latent_ranks, self.device) as layout:
            config.device = resolve_device(layout.device or self.device)
            data = LabelledActivations(
                self.activations,
                config.hook_point,
                labels,
                table.concepts,
                self.images,
                self.validation,
                self.seed,
                config.device,
            )
            assignment = assignment_of(table)
            table.check_sae(sae)
            with layout.as_one():
                if layout.writes and table.assignment != assignment:
                    replace(table, assignment=assignment).save(self.table)
            supervise_sae(config, data, sae, table, layout)
            logger.info("wrote the SAE and assignment.json to %s", config.out_dir / config.hook_point)


def read_labels(source: str) -> Mapping[str, Sequence[str]]:
    """{prompt: its concepts} from JSON lines, or of a benchmark by its name."""
    if source == UNLEARN_CANVAS:
        from saemnesia_fast.training import unlearn_canvas

        return unlearn_canvas.prompt_concepts()
    if source == MINICANVAS:
        from saemnesia_fast.minicanvas import drawing

        return drawing.prompt_concepts()
    labels: dict[str, Sequence[str]] = {}
    for line in filter(str.strip, Path(source).read_text(encoding="utf-8").splitlines()):
        try:
            entry = json.loads(line)
            prompt, names = str(entry["prompt"]), entry["concepts"]
        except (KeyError, TypeError, ValueError):
            prompt, names = "", None
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(
                f'labels: expected lines {{"prompt": ..., "concepts": [...]}} in {source}, got {line[:200]}'
            )
        labels[prompt] = names
    return labels
