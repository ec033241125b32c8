"""One safetensors file that holds all a training run needs to continue to the same curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from saemnesia_fast.files import load_tensors, read_metadata, save_tensors


class Checkpoint(NamedTuple):
    sae: dict[str, Tensor]
    """The SAE's state_dict."""
    adam: dict[int, dict[str, Tensor]]
    """Adam's state of each parameter, by the parameter's number."""
    tokens_since_fired: Tensor
    """[N] int64."""
    rng: Tensor
    """State of torch's global CPU generator, uint8."""
    state: dict[str, Any]
    """Step, tokens, seconds, position in the data, SAE configuration and training recipe; plain JSON."""


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write it atomically: a reader finds the previous checkpoint or this one."""
    tensors = {f"sae.{name}": tensor for name, tensor in checkpoint.sae.items()}
    for number, moments in checkpoint.adam.items():
        tensors |= {f"adam.{number}.{name}": tensor for name, tensor in moments.items()}
    tensors |= {"tokens_since_fired": checkpoint.tokens_since_fired, "rng": checkpoint.rng}
    save_tensors(path, tensors, {"state": json.dumps(checkpoint.state)})


def load_checkpoint(path: Path, device: str = "cpu") -> Checkpoint:
    """Read what `save_checkpoint` wrote; the generator's state stays on the CPU."""
    sae: dict[str, Tensor] = {}
    adam: dict[int, dict[str, Tensor]] = {}
    tensors = load_tensors(path, device)
    tokens_since_fired, rng = tensors.pop("tokens_since_fired"), tensors.pop("rng").cpu()
    for key, tensor in tensors.items():
        group, name = key.split(".", 1)
        if group == "sae":
            sae[name] = tensor
        else:
            number, name = name.split(".", 1)
            adam.setdefault(int(number), {})[name] = tensor
    return Checkpoint(sae, adam, tokens_since_fired, rng, json.loads(read_metadata(path)["state"]))
