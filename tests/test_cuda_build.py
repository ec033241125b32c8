"""csrc/cuda as nvcc compiles it: no warning, no spill, every architecture; and what it computes on a GPU."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pairs import call, random_terms
from saemnesia_fast import ops
from saemnesia_fast.ops import LatentGradients, backend, cpu_backend, cuda_backend, reference
from saemnesia_fast.ops.backend import Refusal
from triton_cases import assert_no_worse
from weights import random_tokens, random_weights, same_bits

ROOT = Path(__file__).resolve().parents[1]
TOOLKIT = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
NVCC = shutil.which("nvcc", path=TOOLKIT / "bin") or shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
MOST_REGISTERS = 128


@pytest.fixture(scope="module")
def setup() -> dict[str, Any]:
    """What setup.py defines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **arguments: None)
        patch.setenv("SAEMNESIA_FAST_BUILD", "0")
        patch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        patch.chdir(ROOT)
        return runpy.run_path("setup.py")


@pytest.fixture(scope="module")
def compiled(setup: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """The object file of a source of csrc/cuda, and what the compiler says of it."""
    nvcc = [NVCC, *setup["nvcc_flags"](), "--threads=0", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra"]
    nvcc += ["-Xptxas=-v"]
    macros = [*setup["MACROS"], ("USE_CUDA", None), ("SAEMNESIA_FAST_ARCHITECTURES", "80,90")]
    folders = [Path(torch.__file__).parent / "include", TOOLKIT / "include", sysconfig.get_path("include")]
    gcc = ["g++", *setup["FLAGS"], "-fPIC", "-Wall", "-Werror", *(f"-I{folder}" for folder in folders)]
    gcc += [f"-D{name}{'' if value is None else '=' + value}" for name, value in macros]
    if find_spec("pybind11"):
        gcc += [f"-I{import_module('pybind11').get_include()}"]
    folder = tmp_path_factory.mktemp("objects")

    @cache
    def compile_source(name: str) -> tuple[Path, str]:
        compiler = nvcc if name.endswith(".cu") else gcc
        command = [*compiler, "-c", ROOT / "csrc" / "cuda" / name, "-o", folder / f"{name}.o"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return folder / f"{name}.o", done.stderr

    return compile_source


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("source", ["latent_gradients.cu", "adam_rows.cu"])
def test_compiles_for_every_architecture_without_warning_or_spill(
    setup: dict[str, Any], compiled: Callable[[str], tuple[Path, str]], source: str
) -> None:
    _, log = compiled(source)
    entries = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", log)
    assert {architecture for _, architecture in entries} == set(setup["ARCHITECTURES"])
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(spills) >= len(entries) > 0
    assert {numbers for spill in spills for numbers in spill[1:]} == {"0"}
    ours = [int(used) for name, used in _registers(log) if "cub" not in name]
    assert 0 < max(ours) <= MOST_REGISTERS, max(ours)


def _registers(log: str) -> Iterator[tuple[str, str]]:
    for part in log.split("Compiling entry function '")[1:]:
        used = re.search(r"Used (\d+) registers", part)
        assert used
        yield part.split("'")[0], used.group(1)


@needs_nvcc
def test_ops_compile_on_the_stable_abi_alone(compiled: Callable[[str], tuple[Path, str]]) -> None:
    """Of torch only what every release from 2.10 on has, and no C++ symbol of it."""
    command = ["nm", "-C", "--undefined-only", compiled("ops.cpp")[0]]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_get_current_cuda_stream" in names
    assert not re.search(r"\b(at|c10|torch)::", names)


STREAM = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void** stream) { return *stream = nullptr, 0; }'
LOAD = """
import torch, _C_cuda
print(_C_cuda.build_config()["flags"], *torch.ops.saemnesia_fast_cuda.adam_rows.overloads())
"""


@needs_nvcc
@pytest.mark.slow
def test_the_linked_extension_loads(
    setup: dict[str, Any], compiled: Callable[[str], tuple[Path, str]], tmp_path: Path
) -> None:
    """Every name is found; where torch has no CUDA, with a stand-in for the one that torch_cuda has."""
    pytest.importorskip("pybind11")
    objects = [compiled(source)[0] for source in ("latent_gradients.cu", "adam_rows.cu", "ops.cpp", "module.cpp")]
    folders = [f"-L{Path(torch.__file__).parent / 'lib'}", f"-L{TOOLKIT / 'lib64'}"]
    libraries = [f"-l{name}" for name in (*setup["cuda_libraries"](), "c10", "torch", "torch_cpu", "torch_python")]
    shared = ["g++", "-shared", "-fPIC", "-Wl,--as-needed", "-o"]
    subprocess.run([*shared, tmp_path / "_C_cuda.so", *objects, *folders, *libraries], check=True)
    (tmp_path / "stream.cpp").write_text(STREAM)
    subprocess.run([*shared, tmp_path / "stream.so", tmp_path / "stream.cpp"], check=True)
    variables = {"PYTHONPATH": str(tmp_path)}
    if torch.version.cuda is None:
        variables["LD_PRELOAD"] = str(tmp_path / "stream.so")
    command = [sys.executable, "-c", LOAD]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [",".join(setup["FLAGS"]), "default"]


SETUP = """
import runpy, setuptools, torch
torch.version.cuda = {cuda!r}
setuptools.setup = lambda **arguments: print([module.name for module in arguments.get("ext_modules", [])])
runpy.run_path("setup.py")
"""


def modules(cuda: str | None, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {key: value for key, value in os.environ.items() if key not in ("FORCE_CUDA", "CUDA_HOME")}
    command = [sys.executable, "-P", "-c", SETUP.format(cuda=cuda)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables | environment)


@needs_nvcc
@pytest.mark.parametrize(
    ("cuda", "environment", "built"),
    [
        (None, {}, False),
        ("13.0", {}, True),
        (None, {"FORCE_CUDA": "1"}, True),
        ("13.0", {"FORCE_CUDA": "0"}, False),
        ("13.0", {"SAEMNESIA_FAST_BUILD": "0"}, None),
    ],
)
def test_is_built_where_torch_has_cuda_and_there_is_a_toolkit(
    cuda: str | None, environment: dict[str, str], built: bool | None
) -> None:
    """Never by whether a GPU is there."""
    names = [] if built is None else ["saemnesia_fast._C", *(["saemnesia_fast._C_cuda"] if built else [])]
    assert modules(cuda, **environment).stdout.splitlines()[-1] == str(names)


def test_architectures_can_be_chosen(setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0;12.0+PTX")
    flags = setup["nvcc_flags"]()
    assert flags[-3:] == [
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def test_an_absent_extension_says_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(name: str) -> None:
        raise ModuleNotFoundError(name)

    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda_backend, "import_module", lost)
    cuda_backend.extension.cache_clear()
    refusal = cuda_backend._refuse(device)
    assert refusal == backend.Refusal(
        "the CUDA extension is not built: install from source with CUDA_HOME set to a CUDA toolkit", missed=True
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    refusal = cuda_backend._refuse(device)
    assert refusal is not None and not refusal.missed and "8.0, not 7.5" in refusal.reason
    assert cuda_backend._refuse(torch.device("cpu")) == backend.Refusal("needs an NVIDIA GPU", missed=False)
    cuda_backend.extension.cache_clear()


@pytest.fixture
def _cuda() -> Iterator[None]:
    with ops.use_backend("cuda"):
        yield


D, N, M, K = 1280, 20480, 4096, 32
Step = tuple[list[ops.PairTerms], tuple[Tensor, Tensor, Tensor, Tensor]]


def full_step(dtype: torch.dtype) -> Step:
    """Terms and (x, W_dec, b_dec, W_enc) of SD 1.5, latent 3 on every token."""
    weights, W_dec = random_weights(D, N, torch.float32)
    x = random_tokens(M, D, dtype=torch.float32)
    terms = random_terms(x, N, (K, 2))
    terms[0].indices[:, 0], terms[0].values[:, 0] = 3, 0.5

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to("cuda", dtype if tensor.is_floating_point() else tensor.dtype)

    terms = [term._replace(**{n: moved(t) for n, t in term._asdict().items() if n != "adds_b_dec"}) for term in terms]
    arguments = (x, W_dec / D**0.5, weights.b_dec, weights.W_enc / D**0.5)
    return terms, tuple(t.to("cuda", dtype) for t in arguments)  # type: ignore[return-value]


@pytest.mark.gpu
@pytest.mark.usefixtures("_cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu_errs_no_more_than_eager(dtype: torch.dtype) -> None:
    terms, arguments = full_step(dtype)
    got = call(terms, *arguments)
    with ops.use_backend("eager"):
        eager = call(terms, *arguments)
        wide = [t._replace(values=t.values.double(), grad_x_hat=t.grad_x_hat.double()) for t in terms]
        wide = [t if t.extra_d_value is None else t._replace(extra_d_value=t.extra_d_value.double()) for t in wide]
        exact = call(wide, *(t.double() for t in arguments))
    for ours, theirs, want in zip(got, eager, exact, strict=True):
        floor = torch.finfo(torch.float32).eps * want.abs().max()
        assert (ours - want).abs().max() <= 2 * (theirs - want).abs().max() + floor


def gradients_of_single_ops(term: ops.PairTerms, x: Tensor, W_dec: Tensor, b_dec: Tensor) -> list[Tensor]:
    """What `loss.backward()` asks for: dW_enc, db_enc, dW_dec and the values' own."""
    library, (values, indices, grad, *_) = torch.ops.saemnesia_fast, term
    encoder = library.encoder_gradients(values.to(reference.compute_dtype(x)), indices, x, b_dec, N)
    return [*encoder, library.decoder_gradient(values, indices, grad, N), library.gather_dot(indices, W_dec, grad)]


@pytest.mark.gpu
@pytest.mark.usefixtures("_cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu_gradients_of_single_ops_err_no_more_than_eager(dtype: torch.dtype) -> None:
    (term, _), (x, W_dec, b_dec, _) = full_step(dtype)
    got = gradients_of_single_ops(term, x, W_dec, b_dec)
    with ops.use_backend("eager"):
        eager = gradients_of_single_ops(term, x, W_dec, b_dec)
        wide = term._replace(values=term.values.double(), grad_x_hat=term.grad_x_hat.double())
        exact = gradients_of_single_ops(wide, x.double(), W_dec.double(), b_dec.double())
    for ours, theirs, want in zip(got, eager, exact, strict=True):
        assert_no_worse(ours, theirs, want)


@pytest.mark.gpu
@pytest.mark.usefixtures("_cuda")
def test_gpu_repeats_bit_for_bit_and_in_a_graph() -> None:
    terms, arguments = full_step(torch.float32)
    first = call(terms, *arguments)
    assert all(same_bits(a, b) for a, b in zip(first, call(terms, *arguments), strict=True))
    out = LatentGradients(*(torch.zeros_like(gradient) for gradient in first))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(terms, *arguments, out=out)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(terms, *arguments, out=out)
    for gradient in out:
        gradient.zero_()
    graph.replay()
    assert all(same_bits(a, b) for a, b in zip(out, first, strict=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("_cuda")
@pytest.mark.parametrize(("d", "n", "m"), [(7, 30, 9), (130, 50, 2500), (1, 1, 1)])
def test_gpu_is_exact_on_whole_numbers(d: int, n: int, m: int) -> None:
    weights, W_dec = random_weights(d, n, torch.float32, integer=True)
    x = random_tokens(m, d, dtype=torch.float32, integer=True)
    terms = random_terms(x, n, (4, 2, 3), integer=True)
    want = reference.latent_gradients(terms, x, W_dec, weights.b_dec, weights.W_enc)
    moved = [t._replace(**{n: v.cuda() for n, v in t._asdict().items() if isinstance(v, Tensor)}) for t in terms]
    got = call(moved, *(t.cuda() for t in (x, W_dec, weights.b_dec, weights.W_enc)))
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_gpu_adam_rows_equals_the_reference(moments: torch.dtype) -> None:
    def steps(run: Callable[..., None], device: str) -> list[Tensor]:
        W, grad = (random_tokens(64, D, dtype=torch.float32, seed=seed).to(device) for seed in (1, 2))
        state = [torch.zeros_like(W, dtype=moments), torch.ones_like(W, dtype=moments)]
        for step in (1, 2):
            run(W, grad, *state, None, None, step, 1e-2, 0.9, 0.999, 1e-9, True, True)
        return [tensor.cpu() for tensor in (W, *state)]

    with ops.use_backend("cuda"):
        got = steps(torch.ops.saemnesia_fast.adam_rows, "cuda")
    want = steps(reference.adam_rows, "cpu")
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=2e-5 if moments == torch.float32 else 1e-2 / 64)
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        assert ((ours - theirs).abs() <= 1e-2 * theirs.abs() + 1e-6).all()


def steps_in_8_bits(device: str, backend: str) -> list[Tensor]:
    """Weights, codes and scales on the CPU after two steps of adam_latents."""
    x, W_enc, W_dec = (random_tokens(n, 256, dtype=torch.float32, seed=n).to(device) for n in (24, 40, 41))
    W_enc, W_dec = W_enc[:40].contiguous(), W_dec[:40].contiguous()
    moments = ops.LatentMoments(*(ops.EightBit.zeros_like(W_dec) for _ in range(4)))
    values = torch.linspace(0.1, 2, 24 * 3, device=device).view(24, 3)
    pairs = ops.PairTerms(values, (torch.arange(24 * 3, device=device) * 7 % 40).view(24, 3), x.flip(0), None)
    with ops.use_backend(backend):
        for step in (1, 2):
            gradients = ops.sparse_gradients([pairs], x, W_dec, x[0].clone())
            ops.adam_latents(gradients, W_enc, W_dec, moments, step, 1e-2, eps=1e-6)
    return [tensor.cpu() for tensor in (W_enc, W_dec, *(part for moment in moments for part in moment))]


@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "cpu"), pytest.param("cuda", "cuda", marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)
def test_adam_latents_in_8_bits_equals_the_reference(device: str, backend: str) -> None:
    """But where a last bit of a sum decides between two codes."""
    if device == "cpu" and isinstance(cpu_backend.extension(), Refusal):
        pytest.skip("needs the C++ extension")
    got, want = steps_in_8_bits(device, backend), steps_in_8_bits("cpu", "eager")
    for ours, theirs in zip(got, want, strict=True):
        if ours.dtype == torch.uint8:
            assert (ours != theirs).float().mean() < 1e-3
        else:
            near = (ours - theirs).abs() <= 1e-3 * theirs.abs() + 1e-5
            assert near.float().mean() > 1 - 1e-3
