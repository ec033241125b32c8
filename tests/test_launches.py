"""Launches of Triton kernels are repeated as Triton itself would make them, or not at all."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="triton is not installed")
erasing = pytest.importorskip("erasing", reason="diffusers or transformers is not installed")

from diffusers.models.transformers.transformer_2d import Transformer2DModel  # noqa: E402

from no_device import Driver, no_device  # noqa: E402
from saemnesia_fast import TopKSAE, apply_erasure  # noqa: E402
from saemnesia_fast.ops import workspace  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
KERNELS = ["steering_lines_kernel", "probe_kernel", "rank_kernel", "erase_kernel"]
GRID = slice(1, 4)
FOR_PROFILERS = (7, 8, 9)
"""Metadata and two hooks, after name, grid, stream, function and packed metadata."""


class Block(Transformer2DModel):
    ready: Tensor

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        return (self.ready,)


class UNet(nn.Module):
    """Hands out what it is told to as its block's output."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.time_proj = nn.Identity()
        self.up_blocks = nn.ModuleList([nn.ModuleDict()])
        block = Block(2, channels // 2, in_channels=channels, norm_num_groups=1)
        self.up_blocks[0].attentions = nn.ModuleList([nn.Identity(), block])  # type: ignore[union-attr]
        self.block = block

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        self.time_proj(timestep.expand(len(sample)))
        self.block.ready = sample
        return self.block(torch.empty(1))  # type: ignore[no-any-return]


class Scene:
    def __init__(self, driver: Driver, sae: TopKSAE | None = None) -> None:
        self.driver = driver
        self.sae = sae or erasing.random_sae()
        self.unet = UNet(self.sae.d)
        self.erasure = apply_erasure(self.unet, self.sae, erasing.random_table(self.sae), "cat", **erasing.STRONG)
        (self.point,) = self.erasure._points.values()

    def call(self, x: Tensor, timestep: Tensor) -> list[tuple[Any, ...]]:
        """The launches of a UNet call."""
        self.point.follow(x.device)
        self.point.tables._on_host = False  # as a GPU's
        self.driver.launched = []
        self.unet(x, timestep)
        return self.driver.launched

    def tokens(self, dtype: torch.dtype = torch.float16, images: int = 2) -> Tensor:
        return torch.randn(images, self.sae.d, 4, 4).to(dtype)


@pytest.fixture
def scene() -> Iterator[Scene]:
    with no_device() as driver:
        yield Scene(driver)


def addresses(launches: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments) for arguments in launches]


def was_repeated(launches: list[tuple[Any, ...]]) -> bool:
    """Whether no launch was handed a tensor: Triton, when asked for a kernel, hands on what it was given."""
    return not any(isinstance(argument, Tensor) for arguments in launches for argument in arguments)


def test_a_repeated_call_differs_from_the_first_in_activation_timestep_and_counter(scene: Scene) -> None:
    x, timestep = scene.tokens(), torch.tensor(751)
    first = scene.call(x, timestep)
    assert [arguments[0] for arguments in first] == KERNELS
    assert not was_repeated(first)
    for step in (501, 251, 1):
        new_x, new_timestep = scene.tokens(), torch.tensor(step)
        again = scene.call(new_x, new_timestep)
        assert was_repeated(again)
        moved = {x.data_ptr(): new_x.data_ptr(), timestep.data_ptr(): new_timestep.data_ptr()}
        counters = set()
        for before, now in zip(addresses(first), again, strict=True):
            assert len(before) == len(now)
            for at, (old, new) in enumerate(zip(before, now, strict=True)):
                if at not in FOR_PROFILERS and moved.get(old, old) != new:
                    counters.add((old, new))
        assert len(counters) == 1  # one and the same in all three kernels
        assert counters.pop()[1] % 16 == 0


def test_each_call_counts_in_a_zero_of_its_own(scene: Scene) -> None:
    own = scene.point.workspace
    seen = []
    original = own.zero
    own.zero = lambda x: seen.append(original(x)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    for _ in range(70):  # more than are filled at once
        scene.call(scene.tokens(), torch.tensor(501))
    assert len({zero.data_ptr() for zero in seen}) == len(seen) == 70
    assert not any(int(zero) for zero in seen)


CHANGES: dict[str, Callable[[Scene], tuple[Tensor, Tensor]]] = {
    "batch": lambda scene: (scene.tokens(images=4), torch.tensor(501)),
    "dtype": lambda scene: (scene.tokens(torch.float32), torch.tensor(501)),
    "layout": lambda scene: (scene.tokens().contiguous(memory_format=torch.channels_last), torch.tensor(501)),
    "alignment": lambda scene: (
        torch.randn(2 * scene.sae.d * 16 + 1).half()[1:].view(2, scene.sae.d, 4, 4),
        torch.tensor(501),
    ),
    "type of the timestep": lambda scene: (scene.tokens(), torch.tensor(501.0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_kind_of_call_is_launched_anew(scene: Scene, change: str) -> None:
    plain = (scene.tokens(), torch.tensor(501))
    scene.call(*plain)
    assert was_repeated(scene.call(*plain))
    other = CHANGES[change](scene)
    assert not was_repeated(scene.call(*other))
    assert was_repeated(scene.call(*other))
    assert not was_repeated(scene.call(*plain))


def test_changed_weights_are_launched_anew(scene: Scene) -> None:
    plain = (scene.tokens(), torch.tensor(501))
    scene.call(*plain)
    with torch.no_grad():
        scene.sae.encoder.bias.add_(1)
    assert not was_repeated(scene.call(*plain))
    assert was_repeated(scene.call(*plain))
    scene.sae.W_dec.data = scene.sae.W_dec.data.clone()
    scene.call(*plain)
    assert was_repeated(scene.call(*plain))


def test_another_precision_of_products_is_launched_anew(scene: Scene) -> None:
    plain = (scene.tokens(torch.float32), torch.tensor(501))
    scene.call(*plain)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert not was_repeated(scene.call(*plain))
        assert was_repeated(scene.call(*plain))
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_profiler_is_told_of_every_launch(scene: Scene) -> None:
    from triton import knobs

    plain = (scene.tokens(), torch.tensor(501))
    scene.call(*plain)
    assert was_repeated(scene.call(*plain))
    knobs.runtime.launch_enter_hook.add(print)
    try:
        assert not was_repeated(scene.call(*plain))
    finally:
        knobs.runtime.launch_enter_hook.remove(print)
    assert was_repeated(scene.call(*plain))


def test_a_captured_call_neither_repeats_nor_forgets(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = (scene.tokens(), torch.tensor(501))
    scene.call(*plain)
    with monkeypatch.context() as capturing:
        capturing.setattr(workspace, "_where", lambda x: None)
        assert not was_repeated(scene.call(*plain))
    assert was_repeated(scene.call(*plain))


def test_new_concepts_and_strengths_are_repeated(scene: Scene) -> None:
    """They are in the tables, which stay where they are."""
    plain = (scene.tokens(), torch.tensor(501))
    first = scene.call(*plain)
    scene.erasure.set(concepts="dog", strength=-2.0)
    again = scene.call(*plain)
    assert was_repeated(again)
    assert [arguments[GRID] for arguments in again] == [arguments[GRID] for arguments in first]


def test_a_call_with_more_to_do_is_not_repeated() -> None:
    """Reports are made of what the lookup returns."""
    with no_device() as driver:
        sae = erasing.random_sae()
        unet = UNet(sae.d)
        apply_erasure(unet, sae, erasing.random_table(sae), "cat", record=True, **erasing.STRONG)
        for _ in range(3):
            driver.launched = []
            unet(torch.randn(2, sae.d, 4, 4).half(), torch.tensor(501))
            assert not was_repeated(driver.launched)


def test_a_workspace_repeats_only_what_was_allowed_to_be() -> None:
    empty, x = workspace.Workspace(), torch.ones(4)
    with empty.record("how", x):
        pass
    assert not empty.repeat("how", x)
    assert not empty.repeat("other", x)
