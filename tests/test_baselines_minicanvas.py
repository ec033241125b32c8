"""The baselines with MiniCanvas' settings."""

from __future__ import annotations

import pytest

from saemnesia_fast.minicanvas.baselines import BASELINES, baseline, guides, prompts
from saemnesia_fast.minicanvas.canvas import MiniCanvas, Request
from saemnesia_fast.minicanvas.drawing import OBJECTS, STYLES


@pytest.fixture(scope="module")
def canvas() -> MiniCanvas:
    return MiniCanvas.load()


def test_every_prompt_has_its_guides():
    texts, others = prompts(), guides()
    assert texts.keys() == others.keys() == {*OBJECTS, *STYLES}
    assert texts["flower"][1] == "a painting of a flower in neon style" and len(set(texts["neon"])) == 32
    assert list(others["mushroom"])[:2] == ["star", "heart"] and "flower" not in others["flower"]
    for text, guide in zip(texts["fish"], others["fish"]["flower"], strict=True):
        assert text.replace("fish", "flower") == guide


def test_baselines_are_known_by_name(canvas):
    assert [baseline(name, canvas).name for name in BASELINES] == list(BASELINES)
    with pytest.raises(ValueError, match="name: expected one of negative_prompt, uce, esd, neuron_masking, got 'fmn'"):
        baseline("fmn", canvas)


def test_uce_paints_the_next_object_and_keeps_the_others(canvas):
    """A flower becomes a mushroom in its own style; other pictures hardly move."""
    wanted = [Request(OBJECTS.index(name), style, 100 + style) for name in ("flower", "star") for style in (0, 4)]
    plain = canvas.paint(wanted)
    with baseline("uce", canvas).erased(canvas.pipe, ["flower"]):
        edited = canvas.paint(wanted)
    objects, styles = (scores.argmax(1) for scores in canvas.judge.predict(edited))
    assert objects.tolist() == 2 * [OBJECTS.index("mushroom")] + 2 * [OBJECTS.index("star")]
    assert styles.tolist() == [0, 4, 0, 4]
    assert (edited[2:] - plain[2:]).abs().mean() < 0.3 * (edited[:2] - plain[:2]).abs().mean()
