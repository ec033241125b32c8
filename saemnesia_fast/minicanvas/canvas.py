"""MiniCanvas put together: pipeline, judge, SAEs, concept tables and the settings with which concepts are erased."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from ..concepts import ConceptTable
from ..erasure import Erasure
from ..evaluation import ErasureScores, Judgement, Outcome, Setting, SparseErasure
from ..evaluation.units import weights_hash
from ..files import read_json
from ..sae import TopKSAE
from .classifier import Judge, load_judge
from .drawing import OBJECTS, STYLES, prompt_for

WEIGHTS = Path(__file__).parent / "weights"
KINDS = {"object": OBJECTS, "style": STYLES}
CELLS = 16
"""Places of the classifiers' last convolution."""
FIRST_SEED, SEEDS_APART = 5_000_000, 10_000


@dataclass(frozen=True)
class Request:
    """A picture to paint: class indices of object and style, and the seed of its noise."""

    object: int
    style: int
    seed: int

    @property
    def prompt(self) -> str:
        return prompt_for(OBJECTS[self.object], STYLES[self.style])


def requests(per_combination: int, seed: int) -> list[Request]:
    """Every object in every style, `per_combination` times; no two share a seed."""
    count = len(OBJECTS) * len(STYLES)
    return [
        Request(n // len(STYLES), n % len(STYLES), seed + n + count * repetition)
        for repetition in range(per_combination)
        for n in range(count)
    ]


@dataclass
class MiniCanvas:
    """The benchmark, ready to paint and to erase."""

    pipe: StableDiffusionPipeline
    judge: Judge
    saes: dict[str, TopKSAE] = field(default_factory=dict)
    tables: dict[str, ConceptTable] = field(default_factory=dict)
    settings: dict[str, Setting] = field(default_factory=dict)
    steps: int = 20
    guidance_scale: float = 3.0
    per_combination: int = 1
    """Pictures of every object in every style that belong to a seed."""

    name: ClassVar[str] = "MiniCanvas"
    classes: ClassVar[Mapping[str, Sequence[str]]] = KINDS
    features: ClassVar[str] = "the last convolutions of MiniCanvas' two classifiers, averaged over the picture"

    @classmethod
    def load(cls, folder: Path = WEIGHTS) -> MiniCanvas:
        """Reads what `python -m saemnesia_fast.minicanvas` made; float16 files, float32 in memory.

        Raises FileNotFoundError where the folder is incomplete.
        """
        pipe = StableDiffusionPipeline.from_pretrained(folder / "pipeline", dtype=torch.float32, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        return cls(pipe, load_judge(folder), *load_sparse(folder))

    def described(self) -> dict[str, Any]:
        """What pictures and judgements depend on, the weights by their hash."""
        return {
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "per_combination": self.per_combination,
            "weights": weights_hash(self.pipe.unet, self.pipe.vae, self.pipe.text_encoder, self.judge),
        }

    def requests(self, seed: int) -> list[Request]:
        """Every object in every style, `per_combination` times; up to 200 times no two of a hundred seeds share one."""
        return requests(self.per_combination, FIRST_SEED + SEEDS_APART * seed)

    @torch.no_grad()
    def paint(
        self,
        wanted: Sequence[Request],
        *,
        arguments: Mapping[str, Any] | None = None,
        batch_size: int = 48,
        progress: str | None = None,
    ) -> Tensor:
        """Runs the pipeline on every request. Returns [n, 3, 64, 64] float32 in [0, 1].

        `arguments` are further ones of the pipeline's calls, texts as they are for one prompt.
        """
        texts = {name: value for name, value in (arguments or {}).items() if isinstance(value, str)}
        images = []
        with tqdm(total=len(wanted), desc=progress, unit="image", disable=progress is None) as bar:
            for first in range(0, len(wanted), batch_size):
                some = wanted[first : first + batch_size]
                images.append(
                    self.pipe(
                        [one.prompt for one in some],
                        num_inference_steps=self.steps,
                        guidance_scale=self.guidance_scale,
                        generator=[torch.Generator().manual_seed(one.seed) for one in some],
                        output_type="pt",
                        **{**(arguments or {}), **{name: [text] * len(some) for name, text in texts.items()}},
                    ).images
                )
                bar.update(len(some))
        return torch.cat(images)

    def judged(self, images: Tensor) -> Judgement:
        """Probabilities of objects and styles, and the features [n, 192] of both classifiers."""
        objects, styles = self.judge.predict(images)
        with torch.no_grad():
            parts = [
                [one.features(part) for one in (self.judge.object, self.judge.style)] for part in images.split(128)
            ]
        features = torch.cat([torch.cat(both, 1) for both in parts])
        return Judgement({"object": objects, "style": styles}, features.unflatten(1, (-1, CELLS)).mean(2))

    @contextmanager
    def erased(self, concepts: Iterable[str], settings: Mapping[str, Setting] | None = None) -> Iterator[list[Erasure]]:
        """Erases objects and styles by name while the context is open, with the setting of each one's kind."""
        method = SparseErasure("minicanvas", "", self.saes, self.tables, settings or self.settings)
        with method.handles(self.pipe, list(concepts)) as handles:
            yield handles

    def scores(self, images: Tensor, wanted: Sequence[Request], concepts: Collection[str]) -> dict[str, ErasureScores]:
        """Scores of every kind among the erased `concepts`: {"object": ..., "style": ...} (SPEC 5.3)."""
        asked = {kind: torch.tensor([getattr(one, kind) for one in wanted]) for kind in KINDS}
        return Outcome(asked, *self.judged(images)).scores(KINDS, concepts)


def load_sparse(folder: Path) -> tuple[dict[str, TopKSAE], dict[str, ConceptTable], dict[str, Setting]]:
    """(SAEs and tables by hook point, settings by kind) of a folder: settings.json, sae/POINT, concepts/POINT."""
    settings = {kind: Setting(**one) for kind, one in read_json(folder / "settings.json").items()}
    points = sorted({point for one in settings.values() for point in one.strength})
    saes = {point: TopKSAE.from_pretrained(folder / "sae", subfolder=point, dtype=torch.float32) for point in points}
    return saes, {point: ConceptTable.load(folder / "concepts" / point) for point in points}, settings


def kind_of(concept: str) -> str:
    """ "object" or "style". Raises ValueError, naming the concepts, for any other name."""
    for kind, names in KINDS.items():
        if concept in names:
            return kind
    raise ValueError(f"concept: expected one of {', '.join((*OBJECTS, *STYLES))}, got {concept!r}")
