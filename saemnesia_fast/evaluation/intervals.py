"""Student's t-interval: how far a mean over seeds may be from the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

CONFIDENCE = 0.95


def half_width(values: Sequence[float], confidence: float = CONFIDENCE) -> float | None:
    """Half the width of the two-sided t-interval of the mean of `values`, one for each seed; None for a single one.

    t * s / sqrt(n), s the sample's standard deviation and t the quantile at (1 + confidence) / 2 with n - 1 degrees of
    freedom. Seeds are the sample: the interval says nothing about other concepts, other training runs or other judges.
    """
    count = len(values)
    if count < 2:
        return None
    return t_quantile((1 + confidence) / 2, count - 1) * stdev(values) / math.sqrt(count)


def mean_and_half_width(values: Sequence[float]) -> dict[str, float | None]:
    """{"mean", "plus_minus"}, rounded to two digits."""
    width = half_width(values)
    return {"mean": round(fmean(values), 2), "plus_minus": None if width is None else round(width, 2)}


def t_quantile(probability: float, freedom: int) -> float:
    """t with P(T <= t) = probability, 0.5 <= probability < 1, for a whole number of degrees of freedom."""
    if not (0.5 <= probability < 1 and freedom >= 1):
        raise ValueError(f"probability, freedom: expected 0.5 <= p < 1 and >= 1, got {probability} and {freedom}")
    low, high = 0.0, 1.0
    while _t_probability(high, freedom) < probability:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _t_probability(middle, freedom) < probability else (low, middle)
    return high


def _t_probability(t: float, freedom: int) -> float:
    """P(T <= t): the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for n in range(2 + odd, freedom - 1, 2):
        term *= cosine * cosine * (n - 1) / n
        total += term
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return 0.5 + inside / 2
