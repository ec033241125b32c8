"""A concept of one's own from a few prompts: its row of a table, and how well an SAE tells it from the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .collect import collect_concepts
from .table import ConceptTable

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from saemnesia_fast.sae import TopKSAE

OTHERS = "others"


class Latent(NamedTuple):
    """One of a concept's best latents."""

    latent: int
    score: float
    """Averaged over the steps (SPEC 2.2)."""
    auc: float
    """Chance that it is more active, averaged over tokens and steps, for a prompt of the concept than for another."""


@dataclass(frozen=True)
class Separability:
    """How well an SAE tells a concept from others. An AUC near 1 and few shared latents: one latent will do."""

    concept: str
    prompts: int
    against: str
    """What the AUC compares with: other prompts, or the means of the other concepts."""
    best: list[Latent]
    """By score, best first."""
    shared: dict[str, int]
    """{other concept: how many of its equally many best latents are among these}, the most first."""
    cosine: dict[str, float]
    """{other concept: cosine of the mean activations}, the nearest first."""

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"best": [one._asdict() for one in self.best]}

    def __str__(self) -> str:
        lines = [f"{self.concept}: {self.prompts} prompts, against {self.against}"]
        lines += [f"  latent {one.latent:<7} score {one.score:<9.4f} AUC {one.auc:.3f}" for one in self.best[:5]]
        near = [f"{name} {value:.2f} ({self.shared[name]})" for name, value in list(self.cosine.items())[:5]]
        lines.append(f"  nearest by cosine (of {len(self.best)} best latents shared): {', '.join(near)}")
        return "\n".join(lines)


def add_concept(
    pipe: DiffusionPipeline,
    sae: TopKSAE,
    name: str,
    prompts: Sequence[str],
    *,
    hook_point: str | None = None,
    table: ConceptTable | None = None,
    others: Sequence[str] = (),
    kind: str = "object",
    assign: bool = False,
    top: int = 10,
    **sampling: Any,
) -> tuple[ConceptTable, Separability]:
    """A table with one more row, of the latents' means over the prompts, and a report of how separable it is.

    Args:
        pipe: the pipeline, with the scheduler that `table` was made with.
        sae: the SAE of the table.
        name: of the concept.
        prompts: different ones that ask for it; about twenty.
        hook_point: that of the table if not given.
        table: to add to; None makes one, of this concept and one called "others".
        others: prompts that do not ask for it; needed without a table. With one they are what the AUC compares with,
            in place of the means of the table's concepts.
        kind: of the concept.
        assign: assign it the best latent that no other concept has; otherwise the best one of each step is erased.
        top: number of best latents to report.
        sampling: arguments of `collect_concepts`; steps, guidance, seed and stream are the table's where it has them.

    Raises:
        ValueError: the name is taken, a prompt comes twice or in both lists, there is nothing to compare with, or the
            table was made with another SAE, hook point or other timesteps.
    """
    _check_prompts(name, prompts, others, table)
    point = hook_point or (table.hook_point if table else None)
    if point is None:
        raise ValueError("hook_point: expected a name without a table, got None")
    if table is not None:
        table.check_sae(sae)
        if point.removeprefix("unet.") != table.hook_point.removeprefix("unet."):
            raise ValueError(f"hook_point: expected {table.hook_point}, the table's, got {point}")
        known = {key: table.sampler[key] for key in _SAMPLING if key in table.sampler}
        sampling = known | {key: value for key, value in sampling.items() if key not in known}

    measured = collect_concepts(pipe, sae, {text: [text] for text in (*prompts, *others)}, point, **sampling)
    own, rest = measured.mu[: len(prompts)], measured.mu[len(prompts) :]
    if table is None:
        table = replace(measured, mu=_mean(rest)[None], concepts=[OTHERS], kinds=[OTHERS])
    elif not torch.equal(measured.timesteps, table.timesteps):
        raise ValueError(
            f"table: expected timesteps as the pipeline has them, {_ends(measured.timesteps)}, got "
            f"{_ends(table.timesteps)}"
        )
    whole = replace(
        table,
        mu=torch.cat([table.mu, _mean(own)[None]]),
        concepts=[*table.concepts, name],
        kinds=[*table.kinds, kind],
        assignment=dict(table.assignment),
    )
    if assign:
        free = whole.scores(name).mean(0)
        free[list(whole.assignment.values())] = -torch.inf
        whole.assignment[name] = int(free.argmax())
    against = rest if len(rest) else table.mu
    what = f"{len(rest)} other prompts" if len(rest) else f"the means of {len(table.concepts)} concepts"
    return whole, _separability(whole, name, own.mean(1), against.mean(1), what, top)


_SAMPLING = {"num_inference_steps", "guidance_scale", "seed", "stream"}


def _check_prompts(name: str, prompts: Sequence[str], others: Sequence[str], table: ConceptTable | None) -> None:
    if name == OTHERS or (table is not None and name in table.concepts):
        raise ValueError(f"name: expected one that the table does not have yet, got {name!r}")
    if table is None and not others:
        raise ValueError("others: expected prompts of other things, or a table of other concepts, got neither")
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    both = [*prompts, *others]
    if repeated := sorted({text for text in both if both.count(text) > 1}):
        raise ValueError(f"prompts, others: expected different ones, got {repeated} more than once")


def _mean(mu: Tensor) -> Tensor:
    return mu.mean(0, dtype=torch.float64).float()


def _ends(timesteps: Tensor) -> str:
    return f"{int(timesteps[0])} to {int(timesteps[-1])} in {len(timesteps)} steps"


def _separability(table: ConceptTable, name: str, own: Tensor, against: Tensor, what: str, top: int) -> Separability:
    """own, against: [prompts, N], averaged over the steps."""
    scores = {concept: table.scores(concept).mean(0) for concept in table.concepts}
    ranked = {concept: score.topk(min(top, len(score))).indices.tolist() for concept, score in scores.items()}
    best = [
        Latent(latent, float(scores[name][latent]), auc(own[:, latent], against[:, latent])) for latent in ranked[name]
    ]
    means = dict(zip(table.concepts, table.mu.mean(1), strict=True))
    others = [concept for concept in table.concepts if concept != name]
    shared = {concept: len({*ranked[concept]} & {*ranked[name]}) for concept in others}
    cosine = {concept: float(torch.cosine_similarity(means[concept], means[name], dim=0)) for concept in others}
    return Separability(name, len(own), what, best, _descending(shared), _descending(cosine))


def auc(positive: Tensor, negative: Tensor) -> float:
    """Chance that a value of `positive` [P] exceeds one of `negative` [Q]; equal ones count half."""
    difference = positive[:, None] - negative
    return float((difference > 0).double().mean() + (difference == 0).double().mean() / 2)


def _descending(values: Mapping[str, Any]) -> dict[str, Any]:
    return dict(sorted(values.items(), key=lambda item: -item[1]))
