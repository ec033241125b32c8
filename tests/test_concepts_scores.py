"""Scores, selection, thresholds and assignment of a concept table, mostly by hand (SPEC 2, 3, 4.2)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saemnesia_fast.concepts import ConceptTable, Selection

INF = math.inf


def make_table(mu: Any, kinds: list[str] | None = None, **fields: Any) -> ConceptTable:
    mu = torch.as_tensor(mu, dtype=torch.float32)
    mu = mu[:, None] if mu.ndim == 2 else mu
    names = fields.pop("concepts", [f"c{c}" for c in range(len(mu))])
    timesteps = fields.pop("timesteps", torch.arange(mu.shape[1]).flip(0) * 10 + 1)
    return ConceptTable(
        mu=mu,
        timesteps=timesteps,
        concepts=names,
        kinds=kinds or ["object"] * len(mu),
        hook_point="up_blocks.1.attentions.1",
        sae_hash="a" * 64,
        **fields,
    )


def selected(selection: Selection, step: int = 0) -> list[int]:
    return selection.latents[step][selection.owners[step] >= 0].tolist()


def as_dict(selection: Selection, step: int = 0) -> dict[int, tuple[str, float, float]]:
    """latent -> (owner, threshold, factor)"""
    columns = (selection.latents, selection.owners, selection.thresholds, selection.factors)
    entries = zip(*(column[step].tolist() for column in columns), strict=True)
    return {i: (selection.concepts[o], m, f) for i, o, m, f in entries if o >= 0}


def test_scores_by_hand_spec_2_2() -> None:
    # c0: shares 1/4 3/4 0; its others: mean of (2,0,2) and (0,0,4) = (1,0,3), shares 1/4 0 3/4.
    table = make_table([[1, 3, 0], [2, 0, 2], [0, 0, 4]])
    expected = torch.tensor([[0, 0.75, -0.75], [0.5 - 1 / 8, -3 / 8, 0.5 - 0.5], [-3 / 8, -3 / 8, 1 - 2 / 8]])
    torch.testing.assert_close(table.scores()[:, 0], expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(table.scores("c1"), table.scores()[1])


def test_score_of_a_single_concept_is_its_share_spec_2_2() -> None:
    table = make_table([[1.0, 3.0, 0.0]])
    torch.testing.assert_close(table.scores("c0"), torch.tensor([[0.25, 0.75, 0.0]]), rtol=1e-6, atol=0)
    selection = table.select("c0", strength=-2.0)
    assert as_dict(selection) == {1: ("c0", 3.0, -6.0)}


def test_scores_divide_by_sum_plus_epsilon_spec_2_2() -> None:
    table = make_table([[1e-8, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(table.scores()[:, 0], torch.tensor([[0.5, 0], [-0.5, 0]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("percentile", "count"), [(99.999, 1), (99.995, 2), (99.99, 3)])
def test_percentile_counts_at_20480_latents_spec_2_3(percentile: float, count: int) -> None:
    mu = torch.zeros(2, 2, 20480)
    mu[0] = torch.stack([torch.randperm(20480, generator=torch.Generator().manual_seed(t)) for t in range(2)])
    selection = make_table(mu).select("c0", percentile=percentile)
    for step in range(2):
        assert selected(selection, step) == sorted(mu[0, step].topk(count).indices.tolist())


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.integers(0, 6), min_size=1, max_size=40),
    percentile=st.floats(0, 100, exclude_max=True, allow_subnormal=False),
)
def test_percentile_is_strictly_above_the_interpolated_quantile_spec_2_3(scores: list[int], percentile: float) -> None:
    table = make_table([[*scores, 1], [0] * (len(scores) + 1)])
    values = table.scores("c0")[0].double()
    bound = values.quantile(percentile / 100)
    near = (values - bound).abs() < 1e-9
    expected = ((values > bound) | (near & (values > values.sort().values[_lower(percentile, len(values))]))) & (
        table.mu[0, 0] > 0
    )
    if expected.any():
        assert selected(table.select("c0", percentile=percentile)) == expected.nonzero().flatten().tolist()
    else:
        with pytest.raises(ValueError, match="selects no latent"):
            table.select("c0", percentile=percentile)


def _lower(percentile: float, n: int) -> int:
    return math.floor(percentile / 100 * (n - 1))


def test_equal_scores_go_to_the_lowest_latent_spec_2_3() -> None:
    table = make_table([[0, 2, 2, 2, 1], [1, 0, 0, 0, 0]])
    assert selected(table.select("c0", num_latents=2)) == [1, 2]
    assert selected(table.select("c0")) == [1]
    with pytest.raises(ValueError, match="c0"):
        make_table([[2, 2, 2]]).select("c0", percentile=50)


def test_num_latents_takes_the_best_of_each_step_and_pads_spec_2_3() -> None:
    mu = torch.tensor([[[4.0, 3, 0, 0], [0, 0, 0, 5]], [[0, 0, 1, 1], [1, 1, 1, 1]]])
    selection = make_table(mu).select(["c0"], strength=-1.0, num_latents=2)
    assert selection.latents.tolist() == [[0, 1], [3, 0]]
    assert selection.thresholds.tolist() == [[2.0, 1.5], [3.0, INF]]
    assert selection.factors.tolist() == [[-4.0, -3.0], [-5.0, 1.0]]
    assert selection.owners.tolist() == [[0, 0], [0, -1]]


def test_a_latent_that_was_never_active_is_not_selected() -> None:
    table = make_table([[0, 2, 0], [1, 0, 1]])
    assert selected(table.select("c0", num_latents=3)) == [1]
    with pytest.raises(ValueError, match=r"'c1' selects no latent of up_blocks\.1\.attentions\.1 at any timestep"):
        make_table([[0, 2, 0], [0, 0, 0]]).select(["c0", "c1"], num_latents=3)


def test_thresholds_are_the_mean_over_all_concepts_spec_3_1() -> None:
    table = make_table([[6, 1], [3, 1], [0, 1]])
    assert as_dict(table.select("c0")) == {0: ("c0", 3.0, -30.0)}


@pytest.mark.parametrize(("scale", "factor"), [("mean", -15.0), ("constant", -5.0), ("norm", -10.0)])
def test_scales_spec_3_1(scale: Any, factor: float) -> None:
    norms = torch.tensor([0.5, 1.0]) if scale == "norm" else None
    selection = make_table([[3, 1], [0, 1]]).select("c0", strength=-5.0, scale=scale, decoder_norms=norms)
    assert as_dict(selection) == {0: ("c0", 1.5, factor)}
    assert selection.scale == scale


def test_a_shared_latent_goes_to_the_most_negative_claim_spec_3_5() -> None:
    table = make_table([[4, 0, 1], [3, 1, 0], [0, 0, 9]])
    equal = table.select(["c0", "c1"], strength=-1.0, num_latents=1)
    assert as_dict(equal) == {0: ("c0", pytest.approx(7 / 3), -4.0)}
    stronger = table.select(["c0", "c1"], strength={"c0": -1.0, "c1": -2.0}, num_latents=1)
    assert as_dict(stronger) == {0: ("c1", pytest.approx(7 / 3), -6.0)}
    union = table.select(["c0", "c2"], strength=-1.0)
    assert as_dict(union) == {0: ("c0", pytest.approx(7 / 3), -4.0), 2: ("c2", pytest.approx(10 / 3), -9.0)}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_order_of_concepts_never_changes_the_selection_spec_3_5(data: st.DataObject) -> None:
    num_concepts, num_latents = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 8))
    values = st.lists(st.integers(0, 3), min_size=num_latents, max_size=num_latents)
    mu = data.draw(st.lists(values, min_size=num_concepts, max_size=num_concepts))
    table = make_table([[1 + v for v in row] for row in mu])
    names = data.draw(st.lists(st.sampled_from(table.concepts), min_size=1))
    strength = {name: data.draw(st.integers(-3, 3)) for name in table.concepts}
    how: dict[str, Any] = {"strength": strength, "num_latents": data.draw(st.integers(1, num_latents))}
    first, second = table.select(names, **how), table.select(data.draw(st.permutations(names)), **how)
    for left, right in zip(vars(first).values(), vars(second).values(), strict=True):
        assert torch.equal(left, right) if isinstance(left, Tensor) else left == right

    rows = data.draw(st.permutations(range(num_concepts)))
    shuffled = make_table(table.mu[rows], concepts=[table.concepts[c] for c in rows]).select(names, **how)
    claims, theirs = as_dict(first), as_dict(shuffled)
    assert claims.keys() == theirs.keys()
    assert all(claims[i][1:] == pytest.approx(theirs[i][1:], rel=1e-6) for i in claims)


def test_sampling_at_50_steps_reads_a_100_row_table_by_timestep_spec_2_4() -> None:
    stored = torch.arange(991, 0, -10)
    table = make_table(torch.ones(1, 100, 2), timesteps=stored)
    selection = table.select("c0")
    assert [selection.row(t) for t in range(981, 0, -20)] == list(range(1, 100, 2))
    assert table.row(torch.tensor(999)) == 0
    assert table.row(1) == 99
    assert table.row(986) == 0, "halfway goes to the noisier step"
    assert table.row(985.9) == 1


def test_assignment_is_greedy_and_one_to_one_spec_4_2() -> None:
    table = make_table([[9, 1, 0], [7, 2, 1], [0, 0, 10]])
    expected = torch.tensor([[0.55, 0, -0.55], [0.25, 0.15, -0.4], [-0.8, -0.15, 0.95]])
    torch.testing.assert_close(table.scores()[:, 0], expected, rtol=1e-6, atol=1e-7)
    assert table.assign() == {"c0": 0, "c1": 1, "c2": 2}
    assert make_table(table.mu[[1, 0, 2]], concepts=["c1", "c0", "c2"]).assign() == table.assign()


def test_assignment_takes_objects_first_spec_4_2() -> None:
    mu = [[3, 1, 0], [0, 1, 3], [1, 0, 0]]
    table = make_table(mu, kinds=["object", "object", "style"])
    assert table.scores().mean(1)[:, 0].tolist() == pytest.approx([0.55, -0.8, 0.625])
    assert table.assign() == {"c0": 0, "c1": 2, "c2": 1}
    assert make_table(mu).assign() == {"c0": 1, "c1": 2, "c2": 0}


def test_assignment_averages_scores_over_the_steps_spec_4_2() -> None:
    mu = torch.tensor([[[1.0, 0, 0], [0, 0.4, 0.6], [0, 1, 0]]])
    assert make_table(mu).assign() == {"c0": 1}


def test_every_concept_is_assigned_even_if_never_active_spec_4_2() -> None:
    assert make_table([[0, 0, 0], [0, 2, 1]]).assign() == {"c0": 0, "c1": 1}
    assert make_table([[1, 1], [1, 1]], concepts=["b", "a"]).assign() == {"b": 1, "a": 0}
    with pytest.raises(ValueError, match="N >= C"):
        make_table([[1], [1]]).assign()


def test_select_uses_the_assigned_latent_unless_told_otherwise_spec_2_3() -> None:
    mu = torch.tensor([[[1.0, 3, 0], [0, 1, 2]], [[1, 0, 1], [1, 1, 1]]])
    table = make_table(mu, assignment={"c0": 0})
    by_default = table.select(["c0", "c1"], strength=-1.0)
    assert as_dict(by_default, 0)[0] == ("c0", 1.0, -1.0)
    assert all(owner != "c0" for owner, _, _ in as_dict(by_default, 1).values()), "mu = 0 at that step"
    assert [selected(table.select("c0", reselect=True), step) for step in (0, 1)] == [[1], [2]]
    assert selected(table.select("c0", num_latents=2)) == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concepts": ["c0", "cow"]}, r"concepts: \['cow'\] not in the table, which has \['c0', 'c1'\]"),
        ({"concepts": []}, "concepts: expected at least one name"),
        ({"num_latents": 1, "percentile": 99.0}, "at most one, got 1 and 99.0"),
        ({"num_latents": 0}, "num_latents: expected 1 to N=2, got 0"),
        ({"num_latents": 3}, "num_latents: expected 1 to N=2, got 3"),
        ({"percentile": 100.0}, "percentile: expected 0 <= p < 100, got 100.0"),
        ({"strength": math.nan}, "strength: expected finite"),
        ({"strength": {"c1": -1.0}}, r"strength: .* got none for \['c0'\]"),
        ({"strength": {"c0": -1.0, "cow": 1.0}}, r"\['cow'\] not in the table"),
        ({"scale": "median"}, "scale: expected one of"),
        ({"scale": "norm"}, "decoder_norms"),
        ({"decoder_norms": torch.ones(2)}, "decoder_norms"),
        ({"scale": "norm", "decoder_norms": torch.ones(3)}, r"expected \[N\] = \[2\], got \[3\]"),
        ({"scale": "norm", "decoder_norms": torch.zeros(2)}, "positive"),
    ],
)
def test_select_refuses_spec_7_1(options: dict[str, Any], message: str) -> None:
    table = make_table([[1, 2], [2, 1]])
    with pytest.raises(ValueError, match=message):
        table.select(**({"concepts": ["c0"]} | options))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mu": torch.ones(2, 3)}, r"mu: expected \[C, T, N\], none of them 0, got \[2, 3\]"),
        ({"mu": -torch.ones(2, 1, 3)}, "mu: expected finite values >= 0"),
        ({"mu": torch.full((2, 1, 3), math.nan)}, "mu: expected finite values >= 0"),
        ({"concepts": ["a"]}, "concepts: expected C = 2"),
        ({"concepts": ["a", "a"]}, "concepts: expected C different names"),
        ({"kinds": ["object"]}, "kinds: expected C = 2"),
        ({"timesteps": torch.tensor([3, 1])}, r"timesteps: expected \[T\] = \[1\] .* got \[2\]"),
        ({"mu": torch.ones(2, 2, 3), "timesteps": torch.tensor([1, 3])}, "timesteps: expected descending"),
        ({"assignment": {"x": 1}}, r"\['x'\] not in the table"),
        ({"assignment": {"a": 3}}, "assignment: expected different latents"),
        ({"assignment": {"a": 1, "b": 1}}, "assignment: expected different latents"),
    ],
)
def test_table_refuses_spec_7_1(fields: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "mu": torch.ones(2, 1, 3),
        "timesteps": torch.tensor([1]),
        "concepts": ["a", "b"],
        "kinds": ["object", "style"],
        "hook_point": "x",
        "sae_hash": "y",
    }
    with pytest.raises(ValueError, match=message):
        ConceptTable(**(good | fields))
