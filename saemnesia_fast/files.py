"""Files as the project writes and finds them: atomic, safetensors or JSON, in folders or on the Hub (SPEC 6)."""

import errno
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("saemnesia_fast")
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_atomic(path: str | os.PathLike[str], data: bytes | Callable[[Path], None]) -> None:
    """Write `path` so that a reader sees the old file or the whole new one, also after a crash (SPEC 6.4).

    `data` is the content, or a function that writes the file whose path it is given. Parent folders are made. A full
    disk is an OSError that names `path`.
    """
    path = Path(path)
    with naming_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A folder, as safetensors makes a temporary file of its own beside the one that it is told to write.
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        temporary = folder / path.name
        try:
            if callable(data):
                data(temporary)
            else:
                temporary.write_bytes(data)
            temporary.chmod(0o666 & ~_umask())
            fsync(temporary)
            temporary.replace(path)
        finally:
            shutil.rmtree(folder)
        fsync(path.parent)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Delete what a killed process's `write_atomic` left in `folder`."""
    for path in Path(folder).glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path)


@contextmanager
def naming_full_disk(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let the OSError of a disk without room, raised in the context, say which file it was and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        advice = f"{os.strerror(error.errno)}; make room and continue, earlier files are whole"
        raise OSError(error.errno, advice, os.fspath(path)) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def fsync(path: Path) -> None:
    """Wait until the file or folder `path` is on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors of any device and layout as one safetensors file, atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(contiguous, temporary, dict(metadata or {}))
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error

    write_atomic(path, write)


def load_tensors(path: str | os.PathLike[str], device: str = "cpu") -> dict[str, "Tensor"]:
    """Read the named tensors of a safetensors file onto `device`.

    Raises FileNotFoundError when there is no such file, ValueError when it is not a whole safetensors file.
    """
    with open_tensors(path, device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextmanager
def open_tensors(path: str | os.PathLike[str], device: str = "cpu") -> Iterator[Any]:
    """A safetensors file as `safetensors.safe_open` gives it: memory-mapped, read where it is asked for a tensor.

    Raises FileNotFoundError when there is no such file, ValueError when it is not a whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the string metadata of a safetensors file without reading its tensors."""
    with open_tensors(path) as file:
        return dict(file.metadata() or {})


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` as indented JSON, atomically; NaN and infinity, which JSON lacks, are a ValueError."""
    write_atomic(path, (json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; ValueError names the file when it does not parse."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def resolve_folder(
    path_or_repo: str | os.PathLike[str],
    subfolder: str | None = None,
    revision: str | None = None,
    allow_patterns: Sequence[str] | None = None,
) -> Path:
    """Return the local folder of a path, or of a Hugging Face Hub repository whose matching files are downloaded.

    An existing folder wins over a repository of that name. `allow_patterns` are relative to the subfolder. A download
    whose `revision` is not a full commit hash can change under the user's feet, so it logs a warning (SPEC 6.4).
    Raises FileNotFoundError when neither a folder nor a repository name is given, or the subfolder is missing.
    """
    folder = Path(path_or_repo)
    if not folder.is_dir():
        repo = str(path_or_repo)
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or repo.startswith("."):
            raise FileNotFoundError(f"{repo}: no such folder, and not a Hub repository name (owner/name)")
        if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
            logger.warning("%s: revision %r is not a commit hash; pin one to get the same files again", repo, revision)
        folder = _download(repo, subfolder, revision, allow_patterns)
    if subfolder:
        folder = folder / subfolder
    if not folder.is_dir():
        raise FileNotFoundError(f"{path_or_repo}: has no folder {subfolder!r}")
    return folder


def _download(repo: str, subfolder: str | None, revision: str | None, allow_patterns: Sequence[str] | None) -> Path:
    from huggingface_hub import snapshot_download

    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    patterns = [prefix + pattern for pattern in allow_patterns or ("*",)]
    return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
