"""ops.steering_lines by the triton backend in the interpreter: SPEC 2.4, 3.4."""

import pytest

from saemnesia_fast import ops
from test_steering_lines import test_an_empty_window_leaves_no_line_active, test_equals_the_loops  # noqa: F401
from triton_cases import IN_INTERPRETER, poisoned_allocations

pytestmark = IN_INTERPRETER


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    with ops.use_backend("triton"), poisoned_allocations(monkeypatch):
        yield
