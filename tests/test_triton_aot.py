"""The Triton kernels compiled for GPUs that are not here, held to tests/budgets.json (see tests/aot.py)."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
BUDGETS = json.loads((TESTS / "budgets.json").read_text(encoding="utf-8"))
SHARED_LIMIT = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that one program can have."""
PRODUCTS = ("encode_topk.encode", "probe.probe", "probe.rank")
SUMS = "probe.probe_exact"
"""No product of matrices: sums in float64."""


def triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "not installed"


def on(architecture: int) -> dict[str, dict[str, object]]:
    return {name: row for name, row in BUDGETS.items() if name.endswith(f" sm_{architecture}")}


@pytest.mark.slow
@pytest.mark.skipif(triton_version() != "3.6.0", reason=f"budgets are Triton 3.6.0's, this is {triton_version()}")
@pytest.mark.parametrize("architecture", SHARED_LIMIT)
def test_kernels_keep_to_their_budgets(architecture: int) -> None:
    ran = subprocess.run(
        [sys.executable, "aot.py", str(architecture)],
        cwd=TESTS,
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    table = json.loads(ran.stdout)
    assert table.keys() == on(architecture).keys()
    for name, row in table.items():
        budget = BUDGETS[name]
        assert row["spilled"] == 0, name
        assert row["registers"] <= budget["registers"], name
        assert row["shared"] == budget["shared"], name  # less would be loads that no longer run ahead
        assert row["matrix"] == budget["matrix"], name


def test_budgets_allow_no_spill_and_fit_the_machine() -> None:
    for architecture, limit in SHARED_LIMIT.items():
        assert on(architecture)
        for name, row in on(architecture).items():
            assert row["spilled"] == 0, name
            assert row["shared"] <= limit * 1024, name


def test_products_use_the_tensor_cores_of_hopper() -> None:
    rows = {name: row for name, row in on(90).items() if name.startswith(PRODUCTS) and not name.startswith(SUMS)}
    assert len(rows) == 13
    assert {row["matrix"] for row in rows.values()} == {"wgmma"}
