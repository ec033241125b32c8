"""UA, IRA, CRA and debris (SPEC 5.3) on hand-made predictions."""

import pytest
import torch

from saemnesia_fast.evaluation import ErasureScores, erasure_scores, mean_scores


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


def test_images_of_both_sorts_are_needed():
    with pytest.raises(ValueError, match="images of erased concepts and of retained ones"):
        _scores([0, 1, 2])
    with pytest.raises(ValueError, match="images of erased concepts"):
        _scores([7])


def test_mean_and_rounding():
    mean = mean_scores([ErasureScores(100, 50, 25, 0), ErasureScores(50, 100, 25, 1 / 3)])
    assert mean.as_dict() == {"UA": 75.0, "IRA": 75.0, "CRA": 25.0, "debris": 0.17}
    with pytest.raises(ValueError, match="at least one"):
        mean_scores([])
