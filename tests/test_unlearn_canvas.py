"""The UnlearnCanvas protocol on stand-ins: a tiny pipeline, small classifiers, SAEs and statistics, in the formats in
which the real ones are published (SPEC 5.2, 5.3, 6)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from legacy import write_latents
from pipelines import CHANNELS, HOOK_POINTS, tiny_sd
from saemnesia_fast import TopKSAE
from saemnesia_fast.cli.convert import Convert
from saemnesia_fast.cli.main import main
from saemnesia_fast.cli.unlearn_canvas import UnlearnCanvasCommand
from saemnesia_fast.evaluation import Plan, cases
from saemnesia_fast.files import read_json
from saemnesia_fast.training.unlearn_canvas import OBJECTS, STYLES, prompts
from saemnesia_fast.unlearn_canvas import SEEDS, SEQUENCE, UnlearnCanvas, estimate, load_judge, measure, methods
from saemnesia_fast.unlearn_canvas.judge import ARCHITECTURE, DEPTH, PATCH, SIDE, THEMES, WIDTH, operations, prepared
from saemnesia_fast.unlearn_canvas.methods import BASELINES, MODES

KINDS = dict(zip(HOOK_POINTS, ("object", "style"), strict=True))


class SmallViT(nn.Module):
    """What `Judge` uses of a timm model."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 32, stride=32)
        self.head = nn.Linear(8, classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.embed(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def create_small(architecture: str, pretrained: bool, num_classes: int) -> SmallViT:
    assert not pretrained
    return SmallViT(num_classes)


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins as they are downloaded, converted by the commands of docs/unlearn_canvas.md."""
    downloads, folder = tmp_path_factory.mktemp("downloads"), tmp_path_factory.mktemp("assets")
    torch.manual_seed(0)
    tiny_sd().save_pretrained(downloads / "style50", safe_serialization=False)
    for name, classes in (("style50_cls", 20), ("style50", 51)):
        torch.save({"model_state_dict": SmallViT(classes).state_dict(), "epoch": 9}, downloads / f"{name}.pth")
    Convert(what="pipeline", source=str(downloads / "style50"), out=folder / "pipeline").run()
    Convert(what="weights", source=str(downloads / "style50_cls.pth"), out=folder / "object.safetensors").run()
    Convert(what="weights", source=str(downloads / "style50.pth"), out=folder / "style.safetensors").run()
    params = {name: {"percentile": 95.0, "multiplier": -5.0} for name in OBJECTS}
    torch.save(params, downloads / "class_params.pth")
    for point, kind in KINDS.items():
        sae = TopKSAE.init(CHANNELS[point], 60, 8, seed=1, batch_topk=True)
        sae.save_pretrained(downloads / f"unet.{point}")
        converted = folder / "saeuron" / "sae" / point
        Convert(what="sae", source=str(downloads), subfolder=f"unet.{point}", out=converted).run()
        latents = downloads / f"{kind}_latents_dict_unet.{point}.pkl"
        write_latents(latents, OBJECTS if kind == "object" else STYLES, prompts=2, steps=4, num_latents=60)
        Convert(
            what="concepts",
            source=str(latents),
            out=folder / "saeuron" / "concepts" / point,
            sae=converted,
            hook_point=f"unet.{point}",
            kind=kind,
            params=downloads / "class_params.pth" if kind == "object" else None,
            strength=None if kind == "object" else -1.0,
        ).run()
    return folder


@pytest.fixture(scope="module")
def canvas(assets: Path) -> UnlearnCanvas:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saemnesia_fast.unlearn_canvas.judge._timm", lambda: create_small)
        return UnlearnCanvas.load(assets, dtype=torch.float32, size=64, steps=2, batch_size=4)


def test_requests_are_the_benchmarks_prompts_at_its_seeds() -> None:
    """SPEC 5.2: 1020 prompts a seed, and five seeds that share no noise."""
    requests = [one for seed in SEEDS for one in UnlearnCanvas().requests(seed)]
    assert SEEDS == (188, 288, 588, 688, 888)
    assert sorted(one.prompt for one in requests) == sorted(prompts() * 5)
    assert len({one.seed for one in requests}) == 5100
    one = requests[38 * 20 + 4]
    assert (OBJECTS[one.object], STYLES[one.style], one.prompt) == (
        "Cats",
        "Sketch",
        "An image of Cats in Sketch style.",
    )
    assert requests[1000].prompt == "An image of Architectures." and requests[1000].style == -1
    assert set(SEQUENCE) < set(OBJECTS) and len(SEQUENCE) == 9


def test_the_style_classifiers_order_is_the_benchmarks() -> None:
    """51 themes; Seed_Images stands between Rust and Sketch in its list."""
    assert len(THEMES) == 51 and THEMES[37:40] == ("Rust", "Seed_Images", "Sketch")
    assert [theme for theme in THEMES if theme != "Seed_Images"] == list(STYLES)


def test_painting_is_the_pipelines_with_noise_by_picture(canvas: UnlearnCanvas) -> None:
    """SPEC 5.2, 3.9; the batch size changes the last bits at most."""
    wanted = canvas.requests(188)[998:1003]
    images = canvas.paint(wanted)
    assert images.shape == (5, 3, 64, 64) and images.dtype == torch.float32
    assert type(canvas.pipe.scheduler).__name__ == "DDIMScheduler"
    want = canvas.pipe(
        wanted[3].prompt,
        num_inference_steps=2,
        guidance_scale=9.0,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(wanted[3].seed),
        output_type="pt",
    ).images
    torch.testing.assert_close(images[3:4], want, rtol=0, atol=1e-4)
    other = canvas.paint(wanted, arguments={"negative_prompt": "a cat"})
    assert (other - images).abs().max() > 1e-3


def test_pictures_are_judged_as_the_published_evaluation_reads_them(canvas: UnlearnCanvas, tmp_path: Path) -> None:
    """JPEG, PIL's bilinear resizing to 224, deviation 0.5; the style's classes in the order of STYLES."""
    images = torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    images = nn.functional.avg_pool2d(images, 9, 1, 4)
    rows = []
    for n, image in enumerate(images):
        path = tmp_path / f"{n}.jpg"
        Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(path)
        small = Image.open(path).resize((224, 224), Image.Resampling.BILINEAR)
        rows.append((torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255.0 - 0.5) / 0.5)
    torch.testing.assert_close(prepared(images), torch.stack(rows), rtol=0, atol=1e-6)
    judgement = canvas.judged(images)
    styles = canvas.judge.style(torch.stack(rows)).softmax(1)
    torch.testing.assert_close(judgement.probabilities["style"][:, STYLES.index("Winter")], styles[:, 50])
    torch.testing.assert_close(judgement.probabilities["style"][:, 50], styles[:, THEMES.index("Seed_Images")])
    torch.testing.assert_close(judgement.probabilities["style"][:, STYLES.index("Sketch")], styles[:, 39])
    torch.testing.assert_close(judgement.probabilities["object"], canvas.judge.object(torch.stack(rows)).softmax(1))
    assert judgement.features.shape == (3, 16)


def test_timm_reads_the_classifiers(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    architecture = "vit_tiny_patch16_224"
    files = {"object": 20, "style": 51}
    for kind, classes in files.items():
        model = timm.create_model(architecture, pretrained=False)
        model.head = nn.Linear(192, classes)
        torch.save({"model_state_dict": model.state_dict()}, tmp_path / f"{kind}.pth")
        Convert(what="weights", source=str(tmp_path / f"{kind}.pth"), out=tmp_path / f"{kind}.safetensors").run()
    judge = load_judge(tmp_path, architecture=architecture)
    images = torch.rand(2, 3, 64, 64)
    judgement = judge.judged(images)
    want = model.eval()(prepared(images)).softmax(1)[:, 39]
    torch.testing.assert_close(judgement.probabilities["style"][:, STYLES.index("Sketch")], want.detach())
    assert judgement.features.shape == (2, 2 * 192)
    with pytest.raises(ValueError, match=r"object\.safetensors: expected a vit_small_patch16_224 of 20 classes"):
        load_judge(tmp_path, architecture="vit_small_patch16_224")


def counted(model: nn.Module, *shape: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(shape, device="meta"))
    return counter.get_total_flops()


def test_the_classifiers_operations_are_those_of_torchs_modules() -> None:
    """A ViT of torch's own: its patches as a convolution, its blocks as encoder layers, its head on one token."""
    tokens = (SIDE // PATCH) ** 2 + 1
    with torch.device("meta"):
        patches = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        block = nn.TransformerEncoderLayer(WIDTH, WIDTH // 64, 4 * WIDTH, batch_first=True).train()
        head = nn.Linear(WIDTH, 51)
    want = counted(patches, 1, 3, SIDE, SIDE) + DEPTH * counted(block, 1, tokens, WIDTH) + counted(head, 1, WIDTH)
    assert operations(51) == want


def test_the_classifiers_operations_are_those_of_timms_model() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    with torch.device("meta"):
        model = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=20)
    assert operations(20) == counted(model.eval(), 1, 3, SIDE, SIDE)


def test_published_files_steer_the_pipeline(canvas: UnlearnCanvas, assets: Path) -> None:
    """Two hook points; strengths and set sizes are those of class_params.pth and of --strength."""
    exact, released = methods(["saeuron-exact", "saeuron-released"], assets)
    assert released.settings["object"].mode == "released" and exact.stored
    assert set(exact.settings["object"].strength) == {HOOK_POINTS[0]}
    assert set(exact.settings["style"].strength) == {HOOK_POINTS[1]}
    assert exact.tables[HOOK_POINTS[0]].settings["Cats"] == {"strength": -5.0, "num_latents": 3, "scale": "mean"}
    assert exact.tables[HOOK_POINTS[1]].settings["Monet"]["strength"] == -1.0
    wanted = canvas.requests(188)[:2]
    plain = canvas.paint(wanted)
    with exact.handles(canvas.pipe, ["Cats", "Monet"]) as handles:
        assert len(handles) == 2
    for method in (exact, released):
        with method.erased(canvas.pipe, ["Cats", "Monet"]):
            assert not torch.equal(canvas.paint(wanted), plain)
    assert torch.equal(canvas.paint(wanted), plain)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["saeuron"], ValueError, r"methods: expected some of none, .*NAME-exact.*, got 'saeuron'"),
        (["saemnesia-exact"], FileNotFoundError, r"expected sae/HOOK_POINT with an SAE; see docs/unlearn_canvas\.md"),
    ],
)
def test_unknown_methods(assets: Path, names: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        methods(names, assets)


def test_baselines_know_the_benchmarks_prompts(assets: Path) -> None:
    uce, esd, masking, negative, none = methods(["uce", "esd", "neuron_masking", "negative_prompt", "none"], assets)
    assert len(uce.prompts["Cats"]) == 51 and len(uce.prompts["Monet"]) == 20
    assert (esd.steps, esd.guidance_scale, masking.steps) == (100, 9.0, 100)
    assert (negative.name, none.name) == ("negative_prompt", "none")


def test_the_estimate_counts_what_the_papers_paint(tmp_path: Path, assets: Path) -> None:
    """20 objects, 5 seeds, 1020 pictures each, and the plain ones."""
    canvas = UnlearnCanvas()
    chosen = methods(["none", "saeuron-exact", "saeuron-released"], assets)
    plan = Plan(canvas, chosen, cases("single", canvas.classes, ["object"]), SEEDS, tmp_path)
    cost = estimate(plan, 100, 0.025)
    assert cost.units == 5 + 2 * 100 and cost.pictures == 205 * 1020 and cost.steps == 100 * cost.pictures
    assert cost.hours == pytest.approx(cost.pictures * 100 * 0.025 / 3600)
    assert cost.memory_bytes == 1020 * 3 * 512 * 512 * 4
    assert cost.judging_operations == cost.pictures * (operations(20) + operations(51))
    assert "judging          51.48 PFLOP" in str(cost)
    assert "209,100" in str(cost) and "145.2 on one device" in str(cost) and "25.00 ms" in str(cost)
    few = estimate(replace(plan, retained=40), 100, 0.025)
    assert few.pictures == 5 * 1020 + 200 * (51 + 40)
    sequence = replace(plan, cases=cases("sequence", canvas.classes, ["object"], SEQUENCE), methods=chosen[:2])
    assert estimate(sequence, 100, 1.0).units == 5 + 9 * 5


def test_measuring_changes_nothing(canvas: UnlearnCanvas) -> None:
    assert 0 < measure(canvas, 1) < 60 and canvas.steps == 2


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four pictures a seed: of Bears without a style, of three objects in one; and classifiers that need no timm."""
    everything = UnlearnCanvas.requests
    monkeypatch.setattr(
        UnlearnCanvas, "requests", lambda self, seed: [everything(self, seed)[n] for n in (1001, 0, 21, 84)]
    )
    monkeypatch.setattr("saemnesia_fast.unlearn_canvas.judge._timm", lambda: create_small)


ARGUMENTS = (
    "--methods",
    "none",
    "saeuron-released",
    "--size",
    "64",
    "--steps",
    "2",
    "--dtype",
    "float32",
    "--protocol",
)


def test_the_command_tells_the_cost_and_needs_a_yes(
    assets: Path, tmp_path: Path, few: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --yes and with a given time nothing is loaded, and nothing painted either way."""
    monkeypatch.setattr(UnlearnCanvas, "load", lambda *_, **__: pytest.fail("loaded"))
    options = ("--assets", str(assets), "--out", str(tmp_path / "out"), "--seconds-per-step", "0.02")
    main(["unlearn-canvas", *options, *ARGUMENTS, "single"])
    out = capsys.readouterr().out
    assert "pictures         420\n" in out and "20.00 ms a step" in out and "run again with --yes" in out
    assert not (tmp_path / "out").exists()


def test_the_help_names_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["unlearn-canvas", "--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in (*BASELINES, *(f"NAME-{mode}" for mode in MODES)))


def test_the_command_evaluates(
    assets: Path, tmp_path: Path, few: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saemnesia_fast.unlearn_canvas.SEQUENCE", ("Cats",))
    command = UnlearnCanvasCommand(
        assets=assets,
        out=tmp_path,
        methods=("none", "saeuron-released"),
        protocol=("sequence",),
        seeds=(188, 288),
        steps=2,
        size=64,
        dtype="float32",
        yes=True,
    )
    replace(command, shard="1/2").run()
    assert "units are yet to be painted by other parts" in capsys.readouterr().out
    command.run()
    out = capsys.readouterr().out
    assert "denoising steps  32" in out and "sequence, object" in out
    summary = read_json(tmp_path / "evaluation.json")
    assert summary["benchmark"]["name"] == "UnlearnCanvas" and summary["benchmark"]["scheduler"] == "DDIMScheduler"
    assert summary["seeds"] == [188, 288] and summary["pictures_per_seed"] == 4
    scores = summary["protocols"]["sequence"]["saeuron-released"]["object"]["cases"][0]
    assert scores["erased"] == ["Cats"] and 0 <= scores["scores"]["UA"]["mean"] <= 100
    assert (tmp_path / "report.html").exists()


def test_what_is_missing_is_named(tmp_path: Path, assets: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no pipeline here; see docs"):
        UnlearnCanvas.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"object\.safetensors: no classifier here"):
        load_judge(tmp_path, create=create_small)
    with pytest.raises(ValueError, match="judge: expected the two classifiers"):
        UnlearnCanvas().judged(torch.zeros(1, 3, 8, 8))
