"""The edit at one hook point: tokens in, erased tokens out (SPEC 3.1-3.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saemnesia_fast import ops
from saemnesia_fast.ops import backend
from saemnesia_fast.ops.registration import only_numbers
from saemnesia_fast.ops.workspace import Workspace, state_of
from saemnesia_fast.sae import unit_norm_statistics

from .clock import Counter
from .replace import replace_tokens
from .report import Recorder
from .tables import SteeringTables

if TYPE_CHECKING:
    from saemnesia_fast.sae import TopKSAE

    from .clock import Clock
    from .contrast import Contrast


class Weights(nn.Module):
    """The SAE's, shared with it as long as the device is."""

    W_enc: Tensor
    b_enc: Tensor
    b_dec: Tensor
    W_dec: Tensor

    def __init__(self, sae: TopKSAE) -> None:
        super().__init__()
        for name in ("W_enc", "b_enc", "b_dec", "W_dec"):
            self.register_buffer(name, getattr(sae, name).detach())

    def in_order(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.W_enc, self.b_enc, self.b_dec, self.W_dec


class ErasurePoint:
    """One hook point of an erasure."""

    def __init__(
        self,
        name: str,
        sae: TopKSAE,
        tables: SteeringTables,
        clock: Clock,
        *,
        mode: str,
        contrast: Contrast | None,
        residual: bool,
        conditional_only: bool,
        norm_scaled: bool,
        precision: str,
        window: tuple[float, float],
        recorder: Recorder | None,
    ) -> None:
        self.name = name
        self.weights = Weights(sae)
        self.d = sae.d
        self.k = sae.k
        self.unit_norm = sae.cfg.input_unit_norm
        self.tables = tables
        self.clock = clock
        self.runs = Counter()
        self.mode = mode
        self.contrast = contrast
        self.residual = residual
        self.conditional_only = conditional_only
        self.norm_scaled = norm_scaled
        self.precision = precision
        self.window = window
        self.recorder = recorder
        self.cfg: bool | None = None
        self.device: torch.device | None = None
        self.backends: list[backend.Choice] = []
        self.workspace = Workspace()

    def follow(self, device: torch.device) -> None:
        """Be on `device`, to be used in and out of inference mode, and decide who computes there."""
        if self.device == device:
            return
        with torch.inference_mode(False):
            self.weights.to(device)
            self.runs.to(device)
            self.tables.settle(device, self.workspace)
            if self.contrast is not None:
                self.contrast.to(device)
        self._weights = self.weights.in_order()
        self.workspace.clear()
        self._erase = backend.select("erase", device, self.workspace)
        self._repeats = backend.takes_workspace("erase", device)
        detects = self.mode in ("replace", "contrast")
        needed = ["probe" if detects else "erase", "steering_lines"]
        if detects or self.recorder is not None:
            self._probe = backend.select("probe", device)
            needed.append("probe")
        self.backends = [choice for choice in ops.backend_report(device) if choice.op in needed]
        self.device = device

    @torch.no_grad()
    def warmup(self, weight: Tensor) -> None:
        """Erase zeros as a UNet with such a convolution's weight would bring them here."""
        images = 2 * self.tables.num_prompts
        side = 16  # like every usual size a multiple of 16 tokens, by which kernels are specialised
        zeros = weight.new_zeros(images, self.d, side, side).contiguous(memory_format=_memory_format(weight))
        self.follow(zeros.device)
        before = self.clock.timesteps, self.cfg, self.recorder, self.runs
        self.cfg, self.recorder, self.runs = True, before[2] and Recorder(), Counter().to(zeros.device)
        try:
            for dtype in (torch.int64, torch.float32):
                self.clock.timesteps = torch.zeros(1, dtype=dtype, device=zeros.device).expand(images)
                self.erase(zeros, torch.zeros_like(zeros), fresh=True)
        finally:
            self.clock.timesteps, self.cfg, self.recorder, self.runs = before

    def erase(self, output: Tensor, block_input: Tensor, fresh: bool = False) -> Tensor:
        """The block's erased output [B, C, H, W], in the dtype and memory format of `output`, or `output` itself.

        `fresh`: the block made `output` in this call, and keeps no hold of it.

        Raises:
            RuntimeError: the timestep, or a number of guidance halves that matters, is unknown.
            ValueError: C is not the SAE's d, or the prompts do not divide B.
        """
        tracing = torch.compiler.is_compiling()
        if not tracing:
            self.follow(output.device)
        timesteps = self.clock.timesteps
        if timesteps is None:
            raise RuntimeError(f"{self.name}: the block ran outside a UNet call, so its timestep is unknown")
        images, channels = output.shape[:2]
        if channels != self.d:
            raise ValueError(
                f"activation at {self.name}: expected [B, C={self.d}, H, W] to match the SAE's d, "
                f"got {list(output.shape)}"
            )
        num_halves = None if self.cfg is None else 1 + int(self.cfg)
        self.runs.add(output, tracing)
        if self.contrast is not None and num_halves != 2:
            if self.tables.enabled:
                raise RuntimeError(f"{self.name}: mode 'contrast' needs guidance, a batch of two halves")
            return output
        if fresh and not tracing and self._may_write_over(output, block_input):
            self._write_over(output, timesteps, num_halves)
            return output
        lines = self._lookup(timesteps, images, num_halves)
        tokens = output.permute(0, 2, 3, 1)
        if self.residual:
            # In float32, the difference of erased and given tokens does not lose what a half-precision output holds.
            dtype = torch.promote_types(output.dtype, torch.float32)
            base = block_input.permute(0, 2, 3, 1).to(dtype)
            whole, tokens = tokens, tokens.to(dtype) - base
            edited = self._edit(tokens, lines, timesteps)
            moved = whole.to(dtype) + (edited - tokens) if self.mode == "exact" else base + edited
            erased = torch.where(edited == tokens, whole, moved.to(output.dtype))
        else:
            erased = self._edit(tokens, lines, timesteps)
        if self.recorder is not None:
            self._record(self.recorder, tokens, lines, num_halves)
        return erased.permute(0, 3, 1, 2).contiguous(memory_format=_memory_format(output))

    def _may_write_over(self, output: Tensor, block_input: Tensor) -> bool:
        """Whether the erased tokens may take the place of the block's own: nobody else needs these."""
        plain = self.mode == "exact" and not self.residual and not self.unit_norm and self.recorder is None
        return plain and only_numbers(output) and output.data_ptr() != block_input.data_ptr()

    def _write_over(self, output: Tensor, timesteps: Tensor, num_halves: int | None) -> None:
        """Erase the tokens of `output` [B, C, H, W] where they are."""
        how = None
        if self._repeats:
            kinds = [(one.shape, one.stride(), one.dtype) for one in (output, timesteps)]
            how = (*kinds, num_halves, state_of(self._weights))
            if self.workspace.repeat(how, output, timesteps):
                return
        with self.workspace.record(how, output, timesteps):
            lines = self._lookup(timesteps, len(output), num_halves)
            self._erase(output.permute(0, 2, 3, 1), *self._arguments(self._weights, lines), in_place=True)

    def _lookup(self, timesteps: Tensor, images: int, num_halves: int | None) -> ops.SteeringLines:
        return self.tables.lookup(timesteps, images, num_halves, self.conditional_only, self.window)

    def _arguments(self, weights: tuple[Tensor, ...], lines: ops.SteeringLines) -> tuple[Any, ...]:
        entries = (lines.latents, lines.thresholds, lines.factors)
        return (*weights, self.k, *entries, self.mode, self.norm_scaled, self.precision)

    def _edit(self, tokens: Tensor, lines: ops.SteeringLines, timesteps: Tensor) -> Tensor:
        if self.contrast is not None:
            return self._contrast(self.contrast, tokens, lines, timesteps)
        given, std = tokens, None
        if self.unit_norm:
            mean, std = unit_norm_statistics(tokens)
            given = (tokens - mean) / std
        if self.mode == "replace":
            return replace_tokens(tokens, self._detect(given, lines)[1].any(-1))
        if only_numbers(given):
            edited = self._erase(given, *self._arguments(self._weights, lines))
        else:
            edited = torch.ops.saemnesia_fast.erase(given, *self._arguments(self.weights.in_order(), lines))
        if std is not None:
            mapped = tokens + (edited - given) * std if self.mode == "exact" else edited * std + mean
            edited = torch.where(edited == given, tokens, mapped.to(tokens.dtype))
        if self.mode == "exact":
            return edited
        active = _per_image(lines.active, len(tokens))
        return torch.where(active[:, None, None, None], edited, tokens)

    def _contrast(self, contrast: Contrast, tokens: Tensor, lines: ops.SteeringLines, timesteps: Tensor) -> Tensor:
        """Detects in the conditional half alone."""
        given, scale = tokens.chunk(2)[1], None
        lines = ops.SteeringLines(*(one.chunk(2)[1] for one in lines))
        if self.unit_norm:
            mean, scale = unit_norm_statistics(given)
            given = (given - mean) / scale
        strengths = _per_image(lines.factors, len(given))
        return contrast(tokens, *self._detect(given, lines), strengths, timesteps, scale)

    def _detect(self, tokens: Tensor, lines: ops.SteeringLines) -> tuple[Tensor, Tensor]:
        """Activations [B, H, W, S] of the selected latents, and bool: where mode "exact" would steer them."""
        entries = (lines.latents, lines.thresholds)
        probe = self._probe if only_numbers(tokens) else torch.ops.saemnesia_fast.probe
        weights = self.weights.in_order()[:3]
        return probe(tokens, *weights, self.k, *entries, self.precision)

    @torch.compiler.disable
    def _record(self, recorder: Recorder, tokens: Tensor, lines: ops.SteeringLines, num_halves: int | None) -> None:
        tokens = tokens.detach()
        if self.unit_norm:
            mean, std = unit_norm_statistics(tokens)
            tokens = (tokens - mean) / std
        weights = self._weights[:3]
        entries = (lines.latents, lines.thresholds)
        activations, steered = self._probe(tokens, *weights, self.k, *entries, self.precision)
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
