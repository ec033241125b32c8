"""Where MiniCanvas is read and with which settings its concepts are erased: one setting for all of a kind."""

from __future__ import annotations

from .canvas import Setting

OBJECTS_AT = "up_blocks.0.attentions.1"
STYLES_AT = "up_blocks.1.attentions.0"
HOOK_POINTS = (OBJECTS_AT, STYLES_AT)

SETTINGS = {
    "object": Setting(strength={OBJECTS_AT: -8.0}, num_latents=16, scale="constant"),
    "style": Setting(strength={STYLES_AT: -4.0}, num_latents=2, scale="constant"),
}
