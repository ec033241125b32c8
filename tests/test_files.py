"""saemnesia_fast.files: atomic writes, safetensors, JSON, folders or Hub repositories (SPEC 6.4)."""

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from saemnesia_fast import files


def test_bytes_and_writers_arrive_whole(tmp_path: Path) -> None:
    def write_two(path: Path) -> None:
        path.write_bytes(b"two")

    files.write_atomic(tmp_path / "deep" / "a", b"one")
    files.write_atomic(tmp_path / "deep" / "a", write_two)
    assert (tmp_path / "deep" / "a").read_bytes() == b"two"
    assert os.listdir(tmp_path / "deep") == ["a"]


def test_an_interrupted_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.write_atomic(path, b"old")

    def interrupted(temporary: Path) -> None:
        temporary.write_bytes(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(path, interrupted)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_content_is_on_the_disk_before_the_name_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync of the file, rename, fsync of the folder, in this order."""
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(handle: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    def spy_replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    files.write_atomic(tmp_path / "a", b"x")
    assert events == ["file", "rename", "folder"]


def test_files_get_the_permissions_of_ordinary_files(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_bytes(b"")
    files.save_tensors(tmp_path / "a", {"x": torch.zeros(1)})
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_tensors_of_any_layout_come_back_bit_equal(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {
        "view": base.T[1:],
        "shared": base,
        "half": base.half(),
        "ints": torch.arange(3),
        "empty": torch.empty(0, 3),
    }
    files.save_tensors(tmp_path / "t.safetensors", tensors, {"what": "test"})
    loaded = files.load_tensors(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert files.read_metadata(tmp_path / "t.safetensors") == {"what": "test"}


def test_a_truncated_tensor_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    files.save_tensors(path, {"x": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"t\.safetensors: not a complete safetensors file"):
        files.load_tensors(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"t\.safetensors: not a complete safetensors file"):
        files.read_metadata(path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path: Path, code: int) -> None:
    path = tmp_path / "a"
    files.write_atomic(path, b"old")

    def full(temporary: Path) -> None:
        temporary.write_bytes(b"ne")
        raise OSError(code, os.strerror(code))

    with pytest.raises(OSError, match=r"make room and continue, earlier files are whole: '.*/a'") as error:
        files.write_atomic(path, full)
    assert (error.value.errno, error.value.filename) == (code, str(path))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_under_tensors_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error as safetensors words it; other errors keep their own message."""

    def full(*arguments: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    path = tmp_path / "t.safetensors"
    with pytest.raises(OSError, match=r"make room and continue.*t\.safetensors") as error:
        files.save_tensors(path, {"x": torch.zeros(100_000)})
    assert error.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []
    with pytest.raises(PermissionError, match="^denied$"), files.naming_full_disk(path):
        raise PermissionError("denied")


def test_what_a_killed_write_left_is_removed(tmp_path: Path) -> None:
    """The process dies while it writes: safetensors may have made a file of its own by then."""

    code = """
import os, sys
from saemnesia_fast.files import write_atomic

def die(temporary):
    (temporary.parent / ".tmpAbC123").write_bytes(b"ha")
    os._exit(0)

write_atomic(sys.argv[1], die)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True, cwd=tmp_path)
    (left,) = tmp_path.iterdir()
    assert [path.name for path in left.iterdir()] == [".tmpAbC123"]
    (tmp_path / ".hidden").write_bytes(b"")
    files.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [".hidden"]
    files.remove_leftovers(tmp_path / "no such folder")


def test_tensors_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    x = torch.arange(40.0).view(10, 4)
    files.save_tensors(path, {"x": x, "y": x + 1})
    with files.open_tensors(path) as file:
        assert torch.equal(file.get_slice("y")[3:5], x[3:5] + 1)
    with pytest.raises(ValueError, match=r"t\.safetensors: not a complete"), files.open_tensors(path) as file:
        file.get_tensor("z")


def test_json_round_trip_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"name": "été", "numbers": [1, 2.5, None]})
    assert files.read_json(path) == {"name": "été", "numbers": [1, 2.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text())["name"] == "été"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"a\.json: not valid JSON"):
        files.read_json(path)


def test_an_existing_folder_needs_no_hub(tmp_path: Path) -> None:
    (tmp_path / "unet.up").mkdir()
    assert files.resolve_folder(tmp_path, "unet.up", None, ("*",)) == tmp_path / "unet.up"
    with pytest.raises(FileNotFoundError, match="has no folder 'unet.down'"):
        files.resolve_folder(tmp_path, "unet.down", None, ("*",))
    with pytest.raises(FileNotFoundError, match="no such folder, and not a Hub repository name"):
        files.resolve_folder(tmp_path / "missing", None, None, ("*",))


@pytest.mark.parametrize(
    ("revision", "warns"), [(None, True), ("main", True), ("0123456789abcdef" * 2 + "01234567", False)]
)
def test_a_hub_repository_is_fetched_with_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, revision: str | None, warns: bool
) -> None:
    """SPEC 6.4: an unpinned revision logs a warning."""
    asked: list[object] = []

    def snapshot_download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend([repo, revision, allow_patterns])
        (tmp_path / "hook").mkdir()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with caplog.at_level(logging.WARNING, "saemnesia_fast"):
        folder = files.resolve_folder("owner/name", "hook", revision, ("cfg.json", "*.safetensors"))
    assert folder == tmp_path / "hook"
    assert asked == ["owner/name", revision, ["hook/cfg.json", "hook/*.safetensors"]]
    assert bool(caplog.records) == warns
