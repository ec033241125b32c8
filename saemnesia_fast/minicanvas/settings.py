"""Where MiniCanvas is read and with which settings its concepts are erased: one setting for all of a kind."""

from __future__ import annotations

from typing import NamedTuple

from ..hookpoints import Stream
from .canvas import Setting

OBJECTS_AT = ("up_blocks.0.attentions.0", "up_blocks.0.attentions.1")
STYLES_AT = "up_blocks.1.attentions.0"
HOOK_POINTS = (*OBJECTS_AT, STYLES_AT)
STREAMS: dict[str, Stream] = {**dict.fromkeys(OBJECTS_AT, "residual"), STYLES_AT: "output"}
"""What SAEs read where (SPEC 3.6). An object is in what the first two blocks add: theirs put in place of another
prompt's paint its object. Either's output is its shape already, which is not to be moved by a single latent."""

SETTINGS = {
    "object": Setting(strength=dict.fromkeys(OBJECTS_AT, -3.0), num_latents=16, scale="constant", halves="cond"),
    "style": Setting(strength={STYLES_AT: -4.0}, num_latents=2, scale="constant"),
}


class Supervision(NamedTuple):
    """How SAEs are taught their concepts; the rest is as in SAEmnesia, with `negatives`, pooled before the ReLU."""

    epochs: int = 10
    lr: float = 2e-3
    """At first; it falls linearly to 0."""
    images: int = 64
    """In a batch: a picture at a denoising step each."""


SUPERVISION = Supervision()
SUPERVISED_SETTINGS = {
    "object": Setting(strength=dict.fromkeys(OBJECTS_AT, -8.0), scale="constant", halves="cond"),
    "style": Setting(strength={STYLES_AT: -3.0}, scale="constant"),
}
"""With the one latent that each concept is assigned."""

CONTRAST_SETTINGS = {
    "object": Setting(strength=dict.fromkeys(OBJECTS_AT, -1.5), num_latents=4, mode="contrast"),
    "style": Setting(strength={STYLES_AT: -1.5}, num_latents=4, mode="contrast"),
}
"""Along what the prompt adds, in place of along latents; SAEmnesia's with its one latent."""
