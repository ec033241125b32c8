"""Fixed-size device tables of what to steer, and the lookup of a UNet call's lines in them (SPEC 2.4, 3.4, 3.11)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from saemnesia_fast import ops

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
        """Lines of a UNet call, found on the device: nothing here waits for it or branches on its values.

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
        prompts = self.num_prompts
        shared = timesteps.shape[0] == 1 or timesteps.stride(0) == 0
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
        if shared:
            timesteps = timesteps[:1]
        first, last = window
        return ops.steering_lines(
            timesteps,
            self.timesteps,
            self.latents,
            self.thresholds,
            self.factors,
            self.owners,
            self.switches,
            num_lines=blocks if shared else images,
            num_blocks=blocks,
            first_block=prompts if conditional_only and num_halves == 2 else 0,
            earliest=first,
            latest=last,
        )
