"""MiniCanvas put together: pipeline, judge, SAEs, concept tables and the settings with which concepts are erased."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from ..concepts import ConceptTable
from ..erasure import Erasure, apply_erasure
from ..evaluation import ErasureScores, erasure_scores
from ..files import read_json
from ..sae import TopKSAE
from .classifier import Judge, load_judge
from .drawing import OBJECTS, STYLES, prompt_for

WEIGHTS = Path(__file__).parent / "weights"
KINDS = {"object": OBJECTS, "style": STYLES}


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
class Setting:
    """How concepts of one kind are erased; the arguments of `apply_erasure`."""

    strength: dict[str, float]
    """Hook point -> gamma."""
    num_latents: int
    scale: str = "mean"
    mode: str = "exact"
    halves: str = "both"
    start: float = 0.0
    stop: float = 1.0


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

    @classmethod
    def load(cls, folder: Path = WEIGHTS) -> MiniCanvas:
        """Reads what `python -m saemnesia_fast.minicanvas` made; float16 files, float32 in memory.

        Raises FileNotFoundError where the folder is incomplete.
        """
        settings = read_json(folder / "settings.json")
        pipe = StableDiffusionPipeline.from_pretrained(folder / "pipeline", dtype=torch.float32, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        canvas = cls(pipe, load_judge(folder), settings={kind: Setting(**one) for kind, one in settings.items()})
        for name in sorted({point for one in canvas.settings.values() for point in one.strength}):
            canvas.saes[name] = TopKSAE.from_pretrained(folder / "sae", subfolder=name, dtype=torch.float32)
            canvas.tables[name] = ConceptTable.load(folder / "concepts" / name)
        return canvas

    @torch.no_grad()
    def paint(self, wanted: Sequence[Request], *, batch_size: int = 48, progress: str | None = None) -> Tensor:
        """Runs the pipeline on every request. Returns [n, 3, 64, 64] float32 in [0, 1]."""
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
                    ).images
                )
                bar.update(len(some))
        return torch.cat(images)

    @contextmanager
    def erased(self, concepts: Iterable[str], settings: Mapping[str, Setting] | None = None) -> Iterator[list[Erasure]]:
        """Erases objects and styles by name while the context is open, with the setting of each one's kind."""
        settings = settings or self.settings
        by_kind: dict[str, list[str]] = {}
        for concept in concepts:
            by_kind.setdefault(kind_of(concept), []).append(concept)
        with ExitStack() as stack:
            handles = []
            for kind, names in by_kind.items():
                setting = settings[kind]
                for point, strength in setting.strength.items():
                    erasure = apply_erasure(
                        self.pipe,
                        self.saes[point],
                        self.tables[point],
                        names,
                        strength,
                        setting.mode,
                        setting.halves,
                        setting.start,
                        setting.stop,
                        num_latents=setting.num_latents,
                        scale=setting.scale,
                    )
                    handles.append(stack.enter_context(erasure))
            yield handles

    def scores(self, images: Tensor, wanted: Sequence[Request], concepts: Iterable[str]) -> dict[str, ErasureScores]:
        """Scores of every kind among the erased `concepts`: {"object": ..., "style": ...} (SPEC 5.3)."""
        erased: dict[str, list[int]] = {"object": [], "style": []}
        for concept in concepts:
            kind = kind_of(concept)
            erased[kind].append(KINDS[kind].index(concept))
        object_scores, style_scores = self.judge.predict(images)
        columns: dict[str, Any] = {
            "object": (torch.tensor([one.object for one in wanted]), object_scores.argmax(1)),
            "style": (torch.tensor([one.style for one in wanted]), style_scores.argmax(1)),
        }
        result = {}
        for kind, other in (("object", "style"), ("style", "object")):
            if erased[kind]:
                result[kind] = erasure_scores(
                    erased[kind],
                    wanted=columns[kind][0],
                    recognised=columns[kind][1],
                    cross_wanted=columns[other][0],
                    cross_recognised=columns[other][1],
                    object_confidence=object_scores.amax(1),
                    cross_erased=erased[other],
                )
        return result


def kind_of(concept: str) -> str:
    """ "object" or "style". Raises ValueError, naming the concepts, for any other name."""
    for kind, names in KINDS.items():
        if concept in names:
            return kind
    raise ValueError(f"concept: expected one of {', '.join((*OBJECTS, *STYLES))}, got {concept!r}")
