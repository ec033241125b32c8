"""Every test: no Hugging Face Hub, one seed, the same hypothesis examples."""

import os

import pytest
import torch
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("same examples", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("same examples")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
