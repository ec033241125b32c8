"""UA, IRA and CRA (SPEC 5.3), their averages, and the share of debris."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields

from torch import Tensor

DEBRIS_BELOW = 0.6
NAMES = ("UA", "IRA", "CRA", "retain", "average", "debris")


@dataclass(frozen=True)
class ErasureScores:
    """Shares in percent, of one erasure or a mean over several."""

    UA: float
    """Unlearning accuracy: images that ask for an erased concept and in which another of its kind is recognised."""
    IRA: float
    """In-domain retain accuracy: recognised concepts of the same kind among images that ask for no erased one.

    Where concepts are erased in sequence, the RA of the never-erased.
    """
    CRA: float
    """Cross-domain retain accuracy: recognised concepts of the other kind, on all images."""
    debris: float
    """Images that ask for an erased concept and whose best object probability is below 0.6: a broken shape."""

    @property
    def retain(self) -> float:
        """Mean of IRA and CRA."""
        return (self.IRA + self.CRA) / 2

    @property
    def average(self) -> float:
        """Mean of UA, IRA and CRA."""
        return (self.UA + self.IRA + self.CRA) / 3

    def as_dict(self) -> dict[str, float]:
        """The scores and their averages by name, rounded to two digits."""
        return {name: round(getattr(self, name), 2) for name in NAMES}


def erasure_scores(
    erased: Collection[int],
    *,
    wanted: Tensor,
    recognised: Tensor,
    cross_wanted: Tensor,
    cross_recognised: Tensor,
    object_confidence: Tensor,
    cross_erased: Collection[int] = (),
) -> ErasureScores:
    """Scores of erasing the concepts `erased` (class indices) of one kind.

    wanted, recognised [n] int64 are the classes of that kind that the prompts ask for (-1: none) and that a classifier
    sees; cross_wanted, cross_recognised [n] those of the other kind; object_confidence [n] is the classifier's best
    object probability. Concepts of the other kind that are erased at the same time, `cross_erased`, do not count for
    CRA.

    Raises ValueError where no image asks for an erased concept, or none for a retained one.
    """
    hit = among(wanted, erased)
    cross = (cross_wanted >= 0) & ~among(cross_wanted, cross_erased)
    retained = (wanted >= 0) & ~hit & ~among(cross_wanted, cross_erased)
    if not hit.any() or not retained.any() or not cross.any():
        raise ValueError("wanted: expected images of erased concepts and of retained ones, got only one of the two")
    return ErasureScores(
        UA=_percent(recognised[hit] != wanted[hit]),
        IRA=_percent(recognised[retained] == wanted[retained]),
        CRA=_percent(cross_recognised[cross] == cross_wanted[cross]),
        debris=_percent(object_confidence[hit] < DEBRIS_BELOW),
    )


def mean_scores(scores: Sequence[ErasureScores]) -> ErasureScores:
    """Mean of each score."""
    if not scores:
        raise ValueError("scores: expected at least one, got none")
    means = {f.name: sum(getattr(one, f.name) for one in scores) / len(scores) for f in fields(ErasureScores)}
    return ErasureScores(**means)


def among(classes: Tensor, some: Collection[int]) -> Tensor:
    """[n] bool: whether a class is one of `some`."""
    found = classes.new_zeros(classes.shape).bool()
    for one in some:
        found |= classes == one
    return found


def _percent(hits: Tensor) -> float:
    return 100 * float(hits.double().mean())
