"""The `concepts` command."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from saemnesia_fast.files import read_json, write_json

from .inputs import load_pipeline, read_prompts, resolve_device

logger = logging.getLogger("saemnesia_fast")


@dataclass
class Concepts:
    """Measure what each latent of an SAE does for each concept, and write a concept table.

    With --name, for one concept of your own: add it to the table in `out`, or begin one, and tell how separable it is.
    """

    model: str
    """Pipeline: a folder in diffusers' format or a Hugging Face repository."""
    sae: str
    """SAE: a folder or a Hugging Face repository."""
    prompts: Path
    """JSON file: {concept: {"kind": "object" or "style", "prompts": [...]}}. With --name a text file with about twenty
    prompts that ask for the concept, one a line."""
    hook_point: str
    """UNet module that the SAE reads, for example unet.up_blocks.1.attentions.1."""
    out: Path
    """Folder to write concepts.safetensors and concepts.json into."""
    name: str | None = None
    """Name of one concept of your own. Where `out` has a table, steps, guidance, seed and stream are the table's."""
    kind: str = "object"
    """Of the concept `name`: object, style or any other word."""
    others: Path | None = None
    """With --name, prompts that do not ask for it, one a line; needed where `out` has no table yet."""
    revision: str | None = None
    """Commit or tag of the model's repository."""
    sae_subfolder: str | None = None
    """Folder of the SAE inside `sae`, often named after the hook point."""
    sae_revision: str | None = None
    """Commit or tag of the SAE's repository."""
    steps: int = 50
    """Denoising steps."""
    guidance: float = 7.5
    """Classifier-free guidance scale."""
    seed: int = 0
    """Seed of all noise."""
    batch_size: int = 8
    """Prompts sampled together."""
    height: int | None = None
    """Height of the images in pixels; the model's own if not given."""
    width: int | None = None
    """Width of the images in pixels; the model's own if not given."""
    stream: Literal["output", "residual"] = "output"
    """What the SAE reads: the module's output, or output - input."""
    assign: bool = False
    """Also assign one latent to every concept, objects first."""
    assignment: Path | None = None
    """Instead of assigning: assignment.json that `saemnesia-fast supervise` wrote beside the SAE, or its folder."""
    device: str | None = None
    """Torch device; cuda where there is one, else cpu."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the pipeline; the SAE runs in float32."""

    def run(self) -> None:
        if self.assign and self.assignment is not None:
            raise ValueError("assign: expected either --assign or --assignment, got both")
        if self.name is not None:
            self._add(self.name)
        elif self.others is not None:
            raise ValueError("others: expected --name beside it")
        else:
            self._collect()

    def _collect(self) -> None:
        from saemnesia_fast.concepts import collect_concepts, load_assignment

        prompts, kinds = read_concepts(self.prompts)
        pipe, sae = self._models()
        assignment = {} if self.assignment is None else load_assignment(self.assignment, sae.content_hash())
        if missing := sorted(set(assignment) - set(prompts)):
            raise ValueError(f"prompts: expected those of every assigned concept, got none for {missing}")
        table = collect_concepts(pipe, sae, prompts, self.hook_point, kinds=kinds, **self._sampling())
        table.assignment = table.assign() if self.assign else assignment
        table.save(self.out)
        logger.info("wrote %s to %s", table, self.out)

    def _add(self, name: str) -> None:
        if self.assignment is not None:
            raise ValueError("assignment: expected --assign with --name, got --assignment")
        from saemnesia_fast.concepts import ConceptTable
        from saemnesia_fast.concepts.own import add_concept
        from saemnesia_fast.concepts.storage import METADATA_FILE

        prompts = read_prompts(str(self.prompts))
        others = [] if self.others is None else read_prompts(str(self.others))
        table = ConceptTable.load(self.out) if (self.out / METADATA_FILE).exists() else None
        options: dict[str, Any] = {"hook_point": self.hook_point, "kind": self.kind, "assign": self.assign}
        pipe, sae = self._models()
        table, report = add_concept(pipe, sae, name, prompts, table=table, others=others, **options, **self._sampling())
        table.save(self.out)
        stem = re.sub(r"[^\w-]", "_", name)
        write_json(self.out / f"{stem}.separability.json", report.as_dict())
        print(report)
        logger.info("wrote %s to %s", table, self.out)

    def _models(self) -> tuple[Any, Any]:
        """Pipeline and SAE."""
        import torch

        from saemnesia_fast.sae import TopKSAE

        device = resolve_device(self.device)
        sae = TopKSAE.from_pretrained(
            self.sae, subfolder=self.sae_subfolder, revision=self.sae_revision, device=device, dtype=torch.float32
        )
        return load_pipeline(self.model, self.revision, device, self.dtype), sae

    def _sampling(self) -> dict[str, Any]:
        return {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "stream": self.stream,
            "height": self.height,
            "width": self.width,
        }


def read_concepts(path: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """({concept: prompts}, {concept: kind}) of a JSON file {concept: {"kind": str, "prompts": [str]}}.

    Raises:
        ValueError: the file has another form.
    """
    entries = read_json(path)
    if not isinstance(entries, dict):
        raise ValueError(f"prompts: expected {{concept: ...}} in {path}, got a {type(entries).__name__}")
    for concept, entry in entries.items():
        if not (isinstance(entry, dict) and set(entry) == {"kind", "prompts"}):
            raise ValueError(
                f'prompts: expected {{"kind": ..., "prompts": [...]}} for {concept!r} in {path}, got {entry}'
            )
        texts = entry["prompts"]
        if not (isinstance(texts, list) and all(isinstance(text, str) for text in [entry["kind"], *texts])):
            raise ValueError(f"prompts: expected a text and a list of texts for {concept!r} in {path}, got {entry}")
    prompts = {concept: entry["prompts"] for concept, entry in entries.items()}
    return prompts, {concept: entry["kind"] for concept, entry in entries.items()}
