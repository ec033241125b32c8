"""What one UNet call tells its hook points: its timesteps; and how often something ran (SPEC 3.9, 3.10)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Counter(nn.Module):
    """Counts on the host wherever Python runs, and on the device inside of compiled and captured graphs."""

    on_device: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("on_device", torch.zeros((), dtype=torch.int64))
        self.on_host = [0]

    def add(self, seen: Tensor, tracing: bool) -> None:
        """Count once; `seen` is a tensor on the device in use, `tracing` says whether a graph is compiled."""
        if tracing or (seen.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.on_device.add_(1)
        else:
            self.on_host[0] += 1

    def take(self) -> int:
        """The count so far, and start anew. Waits for the device."""
        count = self.on_host[0] + int(self.on_device)
        self.reset()
        return count

    def reset(self) -> None:
        self.on_host[0] = 0
        self.on_device.zero_()


class Clock:
    """The timesteps [B] of the UNet call in progress, and how many calls there were."""

    def __init__(self) -> None:
        self.timesteps: Tensor | None = None
        self.calls = Counter()
        self.device: torch.device | None = None

    def follow(self, device: torch.device) -> None:
        """Be on `device`, to be used in and out of inference mode; a compiled graph must find everything there."""
        if self.device != device:
            with torch.inference_mode(False):
                self.calls.to(device)
            self.device = device

    def tick(self, timesteps: Tensor) -> None:
        """A UNet call begins."""
        tracing = torch.compiler.is_compiling()
        if not tracing:
            self.follow(timesteps.device)
        self.timesteps = timesteps
        self.calls.add(timesteps, tracing)
