"""How well one latent's activations tell concepts apart, after arXiv 2508.15094."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saemnesia_fast.concepts.own import auc

from .. import plots
from .reading import Analysis, Reading, by_kind
from .watching import Sample, Watched

BINS, SHUFFLES = 20, 20


def distances(counts: Tensor) -> Tensor:
    """Jensen-Shannon distances [..., C, C] between C distributions, given as counts [..., C, bins].

    `sqrt(H((p + q) / 2) - (H(p) + H(q)) / 2)`, H in bits: 0 for equal distributions, 1 for ones that do not overlap.
    """
    p = counts.double() / counts.double().sum(-1, keepdim=True)
    middle = (p[..., :, None, :] + p[..., None, :, :]) / 2
    own = _entropy(p)
    return (_entropy(middle) - (own[..., :, None] + own[..., None, :]) / 2).clamp_min(0).sqrt()


def separability(
    values: Tensor, members: Tensor, latents: Sequence[int], bins: int = BINS, shuffles: int = SHUFFLES, seed: int = 0
) -> list[dict[str, Any]]:
    """Concept separability of one latent for each of C concepts.

    "Evaluating Sparse Autoencoders for Monosemantic Representation" (2508.15094) scores a neuron by the Jensen-Shannon
    distance between its activation distributions under different concepts. Of a latent i with distributions p_1 .. p_C
    we report, with JS as in `distances`:

    - separability: mean over c' of JS(p_c, p_c'), c being the concept that the latent stands for; 1 if its activation
      alone always tells c from any other concept.
    - all_pairs: mean of JS over all pairs of concepts. A latent that serves one concept alone has 2 / C at best.
    - nearest: the concept of the smallest JS(p_c, p_c').
    - chance: separability after the pictures' concepts are shuffled, mean over `shuffles`: what few pictures give
      where there is nothing to tell.
    - auc: chance that the mean over the steps is larger for a picture of c than for one of another concept.

    What the paper leaves to choose, and we assume: one value is the latent's mean over a picture's tokens at one step,
    zeros included; steps are pooled; a distribution is a histogram, one bin for exact zeros and bins - 1 of equal width
    up to the largest value of any concept; concepts weigh the same.

    Args:
        values: [P, T, C], column c of the latent that stands for concept c.
        members: [P, C] bool, which pictures ask for which concept.
        latents: C numbers, for the record.

    Returns:
        One entry for each concept; "distances" is the list of JS(p_c, p_c') for all c'.

    Raises:
        ValueError: fewer than two concepts, or one without a picture.
    """
    num_pictures, num_concepts = members.shape
    if num_concepts < 2 or not members.any(0).all():
        pictures = members.sum(0).tolist()
        raise ValueError(f"members: expected [P, C] with C >= 2 and a picture of every concept, got {pictures}")
    counts = _counts(values, bins)
    found = distances(torch.einsum("pc,plb->lcb", members.double(), counts))
    chance = torch.zeros(num_concepts, dtype=torch.float64)
    noise = torch.Generator().manual_seed(seed)
    for _ in range(shuffles):
        shuffled = members[torch.randperm(num_pictures, generator=noise)].double()
        chance += _from_others(distances(torch.einsum("pc,plb->lcb", shuffled, counts))) / shuffles
    own, upper = _from_others(found), torch.ones(num_concepts, num_concepts).triu(1).bool()
    means = values.mean(1)
    entries = []
    for c in range(num_concepts):
        row = found[c, c].clone()
        row[c] = torch.inf
        entries.append(
            {
                "latent": int(latents[c]),
                "separability": float(own[c]),
                "all_pairs": float(found[c][upper].mean()),
                "nearest": int(row.argmin()),
                "chance": float(chance[c]),
                "auc": auc(means[members[:, c], c], means[~members[:, c], c]),
                "distances": found[c, c].tolist(),
            }
        )
    return entries


def analyse_separability(readings: Sequence[Reading], watched: Watched, samples: Sequence[Sample]) -> Analysis:
    """`separability` of each reading's concepts; `watched.activations` [P, T, C] are means over the tokens.

    Kinds of a single concept are left out.

    Raises:
        ValueError: no kind has two concepts, or one of theirs has no picture.
    """
    numbers: dict[str, Any] = {}
    drawn = {}
    several = [one for one in readings if len(one.concepts) > 1]
    if not several:
        raise ValueError("readings: expected a kind of two or more concepts to tell apart, got none")
    for kind, some in by_kind(several).items():
        groups: dict[str, dict[str, plots.Value]] = {}
        for one in some:
            members = torch.tensor([[name in sample.concepts for name in one.concepts] for sample in samples])
            entries = separability(watched.activations[one.name], members, one.latents())
            for entry in entries:
                entry["nearest"] = one.concepts[entry["nearest"]]
            concepts = dict(zip(one.concepts, entries, strict=True))
            keys = ("separability", "all_pairs", "chance", "auc")
            mean = {key: sum(entry[key] for entry in entries) / len(entries) for key in keys}
            numbers.setdefault(one.method, {})[kind] = {"concepts": concepts, "mean": mean}
            for name, entry in concepts.items():
                bars = groups.setdefault(name, {})
                bars[one.method] = (100 * entry["separability"], None)
                bars[f"{one.method}, shuffled"] = (100 * entry["chance"], None)
        title = f"{kind}: Jensen-Shannon distance of the concept's latent from other concepts, percent"
        drawn[kind] = plots.bars(title, groups)
    return Analysis(numbers, drawn)


def _from_others(found: Tensor) -> Tensor:
    """[C]: mean over c' != c of found[c, c, c'] [C, C, C]; the distance from itself is 0."""
    own = torch.arange(len(found))
    return found[own, own].sum(-1) / (len(found) - 1)


def _counts(values: Tensor, bins: int) -> Tensor:
    """[P, L, bins] of values [P, T, L]."""
    if bins < 2:
        raise ValueError(f"bins: expected at least 2, got {bins}")
    top = values.amax((0, 1)).clamp_min(torch.finfo(values.dtype).tiny)
    number = (values / top * (bins - 1)).ceil().long().clamp(0, bins - 1)
    return torch.nn.functional.one_hot(number, bins).sum(1).double()


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1) / torch.log(torch.tensor(2.0, dtype=p.dtype))
