"""The numbers of an evaluation: UA, IRA, CRA and debris (SPEC 5.3), FID, intervals over seeds, and the cases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saemnesia_fast.evaluation import ErasureScores, cases, erasure_scores, frechet_distance, mean_scores
from saemnesia_fast.evaluation.frechet import Gaussian
from saemnesia_fast.evaluation.intervals import half_width, mean_and_half_width, t_quantile
from tiny_benchmark import CLASSES


def _scores(erased, **changes):
    given = {
        "wanted": torch.tensor([0, 0, 1, 1, 2, 2, 2, 2]),
        "recognised": torch.tensor([1, 0, 1, 1, 2, 2, 2, 0]),
        "cross_wanted": torch.tensor([0, 1, 0, 1, 0, 1, 0, 1]),
        "cross_recognised": torch.tensor([0, 1, 0, 1, 0, 1, 1, 1]),
        "object_confidence": torch.tensor([0.5, 0.9, 0.3, 0.9, 0.9, 0.9, 0.9, 0.9]),
    }
    return erasure_scores(erased, **(given | changes))


def test_spec_5_3_one_concept():
    scores = _scores([0])
    assert scores == ErasureScores(UA=50.0, IRA=pytest.approx(100 * 5 / 6), CRA=87.5, debris=50.0)
    assert scores.retain == pytest.approx((100 * 5 / 6 + 87.5) / 2)
    assert scores.average == pytest.approx((50 + 100 * 5 / 6 + 87.5) / 3)


def test_spec_5_3_two_concepts_count_together():
    scores = _scores([0, 2])
    assert pytest.approx(100 * 2 / 6) == scores.UA
    assert scores.IRA == 100.0
    assert scores.debris == pytest.approx(100 / 6)


def test_concepts_of_the_other_kind_that_are_erased_too_count_for_neither_ira_nor_cra():
    scores = _scores([0], cross_erased=[0])
    assert scores.CRA == 100.0
    assert pytest.approx(100 * 2 / 3) == scores.IRA
    assert scores.UA == 50.0


def test_a_picture_that_asks_for_no_class_of_a_kind_counts_for_the_other_kind_alone():
    scores = _scores([0], wanted=torch.tensor([0, 0, 1, 1, 2, 2, 2, -1]))
    assert (scores.IRA, scores.CRA) == (100.0, 87.5)
    scores = _scores([0], cross_wanted=torch.tensor([0, 1, 0, 1, 0, 1, -1, 1]))
    assert scores.CRA == 100.0
    assert pytest.approx(100 * 5 / 6) == scores.IRA


def test_images_of_both_sorts_are_needed():
    with pytest.raises(ValueError, match="images of erased concepts and of retained ones"):
        _scores([0, 1, 2])
    with pytest.raises(ValueError, match="images of erased concepts"):
        _scores([7])


def test_mean_and_rounding():
    mean = mean_scores([ErasureScores(100, 50, 25, 0), ErasureScores(50, 100, 25, 1 / 3)])
    rounded = {"UA": 75.0, "IRA": 75.0, "CRA": 25.0, "retain": 50.0, "average": 58.33, "debris": 0.17}
    assert mean.as_dict() == rounded
    with pytest.raises(ValueError, match="at least one"):
        mean_scores([])


def _naive_frechet(features, reference):
    """By the definition, with the eigenvalues of the product itself, which is not symmetric."""
    first, second = features.double(), reference.double()
    product = torch.cov(first.T) @ torch.cov(second.T)
    trace = torch.cov(first.T).trace() + torch.cov(second.T).trace()
    apart = (first.mean(0) - second.mean(0)).pow(2).sum()
    return float(apart + trace - 2 * torch.linalg.eigvals(product).real.clamp_min(0).sqrt().sum())


@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(8, 30))
def test_fid_is_the_naive_formula(seed, width, count):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, width, generator=generator) @ torch.randn(width, width, generator=generator)
    reference = torch.randn(count + 3, width, generator=generator) + 0.5
    expected = _naive_frechet(features, reference)
    assert frechet_distance(features, reference) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert frechet_distance(reference, features) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_fid_of_independent_axes_is_the_sum_over_them():
    """sum (m1 - m2)^2 + (s1 - s2)^2, for samples whose covariance is exactly diagonal."""
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) * math.sqrt(3 / 4)
    first, second = signs * torch.tensor([2.0, 3]) + torch.tensor([1.0, 0]), signs * torch.tensor([0.5, 7])
    assert frechet_distance(first, second) == pytest.approx(1 + 1.5**2 + 4**2)


def test_fid_with_fewer_pictures_than_features():
    features, shift = torch.randn(6, 40), torch.full((40,), 0.25)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features + shift, features) == pytest.approx(40 / 16, rel=1e-6)


@pytest.mark.parametrize("sizes", [(400,), (1, 0, 7, 250, 142), (1,) * 400])
def test_a_gaussian_of_parts_is_that_of_the_whole(sizes):
    """Means and scales of the axes far apart, the mean far from zero; parts of different means."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-1, 2, 12)
    sample = (torch.randn(400, 12, generator=generator) + torch.linspace(0, 3, 400)[:, None]) * scales + 1e3
    reference = (torch.randn(300, 12, generator=generator) * scales + 1e3).half()
    found = Gaussian(12)
    for part in sample.split(list(sizes)):
        found.add(part)
    whole = sample.double()
    assert found.shape == (400, 12)
    torch.testing.assert_close(found.mean, whole.mean(0), rtol=1e-12, atol=0)
    largest = torch.cov(whole.T).diag().sqrt()
    apart = (found.covariance - torch.cov(whole.T)).abs() / largest.outer(largest)
    assert apart.max() < 1e-11
    expected = frechet_distance(sample, reference)
    assert frechet_distance(found, reference) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(reference, found) == pytest.approx(expected, rel=1e-9)
    assert expected == pytest.approx(_naive_frechet(sample, reference), rel=1e-9)


@pytest.mark.parametrize(
    ("features", "reference", "message"),
    [
        (Gaussian(3), torch.zeros(4, 3), r"features: expected \[n, D=3\] with n >= 2 pictures, got \[0, 3\]"),
        (torch.ones(4, 3), Gaussian(3).add(torch.full((4, 3), math.inf)), "reference: expected finite values"),
        (torch.zeros(1, 3), torch.zeros(4, 3), r"features: expected \[n, D=3\] with n >= 2 pictures, got \[1, 3\]"),
        (torch.zeros(4, 3), torch.zeros(4, 2), r"reference: expected \[n, D=3\] with n >= 2 pictures, got \[4, 2\]"),
        (torch.full((4, 3), math.nan), torch.zeros(4, 3), "features: expected finite values"),
    ],
)
def test_fid_refuses_what_has_no_gaussian(features, reference, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(features, reference)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.706205), (2, 4.302653), (4, 2.776445), (5, 2.570582), (30, 2.042272)]
)
def test_t_quantiles_are_those_of_the_tables(freedom, quantile):
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, abs=1e-6)
    assert t_quantile(0.5, freedom) == pytest.approx(0, abs=1e-9)


def test_interval_over_seeds():
    values = [96.0, 98.0, 97.0, 99.0, 95.0]
    assert half_width(values) == pytest.approx(2.776445 * math.sqrt(2.5 / 5), abs=1e-5)
    assert mean_and_half_width(values) == {"mean": 97.0, "plus_minus": 1.96}
    assert mean_and_half_width([97.0]) == {"mean": 97.0, "plus_minus": None}
    assert half_width([1.0, 1.0]) == 0
    with pytest.raises(ValueError, match="probability, freedom"):
        t_quantile(0.4, 3)


def test_the_interval_holds_the_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2000, 5, generator=generator).tolist()
    held = sum(abs(sum(draw) / 5) <= half_width(draw) for draw in draws)
    assert 0.93 <= held / 2000 <= 0.97


def _erased(protocol, **options):
    return [(case.group, case.erased) for case in cases(protocol, CLASSES, **options)]


def test_every_protocol_has_its_cases():
    assert _erased("single", kinds=["style"]) == [("style", ("ink",)), ("style", ("pop art",))]
    assert _erased("sequence") == [("object", ("cat",)), ("object", ("cat", "dog")), ("style", ("ink",))]
    assert _erased("sequence", kinds=["object"], order=["cow", "cat", "dog"]) == [
        ("object", ("cow",)),
        ("object", ("cow", "cat")),
    ]
    pairs = _erased("pairs")
    assert len(pairs) == 3 + 6
    assert pairs[0] == ("object", ("cat", "dog"))
    assert [group for group, _ in pairs].count("object+style") == 6


@pytest.mark.parametrize(
    ("protocol", "options", "message"),
    [
        ("triples", {}, "protocol: expected one of single, sequence, pairs, got 'triples'"),
        ("single", {"kinds": ["size"]}, "kinds: expected some of object, style"),
        ("sequence", {"order": ["cat", "bird"]}, r"order: expected concepts, got \['bird'\]"),
    ],
)
def test_a_protocol_that_cannot_be(protocol, options, message):
    with pytest.raises(ValueError, match=message):
        cases(protocol, CLASSES, **options)
