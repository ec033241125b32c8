"""Which concepts are erased together: singly, in sequence, and all pairs (SPEC 5.3)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

PROTOCOLS = ("single", "sequence", "pairs")


class Case(NamedTuple):
    """A set of concepts that is erased at once, and what it counts for."""

    protocol: str
    group: str
    """The kind, or both of a mixed pair: "object", "style", "object+style"."""
    erased: tuple[str, ...]


def cases(
    protocol: str,
    classes: Mapping[str, Sequence[str]],
    kinds: Collection[str] | None = None,
    order: Sequence[str] | None = None,
) -> list[Case]:
    """The cases of a protocol, for the given kinds or all of them.

    - "single": every concept alone.
    - "sequence": of every kind the first 1, 2, ... in the order given, or as the classes come, until one is left.
    - "pairs": every two concepts, of one kind or of two, if one of each kind is left.

    Raises:
        ValueError: an unknown protocol, kind or concept.
    """
    kinds = list(classes) if kinds is None else [kind for kind in classes if kind in kinds]
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    if not kinds:
        raise ValueError(f"kinds: expected some of {', '.join(classes)}, got none of them")
    if protocol == "single":
        return [Case(protocol, kind, (name,)) for kind in kinds for name in classes[kind]]
    if protocol == "pairs":
        named = [(kind, name) for kind in kinds for name in classes[kind]]
        return [
            Case(protocol, "+".join(dict.fromkeys((kind, other_kind))), (name, other))
            for (kind, name), (other_kind, other) in combinations(named, 2)
            if kind != other_kind or len(classes[kind]) > 2
        ]
    found = []
    for kind in kinds:
        names = _ordered(classes[kind], order, classes)
        found += [
            Case(protocol, kind, tuple(names[:count]))
            for count in range(1, min(len(names), len(classes[kind]) - 1) + 1)
        ]
    return found


def _ordered(names: Sequence[str], order: Sequence[str] | None, classes: Mapping[str, Sequence[str]]) -> list[str]:
    """The names of a kind as they come in `order`, all of them where it names none of the kind."""
    unknown = sorted(set(order or ()) - {name for some in classes.values() for name in some})
    if unknown:
        raise ValueError(f"order: expected concepts, got {unknown}")
    return [name for name in dict.fromkeys(order or ()) if name in names] or list(names)
