"""Where MiniCanvas is read and with which settings its concepts are erased: one setting for all of a kind."""

from __future__ import annotations

from .canvas import Setting

HOOK_POINTS = (
    "mid_block.attentions.0",
    "up_blocks.0.attentions.0",
    "up_blocks.0.attentions.1",
    "up_blocks.1.attentions.0",
    "up_blocks.1.attentions.1",
)

SETTINGS = {
    "object": Setting(strength={"up_blocks.0.attentions.1": -8.0}, num_latents=16),
    "style": Setting(strength={"up_blocks.1.attentions.0": -3.0, "up_blocks.1.attentions.1": -3.0}, num_latents=16),
}
