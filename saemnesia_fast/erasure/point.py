"""The edit at one hook point: tokens in, erased tokens out (SPEC 3.1-3.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from saemnesia_fast import ops
from saemnesia_fast.ops.registration import call
from saemnesia_fast.sae import unit_norm_statistics

from .report import Recorder
from .tables import SteeringTables

if TYPE_CHECKING:
    from saemnesia_fast.sae import TopKSAE

    from .hooks import Clock


class ErasurePoint(nn.Module):
    """One hook point of an erasure. It is no child of the UNet, so the UNet's `state_dict` does not see it."""

    W_enc: Tensor
    b_enc: Tensor
    b_dec: Tensor
    W_dec: Tensor
    counter: Tensor

    def __init__(
        self,
        name: str,
        sae: TopKSAE,
        tables: SteeringTables,
        clock: Clock,
        *,
        mode: str,
        residual: bool,
        conditional_only: bool,
        norm_scaled: bool,
        window: tuple[float, float],
        recorder: Recorder | None,
    ) -> None:
        super().__init__()
        for parameter in ("W_enc", "b_enc", "b_dec", "W_dec"):
            self.register_buffer(parameter, getattr(sae, parameter).detach())
        self.register_buffer("counter", torch.zeros((), dtype=torch.int64))
        self.name = name
        self.k = sae.k
        self.unit_norm = sae.cfg.input_unit_norm
        self.tables = tables
        self.clock = clock
        self.mode = mode
        self.residual = residual
        self.conditional_only = conditional_only
        self.norm_scaled = norm_scaled
        self.window = window
        self.recorder = recorder
        self.cfg: bool | None = None

    def forward(self, output: Tensor, block_input: Tensor | None) -> Tensor:
        """The block's erased output [B, C, H, W], in the dtype and memory format of `output`.

        Raises:
            RuntimeError: the timestep, or a number of guidance halves that matters, is unknown.
            ValueError: C is not the SAE's d, or the prompts do not divide B.
        """
        if self.clock.timesteps is None:
            raise RuntimeError(f"{self.name}: the block ran outside a UNet call, so its timestep is unknown")
        if output.shape[1] != self.b_dec.shape[0]:
            raise ValueError(
                f"activation at {self.name}: expected [B, C={self.b_dec.shape[0]}, H, W] to match the SAE's d, "
                f"got {list(output.shape)}"
            )
        num_halves = None if self.cfg is None else 1 + int(self.cfg)
        lines = self.tables.lookup(
            self.clock.timesteps, output.shape[0], num_halves, self.conditional_only, self.window
        )
        self.counter.add_(1)
        if block_input is None:
            tokens = output.permute(0, 2, 3, 1)
            erased = self._edit(tokens, lines)
        else:
            # In float32, the difference of erased and given tokens does not lose what a half-precision output holds.
            dtype = torch.promote_types(output.dtype, torch.float32)
            base = block_input.permute(0, 2, 3, 1).to(dtype)
            whole = output.permute(0, 2, 3, 1)
            tokens = whole.to(dtype) - base
            edited = self._edit(tokens, lines)
            moved = whole.to(dtype) + (edited - tokens) if self.mode == "exact" else base + edited
            erased = torch.where(edited == tokens, whole, moved.to(output.dtype))
        if self.recorder is not None:
            self._record(self.recorder, tokens, lines, num_halves)
        return erased.permute(0, 3, 1, 2).contiguous(memory_format=_memory_format(output))

    def _edit(self, tokens: Tensor, lines: ops.SteeringLines) -> Tensor:
        given = tokens
        if self.unit_norm:
            mean, std = unit_norm_statistics(tokens)
            given = (tokens - mean) / std
        edited = call(
            "erase",
            given,
            self.W_enc,
            self.b_enc,
            self.b_dec,
            self.W_dec,
            self.k,
            lines.latents,
            lines.thresholds,
            lines.factors,
            self.mode,
            self.norm_scaled,
        )
        if self.unit_norm:
            mapped = tokens + (edited - given) * std if self.mode == "exact" else edited * std + mean
            edited = torch.where(edited == given, tokens, mapped.to(tokens.dtype))
        if self.mode == "exact":
            return edited
        active = _per_image(lines.active, len(tokens))
        return torch.where(active[:, None, None, None], edited, tokens)

    @torch.compiler.disable
    def _record(self, recorder: Recorder, tokens: Tensor, lines: ops.SteeringLines, num_halves: int | None) -> None:
        tokens = tokens.detach()
        if self.unit_norm:
            mean, std = unit_norm_statistics(tokens)
            tokens = (tokens - mean) / std
        activations, steered = ops.probe(
            tokens, self.W_enc, self.b_enc, self.b_dec, self.k, lines.latents, lines.thresholds
        )
        rows = slice(len(tokens) // 2 if num_halves == 2 else 0, None)
        recorder.add(
            activations[rows],
            steered[rows],
            _per_image(lines.thresholds, len(tokens))[rows],
            _per_image(lines.owners, len(tokens))[rows],
            _per_image(lines.active, len(tokens))[rows],
            len(self.tables.concepts),
        )


def _per_image(lines: Tensor, images: int) -> Tensor:
    """[images, ...] of lines [L, ...] that each stand for an equal share of consecutive images."""
    return lines.repeat_interleave(images // len(lines), 0)


def _memory_format(activation: Tensor) -> torch.memory_format:
    if activation.is_contiguous() or not activation.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last
