"""Makes MiniCanvas from nothing: draws, trains, collects, measures. Every stage is seeded and done once."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..concepts import ConceptTable, collect_concepts, save_assignment
from ..files import load_tensors, read_json, save_tensors, write_json
from ..sae import TopKSAE
from ..training import (
    CollectConfig,
    LabelledActivations,
    ShardActivations,
    SuperviseConfig,
    TrainConfig,
    assignment_of,
    collect_activations,
    evaluate_sae,
    supervise_sae,
    train_sae,
)
from . import autoencoder, text
from .canvas import KINDS, WEIGHTS, MiniCanvas, requests
from .classifier import accuracy, load_judge, train_judge
from .drawing import OBJECTS, PROMPT_TEMPLATES, STYLES, Pictures, draw_all, prompt_concepts, prompt_for
from .settings import HOOK_POINTS, SETTINGS, STREAMS, SUPERVISED_SETTINGS, SUPERVISION
from .unet import build_scheduler, train_unet

logger = logging.getLogger("saemnesia_fast")


@dataclass(kw_only=True)
class BuildConfig:
    """How MiniCanvas is made."""

    work: Path = Path("build/minicanvas")
    """Where stages keep what they made; an interrupted build goes on from there."""
    out: Path = WEIGHTS
    """Where the finished float16 weights and their record go."""
    start: Path | None = None
    """Finished weights whose pipeline and judge are kept: SAEs and concept tables alone are made."""
    pictures_per_combination: int = 200
    autoencoder_steps: int = 2000
    judge_steps: int = 1200
    text_steps: int = 300
    unet_steps: int = 6500
    sae_images_per_combination: int = 12
    sae_steps: int = 1500
    num_latents: int = 1536
    k: int = 16
    seed: int = 0
    threads: int = 0
    """CPU threads; 0 leaves it to torch."""
    progress: bool = True


class Builder:
    """The stages, in order; each reads what those before it left in the work folder.

    Weights are rounded to float16 as soon as they are trained, so that later stages see what is shipped.
    """

    def __init__(self, config: BuildConfig) -> None:
        self.config = config
        self.work = config.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.record_file = self.work / "record.json"
        if config.start is not None and not self.record_file.exists():
            self.adopt(config.start)
        self.record: dict[str, Any] = read_json(self.record_file) if self.record_file.exists() else {"stages": {}}

    def run(self) -> dict[str, Any]:
        """Runs every stage that is not done yet, exports, and returns the record."""
        stages: list[Callable[[], dict[str, Any]]] = [
            self.autoencoder,
            self.judge,
            self.text_encoder,
            self.unet,
            self.activations,
            self.sparse_autoencoders,
            self.concepts,
            self.supervised,
        ]
        for stage in stages:
            name = stage.__name__
            if name in self.record["stages"]:
                continue
            started = time.monotonic()
            result = stage()
            # A stage that was interrupted has trained for longer than this process has seen of it.
            seconds = max(time.monotonic() - started, result.get("training_seconds", 0.0))
            result["seconds"] = round(seconds, 1)
            self.record["stages"][name] = result
            write_json(self.record_file, self.record)
            logger.info("minicanvas: %s done: %s", name, result)
        export(self)
        return self.record

    def adopt(self, folder: Path) -> None:
        """Takes the pipeline and the judge in `folder` for what the stages before `activations` made."""
        for part in ("vae", "text_encoder", "tokenizer", "unet"):
            shutil.copytree(folder / "pipeline" / part, self.work / part, dirs_exist_ok=True)
        shutil.copy(folder / "judge.safetensors", self.work)
        stages = read_json(folder / "record.json")["stages"]
        kept = ("autoencoder", "judge", "text_encoder", "unet")
        write_json(self.record_file, {"stages": {name: stages[name] for name in kept}})

    def _fit_options(self) -> dict[str, Any]:
        return {"seed": self.config.seed, "progress": self.config.progress}

    def pictures(self) -> Pictures:
        """The training pictures, drawn again by every stage that needs them: faster than keeping them."""
        return draw_all(self.config.pictures_per_combination, self.config.seed)

    def test_pictures(self) -> Pictures:
        """Pictures that no stage trains on."""
        return draw_all(20, self.config.seed + 1)

    def autoencoder(self) -> dict[str, Any]:
        model, result = autoencoder.train_autoencoder(
            self.pictures().images, self.work, steps=self.config.autoencoder_steps, **self._fit_options()
        )
        model.half().save_pretrained(self.work / "vae")
        return result | {"test_psnr_db": round(autoencoder.psnr(self.load_vae(), self.test_pictures().images), 2)}

    def judge(self) -> dict[str, Any]:
        vae = self.load_vae()
        judge, result = train_judge(
            self.pictures(), vae, self.work, steps=self.config.judge_steps, **self._fit_options()
        )
        save_tensors(self.work / "judge.safetensors", judge.half().state_dict())
        judge = load_judge(self.work)
        test = self.test_pictures()
        seen = autoencoder.decode(vae, autoencoder.encode(vae, test.images))
        drawn, coded = (accuracy(judge, images, test.objects, test.styles) for images in (test.images, seen))
        return result | {
            "test_accuracy": {"object": drawn[0], "style": drawn[1]},
            "test_accuracy_after_autoencoder": {"object": coded[0], "style": coded[1]},
        }

    def text_encoder(self) -> dict[str, Any]:
        tokenizer, encoder, result = text.train_text_encoder(
            self.work, steps=self.config.text_steps, **self._fit_options()
        )
        tokenizer.save_pretrained(self.work / "tokenizer")
        encoder.half().save_pretrained(self.work / "text_encoder")
        return result

    def unet(self) -> dict[str, Any]:
        vae, pictures = self.load_vae(), self.pictures()
        tokenizer, encoder = self.load_text()
        latents = autoencoder.encode(vae, pictures.images) * vae.config.scaling_factor
        with torch.no_grad():
            embeddings = torch.stack(
                [
                    encoder(
                        text.tokenize(tokenizer, [prompt_for(o, s, t) for t in range(len(PROMPT_TEMPLATES))])
                    ).last_hidden_state
                    for o in OBJECTS
                    for s in STYLES
                ]
            )
            empty = encoder(text.tokenize(tokenizer, [""])).last_hidden_state[0]
        rows = pictures.objects * len(STYLES) + pictures.styles
        model, result = train_unet(
            latents, rows, embeddings, empty, self.work, steps=self.config.unet_steps, **self._fit_options()
        )
        model.half().save_pretrained(self.work / "unet")
        canvas = self.canvas()
        wanted = requests(6, seed=1_000_000)
        images = canvas.paint(wanted, progress="generated pictures" if self.config.progress else None)
        objects, styles = (torch.tensor([getattr(one, kind) for one in wanted]) for kind in KINDS)
        on_object, on_style = accuracy(canvas.judge, images, objects, styles)
        return result | {"generated_accuracy": {"object": on_object, "style": on_style, "images": len(wanted)}}

    def activations(self) -> dict[str, Any]:
        wanted = requests(self.config.sae_images_per_combination, seed=0)
        prompts = [
            prompt_for(OBJECTS[one.object], STYLES[one.style], n // (len(OBJECTS) * len(STYLES)))
            for n, one in enumerate(wanted)
        ]
        self.collect(prompts, "activations", seed=2_000_000)
        return {"images": len(prompts)}

    def collect(self, prompts: list[str], folder: str, seed: int) -> None:
        """Activations of all hook points."""
        canvas = self.canvas()
        sampling = CollectConfig(
            num_inference_steps=canvas.steps,
            guidance_scale=canvas.guidance_scale,
            seed=seed + self.config.seed,
            prompts_per_call=48,
            stream=STREAMS,
        )
        collect_activations(
            canvas.pipe, prompts, HOOK_POINTS, self.work / folder, sampling, progress=self.config.progress
        )

    def sparse_autoencoders(self) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name in HOOK_POINTS:
            data = ShardActivations(self.work / "activations", name, batch_size=2048, seed=self.config.seed)
            config = TrainConfig(
                out_dir=self.work / "sae_runs",
                hook_point=name,
                num_latents=self.config.num_latents,
                k=self.config.k,
                steps=self.config.sae_steps,
                lr=1e-3,
                dead_after=500_000,
                seed=self.config.seed,
                resume=True,
                progress=self.config.progress,
            )
            started = time.monotonic()
            sae = train_sae(config, data)
            sae.half().save_pretrained(self.work / "sae" / name)
            measured = evaluate_sae(self.load_sae(name), self.held_out(name))
            result[name] = {
                "fvu": round(measured.fvu, 4),
                "dead_fraction": round(measured.dead_fraction, 4),
                "seconds": round(time.monotonic() - started, 1),
            }
        return result

    def held_out(self, hook_point: str) -> Tensor:
        """Activations [tokens, d] float32 of one picture of every combination that no SAE was trained on."""
        folder = self.work / "held_out"
        if not (folder / "index.json").exists():
            self.collect([one.prompt for one in requests(1, seed=0)], "held_out", seed=3_000_000)
        shards = read_json(folder / "index.json")["hook_points"][hook_point]["shards"]
        parts = [load_tensors(folder / shard["file"])["activations"].flatten(0, 1) for shard in shards]
        return torch.cat(parts).float()

    def concepts(self) -> dict[str, Any]:
        for name, table in self.tables({name: self.load_sae(name) for name in HOOK_POINTS}).items():
            table.save(self.work / "concepts" / name)
        return {f"prompts_per_{kind}": len(concept_prompts()[names[0]]) for kind, names in KINDS.items()}

    def tables(self, saes: dict[str, TopKSAE]) -> dict[str, ConceptTable]:
        canvas = self.canvas()
        return collect_concepts(
            canvas.pipe,
            saes,
            concept_prompts(),
            kinds={name: kind for kind, names in KINDS.items() for name in names},
            num_inference_steps=canvas.steps,
            guidance_scale=canvas.guidance_scale,
            seed=4_000_000 + self.config.seed,
            batch_size=48,
            stream={point: STREAMS[point] for point in saes},
            model_id="minicanvas",
            progress=self.config.progress,
        )

    def supervise_config(self, hook_point: str) -> SuperviseConfig:
        return SuperviseConfig(
            out_dir=self.work / "supervised_runs",
            hook_point=hook_point,
            epochs=SUPERVISION.epochs,
            lr=SUPERVISION.lr,
            lr_schedule="linear",
            negatives=True,
            rectified=False,
            dead_after=500_000,
            seed=self.config.seed,
            resume=True,
            progress=self.config.progress,
        )

    def supervised(self, hook_points: Sequence[str] = HOOK_POINTS) -> dict[str, Any]:
        """A second SAE at each hook point, with a latent for each concept (SPEC 4.2)."""
        out = self.work / "supervised"
        result: dict[str, Any] = {}
        for point in hook_points:
            table = ConceptTable.load(self.work / "concepts" / point)
            data = LabelledActivations(
                self.work / "activations",
                point,
                prompt_concepts(),
                table.concepts,
                images=SUPERVISION.images,
                seed=self.config.seed,
            )
            started = time.monotonic()
            sae = supervise_sae(self.supervise_config(point), data, self.load_sae(point), table)
            sae.half().save_pretrained(out / "sae" / point)
            result[point] = {"seconds": round(time.monotonic() - started, 1)}
        saes = {
            point: TopKSAE.from_pretrained(out / "sae", subfolder=point, dtype=torch.float32) for point in hook_points
        }
        for point, table in self.tables(saes).items():
            table.assignment = assignment_of(ConceptTable.load(self.work / "concepts" / point))
            table.save(out / "concepts" / point)
            kinds = dict(zip(table.concepts, table.kinds, strict=True))
            save_assignment(out / "sae" / point, table.assignment, kinds, saes[point])
            measured = evaluate_sae(saes[point], self.held_out(point))
            best = {name: float(table.scores(name)[:, latent].mean()) for name, latent in table.assignment.items()}
            result[point] |= {
                "fvu": round(measured.fvu, 4),
                "mean_score": {
                    kind: round(sum(best[name] for name in of_kind) / len(of_kind), 4)
                    for kind, of_kind in KINDS.items()
                },
            }
        return result

    def load_vae(self) -> AutoencoderTiny:
        return AutoencoderTiny.from_pretrained(self.work / "vae", dtype=torch.float32)

    def load_text(self) -> tuple[CLIPTokenizer, CLIPTextModel]:
        return (
            CLIPTokenizer.from_pretrained(self.work / "tokenizer"),
            CLIPTextModel.from_pretrained(self.work / "text_encoder", dtype=torch.float32),
        )

    def load_sae(self, hook_point: str) -> TopKSAE:
        return TopKSAE.from_pretrained(self.work / "sae", subfolder=hook_point, dtype=torch.float32)

    def canvas(self) -> MiniCanvas:
        """The pipeline and the judge, without SAEs."""
        tokenizer, encoder = self.load_text()
        pipe = StableDiffusionPipeline(
            vae=self.load_vae(),
            text_encoder=encoder,
            tokenizer=tokenizer,
            unet=UNet2DConditionModel.from_pretrained(self.work / "unet", dtype=torch.float32),
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return MiniCanvas(pipe, load_judge(self.work))


def concept_prompts() -> dict[str, list[str]]:
    """{concept: the prompts that ask for it}."""
    return {
        **{o: [prompt_for(o, s, t) for s in STYLES for t in range(len(PROMPT_TEMPLATES))] for o in OBJECTS},
        **{s: [prompt_for(o, s, t) for o in OBJECTS for t in range(len(PROMPT_TEMPLATES))] for s in STYLES},
    }


def export(builder: Builder) -> None:
    """Writes the finished weights in float16, the settings and the record to the configured folder."""
    out, work = builder.config.out, builder.work
    shutil.rmtree(out, ignore_errors=True)
    pipe = builder.canvas().pipe
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.half()
    pipe.save_pretrained(out / "pipeline")
    for path in (out / "pipeline").rglob("*config.json"):
        entries = read_json(path)
        entries.pop("_name_or_path", None)  # where this machine had it
        write_json(path, entries)
    shutil.copy(work / "judge.safetensors", out)
    for folder, settings in (("", SETTINGS), ("supervised", SUPERVISED_SETTINGS)):
        for point in sorted({point for setting in settings.values() for point in setting.strength}):
            for part in ("sae", "concepts"):
                shutil.copytree(work / folder / part / point, out / folder / part / point)
        write_json(out / folder / "settings.json", {kind: asdict(setting) for kind, setting in settings.items()})
    seconds = sum(stage["seconds"] for stage in builder.record["stages"].values())
    config = {
        key: value for key, value in asdict(builder.config).items() if key not in ("work", "out", "start", "progress")
    }
    write_json(
        out / "record.json",
        builder.record | {"config": config, "total_minutes": round(seconds / 60, 1), "machine": machine()},
    )


def machine() -> dict[str, Any]:
    """What the record says about where it was made."""
    import diffusers
    import transformers

    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
