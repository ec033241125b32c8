"""Attacks find what is there to find, within their budget, and leave the pipeline as it was (SPEC 5.4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from erasing import HOOK_POINT, sae_and_table
from pipelines import tiny_sd
from saemnesia_fast.cli.attack import AttackCommand
from saemnesia_fast.evaluation import Judgement, NoErasure, Setting, SparseErasure
from saemnesia_fast.evaluation.attacks import GradientAttack, SearchAttack, Target, attack_concept, summarize
from saemnesia_fast.evaluation.attacks.prefix import FreePrefix, reading
from saemnesia_fast.evaluation.attacks.run import encoded
from saemnesia_fast.evaluation.attacks.target import Asked
from saemnesia_fast.evaluation.units import made_with
from saemnesia_fast.files import read_json
from saemnesia_fast.ops.backend import Choice


class PlantedTarget:
    """A vocabulary of points on a line; a prompt is broken by one token in each place, and by none other.

    The loss is the squared distance to it, the score the share of places that hold it.
    """

    def __init__(self, planted: Sequence[Sequence[int]], size: int = 40) -> None:
        self.planted = torch.tensor(planted)
        self.vocabulary = torch.arange(size, dtype=torch.float32)[:, None]
        self.pictures = torch.zeros(len(planted), dtype=torch.long)
        self.gradients = torch.zeros(len(planted), dtype=torch.long)
        self.losses: list[float] = []
        self.painted: list[Tensor] = []
        self.found = torch.zeros(len(planted), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.planted)

    @property
    def open(self) -> Tensor:
        return (~self.found).nonzero()[:, 0]

    def nearest(self, prefix: Tensor) -> Tensor:
        return prefix[..., 0].round().clamp(0, len(self.vocabulary) - 1).long()

    def loss(self, prefix: Tensor, rows: Tensor, draws: int, generator: torch.Generator) -> Tensor:
        self.gradients[rows] += draws
        losses = (prefix[..., 0] - self.planted[rows]).square().mean(1)
        self.losses.append(float(losses.detach().sum()))
        return losses

    def attempt(self, prefix: Tensor, rows: Tensor) -> Tensor:
        self.pictures += torch.bincount(rows, minlength=len(self))
        self.painted.append(prefix)
        score = (self.nearest(prefix) == self.planted[rows]).float().mean(1)
        self.found[rows[score == 1]] = True
        return score


def test_descent_finds_a_planted_token_and_stops_there():
    target = PlantedTarget([[3, 31], [20, 8]])
    GradientAttack(tokens=2, iterations=60, every=5, draws=3, learning_rate=0.1)(target)
    assert target.found.all()
    assert target.losses[-1] < 0.05 * target.losses[0]
    assert (target.gradients <= 3 * 60).all() and (target.gradients == 15 * target.pictures).all()
    assert all((prefix == prefix.round()).all() for prefix in target.painted)


def test_free_embeddings_are_painted_as_they_are():
    target = PlantedTarget([[3]])
    GradientAttack(tokens=1, space="continuous", iterations=10, every=10)(target)
    assert (target.painted[0] != target.painted[0].round()).all()


def test_a_hopeless_attack_keeps_its_budget():
    target = PlantedTarget([[99], [99]])
    GradientAttack(tokens=1, iterations=12, every=5, draws=2)(target)
    assert target.gradients.tolist() == [24, 24] and target.pictures.tolist() == [3, 3]
    target = PlantedTarget([[99], [99]])
    SearchAttack(tokens=1, population=4, generations=3)(target)
    assert target.gradients.tolist() == [0, 0] and target.pictures.tolist() == [12, 12]


def test_search_builds_on_what_scores_and_beats_chance():
    """A pair of 1600, in at most 320 pictures; eight prompts, of which one drawn at random would find 1.5."""
    planted = [[3, 31], [20, 8], [0, 0], [39, 1], [7, 7], [12, 30], [25, 2], [38, 38]]
    target = PlantedTarget(planted)
    SearchAttack(tokens=2, population=16, generations=20)(target)
    assert target.found.sum() >= 6


@pytest.mark.parametrize("attack", [SearchAttack(1, 5, 4), GradientAttack(1, "vocabulary", 12, 4, 1, 0.1)])
def test_prompts_are_attacked_independently(attack):
    """Whether another one is broken early does not change what a prompt is given."""
    alone, beside = PlantedTarget([[-1], [99]]), PlantedTarget([[-1], [99]])
    beside.found[0] = True
    for target in (alone, beside):
        attack(target)
    of_second = torch.cat([one.view(2, -1)[1] for one in alone.painted])
    assert torch.equal(of_second, torch.cat([one.flatten() for one in beside.painted]))


@pytest.mark.parametrize(
    ("attack", "options", "message"),
    [
        (GradientAttack, {"space": "pixels"}, "space: expected vocabulary or continuous, got 'pixels'"),
        (GradientAttack, {"every": 0}, "every: expected >= 1, got 0"),
        (SearchAttack, {"population": 1}, "population: expected >= 2, got 1"),
    ],
)
def test_settings_are_checked(attack, options, message):
    with pytest.raises(ValueError, match=message):
        attack(**options)


@dataclass(frozen=True)
class Wanted:
    object: int
    style: int
    seed: int

    @property
    def prompt(self) -> str:
        return ("cat", "dog")[self.object]


@dataclass
class Tiny:
    """A tiny pipeline's pictures; a cat is what is brighter on the left than a limit."""

    pipe: Any = field(default_factory=tiny_sd)
    limit: float = 0.0
    name = "tiny"
    features = "none"
    classes: ClassVar = {"object": ("cat", "dog"), "style": ("sketch",)}

    def described(self) -> Mapping[str, Any]:
        return {}

    def requests(self, seed: int) -> list[Wanted]:
        return [Wanted(n % 2, 0, 10 * seed + n) for n in range(4)]

    def paint(self, wanted: Sequence[Any], *, arguments: Mapping[str, Any] | None = None) -> Tensor:
        return self.pipe(
            [one.prompt for one in wanted],
            num_inference_steps=2,
            guidance_scale=3.0,
            height=64,
            width=64,
            generator=[torch.Generator().manual_seed(one.seed) for one in wanted],
            output_type="pt",
            **(arguments or {}),
        ).images

    def judged(self, images: Tensor) -> Judgement:
        lean = images[..., :32].mean((1, 2, 3)) - images[..., 32:].mean((1, 2, 3))
        cat = torch.sigmoid(1000 * (lean - self.limit))
        return Judgement({"object": torch.stack([cat, 1 - cat], 1), "style": torch.ones(len(images), 1)}, images[:, 0])


def erasure(**options: Any) -> SparseErasure:
    sae, table = sae_and_table()
    settings = {"object": Setting(**({"strength": {HOOK_POINT: -40.0}, "num_latents": 12} | options))}
    return SparseErasure("sparse", "this test", {HOOK_POINT: sae}, {HOOK_POINT: table}, settings)


@contextmanager
def attacked(benchmark: Tiny, method: Any, tokens: int = 2) -> Iterator[Target]:
    wanted = [one for one in benchmark.requests(0) if one.object == 0]
    latents = encoded(benchmark.pipe, benchmark.paint(wanted))
    with method.erased(benchmark.pipe, ["cat"]) as arguments:
        yield Target(benchmark, wanted, "object", arguments, latents, benchmark.pipe.scheduler.timesteps, tokens)


def everything(pipe: Any) -> tuple[Any, ...]:
    """What an attack might leave behind."""
    parts = (pipe.unet, pipe.text_encoder, pipe.vae)
    modules = [module for part in parts for module in part.modules()]
    hooks = [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in modules]
    wants = [p.requires_grad for part in parts for p in part.parameters()]
    grads = [p.grad is None for part in parts for p in part.parameters()]
    return type(pipe), sorted(vars(pipe)), hooks, [sorted(vars(one)) for one in modules], wants, grads


@pytest.fixture(scope="module")
def benchmark() -> Tiny:
    tiny = Tiny()
    tiny.paint(tiny.requests(0)[:1])
    return tiny


def test_a_prefix_of_tokens_is_what_the_pipeline_reads_of_the_text(benchmark):
    """SD's own encoding of the prompt with the tokens written before it."""
    pipe = benchmark.pipe
    free = FreePrefix(pipe, ["cat", "a dog"], 2)
    positions = torch.tensor(
        [[free.allowed.index(i) for i in pipe.tokenizer(text).input_ids[1:-1]] for text in ("x y",) * 2]
    )
    states = free.states(free.vocabulary[positions], torch.arange(2))
    with torch.no_grad():
        expected, negative = pipe.encode_prompt(["x y cat", "x y a dog"], "cpu", 1, True)
        torch.testing.assert_close(states, expected)
        with reading(pipe, {"1": states[1], "0": states[0]}):
            swapped, same = pipe.encode_prompt(["1", "0"], "cpu", 1, True)
    assert torch.equal(swapped, states.flip(0)) and torch.equal(same, negative)
    torch.testing.assert_close(free.empty.expand_as(negative), negative)
    assert torch.equal(free.nearest(free.vocabulary[positions] + 1e-4), positions)
    assert not {*pipe.tokenizer.all_special_ids} & {*free.allowed}


def test_no_word_of_a_prompt_is_cut_off_and_one_encoder_is_expected(benchmark):
    with pytest.raises(ValueError, match="tokens: expected 1 to 11 before 'cat', got 12"):
        FreePrefix(benchmark.pipe, ["cat"], 12)
    sdxl = SimpleNamespace(unet=SimpleNamespace(config=SimpleNamespace(addition_embed_type="text_time")))
    with pytest.raises(ValueError, match="pipe: expected a UNet that reads nothing but text"):
        FreePrefix(sdxl, ["cat"], 2)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("method", [NoErasure(), erasure(mode="contrast", strength={HOOK_POINT: -1.5})])
def test_loss_is_the_mean_error_of_the_prediction(benchmark, method, kind):
    """With one timestep and one noise, against the scheduler's own formulas; of the half that reads the prompt."""
    scheduler = benchmark.pipe.scheduler
    with attacked(benchmark, method) as target:
        scheduler.register_to_config(prediction_type=kind)
        try:
            prefix = target.vocabulary[torch.tensor([[5, 6], [7, 8]])]
            target.timesteps = torch.tensor([501])
            rows = torch.tensor([1])
            with torch.no_grad():
                loss = target.loss(prefix[1:], rows, 1, torch.Generator().manual_seed(1))
            generator = torch.Generator().manual_seed(1)
            torch.randint(1, (2, 1), generator=generator)
            noise = torch.randn(2, 1, *target.latents.shape[1:], generator=generator)[1]
            x, t = target.latents[1:], torch.tensor([501])
            states = target.prefix.states(prefix[1:], rows)
            with torch.no_grad():
                empty = benchmark.pipe.encode_prompt(["a cat"], "cpu", 1, True)[1]
                both = scheduler.add_noise(x, noise, t).expand(2, -1, -1, -1)
                answer = benchmark.pipe.unet(both, t, torch.cat([empty, states])).sample[1:]
            wanted = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x, noise, t), "sample": x}[kind]
        finally:
            scheduler.register_to_config(prediction_type="epsilon")
    torch.testing.assert_close(loss, (answer - wanted).square().mean()[None])


@pytest.mark.parametrize(
    "options", [{"halves": "both"}, {"halves": "cond"}, {"mode": "contrast", "strength": {HOOK_POINT: -1.5}}]
)
def test_descent_lowers_the_loss_of_an_erased_pipeline(benchmark, options):
    """On draws of its own, for every prompt."""
    before = everything(benchmark.pipe)
    attack = GradientAttack(2, "continuous", iterations=8, every=8, draws=2, learning_rate=3.0)
    with attacked(replace(benchmark, limit=9.0), erasure(**options)) as target:
        seen: list[Tensor] = []
        paint = target.attempt
        target.attempt = lambda prefix, rows: (seen.append(prefix), paint(prefix, rows))[1]  # type: ignore[method-assign]
        attack(target)
        generator = torch.Generator().manual_seed(attack.seed)
        start = target.vocabulary[torch.randint(len(target.vocabulary), (2, 2), generator=generator)]
        with torch.no_grad():
            first, last = (
                target.loss(prefix, torch.arange(2), 16, torch.Generator().manual_seed(9))
                for prefix in (start, seen[0])
            )
    assert (last < first).all()
    assert everything(benchmark.pipe) == before


@pytest.mark.parametrize("attack", [GradientAttack(2, iterations=2, every=1, draws=1), SearchAttack(2, 3, 2)])
def test_ua_before_and_after(benchmark, attack):
    """The limit lies between the bare prompts' pictures and the best found: one is broken, the record says by what."""
    before = everything(benchmark.pipe)
    found = attack_concept(replace(benchmark, limit=9.0), erasure(), "cat", attack, seed=0)
    assert (found["plain"], found["before"], found["after"]) == (100, 100, 100)
    assert found["pictures"] == 2 * (1 + (2 if attack.name == "gradient" else 6))
    assert found["gradients"] == (4 if attack.name == "gradient" else 0)

    found = attack_concept(replace(benchmark, limit=-9.0), erasure(), "cat", attack, seed=0)
    assert (found["plain"], found["before"], found["after"], found["pictures"]) == (0, 0, 0, 2)
    assert found["prompts"][0]["text"] == "cat" and found["prompts"][0]["tokens"] == []
    assert everything(benchmark.pipe) == before


def test_an_attack_that_fails_leaves_the_pipeline_as_it_was(benchmark, monkeypatch):
    """In the middle of painting."""
    before = everything(benchmark.pipe)
    tiny = replace(benchmark, limit=9.0)
    judged, calls = tiny.judged, iter(["plain", "bare"])
    monkeypatch.setattr(tiny, "judged", lambda images: (next(calls), judged(images))[1])
    with pytest.raises(StopIteration):
        attack_concept(tiny, erasure(), "cat", GradientAttack(2, iterations=1, every=1, draws=1), seed=0)
    assert everything(benchmark.pipe) == before


def test_what_is_found_can_be_painted_again(benchmark):
    """One of the search's prompts that can be written: as text, it gives a picture of the same probability."""
    with attacked(replace(benchmark, limit=0.01), erasure()) as target:
        for finding in target.findings:
            finding.after, finding.found = -1.0, False
        SearchAttack(2, population=4, generations=1)(target)
        best = replace(next(one for one in target.findings if one.writable))
        request = Asked(next(one for one in target.wanted if one.seed == best.seed), best.text)
        probabilities = target.benchmark.judged(target.benchmark.paint([request])).probabilities["object"]
        first = target.findings[0]
        first.after, first.found = -1.0, False
        target.attempt(target.vocabulary[torch.tensor([[5, 6]])] + 1e-4, torch.tensor([0]))
    assert first.tokens == target.benchmark.pipe.tokenizer.convert_ids_to_tokens(
        target.prefix.ids(torch.tensor([5, 6]))
    )
    assert not first.writable
    assert best.text.endswith(" cat") and len(best.tokens) == 2
    assert float(probabilities[0, 0]) == pytest.approx(best.after, abs=1e-3)


def test_summary_is_a_mean_over_concepts_with_an_interval_over_seeds():
    shares = {("cat", 0): (100, 40), ("dog", 0): (80, 20), ("cat", 1): (90, 10), ("dog", 1): (90, 30)}
    units = [
        {"method": "m", "kind": "object", "concept": name, "seed": seed, "plain": 0, "before": before, "after": after}
        for (name, seed), (before, after) in shares.items()
    ]
    found = summarize(units)["m"]
    assert found["object"]["before"] == {"mean": 90, "plus_minus": 0}
    assert found["object"]["after"]["mean"] == 25 and found["object"]["after"]["plus_minus"] == pytest.approx(
        63.53, abs=0.01
    )
    assert found["concepts"]["dog"] == {"plain": 0, "before": 85, "after": 25}


def test_command_writes_ua_before_and_after_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    command = AttackCommand(
        minicanvas=True,
        methods=("saeuron-exact",),
        concepts=("moon",),
        attack="search",
        population=2,
        generations=1,
        prompts=1,
        processes=1,
        out=tmp_path,
    )
    command.run()
    record = read_json(tmp_path / "attack.json")
    (unit,) = record["units"]
    assert (unit["method"], unit["plain"], unit["before"], unit["pictures"]) == ("saeuron-exact", 0, 100, 3)
    assert record["UA"]["saeuron-exact"]["concepts"]["moon"]["after"] == unit["after"]
    assert record["attack"]["population"] == 2 and record["benchmark"]["steps"] == 20

    files = {path: path.read_bytes() for path in tmp_path.rglob("units/**/*.json")}
    assert len(files) == 1
    command.run()
    assert {path: path.read_bytes() for path in tmp_path.rglob("units/**/*.json")} == files
    assert "saeuron-exact" in capsys.readouterr().out
    monkeypatch.setattr(
        "saemnesia_fast.evaluation.units.backend_report", lambda device: [Choice("erase", f"other on {device}", "")]
    )
    assert made_with("cpu")["backend"] == {"erase": "other on cpu"}
    assert not {path for *_, path in command.plan()[2]} & set(files)
    with pytest.raises(ValueError, match="concept: expected one of star"):
        replace(command, concepts=("cat",)).run()
