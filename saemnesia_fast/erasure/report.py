"""What an erasure saw and did, per image and concept, accumulated on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConceptReport:
    """One concept in one image at one hook point, over all UNet calls inside the erasure's window."""

    hook_point: str
    image: int
    """Index of the image in the batch; with guidance, the conditional half is the one reported."""
    concept: str
    tokens: int
    """Tokens looked at: height x width x UNet calls."""
    flagged: int
    """Tokens on which one of the concept's latents exceeds its threshold, in the top-k or not."""
    steered: int
    """Tokens on which one of the concept's latents was in the top-k and exceeded its threshold."""
    mean_activation: float
    """Mean over tokens of the summed activations (after ReLU, before TopK) of the concept's latents."""
    heat_map: Tensor
    """[H, W] float32: the same mean, for each place of the activation's grid."""


class Recorder:
    """Sums over UNet calls; starts over when the batch, the grid or the number of concepts changes."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(
        self,
        activations: Tensor,
        steered: Tensor,
        thresholds: Tensor,
        owners: Tensor,
        active: Tensor,
        num_concepts: int,
    ) -> None:
        """Add one UNet call. Nothing waits for the device.

        Args:
            activations: [B, H, W, S] of the selected latents, after ReLU.
            steered: [B, H, W, S] bool.
            thresholds: [B, S], +inf for latents that are not to be steered.
            owners: [B, S] concept index of each latent, -1 for none.
            active: [B] bool, whether the erasure acts on the image in this call.
            num_concepts: C.
        """
        concept = torch.arange(num_concepts, device=owners.device)
        claims = ((owners[..., None] == concept) & active[:, None, None]).to(torch.float32)
        flagged = (activations > thresholds[:, None, None]) & (activations > 0)
        new = {
            "calls": active.to(torch.int64),
            "claims": claims.sum(1),
            "flagged": _tokens_of_concepts(flagged, claims),
            "steered": _tokens_of_concepts(steered, claims),
            "activation": torch.einsum("bhws,bsc->bchw", activations.to(torch.float32), claims),
        }
        same = bool(self._sums) and self._sums["activation"].shape == new["activation"].shape
        self._sums = {name: self._sums[name] + value for name, value in new.items()} if same else new

    def report(self, hook_point: str, concepts: Sequence[str]) -> list[ConceptReport]:
        """Reports by image, then concept; a concept that is not erased in an image has none there."""
        if not self._sums:
            return []
        sums = {name: value.cpu() for name, value in self._sums.items()}
        height, width = sums["activation"].shape[2:]
        reports = []
        for image, calls in enumerate(sums["calls"].tolist()):
            for c, concept in enumerate(concepts):
                if not sums["claims"][image, c]:
                    continue
                heat_map = sums["activation"][image, c] / calls
                reports.append(
                    ConceptReport(
                        hook_point=hook_point,
                        image=image,
                        concept=concept,
                        tokens=calls * height * width,
                        flagged=int(sums["flagged"][image, c]),
                        steered=int(sums["steered"][image, c]),
                        mean_activation=float(heat_map.mean()),
                        heat_map=heat_map,
                    )
                )
        return reports


def _tokens_of_concepts(mask: Tensor, claims: Tensor) -> Tensor:
    """[B, C] int64: tokens on which at least one of a concept's latents is set in mask [B, H, W, S]."""
    return (torch.einsum("bhws,bsc->bhwc", mask.to(torch.float32), claims) > 0).sum((1, 2))
