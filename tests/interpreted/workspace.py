"""The scratch memory that an erasure keeps from call to call, by the triton backend in the interpreter: SPEC 7.2."""

import pytest
import torch
from torch import Tensor

from erasing import STRONG, sae_and_table, unet_call
from pipelines import HOOK_POINTS, tiny_unet
from saemnesia_fast import ops
from saemnesia_fast.erasure import apply_erasure
from saemnesia_fast.ops import triton_backend
from saemnesia_fast.ops import workspace as workspace_module
from saemnesia_fast.ops.workspace import Workspace
from triton_cases import IN_INTERPRETER, selection
from weights import random_tokens, random_weights, same_bits

pytestmark = IN_INTERPRETER
PRECISIONS = ["default", "exact"]


@pytest.fixture(autouse=True)
def _triton():
    with ops.use_backend("triton"):
        yield


def kept(workspace):
    return [one for _, scratch in workspace._kept.values() for one in scratch if isinstance(one, Tensor)]


def poison(workspace):
    for tensor in kept(workspace):
        tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max - 12345)


def case(precision, m=6, d=7, n=40, entries=5):
    weights, W_dec = random_weights(d, n, torch.float32)
    return random_tokens(m, d, dtype=torch.float32), (*weights, W_dec, 9, *selection(1, entries, n=n), "exact", False)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_an_earlier_call_left_does_not_matter(precision, monkeypatch):
    """SPEC 7.2."""
    monkeypatch.setattr(workspace_module, "COUNTERS", 3)
    x, arguments = case(precision)
    x[2, 3] = torch.nan
    want, workspace = triton_backend.erase(x, *arguments, precision), Workspace()
    assert (want != x).any()
    places = set()
    for number in range(10):
        tokens = x if number % 3 else x + number
        erased = triton_backend.erase(tokens, *arguments, precision, workspace=workspace)
        if tokens is x:
            assert same_bits(erased, want)
        places.add(tuple(tensor.data_ptr() for tensor in kept(workspace)))
        poison(workspace)
    assert len(places) == 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_another_shape_takes_the_place_of_the_last(precision):
    workspace = Workspace()
    for m, entries in ((6, 5), (4, 5), (6, 5), (6, 2), (1, 1)):
        x, arguments = case(precision, m, entries=entries)
        erased = triton_backend.erase(x, *arguments, precision, workspace=workspace)
        assert same_bits(erased, triton_backend.erase(x, *arguments, precision))
        assert {len(tensor) for tensor in kept(workspace)} == {m}
        assert len(workspace._kept) == 1
        poison(workspace)


def test_an_interrupted_call_leaves_nothing_for_the_next(monkeypatch):
    x, arguments = case("default")
    workspace = Workspace()
    want = triton_backend.erase(x, *arguments, workspace=workspace)
    with monkeypatch.context() as patch:
        patch.setattr(triton_backend, "num_programs", interrupt)  # asked after tokens were counted
        with pytest.raises(KeyboardInterrupt):
            triton_backend.erase(x, *arguments, workspace=workspace)
    assert workspace.num_bytes == 0
    assert same_bits(triton_backend.erase(x, *arguments, workspace=workspace), want)


def interrupt(device):
    raise KeyboardInterrupt


@pytest.mark.parametrize("mode", ["released", "reconstruct"])
def test_pre_activations_of_all_latents_are_not_kept(mode):
    x, (*arguments, _, norm_scaled) = case("default")
    workspace = Workspace()
    triton_backend.erase(x, *arguments, mode, norm_scaled, workspace=workspace)
    assert workspace.num_bytes == 0


def test_each_point_has_its_own_until_it_is_removed():
    unet = tiny_unet()
    erasures = [apply_erasure(unet, *sae_and_table(name), "cat", **STRONG) for name in HOOK_POINTS]
    points = [erasure._points[name] for erasure, name in zip(erasures, HOOK_POINTS, strict=True)]
    workspaces = [point.workspace for point in points]
    assert [workspace.num_bytes for workspace in workspaces] == [0, 0]
    erasures[1].warmup()
    assert [workspace.num_bytes > 0 for workspace in workspaces] == [False, True]
    assert "MiB of scratch memory" in erasures[1].explain()
    want = unet_call(unet)
    places = [{tensor.data_ptr() for tensor in kept(workspace)} for workspace in workspaces]
    assert not places[0] & places[1]
    for workspace in workspaces:
        poison(workspace)
    assert same_bits(unet_call(unet), want)
    assert [{tensor.data_ptr() for tensor in kept(workspace)} for workspace in workspaces] == places
    erasures[0].remove()
    assert [workspace.num_bytes > 0 for workspace in workspaces] == [False, True]
    again = apply_erasure(unet, *sae_and_table(HOOK_POINTS[1]), "cat", **STRONG)
    assert workspaces[1].num_bytes == 0
    again.remove()
