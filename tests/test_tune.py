"""`python benchmarks tune`: the fastest right tiles of one depth are written, and read by the triton backend."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import harness
import results
import tune
from saemnesia_fast import ops
from saemnesia_fast.ops import triton_product
from saemnesia_fast.ops.triton_tiles import Tile, Tiles, heuristic, measured

STAMP = results.Stamp("abc", "2026-01-01T00:00:00Z", "a machine", 2, 2, "2.13.0", "3.6.0")
HALF = heuristic((9, 0), torch.float16)
Times = Callable[[str, int, Tile], Any]


class StubClock:
    """Calls take as long as they say."""

    def prepare(self, call, capturable):
        return call, "graph"

    def samples(self, call, count):
        return [call()[1]] * count


def tune_with(times: Times, path: Path, monkeypatch: pytest.MonkeyPatch, sound: bool = True) -> dict[str, Any]:
    """The command's own course; `times(product, M, tile)` gives microseconds, or "wrong", or raises."""

    def contest(product: str, case: harness.Case, base: Tiles, tiles: list[Tile]) -> harness.Contest:
        def start(tile: Tile) -> Callable[[], tuple[bool, float]]:
            taken = times(product, case.M, tile)
            return lambda: (taken != "wrong", 1.0 if taken == "wrong" else taken)

        entered = [harness.Provider(tune.label(tile), lambda tile=tile: start(tile)) for tile in tiles]
        return harness.Contest(
            case, harness.Work(0, 0), entered, lambda answer: torch.tensor([0.0 if answer[0] else 1.0]), 0.5, "none"
        )

    monkeypatch.setattr(tune, "contest", contest)
    monkeypatch.setattr(tune, "sound", lambda tiles, operand: sound)
    monkeypatch.setattr(triton_product, "tiles_for", lambda device, operand: heuristic((9, 0), operand))
    found = tune.tune(path, StubClock(), 0.001, STAMP)
    return {operand: (tiles, rows) for operand, tiles, rows in found}


def test_the_best_tiles_are_written_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = {"encode_topk": Tile(128, 256, 64, 8, 3), "probe": Tile(64, 16, 64, 8, 4), "rank": Tile(64, 128, 64, 4, 4)}

    def times(product: str, tokens: int, tile: Tile) -> Any:
        if tile == Tile(128, 256, 64, 8, 4):
            raise RuntimeError("out of resource: shared memory, Required: 1, Hardware limit: 0")
        if tile == Tile(64, 256, 64, 4, 3):
            return "wrong"
        return 10.0 if tile == best[product] else 20.0

    path = tmp_path / "configs" / "gpu.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"bfloat16": {}, "another": 1}))
    found = tune_with(times, path, monkeypatch)
    assert set(found) == {"float16", "float32", "bfloat16"}
    assert measured(path, torch.float16) == Tiles(**best) == found["float16"][0]
    assert measured(path, torch.bfloat16) == Tiles(**best)
    assert measured(path, torch.float32) == found["float32"][0] == heuristic((9, 0), torch.float32)
    written = json.loads(path.read_text())
    assert written["measured"]["commit"] == "abc" and written["another"] == 1
    statuses = {row.provider: row.status for row in found["float16"][1]}
    assert "out of resource" in statuses[tune.label(Tile(128, 256, 64, 8, 4))]
    assert statuses[tune.label(Tile(64, 256, 64, 4, 3))].startswith("failed: largest error")
    assert statuses[tune.label(HALF.encode_topk)] == "ok"


def test_tiles_whose_products_differ_in_their_bits_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tune_with(lambda product, tokens, tile: 1.0, tmp_path / "gpu.json", monkeypatch, sound=False)
    assert [tiles for tiles, _ in found.values()] == [None, None, None]
    assert not (tmp_path / "gpu.json").exists()
    assert "float16: nothing chosen, as bits differ" in capsys.readouterr().out


def test_bfloat16_tries_what_float16_chose_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tune_with(lambda product, tokens, tile: float(sum(tile)), tmp_path / "gpu.json", monkeypatch)
    tried = {row.provider for row in found["bfloat16"][1]}
    assert tried == {tune.label(tile) for tile in (*heuristic((9, 0), torch.bfloat16), *found["float16"][0])}


def test_all_cases_judge_a_tile_and_one_that_missed_a_case_is_out() -> None:
    tiles = [Tile(64, 64, 32, 4, stages) for stages in (2, 3, 4)]
    taken = {tiles[0]: (10.0, 40.0), tiles[1]: (19.0, 19.0), tiles[2]: (1.0, None)}
    rows = []
    for tile, times in taken.items():
        for tokens, microseconds in zip((512, 4096), times, strict=True):
            row = results.Row.of(STAMP, harness.Case("tune", M=tokens), tune.label(tile), 0.0)
            row.p50_us = microseconds
            rows.append(row)
    found = tune.scores(rows, tiles, 2)
    assert set(found) == {tiles[0], tiles[1]}
    assert list(found.values()) == pytest.approx([20.0, 19.0])


def test_one_depth_for_all_products() -> None:
    shallow, deep = Tile(64, 64, 32, 4, 3), Tile(64, 64, 64, 4, 3)
    times = {"encode_topk": {shallow: 100.0, deep: 90.0}, "probe": {shallow: 5.0, deep: 7.0}, "rank": {shallow: 50.0}}
    assert tune.choose(times) == Tiles(shallow, shallow, shallow)
    times["rank"][deep] = 50.0
    assert tune.choose(times) == Tiles(shallow, shallow, shallow)
    times["rank"][deep] = 30.0
    assert tune.choose(times) == Tiles(deep, deep, deep)
    assert tune.choose({"encode_topk": {deep: 1.0}, "probe": {shallow: 1.0}, "rank": {deep: 1.0}}) is None


@pytest.mark.parametrize("operand", list(tune.CANDIDATES))
def test_candidates_are_what_the_backend_accepts(operand: str, tmp_path: Path) -> None:
    """Every depth that occurs can be chosen, and a file of it is read."""
    candidates = tune.CANDIDATES[operand]
    depths = {shape[2] for shape in candidates["encode_topk"]}
    for depth in depths:
        fitting = {product: [s for s in shapes if s[2] == depth] for product, shapes in candidates.items()}
        base = heuristic((9, 0), getattr(torch, operand))
        tiles = {product: shapes[0] if shapes else getattr(base, product) for product, shapes in fitting.items()}
        assert {tile[2] for tile in tiles.values()} == {depth}
        (tmp_path / "gpu.json").write_text(json.dumps({operand: tiles}))
        assert measured(tmp_path / "gpu.json", getattr(torch, operand)) is not None


def test_every_candidate_runs_under_its_own_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """And on the triton backend, which the op's provider chooses."""

    def contest(case: harness.Case, device: str) -> harness.Contest:
        def call() -> tuple[Tiles, str]:
            return triton_product.tiles_for(torch.device(device), case.torch_dtype), ops.current_backend()

        triton = harness.Provider("ours triton", lambda: call, context=lambda: ops.use_backend("triton"))
        entered = [harness.Provider("eager", lambda: call), triton]
        return harness.Contest(case, harness.Work(0, 0), entered, lambda answer: torch.zeros(1), 1.0, "eager")

    monkeypatch.setitem(sys.modules, "probe", SimpleNamespace(contest=contest))
    tiles = [HALF.rank, Tile(64, 64, 64, 4, 4)]
    found = tune.contest("rank", tune.CASES["rank"][0], HALF, tiles)
    assert (found.case.op, found.case.variant, found.case.M) == ("tune", "rank by probe", 512)
    assert found.baseline == tune.label(HALF.rank)
    for tile, provider in zip(tiles, found.providers, strict=True):
        with provider.context():
            assert provider.start()() == (HALF._replace(rank=tile), "triton")
    assert ops.current_backend() == "auto"


def test_products_that_differ_in_one_bit_do_not_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    case = harness.Case("tune", M=16, d=64, N=512, k=8)
    assert tune.agree(case, "cpu")
    probe = ops.probe
    spoilt = (lambda seen, steered: (seen * (1 + 2.0**-23), steered), lambda seen, steered: (seen, ~steered))
    for spoil in spoilt:
        monkeypatch.setattr(ops, "probe", lambda *arguments, spoil=spoil: spoil(*probe(*arguments)))
        assert not tune.agree(case, "cpu")


def test_a_cut_is_in_force_inside_its_context_only() -> None:
    other, before = HALF._replace(rank=Tile(64, 64, 64, 4, 2)), triton_product.tiles_for
    with tune.using(other):
        assert triton_product.tiles_for(torch.device("cpu"), torch.float16) == other
    assert triton_product.tiles_for is before
