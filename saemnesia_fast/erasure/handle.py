"""The handle of an erasure on a live pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import count as counting
from types import TracebackType

import torch
from torch import nn

from .clock import Clock, Counter
from .hooks import Attachment, ClockHook, EraseHook, erase_hooks
from .point import ErasurePoint
from .report import ConceptReport
from .selecting import Concepts, Selector, Strength

_serial = counting()


class Erasure:
    """An erasure in effect on a pipeline or UNet: a handle, and a context manager that removes it (SPEC 8).

    Made by `apply_erasure`. Once removed, or replaced at all of its hook points, it is inert: `remove` does nothing and
    `set`, `paused` and `verify` raise RuntimeError.
    """

    def __init__(
        self,
        unet: nn.Module,
        points: Mapping[str, ErasurePoint],
        clock: Clock,
        selector: Selector,
        concepts: Concepts,
        strength: Strength,
        cfg: bool | None,
    ) -> None:
        self.concepts = concepts
        self.strength = strength
        self._unet = unet
        self._points = dict(points)
        self._clock = clock
        self._selector = selector
        self._cfg = cfg
        self._clock_attachment: Attachment | None = None
        self._attachments: dict[str, Attachment] = {}
        self._unguard: Callable[[], None] | None = None
        self.set_guidance(None)

    def attach(
        self, time_proj: nn.Module, blocks: Mapping[str, nn.Module], guard: Callable[[Erasure], Callable[[], None]]
    ) -> None:
        """Put the hooks in place, taking the place of other erasures on the same blocks, and `guard` the calls."""
        for block in blocks.values():
            for earlier in erase_hooks(block):
                earlier.release()
        serial = next(_serial)
        try:
            hook = ClockHook(self._clock)
            self._clock_attachment = Attachment(time_proj, hook, f"saemnesia_fast.clock.{serial}")
            for name, block in blocks.items():
                erase = EraseHook(self._points[name], release=partial(self._release, name))
                self._attachments[name] = Attachment(block, erase, f"saemnesia_fast.erase.{serial}")
            self._unguard = guard(self)
        except BaseException:
            self.remove()
            raise

    @property
    def hook_points(self) -> tuple[str, ...]:
        """The hook points at which this erasure is in effect; none once it is inert."""
        return tuple(self._attachments)

    def set(self, concepts: Concepts | None = None, strength: Strength | None = None) -> None:
        """Change what is erased, or how strongly, without recompiling anything (SPEC 3.11); None keeps what is.

        Raises:
            ValueError: an unknown concept, more latents than `max_latents`, or another number of prompts. Nothing has
                changed then.
            RuntimeError: the erasure is inert.
        """
        self._check_in_effect()
        concepts = self.concepts if concepts is None else concepts
        strength = self.strength if strength is None else strength
        selections = {name: self._selector(name, concepts, strength) for name in self._attachments}
        for name, selected in selections.items():
            self._points[name].tables.check(selected)
        for name, selected in selections.items():
            self._points[name].tables.write(selected)
        self.concepts, self.strength = concepts, strength
        self._clear_records()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave every image as it is inside the context; a switch on the device, so nothing is recompiled."""
        self._check_in_effect()
        before = {name: point.tables.enabled for name, point in self._points.items()}
        for point in self._points.values():
            point.tables.enable(False)
        try:
            yield
        finally:
            for name, enabled in before.items():
                self._points[name].tables.enable(enabled)

    def warmup(self) -> None:
        """Do now what the first image would wait for: load what is to be loaded, compile what is to be compiled.

        Runs every edit on zeros of the UNet's dtype and memory format, with timesteps of the dtypes that schedulers
        use. What is reported and verified does not change. Call it again after the pipeline has moved.
        """
        self._check_in_effect()
        weight = next(parameter for parameter in self._unet.parameters() if parameter.dim() == 4)
        for name in self._attachments:
            self._points[name].warmup(weight)

    def remove(self) -> None:
        """Take everything off again, leaving the pipeline as it was (SPEC 7.4). A second call does nothing."""
        for name in self.hook_points:
            self._detach(name)
        if self._clock_attachment is not None:
            self._clock_attachment.remove()
            self._clock_attachment = None
        if self._unguard is not None:
            self._unguard()
            self._unguard = None
        self._clock.timesteps = None

    def _detach(self, name: str) -> None:
        attachment = self._attachments.pop(name, None)
        if attachment is not None:
            attachment.remove()
            self._points[name].workspace.clear()

    def _release(self, name: str) -> None:
        self._detach(name)
        if not self._attachments:
            self.remove()

    def __enter__(self) -> Erasure:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def begin_call(self, device: torch.device | str | None) -> None:
        """Start of a pipeline call: follow it to its device, count from zero, report anew."""
        self.verify_attached()
        if device is not None:
            self._clock.follow(torch.device(device))
            for point in self._points.values():
                point.follow(torch.device(device))
        for counter in self._counters():
            counter.reset()
        self._clear_records()

    def set_guidance(self, on: bool | None) -> None:
        """Whether the UNet calls to come hold two halves, None if nobody says; `apply_erasure(cfg=)` overrides it."""
        for point in self._points.values():
            point.cfg = on if self._cfg is None else self._cfg

    def verify(self) -> None:
        """Raise RuntimeError unless the UNet ran, with the edit at each hook point, since the last check (SPEC 3.10).

        Pipelines do this after every image; for a bare compiled UNet call it after sampling. It waits for the device.
        """
        self.verify_attached()
        if not self._attachments:
            return
        calls, *runs = (counter.take() for counter in self._counters())
        if calls == 0:
            raise RuntimeError(
                "the erasure did not run: the UNet that it was applied to was not called. Was the pipeline's UNet "
                "exchanged? Remove the erasure and apply it anew"
            )
        for name, count in zip(self._points, runs, strict=True):
            if name in self._attachments and count < calls:
                raise RuntimeError(
                    f"the erasure at {name} ran in {count} of {calls} UNet calls: the block's hook was bypassed, so "
                    "images are not erased. Remove the erasure and apply it anew"
                )

    def verify_attached(self) -> None:
        """Raise RuntimeError if somebody took a hook out. Looks at the host only."""
        clock = self._clock_attachment
        if (clock is None or clock.in_place) and all([one.in_place for one in self._attachments.values()]):
            return
        lost = [name for name, one in self._attachments.items() if not one.in_place] or ["time_proj"]
        raise RuntimeError(
            f"the erasure's hook at {lost[0]} was taken out by somebody else, so images are not erased. "
            "Remove the erasure and apply it anew"
        )

    def report(self) -> list[ConceptReport]:
        """Per hook point, image and erased concept: tokens seen, flagged and steered, mean activation, heat map.

        Of the last pipeline call; for a bare UNet of all calls since the erasure was applied or set. With guidance the
        conditional half is reported. Raises RuntimeError unless the erasure was applied with `record=True`.
        """
        reports: list[ConceptReport] = []
        for name, point in self._points.items():
            if point.recorder is None:
                raise RuntimeError("there is nothing to report: apply the erasure with record=True")
            reports += point.recorder.report(name, point.tables.concepts)
        return reports

    def explain(self) -> str:
        """What is erased where, by how many latents, and which backend computes it and why: text for people."""
        lines = [self._selector.explain()]
        if not self._attachments:
            lines.append("not in effect: removed, or replaced by another erasure")
        for name, point in self._points.items():
            if name in self._attachments:
                tables, held = point.tables, point.workspace.num_bytes
                used = (tables.thresholds != torch.inf).sum(-1)
                lines.append(
                    f"{name}: {', '.join(tables.concepts) or 'nothing'}; {int(used.min())} to {int(used.max())} "
                    f"latents a step, room for {tables.capacity}; {len(tables.timesteps)} stored timesteps"
                    f"{f'; {held / 2**20:.1f} MiB of scratch memory' if held else ''}"
                )
        point = next(iter(self._points.values()))
        lines += [f"{op} on {point.device}: {name} ({why})" for op, name, why in point.backends]
        return "\n".join(lines)

    def _counters(self) -> list[Counter]:
        return [self._clock.calls, *(point.runs for point in self._points.values())]

    def _clear_records(self) -> None:
        for point in self._points.values():
            if point.recorder is not None:
                point.recorder.clear()

    def _check_in_effect(self) -> None:
        if not self._attachments:
            raise RuntimeError("the erasure is not in effect: it was removed, or another one took its place")
