"""ops.steering_lines: SPEC 2.4, 3.4."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saemnesia_fast import ops

OP = torch.ops.saemnesia_fast.steering_lines
pytestmark = pytest.mark.usefixtures("each_backend")


def tables(timesteps: int, prompts: int, width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (timesteps, prompts, width)
    return {
        "stored": torch.randperm(1000, generator=generator)[:timesteps].float(),
        "latents": torch.randint(100, shape, generator=generator),
        "thresholds": torch.randn(shape, generator=generator),
        "factors": torch.randn(shape, generator=generator),
        "owners": torch.randint(-1, 3, shape, generator=generator),
        "switches": torch.rand(prompts, generator=generator) < 0.7,
    }


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 4), st.integers(1, 2), st.data())
def test_equals_the_loops(count: int, prompts: int, width: int, halves: int, data: st.DataObject) -> None:
    held = tables(count, prompts, width, seed=data.draw(st.integers(0, 99)))
    blocks = halves * prompts
    lines = blocks * data.draw(st.integers(1, 3))
    shared = data.draw(st.booleans())
    times = torch.tensor(data.draw(st.lists(st.integers(0, 999), min_size=1 if shared else lines, max_size=lines)))
    times = times[:1] if shared else times
    first_block = data.draw(st.sampled_from([0, prompts * (halves - 1)]))
    earliest, latest = sorted(data.draw(st.tuples(st.integers(0, 999), st.integers(0, 999))), reverse=True)
    got = ops.steering_lines(
        times, **held, num_lines=lines, num_blocks=blocks, first_block=first_block, earliest=earliest, latest=latest
    )
    for line in range(lines):
        block = line // (lines // blocks)
        prompt = block % prompts
        time = times[0 if shared else line].item()
        distances = [abs(at - time) for at in held["stored"].tolist()]
        step = distances.index(min(distances))
        active = bool(held["switches"][prompt]) and block >= first_block and earliest >= time >= latest
        assert got.active[line].item() == active
        for name in ("latents", "factors", "owners"):
            assert torch.equal(getattr(got, name)[line], held[name][step, prompt])
        want = held["thresholds"][step, prompt] if active else torch.full((width,), math.inf)
        assert torch.equal(got.thresholds[line], want)


def test_an_empty_window_leaves_no_line_active() -> None:
    lines = ops.steering_lines(torch.tensor([5]), **tables(3, 2, 4), num_lines=4, earliest=4.0, latest=0.0)
    assert not lines.active.any()
    assert (lines.thresholds == math.inf).all()


@pytest.mark.parametrize("shared", [True, False])
def test_opcheck(shared: bool) -> None:
    times = torch.tensor([400]) if shared else torch.tensor([400, 10, 900, 400])
    torch.library.opcheck(OP, (times, *tables(5, 2, 3).values(), 4, 4, 2, 800.0, 10.0))
