"""What the triton backend refuses, and the tiles that it takes."""

import json
from pathlib import Path

import pytest
import torch

from saemnesia_fast import ops
from saemnesia_fast.ops import backend, triton_backend, triton_tiles
from saemnesia_fast.ops.triton_tiles import Tile, Tiles

CUDA = torch.device("cuda")


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
