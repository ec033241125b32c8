"""The backend switch and its report: SPEC 7.3, 8."""

import logging
import re
import subprocess
import sys

import pytest
import torch

from saemnesia_fast import ops
from saemnesia_fast.env import describe
from saemnesia_fast.ops import backend, reference
from weights import random_tokens, random_weights

WEIGHTS, W_DEC = random_weights(4, 9)
X = random_tokens(5, 4)


@pytest.fixture(autouse=True)
def _untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = {slot: filled for slot, filled in backend._slots.items() if slot[1] == "eager"}
    monkeypatch.setattr(backend, "_slots", eager)
    monkeypatch.setattr(backend, "_selected", {})
    monkeypatch.setattr(backend, "_logged", set())
    monkeypatch.setattr(backend, "_chosen", None)
    monkeypatch.delenv("SAEMNESIA_FAST_BACKEND", raising=False)
    monkeypatch.delenv("SAEMNESIA_FAST_STRICT", raising=False)


def register_triton(refusal: backend.Refusal | None) -> list[str]:
    """Fill triton's encode_topk slot; returns the list that its calls are noted in."""
    calls = []

    def encode_topk(*arguments: object) -> object:
        calls.append("triton")
        return reference.encode_topk(*arguments[:-1])  # type: ignore[arg-type]

    backend.register("encode_topk", "triton", encode_topk, lambda device: refusal)
    return calls


def test_auto_takes_the_fastest_that_can_run() -> None:
    calls = register_triton(None)
    ops.encode_topk(X, *WEIGHTS, 3)
    assert calls == ["triton"]
    assert ops.backend_report()[0] == ("encode_topk", "triton", "cuda: not in this version")
    with ops.use_backend("eager"):
        ops.encode_topk(X, *WEIGHTS, 3)
        assert ops.backend_report()[0] == ("encode_topk", "eager", "'eager' was chosen")
    assert calls == ["triton"]


def test_an_explicit_choice_never_falls_back() -> None:
    register_triton(backend.Refusal("needs a GPU", missed=False))
    with ops.use_backend("triton"):
        with pytest.raises(RuntimeError, match=r"encode_topk: backend 'triton' was chosen but .*: needs a GPU"):
            ops.encode_topk(X, *WEIGHTS, 3)
        with pytest.raises(RuntimeError, match=r"decode: backend 'triton' was chosen .*: not in this version"):
            ops.decode(*ops.SparseLatents(X, torch.zeros(5, 4, dtype=torch.int32)), W_DEC, WEIGHTS.b_dec)
        assert [choice.backend for choice in ops.backend_report()] == ["none"] * len(backend.OPS)
    assert ops.current_backend() == "auto"


def test_a_missed_fallback_is_logged_once_per_op_and_reason(caplog: pytest.LogCaptureFixture) -> None:
    register_triton(backend.Refusal("triton is not installed", missed=True))
    with caplog.at_level(logging.DEBUG, "saemnesia_fast"):
        for _ in range(3):
            ops.encode_topk(X, *WEIGHTS, 3)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "encode_topk: eager instead of triton (triton is not installed): correct but slower")
    ]


def test_an_expected_fallback_is_silent(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    register_triton(backend.Refusal("needs a GPU", missed=False))
    monkeypatch.setenv("SAEMNESIA_FAST_STRICT", "1")
    with caplog.at_level(logging.DEBUG, "saemnesia_fast"):
        ops.encode_topk(X, *WEIGHTS, 3)
    assert not caplog.records


def test_strict_turns_a_missed_fallback_into_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    register_triton(backend.Refusal("triton is not installed", missed=True))
    monkeypatch.setenv("SAEMNESIA_FAST_STRICT", "1")
    with pytest.raises(RuntimeError, match="triton is not installed.*SAEMNESIA_FAST_STRICT=1 forbids it"):
        ops.encode_topk(X, *WEIGHTS, 3)


def test_use_backend_sets_and_as_a_context_restores() -> None:
    ops.use_backend("eager")
    assert ops.current_backend() == "eager"
    with ops.use_backend("triton"):
        assert ops.current_backend() == "triton"
    assert ops.current_backend() == "eager"
    with pytest.raises(ZeroDivisionError), ops.use_backend("triton"):
        _ = 1 / 0
    assert ops.current_backend() == "eager"


def test_the_environment_variable_chooses_unless_the_program_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEMNESIA_FAST_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="backend 'cuda' was chosen"):
        ops.encode_topk(X, *WEIGHTS, 3)
    with ops.use_backend("eager"):
        ops.encode_topk(X, *WEIGHTS, 3)


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend: expected one of auto, eager, cpu, triton, cuda, got 'fast'"):
        ops.use_backend("fast")
    monkeypatch.setenv("SAEMNESIA_FAST_BACKEND", "fast")
    with pytest.raises(ValueError, match="SAEMNESIA_FAST_BACKEND: expected one of auto, .*, got 'fast'"):
        ops.encode_topk(X, *WEIGHTS, 3)


def test_report_says_why_every_op_is_eager() -> None:
    why = "cuda: not in this version, triton: not in this version, cpu: not in this version"
    assert ops.backend_report() == [(op, "eager", why) for op in backend.OPS]


def test_env_command_reports_versions_and_backends() -> None:
    ran = subprocess.run([sys.executable, "-P", "-m", "saemnesia_fast.env"], capture_output=True, text=True, check=True)
    assert f"torch{'':19}{torch.__version__}" in ran.stdout
    for op in backend.OPS:
        assert re.search(rf"\n{op} +(cpu|eager): ", ran.stdout)
    assert ran.stderr == ""
    assert "triton" in describe()


def test_env_does_not_import_triton() -> None:
    code = "import sys, saemnesia_fast.env as e; e.describe(); sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
