"""Supervised training: its data, epochs, early stopping, resuming, ranks and command (SPEC 4.2)."""

import json
import logging
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import render
import supervised_step
from ranks import run_on_ranks
from saemnesia_fast.cli.main import main
from saemnesia_fast.cli.supervise import read_labels
from saemnesia_fast.concepts import ConceptTable, load_assignment
from saemnesia_fast.files import load_tensors, read_json, save_tensors, write_json
from saemnesia_fast.sae import TopKSAE
from saemnesia_fast.training import LabelledActivations, LabelledImages, SuperviseConfig, assignment_of, supervise_sae
from saemnesia_fast.training.checkpoint import list_checkpoints, load_checkpoint
from saemnesia_fast.training.parallel import connect

D, N, K, T = 10, 29, 4, 6
OBJECTS, STYLES = ("cat", "sea", "bear"), ("neon", "ink")
CONCEPTS = [*OBJECTS, *STYLES]
PROMPTS = [f"{one} in {style}" for one in OBJECTS for style in STYLES] * 4
LABELS = {prompt: prompt.split(" in ") for prompt in PROMPTS}
STEPS_A_PROMPT = 3
RECIPE: dict[str, Any] = {"hook_point": "block", "device": "cpu", "progress": False, "log_every": 1, "lr": 1e-3}


def store(folder: Path) -> Path:
    """Two shards of images whose tokens hold their object's and their style's direction."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(len(CONCEPTS), D, generator=generator)
    entries = []
    for number, some in enumerate((range(10), range(10, len(PROMPTS)))):
        owners = torch.tensor([i for i in some for _ in range(STEPS_A_PROMPT)])
        of_images = torch.tensor([[name in LABELS[PROMPTS[i]] for name in CONCEPTS] for i in owners]).float()
        strength = torch.rand(len(owners), T, len(CONCEPTS), generator=generator) + 0.2
        x = (strength * of_images[:, None]) @ directions + 0.2 * torch.randn(len(owners), T, D, generator=generator)
        file = f"block/{number:05d}.safetensors"
        steps = torch.arange(STEPS_A_PROMPT).repeat(len(some))
        save_tensors(folder / file, {"activations": x.half(), "timesteps": steps, "prompts": owners})
        entries.append({"file": file, "prompts": len(some), "tokens": len(x) * T})
    index = {"finished": True, "prompts": PROMPTS, "hook_points": {"block": {"d": D, "shards": entries}}}
    write_json(folder / "index.json", index)
    return folder


def images(folder: Path, **options: Any) -> LabelledActivations:
    return LabelledActivations(folder, "block", LABELS, CONCEPTS, **{"images": 8, "validation": 0.34} | options)


def new_sae(dtype: torch.dtype = torch.float32) -> TopKSAE:
    return TopKSAE.init(D, N, K, seed=5, dtype=dtype)


def table_of(sae: TopKSAE) -> ConceptTable:
    mu = torch.rand(len(CONCEPTS), 2, N, generator=torch.Generator().manual_seed(1))
    kinds = ["object"] * len(OBJECTS) + ["style"] * len(STYLES)
    return ConceptTable(mu, torch.tensor([9, 1]), CONCEPTS, kinds, "block", sae.content_hash())


def lines(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in found]


def numbers_of(batches: Any, folder: Path) -> list[int]:
    """Which images of the store the batches hold, found by their content."""
    files = sorted((folder / "block").iterdir())
    whole = torch.cat([load_tensors(file)["activations"] for file in files]).flatten(1)
    return [int((whole == one).all(1).nonzero()) for batch in batches for one in batch.x.flatten(1)]


def test_batches_are_whole_images_with_their_labels(tmp_path):
    data = images(store(tmp_path))
    owners = [i for i in range(len(PROMPTS)) for _ in range(STEPS_A_PROMPT)]
    assert data.batches_per_epoch == len(data.training) // 8 == 6
    for batch in islice(data, 3):
        assert batch.x.shape == (8, T, D) and batch.x.dtype == torch.float16
        for number, row in zip(numbers_of([batch], tmp_path), batch.labels, strict=True):
            names = [name for name, chosen in zip(CONCEPTS, row.tolist(), strict=True) if chosen]
            assert sorted(names) == sorted(LABELS[PROMPTS[owners[number]]])


def test_a_pass_holds_every_training_image_once_in_a_new_order(tmp_path):
    data = images(store(tmp_path), images=6)
    batches = list(islice(data, 16))
    first, second = numbers_of(batches[:8], tmp_path), numbers_of(batches[8:], tmp_path)
    assert sorted(first) == sorted(second) == data.training.tolist()
    assert first != second and first != sorted(first)
    assert numbers_of(islice(images(tmp_path, images=6, seed=1), 8), tmp_path) != first
    assert numbers_of(data.validation(), tmp_path) == data.held_out.tolist()


def test_validation_prompts_are_never_trained_on(tmp_path):
    """By text: two of the six, however often they were sampled."""
    store(tmp_path)
    for seed in range(4):
        data = images(tmp_path, seed=seed)
        texts = [{PROMPTS[i // STEPS_A_PROMPT] for i in part.tolist()} for part in (data.training, data.held_out)]
        assert not texts[0] & texts[1] and len(texts[1]) == 2
        assert len(data.training) + len(data.held_out) == STEPS_A_PROMPT * len(PROMPTS)


@pytest.mark.parametrize("stop", [1, 5, 6, 7, 13])
def test_state_continues_at_the_next_batch(tmp_path, stop):
    expected = list(islice(images(store(tmp_path)), 16))
    source, restored = images(tmp_path), images(tmp_path)
    assert len(list(islice(source, stop))) == stop
    restored.load_state_dict(json.loads(json.dumps(source.state_dict())))
    for batch, wanted in zip(restored, expected[stop:], strict=False):
        assert torch.equal(batch.x, wanted.x) and torch.equal(batch.labels, wanted.labels)
    with pytest.raises(ValueError, match="seed: expected 0 as in the saved state, got 1"):
        images(tmp_path, seed=1).load_state_dict(source.state_dict())


def test_data_refusals(tmp_path):
    store(tmp_path)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"images": 0}, "images: expected a number >= 1, got 0"),
        ({"images": 49}, "images: expected at most the 48 to train on, got 49"),
        ({"validation": 1.0}, "validation: expected a share > 0 and < 1, got 1.0"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            images(tmp_path, **options)
    for labels, concepts, message in [
        (LABELS, CONCEPTS[:-1], r"labels: expected some of .* for 'cat in ink', got \['cat', 'ink'\]"),
        ({}, CONCEPTS, "labels: expected the concepts of every prompt, got none for 'cat in neon'"),
        (lambda prompt: [], CONCEPTS, r"labels: expected images of every concept to train on, got none of \['cat'"),
        (lambda prompt: "cat", CONCEPTS, "labels: expected some of .* got 'cat'"),
    ]:
        with pytest.raises(ValueError, match=message):
            LabelledActivations(tmp_path, "block", labels, concepts, images=8)
    with pytest.raises(ValueError, match="hook_point: expected one of"):
        LabelledActivations(tmp_path, "other", LABELS, CONCEPTS)


def supervise(folder: Path, data: Any, sae: TopKSAE | None = None, layout: Any = None, **options: Any) -> TopKSAE:
    sae = new_sae() if sae is None else sae
    config = SuperviseConfig(**RECIPE | {"out_dir": folder, "epochs": 3} | options)
    return supervise_sae(config, data, sae, table_of(sae), **({} if layout is None else {"layout": layout}))


def test_training_teaches_the_assigned_latents(tmp_path):
    """The validation loss falls, and on new prompts the assigned latents tell concepts apart."""
    data, sae = images(store(tmp_path / "store")), new_sae()
    assignment = assignment_of(table_of(sae))

    def margins(sae: TopKSAE) -> torch.Tensor:
        """v of the images that have the concept, less v of those that do not, for each concept."""
        batches = list(images(tmp_path / "store").validation())
        x, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        pre = torch.relu((x.float() - sae.b_dec) @ sae.W_enc.T + sae.b_enc).mean(1)[:, list(assignment.values())]
        rows = zip(pre.T, labels.T, strict=True)
        return torch.stack([v[one].mean() - v[~one].mean() for v, one in rows if one.any() and not one.all()])

    before = margins(sae).mean()
    trained = supervise(tmp_path / "run", data, sae, epochs=12, lr=5e-3, negatives=True, eta=1.0)
    assert margins(trained).mean() > before + 0.3
    curve = [line["validation_loss"] for line in lines(tmp_path / "run/block") if "validation_loss" in line]
    assert min(curve) < 0.8 * curve[0]
    record = read_json(tmp_path / "run/block/training.json")
    assert record["validation_loss"] == curve and record["recipe"]["assignment"] == assignment
    saved = TopKSAE.from_pretrained(tmp_path / "run", subfolder="block")
    assert load_assignment(tmp_path / "run/block", saved.content_hash()) == assignment
    with pytest.raises(ValueError, match="assignment: .* is of SAE"):
        load_assignment(tmp_path / "run/block", table_of(new_sae()).sae_hash)


def test_validation_loss_is_that_of_all_its_images_as_one_batch(tmp_path):
    """In float64 against the loss of a batch of them, which the gradient's tests hold to a plain one."""
    from saemnesia_fast.training.step import Objective, batch_gradient
    from saemnesia_fast.training.supervised_loss import Supervised, Supervision

    data, sae = images(store(tmp_path / "store")), new_sae(torch.float64).requires_grad_(False)
    x, labels = (torch.cat(parts) for parts in zip(*data.validation(), strict=True))
    for l1 in ("kept", "dense"):
        config = SuperviseConfig(**RECIPE | {"out_dir": tmp_path / l1, "l1": l1, "l1_weight": 0.5, "eta": 2.0})
        table = table_of(sae)
        kinds = dict(zip(CONCEPTS, table.kinds, strict=True))
        supervised = Supervised(Supervision(assignment_of(table), kinds, config, N), labels)
        tokens = x.double().flatten(0, 1)
        wanted = batch_gradient(sae, tokens, Objective(K, auxk_alpha=0), supervised=supervised)
        supervise_sae(replace(config, epochs=1), images(tmp_path / "store"), new_sae(torch.float64), table)
        first = lines(tmp_path / l1 / "block")[0]
        assert first["validation_loss"] == pytest.approx(float(wanted.loss), rel=1e-12)
        for name in ("concepts", "correlation", "l1"):
            assert first[f"validation_{name}"] == pytest.approx(float(getattr(wanted.taught, name)), rel=1e-12)
        assert first["validation_fvu"] == pytest.approx(float(wanted.fvu), rel=1e-12)


class Killed(Exception):
    """Stands for whatever ends a process."""


class Dying:
    """Gives `count` batches and then fails."""

    def __init__(self, data: LabelledActivations, count: int) -> None:
        self.data, self.count = data, count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def __iter__(self):
        yield from islice(self.data, self.count)
        raise Killed


OVERSHOOTING: dict[str, Any] = {"epochs": 9, "patience": 2, "lr": 0.05, "checkpoint_every": 4, "keep_checkpoints": 1}


def test_stops_early_and_keeps_the_best(tmp_path):
    """With a rate so high that the loss rises: ends `patience` epochs after the best, whose weights are kept."""
    trained = supervise(tmp_path / "run", images(store(tmp_path / "store")), **OVERSHOOTING)
    losses = read_json(tmp_path / "run/block/training.json")["validation_loss"]
    best = losses.index(min(losses))
    assert len(losses) - 1 == best + 2 < 9
    paths = list_checkpoints(tmp_path / "run/block/checkpoints")
    assert [int(path.stem[5:]) for path in paths] == [6 * best, 6 * (best + 2)]
    kept = load_checkpoint(paths[0]).sae
    assert all(torch.equal(tensor, kept[name]) for name, tensor in trained.state_dict().items())
    assert not torch.equal(load_checkpoint(paths[1]).sae["W_dec"], kept["W_dec"])


def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path):
    """Killed right after an epoch, then within one: the same SAE, curve, and epoch to stop at."""
    straight = supervise(tmp_path / "straight", images(store(tmp_path / "store")), **OVERSHOOTING).state_dict()
    for killed_after in (6, 9):
        data = Dying(images(tmp_path / "store"), killed_after)
        with pytest.raises(Killed):
            supervise(tmp_path / "killed", data, resume=True, **OVERSHOOTING)
    for _ in range(2):  # A finished run that is resumed has nothing left to do.
        resumed = supervise(tmp_path / "killed", images(tmp_path / "store"), resume=True, **OVERSHOOTING)
        assert all(torch.equal(tensor, straight[name]) for name, tensor in resumed.state_dict().items())
        assert lines(tmp_path / "killed/block") == lines(tmp_path / "straight/block")
    with pytest.raises(ValueError, match=r"beta: expected 3.0 as in .*, got 1.0; resume takes the same recipe"):
        supervise(tmp_path / "killed", images(tmp_path / "store"), resume=True, **OVERSHOOTING, beta=1.0)


def test_learning_rate_is_constant_and_bad_batches_are_skipped(tmp_path):
    data = images(store(tmp_path / "store"))

    class Spoilt(Dying):
        def __iter__(self):
            for number, batch in enumerate(self.data):
                yield LabelledImages(batch.x * torch.nan, batch.labels) if number == 3 else batch

    supervise(tmp_path / "run", Spoilt(data, 0), epochs=1, on_bad_batch="skip", warmup_steps=2)
    steps = [line for line in lines(tmp_path / "run/block") if "validation_loss" not in line]
    assert [line.get("lr") for line in steps] == [5e-4, 1e-3, 1e-3, None, 1e-3, 1e-3]
    assert steps[-1]["skipped"] == 1
    assert {"concepts", "correlation", "l1", "fvu", "auxk"} < set(steps[-1])


def test_refusals(tmp_path):
    data, sae = images(store(tmp_path / "store")), new_sae()
    config, table = SuperviseConfig(**RECIPE, out_dir=tmp_path / "run"), table_of(sae)
    with pytest.raises(ValueError, match="sae: the table was made with SAE"):
        supervise_sae(config, data, TopKSAE.init(D, N, K, seed=9), table)
    with pytest.raises(ValueError, match="table: expected a latent assigned to every concept, got none for"):
        supervise_sae(config, data, sae, replace(table, assignment={"cat": 3}))
    data.concepts = data.concepts[::-1]
    with pytest.raises(ValueError, match="data: expected labels of the table's concepts"):
        supervise_sae(config, data, sae, table)
    for options, message in [
        ({"out_dir": None}, "out_dir: expected a folder"),
        ({"steps": 3}, "steps: expected None"),
        ({"patience": 0}, "patience: expected a number >= 1"),
        ({"l1": "all"}, "l1: expected kept or dense"),
    ]:
        with pytest.raises(ValueError, match=message):
            SuperviseConfig(**{"out_dir": tmp_path} | options)


WAYS: dict[str, dict[str, Any]] = {
    "plain": {"auxk_alpha": 0.0},
    "auxk": {"dead_after": 96, "negatives": True, "eta": 3.0},
    "dense": {"l1": "dense", "l1_weight": 0.3},
}


def rank_supervises(folder: str, store: str, latent_ranks: int) -> dict[str, Any]:
    with connect(latent_ranks, "cpu") as layout:
        found = {}
        for way, options in WAYS.items():
            dtype = torch.float32 if way == "plain" else torch.float64
            out = Path(folder) / way
            trained = supervise(out, images(Path(store)), new_sae(dtype), layout, lr=1e-2, epochs=2, **options)
            found[way] = trained.state_dict()
        return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("alone")
    store(folder / "store")
    return folder, run_on_ranks(1, rank_supervises, str(folder / "run"), str(folder / "store"), 1)[0]


@pytest.mark.parametrize(("data", "latents"), [(2, 1), (2, 2)])
def test_ranks_train_what_one_process_trains(data, latents, alone, tmp_path):
    """Correlations are of the whole batch: the SAE, the curve and the epochs are one process's, to the bit without
    AuxK where nothing but images is shared."""
    folder, expected = alone
    ranks = run_on_ranks(data * latents, rank_supervises, str(tmp_path), str(folder / "store"), latents)
    for way, wanted in expected.items():
        tolerance = 0 if way == "plain" and latents == 1 else 1e-5 if way == "plain" else 1e-11
        for rank in ranks:
            torch.testing.assert_close(rank[way], wanted, rtol=0, atol=tolerance)
        curves = [lines(run / way / "block") for run in (tmp_path, folder / "run")]
        for line, other in zip(*curves, strict=True):
            assert line == pytest.approx(other, rel=tolerance, abs=tolerance)


def test_the_command_supervises(tmp_path, caplog):
    """From files to files; the assignment is stored in the table, and beside the SAE for the next one."""
    sae = new_sae()
    sae.save_pretrained(tmp_path / "sae")
    table_of(sae).save(tmp_path / "table")
    entries = [json.dumps({"prompt": prompt, "concepts": names}) for prompt, names in LABELS.items()]
    (tmp_path / "labels.jsonl").write_text("\n".join(entries) + "\n")
    words = {"sae": "sae", "table": "table", "activations": "store", "labels": "labels.jsonl", "out-dir": "run"}
    store(tmp_path / "store")
    command = [
        "supervise",
        "--images",
        "8",
        "--validation",
        "0.34",
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--no-progress",
    ]
    with caplog.at_level(logging.INFO, "saemnesia_fast"):
        main([*command, *(word for name, path in words.items() for word in (f"--{name}", str(tmp_path / path)))])
    assert "wrote the SAE and assignment.json" in caplog.text
    before, after = table_of(sae), ConceptTable.load(tmp_path / "table")
    assert after.assignment == before.assign() and len(after.assignment) == len(CONCEPTS)
    torch.testing.assert_close(after.mu, before.mu, rtol=2**-10, atol=0)
    trained = TopKSAE.from_pretrained(tmp_path / "run", subfolder="block")
    assert load_assignment(tmp_path / "run/block", trained.content_hash()) == after.assignment


def test_the_benchmark_times_every_way_in_turns(tmp_path, monkeypatch):
    supervised_step.main(tmp_path / "step.json", "cpu", rounds=2, images=4, tokens=4, small=True, dense=True)
    report = read_json(tmp_path / "step.json")
    assert list(report["ways"]) == list(supervised_step.WAYS) and report["ways"]["unsupervised"]["extra_percent"] == 0
    monkeypatch.setattr(render, "SUPERVISED_STEP", tmp_path / "other.json")
    assert render.supervised_step() == render.NOT_YET
    found = {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0, "extra_percent": 1.25, "extra_interval": [-0.5, 2.0]}
    write_json(render.SUPERVISED_STEP, report | {"ways": {"supervised": found}})
    assert "| supervised | 2 (1-3) | +1.2 % (-0.5 to +2.0) |" in render.supervised_step()
    assert "6 images of 4 tokens, d = 32, N = 256, k = 4, 3 objects and 2 styles; 2 rounds" in render.supervised_step()


def test_supervision_costs_less_than_a_twentieth_of_a_step():
    """As committed, and so does the upper end of the median's interval by ranks."""
    assert supervised_step.of_median(range(101)) == (40, 61)
    found = read_json(render.RESULTS / "supervised_step.json")["ways"]["supervised"]
    assert found["extra_percent"] <= found["extra_interval"][1] <= 5


def test_labels_of_benchmarks_and_files(tmp_path):
    of_canvas, of_small = read_labels("unlearn-canvas"), read_labels("minicanvas")
    assert len(of_canvas) == 1020
    assert of_canvas["An image of Bears in Van Gogh style."] == ("Bears", "Van_Gogh")
    assert of_canvas["An image of Sea."] == ("Sea",)
    assert len(of_small) == 8 * 6 * 4 and of_small["a neon painting of a fish"] == ("fish", "neon")
    for line in ("{", '{"prompt": "a"}', '{"prompt": "a", "concepts": "b"}', "[1]"):
        (tmp_path / "labels.jsonl").write_text(line)
        with pytest.raises(ValueError, match="labels: expected lines"):
            read_labels(str(tmp_path / "labels.jsonl"))
