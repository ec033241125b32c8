"""The file beside a supervised SAE that tells which latent was assigned to which concept (SPEC 4.2, 6.1)."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from saemnesia_fast.files import read_json, write_json

if TYPE_CHECKING:
    from saemnesia_fast.sae import TopKSAE

ASSIGNMENT_FILE = "assignment.json"


def save_assignment(
    folder: str | PathLike[str], assignment: Mapping[str, int], kinds: Mapping[str, str], sae: TopKSAE
) -> None:
    """Write `assignment.json` into the folder of `sae`: its hash, and each concept's kind and latent."""
    concepts = {name: {"kind": kinds[name], "latent": latent} for name, latent in assignment.items()}
    write_json(Path(folder) / ASSIGNMENT_FILE, {"sae_hash": sae.content_hash(), "concepts": concepts})


def load_assignment(path: str | PathLike[str], sae_hash: str) -> dict[str, int]:
    """{concept: latent} from a folder or file of `save_assignment`, for a table made with the SAE of that hash.

    `table.assignment = load_assignment(folder, table.sae_hash)` lets a new table take the assignment over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not one that `save_assignment` wrote, or belongs to another SAE.
    """
    path = Path(path)
    path = path / ASSIGNMENT_FILE if path.is_dir() else path
    content = read_json(path)
    try:
        found, concepts = str(content["sae_hash"]), content["concepts"]
        assignment = {name: int(entry["latent"]) for name, entry in concepts.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"assignment: expected what `supervise` wrote, got {path} ({error!r})") from error
    if found != sae_hash:
        raise ValueError(f"assignment: {path} is of SAE {found[:12]}, the table of {sae_hash[:12]}")
    return assignment
