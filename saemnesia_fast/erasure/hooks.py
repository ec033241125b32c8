"""The two diffusers hooks of an erasure, and how they come off without a trace (SPEC 3.9, 3.10, 7.4)."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from saemnesia_fast.hookpoints import block_input, block_output

if TYPE_CHECKING:
    from .clock import Clock
    from .point import ErasurePoint


class ClockHook(ModelHook):
    """Sits on `unet.time_proj`, which every UNet call hands its timesteps [B] to, once."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.clock.tick(args[0])
        return args, kwargs


class EraseHook(ModelHook):
    """Sits on a block and replaces the activation in what it returns: a 1-tuple or a `Transformer2DModelOutput`."""

    def __init__(self, point: ErasurePoint, release: Callable[[], None]) -> None:
        super().__init__()
        self.point = point
        self.release = release
        self.given: Any = None

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.given = block_input(args, kwargs)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        given, self.given = self.given, None
        activation = block_output(output)
        # What a wrapper around the block's own method returns may be kept there, to be returned once more.
        fresh = getattr(self.fn_ref.forward, "__func__", None) is type(module).forward
        erased = self.point.erase(activation, given, fresh)
        if erased is activation:
            return output
        return (erased, *output[1:]) if isinstance(output, tuple) else type(output)(sample=erased)


def _registry(module: nn.Module) -> HookRegistry | None:
    return vars(module).get("_diffusers_hook")


class Attachment:
    """A hook in the registry of a module."""

    def __init__(self, module: nn.Module, hook: ModelHook, name: str) -> None:
        self.module, self.hook, self.name = module, hook, name
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
        self._wrapper = module.forward

    @property
    def in_place(self) -> bool:
        """False once somebody else took the hook out of the registry."""
        registry = _registry(self.module)
        return registry is not None and registry.hooks.get(self.name) is self.hook

    def remove(self) -> None:
        """Take the hook out, and the registry and the module's own `forward` too where nothing else needs them.

        Where another library has wrapped `forward` since, unlinking would take its wrapper off with ours: then the
        hook stays, but does nothing.
        """
        reference, inert = self.hook.fn_ref, ModelHook()
        reference.pre_forward, reference.post_forward = inert.pre_forward, inert.post_forward
        registry = _registry(self.module)
        if registry is None or not self.in_place:
            return
        later = list(registry.hooks.values())
        later = later[later.index(self.hook) + 1 :]
        unlinkable = not hasattr(later[0], "new_forward") if later else self.module.forward is self._wrapper
        if not unlinkable:
            return
        registry.remove_hook(self.name, recurse=False)
        if not registry.hooks:
            del self.module._diffusers_hook
            if self.module.__dict__.get("forward") == types.MethodType(type(self.module).forward, self.module):
                del self.module.forward


def erase_hooks(module: nn.Module) -> list[EraseHook]:
    """The erasing hooks on a block."""
    registry = _registry(module)
    return [] if registry is None else [hook for hook in registry.hooks.values() if isinstance(hook, EraseHook)]
