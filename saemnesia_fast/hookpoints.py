"""Hook points of a diffusers UNet: the `Transformer2DModel` blocks whose activations an SAE reads (SPEC 3.6)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Stream = Literal["output", "residual"]
STREAMS: tuple[Stream, ...] = get_args(Stream)


def get_unet(pipe_or_unet: Any) -> nn.Module:
    """The UNet module of a pipeline or the UNet handed in, without torch.compile's wrapper.

    Raises TypeError for anything that neither is a module nor has one as `.unet`.
    """
    unet = pipe_or_unet if isinstance(pipe_or_unet, nn.Module) else getattr(pipe_or_unet, "unet", None)
    unet = getattr(unet, "_orig_mod", unet)
    if not isinstance(unet, nn.Module):
        raise TypeError(f"pipe: expected a pipeline with a UNet, or a UNet, got {type(pipe_or_unet).__name__}")
    return unet


def normalize_hook_point(name: str) -> str:
    """The hook point's name inside the UNet: `unet.up_blocks.1.attentions.1` -> `up_blocks.1.attentions.1`."""
    return name.removeprefix("unet.")


def _hook_points(unet: nn.Module) -> dict[str, nn.Module]:
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    return {
        name.replace("._orig_mod", ""): module
        for name, module in get_unet(unet).named_modules()
        if isinstance(module, Transformer2DModel)
    }


def list_hook_points(unet: Any) -> list[str]:
    """Names of all `Transformer2DModel` modules of a UNet or of a pipeline's UNet, in module order (SPEC 3.6)."""
    return list(_hook_points(get_unet(unet)))


def find_hook_point(unet: Any, name: str) -> nn.Module:
    """The block called `name`, e.g. `up_blocks.1.attentions.1`, with or without a leading `unet.`.

    Raises ValueError, listing the UNet's hook points, where there is no such block.
    """
    points = _hook_points(get_unet(unet))
    try:
        return points[normalize_hook_point(name)]
    except KeyError:
        raise ValueError(f"hook_point: the UNet has no {name!r}; its hook points are {', '.join(points)}") from None


def block_output(output: Any) -> Tensor:
    """The activation [B, C, H, W] in what a block returned: a 1-tuple or a `Transformer2DModelOutput` (SPEC 3.9)."""
    activation = output[0]
    if activation.ndim != 4:
        raise ValueError(f"activation: expected [B, C, H, W], got {list(activation.shape)}")
    return activation


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The `hidden_states` [B, C, H, W] that a block was called with."""
    return args[0] if args else kwargs["hidden_states"]


def _single_timestep(timesteps: Tensor) -> Tensor:
    flat = timesteps.detach().reshape(-1)
    if flat.numel() > 1 and flat.stride(0) != 0 and not bool((flat == flat[0]).all()):
        raise ValueError(f"timestep: expected one timestep per UNet call, got {flat.tolist()}")
    return flat[0].round().to(torch.int64)


def streams_at(hook_points: Iterable[str], stream: str | Mapping[str, str]) -> dict[str, str]:
    """{hook point: stream} of one stream for all, or of such a mapping. ValueError if one is missing or unknown."""
    streams = {}
    for name in hook_points:
        streams[name] = stream if isinstance(stream, str) else stream.get(name, "none")
        if streams[name] not in STREAMS:
            raise ValueError(f"stream: expected one of {STREAMS} at {name}, got {streams[name]!r}")
    return streams


@contextmanager
def capture(
    pipe: Any,
    hook_points: Sequence[str],
    on_activation: Callable[[str, Tensor, Tensor], None],
    stream: str | Mapping[str, str] = "output",
) -> Iterator[None]:
    """Call `on_activation(hook_point, activation [B, C, H, W], timestep)` at every UNet call inside the context.

    The timestep is a 0-d int64 tensor on the activation's device. `stream="residual"` gives the block's output minus
    its input; {hook point: stream} where they differ. Nothing is changed, and the hooks are gone on exit, also after an
    exception. Compiled UNets run eagerly meanwhile: a compiled graph would ignore the hooks without a word (SPEC 3.10).

    Raises ValueError for an unknown hook point or stream, or a hook point without one.
    """
    streams = streams_at(hook_points, stream)
    unet = get_unet(pipe)
    blocks = {name: find_hook_point(unet, name) for name in hook_points}
    timestep: Tensor | None = None

    def remember_timestep(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal timestep
        timestep = _single_timestep(args[0])

    def report(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            activation = block_output(output).detach()
            if streams[name] == "residual":
                activation = activation - block_input(args, kwargs).detach()
            if timestep is None:
                raise RuntimeError("the block ran outside a UNet call, so its timestep is unknown")
            on_activation(name, activation, timestep.to(activation.device))

        return hook

    with ExitStack() as stack:
        stack.callback(get_time_proj(unet).register_forward_pre_hook(remember_timestep).remove)
        for name, block in blocks.items():
            stack.callback(block.register_forward_hook(report(name), with_kwargs=True).remove)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def get_time_proj(unet: nn.Module) -> nn.Module:
    """The module that every UNet call hands its timesteps [B] to, once."""
    time_proj = getattr(unet, "time_proj", None)
    if not isinstance(time_proj, nn.Module):
        raise ValueError(f"unet: {type(unet).__name__} has no time_proj module to read the timestep from")
    return time_proj
