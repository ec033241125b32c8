"""Other people's packages, where a test compares with them."""

from typing import Any

import pytest

from harness import Absent
from providers import load_peer


def peer(module: str) -> Any:
    """The module; skips the test where its package is not installed."""
    try:
        return load_peer(module)
    except Absent as absent:
        pytest.skip(f"{module.partition('.')[0]}: {absent}")
