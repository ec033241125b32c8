"""Weights that change for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def swapped(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, the named parameters of `module` hold `values`, in their own dtype and on their own device.

    They are written in place, so that compiled graphs see them, and afterwards hold their old bits again, also after an
    exception. Raises ValueError for a shape that differs, before anything is written.
    """
    parameters = {name: module.get_parameter(name) for name in values}
    for name, value in values.items():
        if value.shape != parameters[name].shape:
            raise ValueError(f"{name}: expected {list(parameters[name].shape)}, got {list(value.shape)}")
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        _write(parameters, values)
        yield
    finally:
        _write(parameters, before)


@torch.no_grad()
def _write(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
