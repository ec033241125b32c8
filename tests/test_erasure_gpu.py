"""Erased UNets captured and compiled: one graph follows all that may change between two calls (SPEC 3.11)."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saemnesia_fast
from waiting import no_waiting

erasing = pytest.importorskip("erasing", reason="diffusers or transformers is not installed")
pipelines = pytest.importorskip("pipelines", reason="diffusers or transformers is not installed")

gpu = pytest.mark.gpu
MODES = ["exact", "released", "contrast"]
ANCHOR = "wolf"
COMPILED = [
    pytest.param("cpu", {"backend": "aot_eager"}, "exact", id="cpu-exact"),
    pytest.param("cpu", {"backend": "aot_eager"}, "released", id="cpu-released"),
    pytest.param("cpu", {"backend": "aot_eager"}, "contrast", id="cpu-contrast"),
    pytest.param("cuda", {"backend": "inductor"}, "exact", id="inductor-exact", marks=gpu),
    pytest.param("cuda", {"backend": "inductor"}, "contrast", id="inductor-contrast", marks=gpu),
    pytest.param("cuda", {"mode": "reduce-overhead"}, "released", id="reduce-overhead-released", marks=gpu),
]


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def named(change: str) -> Callable[[str], str]:
    return lambda text: f"{change}: {text}"


class Scene:
    """A small UNet, and inputs that stay where they are."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32) -> None:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=self.generator).to(device, dtype)

        self.generator = torch.Generator().manual_seed(0)
        self.unet = nn.Module.to(pipelines.tiny_sd_to_compile().unet, device, dtype)
        self.sae = erasing.random_sae(erasing.OTHER_HOOK_POINT).to(dtype)
        table = erasing.random_table(self.sae, erasing.HOOK_POINT)
        mu, concepts, kinds = (
            torch.cat([table.mu, table.mu[:1].flip(-1)]),
            [*table.concepts, ANCHOR],
            [*table.kinds, "object"],
        )
        self.table = saemnesia_fast.ConceptTable(mu, table.timesteps, concepts, kinds, table.hook_point, table.sae_hash)
        self.draw = draw
        self.sample, self.states = draw(2, 4, 8, 8), draw(2, 16, 32)
        self.timestep = torch.tensor(501, device=device)

    def erased(self, unet: Any = None, **options: Any) -> Any:
        unet = self.unet if unet is None else unet
        if options.get("mode") == "contrast":
            options["anchor"] = ANCHOR
        return saemnesia_fast.apply_erasure(
            unet, self.sae, self.table, "cat", strength=-40.0, num_latents=5, max_latents=16, cfg=True, **options
        )

    @torch.no_grad()
    def call(self, unet: Any = None) -> Tensor:
        unet = self.unet if unet is None else unet
        return unet(self.sample, self.timestep, encoder_hidden_states=self.states).sample

    def course(self, erasure: Any) -> Iterator[str]:
        """Changes one thing after the other, and names it."""
        yield "as it was applied"
        self.sample.copy_(self.draw(*self.sample.shape))
        yield "another sample"
        self.timestep.fill_(251)
        yield "another timestep"
        erasure.set("dog", strength=-9.0)
        yield "other concepts and another strength"
        with erasure.paused():
            yield "paused"
        yield "no longer paused"

    def follow(self, erasure: Any, run: Callable[[], Tensor], **tolerance: float) -> None:
        """Hold `run` to an eager call of the UNet all along the course, and that to a UNet without erasure."""
        for change in self.course(erasure):
            seen, expected = run(), self.call()
            torch.testing.assert_close(seen, expected, msg=named(change), **tolerance)
            with erasure.paused():
                plain = self.call()
            steered = (expected.float() - plain.float()).abs().amax() > 0.01
            assert bool(steered) == (change != "paused"), change


@pytest.mark.filterwarnings("default")  # of compilers, about the machine
@pytest.mark.parametrize(("device", "options", "mode"), COMPILED)
def test_one_compiled_graph_serves_all_that_changes(device: str, options: dict[str, Any], mode: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    scene = Scene(device)
    compiled = torch.compile(scene.unet, fullgraph=True, **options)
    with scene.erased(compiled, mode=mode) as erasure, torch._dynamo.config.patch(error_on_recompile=True):
        scene.follow(erasure, lambda: scene.call(compiled).clone(), rtol=1e-4, atol=1e-4)
        erasure.verify()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def captured(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_a_captured_step_follows_all_that_changes(mode: str, dtype: torch.dtype) -> None:
    scene = Scene("cuda", dtype)
    with scene.erased(mode=mode) as erasure:
        scene.call()  # the check of a first call waits for the device, which a captured one must not
        graph, result = captured(scene.call)

        def replay() -> Tensor:
            graph.replay()
            return result

        scene.follow(erasure, replay)
        erasure.verify()


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_repeated_launches_follow_all_that_changes(dtype: torch.dtype) -> None:
    """Bit for bit what they are when Triton looks for every kernel."""
    scene = Scene("cuda", dtype)
    with scene.erased() as erasure:
        (workspace,) = [point.workspace for point in erasure._points.values()]
        for change in scene.course(erasure):
            workspace.clear()
            expected = scene.call()
            assert workspace._repeat is not None
            assert torch.equal(scene.call(), expected), change


@gpu
def test_streams_and_graphs_share_no_scratch_memory() -> None:
    scene = Scene("cuda", torch.float16)
    with scene.erased():
        expected = scene.call()
        graph, result = captured(scene.call)
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        torch.cuda.synchronize()
        seen = [result]
        for _ in range(8):
            graph.replay()
            for stream in streams:
                with torch.cuda.stream(stream):
                    seen.append(scene.call())
        torch.cuda.synchronize()
    for one in seen:
        torch.testing.assert_close(one, expected)


@gpu
@pytest.mark.parametrize("mode", MODES)
def test_a_step_never_waits_for_the_device(mode: str) -> None:
    scene = Scene("cuda", torch.float16)
    with scene.erased(mode=mode):
        scene.call()
        with no_waiting():
            scene.call()


@gpu
@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_erases_what_the_cpu_erases(mode: str) -> None:
    here, there = Scene("cpu"), Scene("cuda")
    with here.erased(mode=mode) as expected, there.erased(mode=mode) as erasure:
        op = "probe" if mode == "contrast" else "erase"
        assert f"{op} on cuda:0: triton" in erasure.explain()
        for change, _ in zip(here.course(expected), there.course(erasure), strict=True):
            torch.testing.assert_close(there.call().cpu(), here.call(), rtol=1e-4, atol=1e-4, msg=named(change))


def forget_kernels(triton: Any) -> None:
    """As in a process that has not launched any."""
    package = import_module("saemnesia_fast.kernels")
    for found in pkgutil.iter_modules(package.__path__):
        for kernel in vars(import_module(f"{package.__name__}.{found.name}")).values():
            if isinstance(kernel, triton.JITFunction):
                kernel.device_caches.clear()


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_after_a_warmup_the_first_call_compiles_no_kernel(
    mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton", reason="triton is not installed")
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda *, repr, **others: compiled.append(repr))
    forget_kernels(triton)
    scene = Scene("cuda", dtype)
    with scene.erased(mode=mode) as erasure:
        erasure.warmup()
        assert compiled
        compiled.clear()
        scene.call()
    assert compiled == []
