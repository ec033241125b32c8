"""UnlearnCanvas as a benchmark of `saemnesia_fast.evaluation`: prompts, seeds, sampling and judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..training.unlearn_canvas import OBJECTS, STYLES, prompt_for

if TYPE_CHECKING:
    from ..evaluation import Judgement
    from .judge import Judge

SEEDS = (188, 288, 588, 688, 888)
SEQUENCE = ("Bears", "Cats", "Flowers", "Frogs", "Jellyfish", "Sea", "Statues", "Sandwiches", "Waterfalls")
"""Objects as they are erased one after the other."""
PIPELINE = "pipeline"
_APART = 10_000


@dataclass(frozen=True)
class Request:
    """A picture to paint: class index of its object, of its style or -1 for none, and the seed of its noise."""

    object: int
    style: int
    seed: int

    @property
    def prompt(self) -> str:
        return prompt_for(OBJECTS[self.object], None if self.style < 0 else STYLES[self.style])


@dataclass
class UnlearnCanvas:
    """The benchmark, ready to paint and to judge; without pipeline and judge it can tell its requests only.

    A seed stands for 1020 pictures: every object in every style, and without one. Each has noise of its own, so that
    pictures depend neither on their order nor on the number of processes; the papers' code draws the noise of all of
    a seed's pictures from one generator.
    """

    pipe: Any = None
    judge: Judge | None = None
    steps: int = 100
    guidance_scale: float = 9.0
    batch_size: int = 20
    size: int | None = None
    """Height and width in pixels; the pipeline's own if None."""

    name: ClassVar[str] = "UnlearnCanvas"
    classes: ClassVar[Mapping[str, Sequence[str]]] = {"object": OBJECTS, "style": STYLES}
    features: ClassVar[str] = "what the heads of UnlearnCanvas' two ViT-L classifiers see"

    @classmethod
    def load(
        cls, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float16, **options: Any
    ) -> UnlearnCanvas:
        """Reads `pipeline/`, `object.safetensors` and `style.safetensors`, as `saemnesia-fast convert` wrote them.

        DDIM sampling whatever the pipeline's scheduler. `options` are fields of the class. Raises FileNotFoundError
        where something is missing.
        """
        from diffusers import DDIMScheduler, DiffusionPipeline

        from .judge import load_judge

        if not (folder / PIPELINE / "model_index.json").is_file():
            raise FileNotFoundError(f"{folder / PIPELINE}: no pipeline here; see docs/unlearn_canvas.md")
        judge = load_judge(folder, device)
        pipe = DiffusionPipeline.from_pretrained(
            folder / PIPELINE, dtype=dtype, use_safetensors=True, safety_checker=None
        )
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        return cls(pipe.to(device), judge, **options)

    def described(self) -> dict[str, Any]:
        """What pictures and judgements depend on, the weights by their hash."""
        from ..evaluation.units import weights_hash

        return {
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "batch_size": self.batch_size,
            "size": self.size,
            "scheduler": type(self.pipe.scheduler).__name__,
            "dtype": str(self.pipe.unet.dtype),
            "weights": weights_hash(self.pipe.unet, self.pipe.vae, self.pipe.text_encoder, self.judge),
        }

    def requests(self, seed: int) -> list[Request]:
        """Every object in every style and, style by style, those without one last: 50 * 20 + 20 pictures."""
        wanted = [(number, style) for style in (*range(len(STYLES)), -1) for number in range(len(OBJECTS))]
        return [Request(number, style, _APART * seed + n) for n, (number, style) in enumerate(wanted)]

    @torch.no_grad()
    def paint(self, wanted: Sequence[Request], *, arguments: Mapping[str, Any] | None = None) -> Tensor:
        """[n, 3, H, W] float32 in [0, 1] on the CPU. `arguments` go to the pipeline's calls, texts once a prompt."""
        extra = dict(arguments or {})
        if self.size is not None:
            extra |= {"height": self.size, "width": self.size}
        images = []
        for first in range(0, len(wanted), self.batch_size):
            some = wanted[first : first + self.batch_size]
            texts = {name: [value] * len(some) for name, value in extra.items() if isinstance(value, str)}
            painted = self.pipe(
                [one.prompt for one in some],
                num_inference_steps=self.steps,
                guidance_scale=self.guidance_scale,
                generator=[torch.Generator().manual_seed(one.seed) for one in some],
                output_type="pt",
                **{**extra, **texts},
            )
            images.append(painted.images.float().cpu())
        return torch.cat(images)

    def judged(self, images: Tensor) -> Judgement:
        """Probabilities of the 20 objects, and of the 50 styles followed by Seed_Images, no style."""
        if self.judge is None:
            raise ValueError("judge: expected the two classifiers, got none")
        return self.judge.judged(images)
