"""`saemnesia-fast analyse`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from ..files import write_atomic, write_json
from .concepts import read_concepts
from .inputs import load_pipeline, quiet_libraries, resolve_device

if TYPE_CHECKING:
    from ..concepts import ConceptTable
    from ..evaluation.analyses import Analysis, Reading, Sample

PAINTING = ("maps", "separability")
SAMPLING = ("num_inference_steps", "guidance_scale")


@dataclass(kw_only=True)
class Analyse:
    """Show what latents know of concepts: their scores, over the timesteps, on the picture, and how separable they are.

    scores: peak, overlap and latents needed of each concept. timesteps: score of each concept's latent over the
    denoising. maps: where in a picture it is active. separability: how far its activations differ between concepts.
    Writes OUT/WHAT.json beside plots as SVG, or PNG for maps. Several methods come side by side.
    """

    what: tyro.conf.Positional[Literal["scores", "timesteps", "maps", "separability"]]
    """scores and timesteps need tables alone; maps and separability paint pictures."""
    minicanvas: bool = False
    """Analyse MiniCanvas, the benchmark that comes with the package: its SAEs are SAeUron's."""
    supervised: Path | None = None
    """With --minicanvas, folder of SAEmnesia's SAEs and tables: settings.json, sae/POINT, concepts/POINT."""
    table: tuple[Path, ...] = ()
    """Instead of MiniCanvas: concept tables, folders that `saemnesia-fast concepts` wrote; several are compared."""
    sae: tuple[str, ...] = ()
    """SAE of each table, a folder or a Hugging Face repository; for maps and separability."""
    sae_subfolder: str | None = None
    """Folder of the SAE inside each `sae`."""
    sae_revision: str | None = None
    """Commit or tag of the SAEs' repositories."""
    model: str | None = None
    """Pipeline of the tables, in diffusers' format; for maps and separability."""
    revision: str | None = None
    """Commit or tag of the model's repository."""
    prompts: Path | None = None
    """JSON file as for `concepts`, {concept: {"kind": ..., "prompts": [...]}}; for maps and separability. Steps
    and guidance are the tables'."""
    top: int = 10
    """scores: best latents of each concept to look for among those of the others."""
    share: float = 0.9
    """scores: share of a concept's positive score that the latents it needs hold together."""
    columns: int = 5
    """maps: timesteps to draw."""
    images: int = 1
    """separability on MiniCanvas: pictures of every object in every style."""
    seed: int = 0
    """Of the pictures' noise."""
    batch_size: int = 16
    """Pictures painted together."""
    height: int | None = None
    """Height of the pictures in pixels; the model's own if not given."""
    width: int | None = None
    """Width of the pictures in pixels; the model's own if not given."""
    device: str | None = None
    """Torch device; cuda where there is one, else cpu. MiniCanvas stays on the CPU."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the pipeline; SAEs run in float32."""
    out: Path = Path("analysis")
    """Folder to write to."""

    def run(self) -> None:
        if self.minicanvas == bool(self.table):
            raise ValueError("minicanvas, table: expected either --minicanvas or --table, got both or neither")
        if self.supervised is not None and not self.minicanvas:
            raise ValueError("supervised: expected --minicanvas beside it")
        quiet_libraries()
        from ..evaluation.plots import standalone

        analysis = self._of_minicanvas() if self.minicanvas else self._of_tables()
        print_means(analysis.numbers)
        written = [self.out / f"{self.what}.json"]
        write_json(written[0], analysis.numbers)
        for name, svg in analysis.plots.items():
            written.append(self.out / f"{self.what}-{_stem(name)}.svg")
            write_atomic(written[-1], standalone(svg).encode())
        for name, picture in analysis.pictures.items():
            written.append(self.out / f"{self.what}-{_stem(name)}.png")
            write_atomic(written[-1], partial(picture.save, format="PNG"))
        print(*written, sep="\n")

    def _of_minicanvas(self) -> Analysis:
        from ..evaluation.analyses import Reading, Sample
        from ..minicanvas.canvas import MiniCanvas, load_sparse
        from ..minicanvas.drawing import OBJECTS, STYLES
        from ..minicanvas.methods import SUPERVISED

        canvas = MiniCanvas.load()
        canvas.per_combination = self.images
        methods = {"SAeUron": (canvas.saes, canvas.tables, canvas.settings)}
        if self.supervised is not None or (SUPERVISED / "settings.json").exists():
            methods["SAEmnesia"] = load_sparse(self.supervised or SUPERVISED)
        readings = [
            Reading(f"{method} at {point}", kind, tables[point], saes[point])
            for method, (saes, tables, settings) in methods.items()
            for kind, setting in settings.items()
            for point in setting.strength
        ]
        samples = [
            Sample(one.prompt, one.seed, (OBJECTS[one.object], STYLES[one.style])) for one in canvas.requests(self.seed)
        ]
        sampling = {"num_inference_steps": canvas.steps, "guidance_scale": canvas.guidance_scale}
        return self._analysis(readings, samples, canvas.pipe, sampling)

    def _of_tables(self) -> Analysis:
        from ..concepts import ConceptTable
        from ..evaluation.analyses import Reading

        tables = [ConceptTable.load(path) for path in self.table]
        saes = self._saes() if self.what in PAINTING else [None] * len(tables)
        short = [path.name for path in self.table]
        names = short if len(set(short)) == len(short) else [str(path) for path in self.table]
        readings = [
            Reading(name, kind, table, sae)
            for name, table, sae in zip(names, tables, saes, strict=True)
            for kind in dict.fromkeys(table.kinds)
        ]
        if self.what not in PAINTING or self.model is None or self.prompts is None:
            return self._analysis(readings)
        samples = self._samples(self.prompts, tables)
        sampling = _sampling(tables) | {"height": self.height, "width": self.width}
        pipe = load_pipeline(self.model, self.revision, self.device, self.dtype)
        pipe.set_progress_bar_config(disable=True)
        return self._analysis(readings, samples, pipe, sampling)

    def _saes(self) -> list[Any]:
        import torch

        from ..sae import TopKSAE

        if len(self.sae) != len(self.table) or self.model is None or self.prompts is None:
            raise ValueError(
                f"sae, model, prompts: expected an SAE for each table, a pipeline and prompts to paint {self.what}, "
                f"got {len(self.sae)} for {len(self.table)} tables, {self.model} and {self.prompts}"
            )
        where = {"subfolder": self.sae_subfolder, "revision": self.sae_revision, "device": resolve_device(self.device)}
        return [TopKSAE.from_pretrained(one, dtype=torch.float32, **where) for one in self.sae]

    def _samples(self, path: Path, tables: Sequence[ConceptTable]) -> list[Sample]:
        """The file's prompts, each once, with all concepts that list it and a seed of its own."""
        from ..evaluation.analyses import Sample

        prompts, _ = read_concepts(path)
        known = {name for table in tables for name in table.concepts}
        if missing := sorted(known - set(prompts)):
            raise ValueError(f"prompts: expected those of every concept of the tables, got none for {missing}")
        texts = dict.fromkeys(text for some in prompts.values() for text in some)
        return [
            Sample(text, self.seed + n, tuple(name for name, some in prompts.items() if text in some))
            for n, text in enumerate(texts)
        ]

    def _analysis(
        self, readings: Sequence[Reading], samples: Sequence[Sample] = (), pipe: Any = None, sampling: Any = None
    ) -> Analysis:
        from ..evaluation import analyses

        if self.what == "scores":
            return analyses.analyse_scores(readings, self.top, self.share)
        if self.what == "timesteps":
            return analyses.analyse_timesteps(readings)
        options = {**sampling, "batch_size": self.batch_size}
        if self.what == "maps":
            chosen = analyses.one_of_each(readings, samples)
            watched = analyses.watch(pipe, readings, chosen, **options)
            return analyses.analyse_maps(readings, watched, chosen, self.columns)
        # Nothing but the token means is kept, and no picture is decoded.
        options |= {"output_type": "latent", "reduce": lambda values: values.mean((-2, -1))}
        return analyses.analyse_separability(readings, analyses.watch(pipe, readings, samples, **options), samples)


def _sampling(tables: Sequence[ConceptTable]) -> dict[str, Any]:
    samplers = [{key: table.sampler.get(key) for key in SAMPLING} for table in tables]
    if any(one != samplers[0] for one in samplers) or None in samplers[0].values():
        raise ValueError(f"table: expected tables that say how they were sampled, all alike, got {samplers}")
    return samplers[0]


def print_means(numbers: Mapping[str, Any]) -> None:
    """One line for each method and kind that has means."""
    for method, kinds in numbers.items():
        for kind, found in kinds.items():
            means = [f"{key} {value:.4g}" for key, value in found.get("mean", {}).items()]
            if means:
                print(f"{method}, {kind}: {', '.join(means)}")


def _stem(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)
