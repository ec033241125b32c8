"""The baselines with the settings that work best on MiniCanvas, of a small search over two objects and two styles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..evaluation import Setting
from ..evaluation.baselines import ESD, UCE, NegativePrompt, NeuronMasking
from .canvas import KINDS, MiniCanvas
from .drawing import OBJECTS, PROMPT_TEMPLATES, STYLES, prompt_for
from .settings import HOOK_POINTS, STYLES_AT

BASELINES = ("negative_prompt", "uce", "esd", "neuron_masking")
REPLACE = {
    "object": Setting(strength=dict.fromkeys(HOOK_POINTS, -1.0), num_latents=2, mode="replace"),
    "style": Setting(strength={STYLES_AT: -1.0}, num_latents=2, mode="replace"),
}
"""Token replacement (SPEC 3.8), which ignores the strength. Few latents, as a map that is detected as a whole stays as
it is; objects also where the map is 8x8, as in 4x4 all tokens tell of an object. Eight latents erase more objects, and
take others with them."""


def baseline(name: str, canvas: MiniCanvas, folder: Path | None = None) -> NegativePrompt | UCE | ESD | NeuronMasking:
    """The baseline of that name in BASELINES; `folder` keeps fine-tuned weights. ValueError for any other name."""
    made: Mapping[str, Callable[[], NegativePrompt | UCE | ESD | NeuronMasking]] = {
        "negative_prompt": lambda: NegativePrompt("a painting of a {}"),
        "uce": lambda: UCE(prompts(), guides()),
        "esd": lambda: ESD(
            prompts(),
            trained="x",
            iterations=400,
            learning_rate=1e-4,
            batch_size=4,
            steps=canvas.steps,
            guidance_scale=canvas.guidance_scale,
            folder=folder,
        ),
        "neuron_masking": lambda: NeuronMasking(
            prompts(templates=1), share=0.3, steps=canvas.steps, guidance_scale=canvas.guidance_scale
        ),
    }
    if name not in made:
        raise ValueError(f"name: expected one of {', '.join(BASELINES)}, got {name!r}")
    return made[name]()


def prompts(templates: int = len(PROMPT_TEMPLATES)) -> dict[str, list[str]]:
    """{concept: prompts for it with every concept of the other kind}, in the first `templates` ways to put it."""
    return {name: _texts(kind, name, templates) for kind, names in KINDS.items() for name in names}


def guides() -> dict[str, dict[str, list[str]]]:
    """{concept: {another of its kind: `prompts` for that one}}, beginning with the next one."""
    result = {}
    for kind, names in KINDS.items():
        for n, name in enumerate(names):
            following = (*names[n + 1 :], *names[:n])
            result[name] = {other: _texts(kind, other, len(PROMPT_TEMPLATES)) for other in following}
    return result


def _texts(kind: str, name: str, templates: int) -> list[str]:
    pairs: Sequence[tuple[str, str]] = (
        [(name, style) for style in STYLES] if kind == "object" else [(object, name) for object in OBJECTS]
    )
    return [prompt_for(*pair, template) for template in range(templates) for pair in pairs]
