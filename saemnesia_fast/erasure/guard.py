"""An image is erased or the call raises (SPEC 3.10): the watch over pipelines and bare UNets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .handle import Erasure

_ERASURES = "_saemnesia_fast_erasures"


def guard_pipeline(pipe: Any, erasure: Erasure) -> Callable[[], None]:
    """Have every call of `pipe` verified by `erasure`, and tell it whether guidance is on. Returns what undoes it.

    A check on the UNet alone would miss a pipeline whose UNet was exchanged, and a compiled graph that ignores hooks.
    So the instance gets a subclass of its own class, of the same name, for as long as it has erasures.
    """
    erasures: list[Erasure] = pipe.__dict__.setdefault(_ERASURES, [])
    if not erasures:
        base: type = type(pipe)
        pipe.__class__ = _guarded_class(base)
    erasures.append(erasure)

    def undo() -> None:
        erasures.remove(erasure)
        if not erasures:
            pipe.__class__ = type(pipe).__mro__[1]
            del pipe.__dict__[_ERASURES]

    return undo


@functools.cache
def _guarded_class(base: type) -> type:
    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        erasures = list(self.__dict__[_ERASURES])
        for erasure in erasures:
            erasure.begin_call(getattr(self, "_execution_device", None))
        try:
            output = base.__call__(self, *args, **kwargs)
        finally:
            for erasure in erasures:
                erasure.set_guidance(None)
        for erasure in erasures:
            erasure.verify()
        return output

    members: dict[str, Any] = {"__call__": call, "__doc__": base.__doc__}
    guidance = getattr(base, "do_classifier_free_guidance", None)
    if isinstance(guidance, property) and guidance.fget is not None:
        base_value = guidance.fget

        def do_classifier_free_guidance(self: Any) -> bool:
            value = base_value(self)
            for erasure in self.__dict__[_ERASURES]:
                erasure.set_guidance(bool(value))
            return value

        members["do_classifier_free_guidance"] = property(do_classifier_free_guidance)
    for name in ("__module__", "__qualname__"):
        members[name] = getattr(base, name)
    return type(base.__name__, (base,), members)


def tells_guidance(pipe: Any) -> bool:
    """Whether a call of `pipe` says if its batch is one half, or the unconditional and the conditional half in turn."""
    kind = type(pipe)
    three_parts = hasattr(kind, "do_perturbed_attention_guidance") or hasattr(kind, "image_guidance_scale")
    return isinstance(getattr(kind, "do_classifier_free_guidance", None), property) and not three_parts


def guard_unet(unet: nn.Module, erasure: Erasure) -> Callable[[], None]:
    """Verify the calls of a bare UNet, the object handed in: the first, and any of a new device, dtype or shape.

    Each check waits for the device, so the others only look whether the hooks are still registered. Returns what
    undoes it.
    """
    seen: set[tuple[Any, ...]] = set()

    def check(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        sample: Tensor = output[0]
        key = (sample.device, sample.dtype, sample.shape)
        if key in seen:
            erasure.verify_attached()
        elif not (sample.is_cuda and torch.cuda.is_current_stream_capturing()):
            erasure.verify()
            seen.add(key)

    return unet.register_forward_hook(check).remove
