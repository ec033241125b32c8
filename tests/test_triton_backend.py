"""What the triton backend refuses, the tiles that it takes, and what its launches are compiled for."""

import json
import os
from collections import defaultdict
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from saemnesia_fast import ops
from saemnesia_fast.ops import backend, triton_backend, triton_tiles
from saemnesia_fast.ops import workspace as workspace_module
from saemnesia_fast.ops.triton_tiles import Tile, Tiles
from saemnesia_fast.ops.workspace import Workspace
from triton_cases import MODES, selection
from weights import random_tokens, random_weights

CUDA = torch.device("cuda")
SPECIALISED = {"d", "k", "num_latents", "num_listed", "per_batch"}
SPECIALISED |= {f"{side}stride_{of}" for side in ("", "out_") for of in "btd"}
"""The numbers that a kernel may be compiled for: of an SAE, or of how tokens lie, not of how many there are."""


def test_refuses_the_cpu() -> None:
    assert triton_backend.refuse(torch.device("cpu")) == backend.Refusal("needs an NVIDIA GPU", missed=False)
    with (
        ops.use_backend("triton"),
        pytest.raises(RuntimeError, match="decode: backend 'triton' .* needs an NVIDIA GPU"),
    ):
        ops.decode(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1), torch.ones(1))


def test_a_torch_without_cuda_can_be_asked_about_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton_backend.refuse(CUDA) == backend.Refusal("needs an NVIDIA GPU", missed=False)


def test_is_missed_where_there_is_a_gpu_and_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_backend, "find_spec", lambda name: None)
    assert triton_backend.refuse(CUDA) == backend.Refusal("triton is not installed", missed=True)
    assert triton_backend.refuse(torch.device("cpu")) == backend.Refusal("needs an NVIDIA GPU", missed=False)


@pytest.mark.skipif(triton_backend.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("capability", "reason"), [((7, 5), "needs compute capability 8.0, not 7.5"), ((8, 0), None)])
def test_refuses_old_gpus(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], reason: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    refusal = triton_backend.refuse(CUDA)
    assert (refusal and refusal.reason) == reason


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("operand", [torch.float16, torch.bfloat16, torch.float32])
def test_products_of_a_gpu_have_one_depth(capability: tuple[int, int], operand: torch.dtype) -> None:
    """So that z is the same bits wherever it is computed, in batches of any size."""
    tiles = triton_tiles.heuristic(capability, operand)
    assert len({tile.depth for tile in tiles}) == 1
    assert min(tile.tokens for tile in tiles) >= 64
    assert tiles.encode_topk.latents % 32 == 0


def test_measured_tiles_come_before_the_heuristic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shapes = {"encode_topk": [128, 256, 64, 8, 3], "probe": [64, 16, 64, 4, 4], "rank": [64, 64, 64, 4, 4]}
    (tmp_path / "Some_GPU.json").write_text(json.dumps({"float16": shapes}), encoding="utf-8")
    monkeypatch.setattr(triton_tiles, "CONFIGS", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    triton_tiles.tiles_for.cache_clear()
    want = Tiles(Tile(128, 256, 64, 8, 3), Tile(64, 16, 64, 4, 4), Tile(64, 64, 64, 4, 4))
    assert triton_tiles.tiles_for(CUDA, torch.float16) == want
    assert triton_tiles.tiles_for(CUDA, torch.float32) == triton_tiles.heuristic((9, 0), torch.float32)
    triton_tiles.tiles_for.cache_clear()


def test_measured_tiles_of_unequal_arithmetic_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    shapes = {"encode_topk": [128, 128, 64, 8, 3], "probe": [64, 16, 32, 4, 4], "rank": [64, 64, 64, 4, 4]}
    path.write_text(json.dumps({"float16": shapes}), encoding="utf-8")
    with pytest.raises(ValueError, match="expected one depth for all products"):
        triton_tiles.measured(path, torch.float16)


class Launches:
    """What kernels would be compiled for, were there a GPU to launch them on: by kernel, its specialisations."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import JITFunction, create_function_from_signature

        self.variants: dict[str, set[str]] = defaultdict(set)
        self.specialised: set[str] = set()
        target = make_backend(GPUTarget("cuda", 90, 32))

        def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **meta: Any) -> None:
            bound, types, options = create_function_from_signature(kernel.signature, kernel.params, target)(
                *arguments, **meta
            )
            self.variants[kernel.__name__].add(f"{types} {options}")
            if bound.get("ALIGNED"):
                promised = ("BLOCK_M", "per_batch", "per_line", "first_row", "num_rows")
                assert not any(bound.get(name, 0) % 16 for name in promised)
            numbers = {name for name, value in bound.items() if type(value) is int}
            kept = {p.name for p in kernel.params if not p.is_constexpr and not p.do_not_specialize}
            self.specialised |= numbers & kept

        monkeypatch.setattr(JITFunction, "run", run)


def everything(
    x: Tensor, num_lines: int, num_entries: int, precision: str, in_place: bool, workspace: Workspace
) -> None:
    """Every op, on tokens x [..., 64]."""
    weights, W_dec = random_weights(64, 512, x.dtype if precision == "default" else torch.float32)
    lines = [t[:, 1:] for t in selection(num_lines, 1 + num_entries, n=512)]
    values, indices = triton_backend.encode_topk(x, *weights, 32, precision)
    latents = (values, indices.clamp(0, 511), W_dec, weights.b_dec)
    triton_backend.decode(*latents)
    triton_backend.decode(*latents, x, torch.ones(3)[num_lines % 3])
    triton_backend.probe(x, *weights, 32, *lines[:2], precision)
    options = {"in_place": in_place, "workspace": workspace}
    for mode in (*MODES, "exact"):
        triton_backend.erase(x, *weights, W_dec, 32, *lines, mode, False, precision, **options)


@pytest.mark.skipif(triton_backend.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("precision", ["default", "exact"])
@pytest.mark.parametrize("layout", ["nchw", "matrix"])
def test_a_new_batch_compiles_nothing(monkeypatch: pytest.MonkeyPatch, layout: str, precision: str) -> None:
    """Whatever the number of images, tokens, lines and entries."""
    launches, workspace = Launches(monkeypatch), Workspace()
    compiled = None
    for images, num_lines, num_entries in ((2, 1, 3), (1, 1, 1), (3, 3, 16), (16, 2, 7), (17, 17, 9)):
        if layout == "nchw":
            x = random_tokens(images, 64, 4, 4, dtype=torch.float16).permute(0, 2, 3, 1)
        else:
            x = random_tokens(num_lines * (images * 3 - 2), 64, dtype=torch.float16)
        everything(x, num_lines, num_entries, precision, images == 3, workspace)
        compiled = compiled or {name: set(variants) for name, variants in launches.variants.items()}
        assert launches.variants == compiled
    kernels = {"encode_kernel", "select_kernel", "decode_kernel", "probe_kernel", "rank_kernel", "erase_kernel"}
    kernels |= {"round_kernel", "rescore_kernel", "settle_kernel"} if precision == "exact" else set()
    assert launches.variants.keys() == kernels
    assert launches.specialised <= SPECIALISED


@pytest.mark.skipif(triton_backend.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_a_new_timestep_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timesteps are handed over as views into the scheduler's, at any address, or one for each row."""
    launches = Launches(monkeypatch)
    timesteps = torch.arange(40)
    for stored, prompts, entries, rows, step in ((50, 1, 8, 1, 3), (100, 4, 16, 8, 16), (1, 2, 8, 16, 21)):
        tables = [torch.zeros(stored, prompts, entries, dtype=dtype) for dtype in (torch.int64, torch.float32)]
        tables = [tables[0], tables[1], tables[1], tables[0]]
        for given in (timesteps[step : step + 1], timesteps[step].expand(rows), timesteps[: rows + step][-rows:]):
            switches = torch.ones(prompts, dtype=torch.bool)
            times = torch.arange(stored).float()
            triton_backend.steering_lines(given, times, *tables, switches, rows, rows, rows // 2, 900.0, 0.0)
    assert len(launches.variants["steering_lines_kernel"]) == 1
    assert not launches.specialised


class OnGPU:
    """Stands in for a GPU with a stream, from which a graph may be captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.capturing = 7, False
        self.x = SimpleNamespace(is_cuda=True, device=CUDA, get_device=lambda: 0)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: self.stream, raising=False)

    def call(self, workspace: Workspace, size: int = 4) -> Tensor:
        """What a call that needs a tensor of `size` elements is given."""
        make = lambda x, size: (torch.empty(size),)  # noqa: E731
        key, scratch = workspace.take("op", make, self.x, size)  # type: ignore[arg-type]
        workspace.put_back("op", key, scratch)
        return scratch[0]


def test_scratch_memory_is_that_of_the_last_call_like_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, workspace = OnGPU(monkeypatch), Workspace()
    first = gpu.call(workspace)
    assert gpu.call(workspace) is first
    larger = gpu.call(workspace, 9)
    assert workspace.num_bytes == larger.nbytes == 36
    assert gpu.call(workspace) is not first
    assert gpu.call(Workspace()) is not gpu.call(workspace)
    workspace.clear()
    assert workspace.num_bytes == 0


def test_streams_share_no_scratch_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, workspace = OnGPU(monkeypatch), Workspace()
    first = gpu.call(workspace)
    gpu.stream = 8
    assert gpu.call(workspace) is not first


def test_a_captured_graph_has_scratch_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, workspace = OnGPU(monkeypatch), Workspace()
    first = gpu.call(workspace)
    gpu.capturing = True
    in_graph = gpu.call(workspace)
    gpu.capturing = False
    assert in_graph is not first
    assert gpu.call(workspace) is first


def test_calls_at_the_same_time_share_no_scratch_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, workspace = OnGPU(monkeypatch), Workspace()
    gpu.call(workspace)
    taken = [workspace.take("op", lambda x: (torch.empty(4),), gpu.x)[1][0] for _ in range(2)]  # type: ignore[arg-type]
    assert taken[0] is not taken[1]


def test_a_copy_of_a_workspace_begins_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace()
    OnGPU(monkeypatch).call(workspace)
    assert deepcopy(workspace).num_bytes == 0


@pytest.mark.skipif(triton_backend.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("precision", ["default", "exact"])
def test_a_call_with_a_workspace_allocates_nothing_in_place(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """But new counters, once in many calls."""
    Launches(monkeypatch)
    monkeypatch.setattr(workspace_module, "COUNTERS", 3)
    weights, W_dec = random_weights(64, 512, torch.float32)
    arguments = (*weights, W_dec, 32, *selection(1, 4, n=512), "exact", False, precision)
    x, workspace = random_tokens(32, 64, dtype=torch.float16), Workspace()
    allocated = []
    for name in ("new_empty", "new_zeros"):
        new = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda *a, new=new, **kw: allocated.append(new(*a, **kw)) or allocated[-1])
    seen = []
    for _ in range(9):
        allocated.clear()
        triton_backend.erase(x, *arguments, in_place=True, workspace=workspace)
        seen.append(len(allocated))
    assert seen[0] > 4
    assert seen[1:] == [1, 0, 0, 1, 0, 0, 1, 0]


def test_only_who_asks_for_it_is_given_a_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_slots", dict(backend._slots))
    monkeypatch.setattr(backend, "_selected", {})
    cpu, workspace = torch.device("cpu"), Workspace()
    with ops.use_backend("eager"):
        assert backend.select("erase", cpu, workspace) is backend.select("erase", cpu)
        backend.register("erase", "eager", lambda x, workspace=None: workspace, takes_workspace=True)
        assert backend.select("erase", cpu, workspace)(None) is workspace
        assert backend.select("erase", cpu)(None) is None
