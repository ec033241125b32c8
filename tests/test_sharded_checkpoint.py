"""Checkpoints of several processes: read by any number of them, whole or passed over."""

import errno
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ranks import run_on_ranks
from saemnesia_fast.training.checkpoint import Checkpoint, list_checkpoints, load_newest_checkpoint, save_checkpoint
from saemnesia_fast.training.layout import ALONE
from saemnesia_fast.training.parallel import connect
from saemnesia_fast.training.sharded_checkpoint import load_shards, read_state, save_shards

N, D = 29, 8
STATE = {"step": 20, "fvu": 0.5, "data": {"window": 3}}


def everything() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "W_dec": torch.randn(N, D, generator=generator),
        "exp_avg": torch.randn(N, D, generator=generator).bfloat16(),
        "b_enc": torch.randn(N, generator=generator, dtype=torch.float64),
        "firings": torch.randint(2**40, (N,), generator=generator),
        "b_dec": torch.randn(D, generator=generator),
        "rng": torch.get_rng_state(),
    }


OF_LATENTS = {"W_dec", "exp_avg", "b_enc", "firings"}


def part_of(layout: Any) -> dict[str, torch.Tensor]:
    rows = layout.shard(N)
    return {name: tensor[rows] if name in OF_LATENTS else tensor for name, tensor in everything().items()}


def same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return tensors.keys() == expected.keys() and all(
        tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor) for name, tensor in expected.items()
    )


def rank_saves(folder: str, latent_ranks: int) -> None:
    torch.manual_seed(0)
    with connect(latent_ranks, "cpu") as layout:
        save_shards(Path(folder), part_of(layout), OF_LATENTS, STATE | {"rank": layout.rank}, layout)


def rank_loads(folder: str, latent_ranks: int) -> None:
    torch.manual_seed(0)
    with connect(latent_ranks, "cpu") as layout:
        tensors, state = load_shards(Path(folder), layout)
        assert same(tensors, part_of(layout))
        assert state == STATE | {"rank": 0}


@pytest.fixture(scope="module", params=[(2, 1), (2, 2), (1, 4)], ids=str)
def saved(request, tmp_path_factory):
    data, latents = request.param
    folder = tmp_path_factory.mktemp("saved") / "step-00000020"
    run_on_ranks(data * latents, rank_saves, str(folder), latents)
    return folder


def test_one_process_reads_what_several_wrote(saved):
    tensors, state = load_shards(saved, ALONE)
    assert same(tensors, everything())
    assert state == read_state(saved) == STATE | {"rank": 0}
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_other_numbers_of_processes_read_it(saved):
    for data, latents in ((2, 1), (1, 3), (2, 2)):
        run_on_ranks(data * latents, rank_loads, str(saved), latents)


def test_rows_are_written_once(saved):
    """What several processes hold is on the disk only once; nothing is there but safetensors files and one of JSON."""
    bytes_held = sum(tensor.nbytes for tensor in everything().values())
    files = list(saved.iterdir())
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    written = sum(path.stat().st_size for path in files)
    assert bytes_held < written < bytes_held + 4096 * len(files)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def files_of(folder):
    return sorted(folder.glob("*.safetensors"))


DAMAGES = {
    "one bit": lambda folder: flip_a_bit(files_of(folder)[-1]),
    "truncated": lambda folder: files_of(folder)[0].write_bytes(files_of(folder)[0].read_bytes()[:-10]),
    "a file is missing": lambda folder: files_of(folder)[-1].unlink(),
    "a file too many": lambda folder: shutil.copy(files_of(folder)[0], folder / "shard-9.safetensors"),
    "no content": lambda folder: (folder / "state.json").unlink(),
    "half a content": lambda folder: (folder / "state.json").write_text((folder / "state.json").read_text()[:100]),
    "other content": lambda folder: (folder / "state.json").write_text("[]"),
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
}


def rank_is_refused(folders: list[str]) -> None:
    with connect(1, "cpu") as layout:
        for folder in folders:
            with pytest.raises(ValueError, match=re.escape(f"{folder}: ") + "(damaged|not a checkpoint)"):
                load_shards(Path(folder), layout)


def test_damage_is_noticed_by_all(tmp_path):
    """Also by the process that has not looked at the damaged file."""
    whole = tmp_path / "whole"
    run_on_ranks(2, rank_saves, str(whole), 2)
    folders = []
    for damage, do in DAMAGES.items():
        folder = tmp_path / damage
        shutil.copytree(whole, folder)
        do(folder)
        with pytest.raises(ValueError, match=re.escape(f"{folder}: ") + "(damaged|not a checkpoint)"):
            load_shards(folder, ALONE)
        folders.append(str(folder))
    run_on_ranks(2, rank_is_refused, folders)


def checkpoint(layout: Any, step: int) -> Checkpoint:
    tensors = part_of(layout)
    rng, counters = tensors.pop("rng"), {"firings": tensors.pop("firings")}
    return Checkpoint({"W_enc": tensors.pop("W_dec").clone()}, tensors, counters, rng, STATE | {"step": step})


def rank_tidies_up(folder: str) -> list[str]:
    with connect(2, "cpu") as layout:
        for step in (10, 20, 30, 20, 40):
            save_checkpoint(Path(folder), checkpoint(layout, step), 2, layout)
        return [path.name for path in list_checkpoints(Path(folder))]


def test_old_ones_go_and_a_step_may_be_written_again(tmp_path):
    """Of both kinds; equal FVUs make the first the best."""
    save_checkpoint(tmp_path, checkpoint(ALONE, 5), 2)
    save_checkpoint(tmp_path, checkpoint(ALONE, 30), 2)
    names = ["step-00000005.safetensors", "step-00000020", "step-00000040"]
    assert run_on_ranks(2, rank_tidies_up, str(tmp_path))[1] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    save_checkpoint(tmp_path, checkpoint(ALONE, 20), 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == [names[0], "step-00000020.safetensors"]


def rank_goes_back(folder: str) -> int:
    """The newest that is whole, where the damage is in a part that one process alone looks at."""
    with connect(2, "cpu") as layout:
        for step in (10, 20):
            save_checkpoint(Path(folder), checkpoint(layout, step), 2, layout)
        if layout.writes:
            flip_a_bit(files_of(Path(folder) / "step-00000020")[1])
        layout.agree(True)
        path, found = load_newest_checkpoint(Path(folder), layout=layout)
        assert same(found.adam, checkpoint(layout, 10).adam)
        assert path.name == "step-00000010"
        return found.state["step"]


def test_a_damaged_one_is_passed_over_by_all(tmp_path, caplog):
    assert run_on_ranks(2, rank_goes_back, str(tmp_path)) == [10, 10]
    path, _ = load_newest_checkpoint(tmp_path)
    assert path.name == "step-00000010"
    assert "step-00000020: damaged, shard-" in caplog.text


def rank_fills_the_disk(folder: str) -> str:
    """On one process's disk a file may not grow."""
    with connect(2, "cpu") as layout:
        save_checkpoint(Path(folder), checkpoint(layout, 10), 2, layout)
        if layout.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
        with pytest.raises(
            OSError, match="make room and continue, earlier files are whole: .*step-00000020"
        ) as stopped:
            save_checkpoint(Path(folder), checkpoint(layout, 20), 2, layout)
        assert stopped.value.errno == errno.EFBIG
        path, _ = load_newest_checkpoint(Path(folder), layout=layout)
        return path.name


def test_a_full_disk_leaves_the_last_one(tmp_path):
    assert run_on_ranks(2, rank_fills_the_disk, str(tmp_path)) == ["step-00000010"] * 2
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000010"]
