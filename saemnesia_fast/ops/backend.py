"""Which implementation computes each op: a table of op x backend, the user's choice, and the reasons (SPEC 7.3)."""

import logging
import os
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import torch

from .workspace import Workspace

logger = logging.getLogger("saemnesia_fast")

BACKENDS = ("cuda", "triton", "cpu", "eager")
OPS = (
    "encode_topk",
    "decode",
    "erase",
    "probe",
    "steering_lines",
    "latent_gradients",
    "encoder_gradients",
    "decoder_gradient",
    "gather_dot",
    "adam_rows",
    "sparse_gradients",
)


class Refusal(NamedTuple):
    """Why a backend does not compute an op."""

    reason: str
    missed: bool
    """True if it should have been there (a fallback worth a warning), False if it has no business on this device."""


class Choice(NamedTuple):
    """One line of `backend_report`."""

    op: str
    backend: str
    why: str


class Slot(NamedTuple):
    implementation: Callable[..., Any]
    refuse: Callable[[torch.device], Refusal | None]
    takes_workspace: bool = False


_slots: dict[tuple[str, str], Slot] = {}
_selected: dict[tuple[Any, ...], Slot] = {}
_chosen: str | None = None
_logged: set[tuple[str, str]] = set()


def register(
    op: str,
    backend: str,
    implementation: Callable[..., Any],
    refuse: Callable[[torch.device], Refusal | None] = lambda device: None,
    takes_workspace: bool = False,
) -> None:
    """Fill the slot of `op` and `backend`. `refuse(device)` says why it cannot run there, or None if it can.

    `takes_workspace`: the implementation has a keyword `workspace`, a `Workspace` or None.
    """
    if op not in OPS or backend not in BACKENDS:
        raise ValueError(f"op, backend: expected one of {OPS} and one of {BACKENDS}, got {op!r} and {backend!r}")
    _slots[op, backend] = Slot(implementation, refuse, takes_workspace)
    _selected.clear()


def _check(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source}: expected one of auto, {', '.join(reversed(BACKENDS))}, got {name!r}")
    return name


def current_backend() -> str:
    """The name set by `use_backend`, else SAEMNESIA_FAST_BACKEND, else "auto"."""
    return _chosen or _check(os.environ.get("SAEMNESIA_FAST_BACKEND") or "auto", "SAEMNESIA_FAST_BACKEND")


class use_backend:
    """Choose the backend of all ops in this process: a call sets it, the end of a `with` block restores the former one.

    `use_backend("auto" | "eager" | "cpu" | "triton" | "cuda")`. "auto" takes the fastest that can run. Any other name
    is never replaced by another: an op that it cannot compute raises RuntimeError with the reason.
    Raises ValueError for an unknown name.
    """

    def __init__(self, name: str) -> None:
        global _chosen
        self._previous = _chosen
        _chosen = _check(name, "backend")

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _chosen
        _chosen = self._previous


def _refusal(op: str, backend: str, device: torch.device) -> Refusal | None:
    slot = _slots.get((op, backend))
    return slot.refuse(device) if slot else Refusal("not in this version", missed=False)


def _resolve(op: str, device: torch.device) -> tuple[str, list[tuple[str, Refusal]]]:
    """The backend of `op` and the faster ones that refused; RuntimeError when an explicit choice cannot run."""
    name = current_backend()
    refused: list[tuple[str, Refusal]] = []
    for backend in BACKENDS if name == "auto" else (name,):
        refusal = _refusal(op, backend, device)
        if refusal is None:
            return backend, refused
        refused.append((backend, refusal))
    raise RuntimeError(f"{op}: backend {name!r} was chosen but cannot run on {device}: {refused[-1][1].reason}")


def select(op: str, device: torch.device, workspace: Workspace | None = None) -> Callable[..., Any]:
    """Return the implementation of `op` for tensors on `device`; looked for once for each choice of the user.

    Given a `workspace`, it is that of a single caller and keeps its scratch memory there, if it takes one.

    Under "auto", a faster backend that is missing without need is logged once per (op, reason) at WARNING, or raises
    RuntimeError if SAEMNESIA_FAST_STRICT=1.
    """
    slot = _slot(op, device)
    if workspace is not None and slot.takes_workspace:
        return partial(slot.implementation, workspace=workspace)
    return slot.implementation


def takes_workspace(op: str, device: torch.device) -> bool:
    """Whether the implementation that `select` returns keeps anything in a workspace."""
    return _slot(op, device).takes_workspace


def _slot(op: str, device: torch.device) -> Slot:
    environment = os.environ.get
    key = (op, device, _chosen, environment("SAEMNESIA_FAST_BACKEND"), environment("SAEMNESIA_FAST_STRICT"))
    if key not in _selected:
        _selected[key] = _select(op, device)
    return _selected[key]


def _select(op: str, device: torch.device) -> Slot:
    backend, refused = _resolve(op, device)
    for faster, refusal in refused:
        if refusal.missed:
            tell_missed(op, backend, faster, refusal.reason)
    return _slots[op, backend]


def tell_missed(op: str, backend: str, faster: str, reason: str) -> None:
    """Log, once per (op, reason), that the `faster` backend is missed; RuntimeError if SAEMNESIA_FAST_STRICT=1."""
    message = f"{op}: {backend} instead of {faster} ({reason}): correct but slower"
    if os.environ.get("SAEMNESIA_FAST_STRICT") == "1":
        raise RuntimeError(f"{message}; SAEMNESIA_FAST_STRICT=1 forbids it")
    if (op, reason) not in _logged:
        _logged.add((op, reason))
        logger.warning(message)


def backend_report(device: torch.device | str = "cpu") -> list[Choice]:
    """Say for each op which backend computes it on `device` ("none" if it would raise), and why."""
    lines = []
    for op in OPS:
        try:
            backend, refused = _resolve(op, torch.device(device))
        except RuntimeError as error:
            lines.append(Choice(op, "none", str(error)))
            continue
        chosen = current_backend()
        reasons = ", ".join(f"{faster}: {refusal.reason}" for faster, refusal in refused) or "the fastest there is"
        lines.append(Choice(op, backend, reasons if chosen == "auto" else f"{chosen!r} was chosen"))
    return lines
