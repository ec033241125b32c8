"""Training on several processes equals training on one: gloo on the CPU.

Functions that begin with `rank_` run on every rank.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from ranks import RankFailed, run_on_ranks
from saemnesia_fast import ops
from saemnesia_fast.cli.main import main
from saemnesia_fast.files import save_tensors, write_json
from saemnesia_fast.ops.reference import top_columns
from saemnesia_fast.sae import TopKSAE
from saemnesia_fast.training import TensorActivations, TrainConfig, Trainer, eight_bit, train_sae
from saemnesia_fast.training.checkpoint import list_checkpoints, load_checkpoint
from saemnesia_fast.training.layout import ALONE
from saemnesia_fast.training.parallel import connect

D, N, K, M = 8, 29, 5, 24
# (data ranks, latent ranks); 4 latent ranks hold 8, 8, 8 and 5 of 29 latents.
LAYOUTS = [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check_exchange(layout: Any) -> None:
    for batch in (torch.arange(M * 3).view(M, 3), torch.arange(M) % 3 == 0):
        assert torch.equal(layout.gather_tokens(layout.rows_of(batch)), batch)
    mine = torch.full((2, 2), 10.0**layout.data_rank + 100.0**layout.latents_rank).T
    before = mine.clone()
    over_data = sum(10.0**rank for rank in range(layout.data_size)) + layout.data_size * 100.0**layout.latents_rank
    over_latents = (
        sum(100.0**rank for rank in range(layout.latents_size)) + layout.latents_size * 10.0**layout.data_rank
    )
    assert torch.equal(layout.sum_over_data(mine), torch.full((2, 2), over_data))
    assert torch.equal(layout.sum_over_latents(mine), torch.full((2, 2), over_latents))
    assert torch.equal(mine, before)
    for num_latents in (N, 12, 4):
        everything = torch.arange(num_latents * 2).view(num_latents, 2)
        rows = everything[layout.shard(num_latents)]
        assert torch.equal(layout.all_latents(rows, num_latents), everything)
        whole = layout.as_whole(rows)
        assert (whole.shape, whole.to_local().data_ptr()) == (everything.shape, rows.data_ptr())
    assert [layout.agree(True), layout.agree(layout.rank != 1), layout.agree(True)] == [True, False, True]


def check_refusals(layout: Any) -> None:
    if layout.data_size > 1:
        with pytest.raises(
            ValueError, match=r"data: expected a number of tokens that the \d processes can share equally"
        ):
            layout.rows_of(torch.zeros(4 * layout.data_size + 1, D))
    for num_latents in range(1, layout.latents_size):
        with pytest.raises(ValueError, match=rf"latent_ranks: {num_latents} latents cannot be shared by \d processes"):
            layout.shard(num_latents)


def check_top_latents(layout: Any) -> None:
    """Every column that is not another rank's equals the column of the whole, ties included."""
    for number in range(12):
        ties, k, num_latents = number % 2, (1, K, 12)[number % 3], (N, 12)[number // 6]
        pre = torch.randn(M, num_latents, generator=seeded(number)).relu()
        pre = layout.rows_of((2 * pre).round() if ties else pre)
        values, indices = top_columns(pre, k)
        rows = layout.shard(num_latents)
        candidates = top_columns(pre[:, rows], min(k, rows.stop - rows.start))
        own_values, own_indices = layout.top_latents(*candidates, k)
        mine = (indices >= rows.start) & (indices < rows.stop)
        assert torch.equal(own_values, torch.where(mine, values, 0))
        assert torch.equal(own_indices, torch.where(mine, indices - rows.start, 0))

        expected = torch.zeros_like(pre).scatter(1, indices, values)
        assert torch.equal(layout.keep_largest(pre[:, rows], k), expected[:, rows]) or (
            ties and layout.latents_size == 1
        )


def check_unequal_widths(layout: Any) -> None:
    """A rank may have fewer candidates than k, or none, and all together may have fewer."""
    z = torch.rand(M, 3, generator=seeded(0)) + 1
    z = layout.rows_of(z)
    mine = z if layout.latents_rank == 0 else z[:, :0]
    assert torch.equal(layout.keep_largest(mine, 40), mine)
    assert layout.keep_largest(mine, 2).count_nonzero() == (2 * len(z) if layout.latents_rank == 0 else 0)


def check_nan(layout: Any) -> None:
    """A token with NaN has values NaN on all ranks, whichever had it, and touches no other."""
    pre = torch.rand(M, N, generator=seeded(0))
    rows = layout.shard(N)
    values, indices = top_columns(pre[:, rows], K)
    whole = layout.rows_of(values)
    expected, _ = layout.top_latents(whole, layout.rows_of(indices), K)
    if layout.latents_rank == 0:
        whole = whole.clone()
        whole[1] = torch.nan
    values, indices = layout.top_latents(whole, layout.rows_of(indices), K)
    if layout.latents_size > 1:
        assert values[1].isnan().all()
        assert values.isnan().sum() == K
        assert torch.equal(values[2:], expected[2:])
    assert ((indices >= 0) & (indices < rows.stop - rows.start)).all()


def check_encode_and_decode(layout: Any) -> None:
    """With integers, where float32 is exact: the ranks' encode and decode are the whole SAE's, ties and all."""
    sae = TopKSAE.init(D, N, K).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.copy_(torch.randint(-1, 2, parameter.shape, generator=seeded(1)))
    x = torch.randint(-1, 2, (M, D), generator=seeded(2)).float()
    values, indices = ops.encode_topk(x, sae.W_enc, sae.b_enc, sae.b_dec, K)
    assert (values[:, 1:] == values[:, :-1]).float().mean() > 0.3
    x_hat = ops.decode(values, indices, sae.W_dec, sae.b_dec)

    sae = layout.own_latents(sae)
    rows = layout.shard(N)
    assert (sae.num_latents, len(sae.W_enc)) == (N, rows.stop - rows.start)
    x = layout.rows_of(x)
    candidates = ops.encode_topk(x, sae.W_enc, sae.b_enc, sae.b_dec, min(K, len(sae.W_enc)))
    own_values, own_indices = layout.top_latents(*candidates, K)
    mine = layout.rows_of((indices >= rows.start) & (indices < rows.stop))
    assert torch.equal(own_values, layout.rows_of(values) * mine)
    assert torch.equal(own_indices, (layout.rows_of(indices) - rows.start) * mine)
    assert torch.equal(layout.decode(own_values, own_indices, sae.W_dec, sae.b_dec), layout.rows_of(x_hat))


def rank_primitives(latent_ranks: int) -> tuple[int, int, bool]:
    with connect(latent_ranks, "cpu") as layout, torch.no_grad():
        for check in (check_exchange, check_refusals, check_top_latents, check_unequal_widths, check_nan):
            check(layout)
        check_encode_and_decode(layout)
        return layout.data_rank, layout.latents_rank, layout.writes


@pytest.mark.parametrize(("data", "latents"), LAYOUTS)
def test_ranks_exchange_what_one_process_would_have(data, latents):
    ranks = run_on_ranks(data * latents, rank_primitives, latents)
    assert ranks == [(r // latents, r % latents, r == 0) for r in range(data * latents)]


def test_a_process_alone_is_not_connected(monkeypatch):
    with connect() as layout:
        assert layout is ALONE
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="latent_ranks: expected a divisor of the 4 processes, got 3"), connect(3):
        pass


def rank_fails(how: str) -> None:
    with connect(1, "cpu") as layout:
        if layout.rank == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("x: expected something else")
        layout.sum_over_data(torch.ones(1))


@pytest.mark.parametrize("how", ["raises", "killed"])
def test_a_rank_that_fails_takes_the_others_down(how):
    started = time.monotonic()
    with pytest.raises(RankFailed) as failed:
        run_on_ranks(3, rank_fails, how)
    assert time.monotonic() - started < 20
    first, second, third = failed.value.failures
    if how == "raises":
        assert second.endswith("ValueError: x: expected something else\n")
        for rank, failure in ((0, first), (2, third)):
            message = f"train: rank {rank} of 3 stops, as another has failed: rank 1: ValueError: x: expected something"
            assert message in failure
    else:
        assert second == "ended without a word"
        assert all("Connection" in failure for failure in (first, third))


def rank_fail_alike() -> None:
    with connect(1, "cpu"):
        raise ValueError("the same everywhere")


def test_ranks_that_fail_alike_say_so_alike():
    with pytest.raises(RankFailed) as failed:
        run_on_ranks(2, rank_fail_alike)
    assert all(failure.endswith("ValueError: the same everywhere\n") for failure in failed.value.failures)


RECIPE: dict[str, Any] = {"num_latents": N, "k": K, "steps": 20, "lr": 0.01, "progress": False, "device": "cpu"}
RECIPE |= {"dead_after": 96, "clip_norm": 0.5, "on_bad_batch": "skip", "checkpoint_every": 5, "log_every": 1}
WAYS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "plain": (torch.float32, {"auxk_alpha": 0.0}),
    "short": (torch.float32, {"auxk_alpha": 0.0, "moments": "bfloat16", "compute_dtype": "bfloat16"}),
    "auxk": (torch.float64, {"micro_batches": 2}),
    "multi": (torch.float64, {"multi_topk": True, "k_start": 2 * K, "k_steps": 10}),
    "batch": (torch.float64, {"batch_topk": True, "multi_topk": True, "moments": "8bit", "adam_eps": 1e-5}),
}


class Tokens(TensorActivations):
    """Of few directions, so that some latents die; two tokens are not finite. Calls `then` after `count` batches."""

    def __init__(self, count: int = 1000, then: Any = None):
        generator = seeded(4)
        codes = torch.rand(600, 6, generator=generator) * (torch.rand(600, 6, generator=generator) < 0.3)
        x = codes @ torch.randn(6, D, generator=generator) + 1 + 0.01 * torch.randn(600, D, generator=generator)
        x[[77, 300], 3] = torch.nan
        super().__init__(x.double(), M)
        self.count, self.then = count, then

    def __iter__(self):
        tokens = super().__iter__()
        yield from islice(tokens, self.count)
        self.then()
        yield from tokens


def rank_trains(latent_ranks: int) -> dict[str, Any]:
    eight_bit.LEAST_BLOCK = D
    with connect(latent_ranks, "cpu") as layout:
        outcomes = {}
        for way, (dtype, options) in WAYS.items():
            sae = TopKSAE.init(D, N, K, seed=5, dtype=dtype)
            trainer = Trainer(TrainConfig(**RECIPE | options), Tokens(), sae, layout)
            lines = [trainer.train_step(batch) for batch in islice(Tokens(), 20)]
            counters = {"firings": trainer.activity.firings, "since": trainer.activity.tokens_since_fired}
            outcomes[way] = {
                "own": trainer._adam.state_dict() | counters,
                "sae": trainer.fit().state_dict(),
                "curve": torch.stack([torch.stack([n.double() for n in line]) for line in lines if line is not None]),
                "counted": [trainer.tokens, trainer.skipped, lines.index(None)],
            }
        return outcomes


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process gets, with as many threads as a rank has."""
    return run_on_ranks(1, rank_trains, 1)[0]


def test_one_process_learns_and_skips_and_has_dead_latents(alone):
    for way, outcome in alone.items():
        _, fvu, auxk, dead, _ = outcome["curve"].T
        assert outcome["counted"][:2] == [18 * M, 2]
        assert fvu[-4:].mean() < 0.7 * fvu[:4].mean(), way
        if way not in ("plain", "short"):
            assert 0 < (dead > 0).sum() < len(dead), way
            assert torch.equal(auxk > 0, dead > 0), way


@pytest.mark.parametrize(("data", "latents"), LAYOUTS)
def test_ranks_train_what_one_process_trains(data, latents, alone):
    """To float64's rounding, as sums are split up; to the bit where nothing but tokens is shared, without AuxK."""
    ranks = run_on_ranks(data * latents, rank_trains, latents)
    for way, expected in alone.items():
        if way == "short" and latents > 1:  # Encoding in bfloat16 selects other latents where products differ by a bit.
            continue
        outcomes = [rank[way] for rank in ranks]
        for number, outcome in enumerate(outcomes):
            assert outcome["counted"] == expected["counted"]
            assert_same(outcome["sae"], outcomes[0]["sae"])
            assert_same(outcome["own"], outcomes[number % latents]["own"])
        for name in ("firings", "since"):
            parts = [outcome["own"][name] for outcome in outcomes[:latents]]
            assert torch.equal(torch.cat(parts), expected["own"][name])
        exact = latents == 1 and way in ("plain", "short")
        tolerance = 0 if exact else 1e-6 if way == "plain" else 1e-12
        for name, tensor in expected["sae"].items():
            torch.testing.assert_close(outcomes[0]["sae"][name], tensor, rtol=0, atol=tolerance)
        torch.testing.assert_close(outcomes[0]["curve"], expected["curve"], rtol=tolerance, atol=tolerance)


def assert_same(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == others.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])] == []


def rank_trains_until(folder: str, latent_ranks: int, killed_after: int, way: str) -> dict[str, Any]:
    """The last rank is killed before it trains on its `killed_after`-th batch more."""

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    eight_bit.LEAST_BLOCK = D
    dtype, options = WAYS[way]
    with connect(latent_ranks, "cpu") as layout:
        last = layout.rank == layout.size - 1
        tokens = Tokens(killed_after if last else 1000, kill)
        sae = None if dtype == torch.float32 else TopKSAE.init(D, N, K, seed=5, dtype=dtype)
        config = TrainConfig(**RECIPE | options, out_dir=Path(folder), resume=True)
        return train_sae(config, tokens, sae, layout).state_dict()


@pytest.mark.parametrize(
    ("way", "layouts"),
    [("plain", [(2, 1), (1, 1), (4, 1)]), ("auxk", [(2, 2), (1, 3), (1, 1)]), ("batch", [(1, 1), (1, 2), (2, 1)])],
)
def test_a_run_goes_on_with_any_number_of_ranks(way, layouts, tmp_path):
    """Killed in steps 7 and 14, each time continued by other ranks: the same SAE, curve and counters."""
    (expected,) = run_on_ranks(1, rank_trains_until, str(tmp_path / "straight"), 1, 1000, way)
    folder = tmp_path / "killed"
    for (data, latents), killed_after in zip(layouts[:2], (7, 9), strict=True):
        with pytest.raises(RankFailed):
            run_on_ranks(data * latents, rank_trains_until, str(folder), latents, killed_after, way)
    data, latents = layouts[2]
    ranks = run_on_ranks(data * latents, rank_trains_until, str(folder), latents, 1000, way)

    tolerance = 0 if way == "plain" else 1e-12
    for sae in ranks:
        torch.testing.assert_close(sae, expected, rtol=0, atol=tolerance)
    curves = [(run / "sae/metrics.jsonl").read_text().splitlines() for run in (folder, tmp_path / "straight")]
    for line, other in zip(*(map(json.loads, curve) for curve in curves), strict=True):
        assert line == pytest.approx(other | {"seconds": line["seconds"]}, rel=tolerance, abs=tolerance)
    newest, other = (
        load_checkpoint(list_checkpoints(run / "sae/checkpoints")[-1]) for run in (folder, tmp_path / "straight")
    )
    assert_same(newest.counters, other.counters)
    torch.testing.assert_close(newest.adam, other.adam, rtol=0, atol=tolerance)
    kinds = {path.name for path in list_checkpoints(folder / "sae/checkpoints")}
    assert len(kinds) in (2, 3) and not list((folder / "sae/checkpoints").glob(".*"))
    finished = TopKSAE.from_pretrained(folder, subfolder="sae")
    assert_same(finished.state_dict(), {name: tensor.to(finished.W_dec.dtype) for name, tensor in ranks[0].items()})


def rank_command(words: list[str]) -> list[str]:
    """What the command logs."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("saemnesia_fast").addHandler(handler)
    main(words)
    return records


def train_command(folder: Path) -> list[str]:
    """What trains on a small store in `folder`."""
    activations = torch.stack(list(islice(Tokens(), 1, 8))).half()
    save_tensors(folder / "activations/block/00000.safetensors", {"activations": activations})
    shard = {"file": "block/00000.safetensors", "prompts": 1, "tokens": activations[..., 0].numel()}
    index = {"finished": True, "hook_points": {"block": {"d": D, "shards": [shard]}}}
    write_json(folder / "activations/index.json", index)
    words = ["train", "--activations", str(folder / "activations"), "--hook-point", "block", "--device", "cpu"]
    return [*words, "--k", str(K), "--batch-size", "24", "--no-progress"]


def assert_same_saes(folder: Path, others: Path) -> None:
    saes = [TopKSAE.from_pretrained(path, subfolder="block") for path in (folder, others)]
    torch.testing.assert_close(*(sae.state_dict() for sae in saes), rtol=0, atol=1e-6)


def test_the_command_trains_on_ranks(tmp_path):
    """Two SAEs on 2 x 2 ranks, of which the first alone logs, are those of one process."""
    command = [*train_command(tmp_path), "--num-latents", str(N), "--more-k", "2"]
    several = run_on_ranks(4, rank_command, [*command, "--latent-ranks", "2", "--out-dir", str(tmp_path / "ranks")])
    (alone,) = run_on_ranks(1, rank_command, [*command, "--out-dir", str(tmp_path / "alone")])
    assert several == [[line.replace("alone", "ranks") for line in alone], [], [], []]
    for k in (K, 2):
        assert_same_saes(tmp_path / f"ranks/k{k}", tmp_path / f"alone/k{k}")


def test_torchrun_starts_the_command(tmp_path):
    """Two processes of its own train SAEs of two sizes as this one does."""
    command = [*train_command(tmp_path), "--expansion-factor", "4", "--more-expansion-factors", "2"]
    python = [sys.executable, "-P", "-m"]
    torchrun = [*python, "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    started = [*torchrun, "--no-python", *python, "saemnesia_fast", *command, "--out-dir", str(tmp_path / "ranks")]
    ran = subprocess.run(started, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    main([*command, "--out-dir", str(tmp_path / "alone")])
    for factor in (4, 2):
        assert_same_saes(tmp_path / f"ranks/x{factor}", tmp_path / f"alone/x{factor}")
