"""Fixed-size device tables of what to steer, and the lookup of a UNet call's lines in them (SPEC 2.4, 3.4, 3.11)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from saemnesia_fast import ops
from saemnesia_fast.ops import backend
from saemnesia_fast.ops.registration import only_numbers
from saemnesia_fast.ops.workspace import Workspace

if TYPE_CHECKING:
    from saemnesia_fast.concepts import Selection

MIN_CAPACITY = 8


class SteeringTables(nn.Module):
    """Selections of G prompts at T stored timesteps, S latents each at most, written in place.

    Args:
        timesteps: [T] stored timesteps.
        selections: G selections, None for a prompt that keeps everything. One selection serves any batch.
        capacity: S; None for what the selections need, rounded up to a power of two, at least 8.
    """

    timesteps: Tensor
    latents: Tensor
    thresholds: Tensor
    factors: Tensor
    owners: Tensor
    switches: Tensor

    def __init__(self, timesteps: Tensor, selections: Sequence[Selection | None], capacity: int | None = None) -> None:
        super().__init__()
        needed = max((selection.latents.shape[1] for selection in selections if selection is not None), default=0)
        if capacity is None:
            capacity = max(MIN_CAPACITY, 1 << max(needed - 1, 0).bit_length())
        shape = (len(timesteps), len(selections), capacity)
        self.register_buffer("timesteps", timesteps.to(torch.float32))
        self.register_buffer("latents", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("thresholds", torch.full(shape, math.inf))
        self.register_buffer("factors", torch.ones(shape))
        self.register_buffer("owners", torch.full(shape, -1))
        self.register_buffer("switches", torch.zeros(len(selections), dtype=torch.bool))
        self.enabled = True
        self.occupied = [False] * len(selections)
        self.concepts: tuple[str, ...] = ()
        self.write(selections)

    def settle(self, device: torch.device, workspace: Workspace) -> None:
        """Be on `device`, and decide who looks up lines there, in the caller's workspace."""
        self.to(device)
        self._held = self._in_order()
        self._look_up = backend.select("steering_lines", device, workspace)
        self._lines: dict[tuple[float, bool], ops.SteeringLines] = {}
        # A look at the data is free there; elsewhere the host would wait.
        self._on_host = device.type == "cpu"

    @torch.inference_mode(False)
    def _new_line(self, time: float, active: bool) -> ops.SteeringLines:
        step = int((self.timesteps - time).abs().argmin())
        thresholds = self.thresholds[step] if active else torch.full_like(self.thresholds[step], math.inf)
        return ops.SteeringLines(
            self.latents[step], thresholds, self.factors[step], self.owners[step], torch.tensor([active])
        )

    def _known_line(self, time: float, window: tuple[float, float]) -> ops.SteeringLines:
        """The only prompt's line at a timestep: parts of the tables themselves, put together once."""
        first, last = window
        active = self.enabled and self.occupied[0] and first >= time >= last
        if (time, active) not in self._lines:
            self._lines[time, active] = self._new_line(time, active)
        return self._lines[time, active]

    def _in_order(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `steering_lines` takes them."""
        return self.timesteps, self.latents, self.thresholds, self.factors, self.owners, self.switches

    @property
    def capacity(self) -> int:
        return self.latents.shape[-1]

    @property
    def num_prompts(self) -> int:
        return self.latents.shape[1]

    def check(self, selections: Sequence[Selection | None]) -> None:
        """Raise ValueError if `selections` do not fit into the tables."""
        if len(selections) not in (1, self.num_prompts):
            raise ValueError(
                f"concepts: expected one list of names, or one for each of {self.num_prompts} prompts as when the "
                f"erasure was applied, got {len(selections)} lists; apply the erasure anew"
            )
        for selection in selections:
            if selection is not None and selection.latents.shape[1] > self.capacity:
                raise ValueError(
                    f"concepts: selected {selection.latents.shape[1]} latents a step, expected at most "
                    f"max_latents={self.capacity}; apply the erasure with a larger max_latents"
                )

    def write(self, selections: Sequence[Selection | None]) -> None:
        """Replace the contents, on whatever device the tables are; a single selection goes to all prompts."""
        self.check(selections)
        if len(selections) == 1:
            selections = list(selections) * self.num_prompts
        self.concepts = tuple(dict.fromkeys(name for s in selections if s is not None for name in s.concepts))
        shape = self.latents.shape
        new = {
            "latents": torch.zeros(shape, dtype=torch.int64),
            "thresholds": torch.full(shape, math.inf),
            "factors": torch.ones(shape),
            "owners": torch.full(shape, -1),
        }
        for g, selection in enumerate(selections):
            if selection is None:
                continue
            width = selection.latents.shape[1]
            index = torch.tensor([self.concepts.index(name) for name in selection.concepts] + [-1])
            new["latents"][:, g, :width] = selection.latents
            new["thresholds"][:, g, :width] = selection.thresholds
            new["factors"][:, g, :width] = selection.factors
            new["owners"][:, g, :width] = index[selection.owners]
        for name, values in new.items():
            self.get_buffer(name).copy_(values)
        self.occupied = [selection is not None for selection in selections]
        self.enable(self.enabled)

    def enable(self, enabled: bool) -> None:
        """Let all prompts be steered, or none."""
        self.enabled = enabled
        self.switches.copy_(torch.tensor([enabled and occupied for occupied in self.occupied]))

    def lookup(
        self,
        timesteps: Tensor,
        images: int,
        num_halves: int | None,
        conditional_only: bool,
        window: tuple[float, float],
    ) -> ops.SteeringLines:
        """Lines of a UNet call, found on the device; nothing waits for a GPU or branches on its values.

        Args:
            timesteps: [images], as the UNet expanded them. A stride of 0 says that all images share one.
            images: rows of the UNet's batch.
            num_halves: 2 with classifier-free guidance, 1 without, None if unknown.
            conditional_only: leave the first of two halves as it is.
            window: first and last timestep at which to steer, noisier one first.

        Raises:
            RuntimeError: it matters how many halves there are, but is unknown.
            ValueError: the prompts do not divide the rows.
        """
        prompts = len(self.occupied)
        uniform = prompts == 1 and not conditional_only
        if num_halves is None and not uniform:
            raise RuntimeError(
                "whether the UNet's batch holds two guidance halves is unknown here: call the pipeline that the "
                "erasure was applied to, or pass cfg=True or cfg=False to apply_erasure"
            )
        blocks = 1 if uniform else (num_halves or 1) * prompts
        if images % blocks:
            raise ValueError(
                f"concepts: expected the UNet's batch to be a multiple of {num_halves} halves x {prompts} prompts, "
                f"got {images} rows"
            )
        direct = only_numbers(timesteps)
        if uniform and direct and self._on_host:
            times = timesteps.tolist()
            if times.count(times[0]) == len(times):
                return self._known_line(times[0], window)
        shared = timesteps.shape[0] == 1 or timesteps.stride(0) == 0
        if shared:
            timesteps = timesteps[:1]
        lines = blocks if shared else images
        first_block = prompts if conditional_only and num_halves == 2 else 0
        if direct:
            return ops.SteeringLines(*self._look_up(timesteps, *self._held, lines, blocks, first_block, *window))
        return ops.steering_lines(timesteps, *self._in_order(), lines, blocks, first_block, *window)
