"""Every test: no Hugging Face Hub, one seed, the same hypothesis examples."""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from saemnesia_fast.ops import backend

os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # eai-sparsify looks when it is imported

if find_spec("hypothesis"):  # `make gpu` runs where only the GPU tests' own needs are installed
    from hypothesis import settings

    settings.register_profile("same examples", deadline=None, derandomize=True, print_blob=True)
    settings.load_profile("same examples")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that processes that share the files end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(params=["eager", "cpu"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that computes on the CPU, in turn."""
    if refusal := backend._refusal("erase", request.param, torch.device("cpu")):
        pytest.skip(refusal.reason)
    with backend.use_backend(request.param):
        yield request.param
