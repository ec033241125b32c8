"""Work for spawned processes that costs no import."""

from pathlib import Path


def note(folder: Path, part: tuple[int, int]) -> None:
    """Leaves a file named by the part; part 1 fails where the folder is called "bad"."""
    (folder / "{}of{}".format(*part)).touch()
    if folder.name == "bad" and part[0] == 1:
        raise SystemExit(3)
