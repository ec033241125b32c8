"""Steering along what the prompt adds: a token's conditional value less its unconditional one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saemnesia_fast.concepts import nearest_row


class Contrast(nn.Module):
    """The edit of `mode="contrast"`, our own. Latents detect a concept, guidance's other half says what it adds there.

    A detected conditional token c with its partner u, the same place of the same image in the unconditional half of the
    guided batch (or that of the negative prompt), becomes `c + strength * (c - u - a)`. Strength -1 without an anchor
    leaves u, and what is below goes to u's other side, away from the concept. a is what an anchor, another concept,
    is more than the mean of its kind (`ConceptTable.departure`); it takes the place of what is removed.

    Args:
        timesteps: [T] stored timesteps.
        anchor: [T, d] float32, a at each of them, or None for 0.
    """

    timesteps: Tensor
    anchor: Tensor | None

    def __init__(self, timesteps: Tensor, anchor: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("timesteps", timesteps.to(torch.float32))
        self.register_buffer("anchor", anchor)

    def forward(
        self,
        x: Tensor,
        activations: Tensor,
        steered: Tensor,
        strengths: Tensor,
        timesteps: Tensor,
        scale: Tensor | None = None,
    ) -> Tensor:
        """x [2 * B, H, W, d], unconditional images first, with its detected conditional tokens moved.

        All other tokens stay bit for bit. Where several latents are steered, the most active one gives the strength.
        Nothing waits for the device. Differentiable in x.

        Args:
            x: tokens; half-precision ones are moved in float32.
            activations, steered: [B, H, W, S], of `ops.probe` on the conditional half.
            strengths: [B, S], by latent.
            timesteps: [2 * B], or [1] for all.
            scale: [B, H, W, 1] by which the anchor's part is multiplied, or None for 1.
        """
        unconditional, conditional = x.chunk(2)
        strongest = activations.masked_fill(~steered, -torch.inf).argmax(-1, keepdim=True)
        strength = strengths[:, None, None].expand(activations.shape).gather(-1, strongest)
        given = conditional.to(torch.promote_types(x.dtype, torch.float32))
        added = given - unconditional
        if self.anchor is not None:
            rows = nearest_row(self.timesteps, timesteps.expand(len(x)).chunk(2)[1])
            anchor = self.anchor[rows].to(given.dtype)[:, None, None]
            added = added - (anchor if scale is None else anchor * scale)
        moved = (given + strength * added).to(x.dtype)
        return torch.cat([unconditional, torch.where(steered.any(-1, keepdim=True), moved, conditional)])
