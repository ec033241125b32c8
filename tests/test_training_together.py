"""Several SAEs trained on one stream of activations."""

import shutil
from itertools import islice
from typing import Any

import pytest
import torch

from saemnesia_fast.training import (
    LiveActivations,
    SeveralActivations,
    TensorActivations,
    TrainConfig,
    train_sae,
    train_saes,
)
from saemnesia_fast.training.sampling import sample_activations
from test_training import Interrupted, Interrupting, data, metrics, sparse_tokens
from test_training_data import HOOK_POINTS, SAMPLING, pipeline

RECIPE: dict[str, Any] = {"steps": 12, "lr": 3e-3, "progress": False, "device": "cpu", "log_every": 1}
RECIPE |= {"checkpoint_every": 4, "keep_checkpoints": 3}
SIZES: dict[str, dict[str, Any]] = {
    "narrow": {"num_latents": 16, "k": 2},
    "wide": {"num_latents": 48, "k": 5, "multi_topk": True},
    "shared": {"expansion_factor": 3, "k": 3, "batch_topk": True},
}


def configs(folder, **options):
    return [TrainConfig(**RECIPE, **sizes, hook_point=name, out_dir=folder, **options) for name, sizes in SIZES.items()]


def test_each_is_the_sae_that_training_alone_gives(tmp_path):
    """Sizes, k and loss may differ; batches are read once."""
    together = train_saes(configs(tmp_path / "together"), data())
    for config, sae in zip(configs(tmp_path / "alone"), together, strict=True):
        alone = train_sae(config, data())
        assert all(torch.equal(tensor, sae.state_dict()[name]) for name, tensor in alone.state_dict().items())
        assert metrics(tmp_path / "alone" / config.hook_point) == metrics(tmp_path / "together" / config.hook_point)


@pytest.mark.parametrize(("stop", "lost"), [(10, None), (10, 8), (6, 4)])
def test_they_resume_from_a_step_that_all_have(stop, lost, tmp_path):
    """Killed between two checkpoints of one step, or before the first: those that are ahead go back."""
    straight = train_saes(configs(tmp_path / "straight"), data())
    resuming = configs(tmp_path / "resumed", resume=True)
    with pytest.raises(Interrupted):
        train_saes(resuming, Interrupting(stop, sparse_tokens(), 64))
    if lost:
        folder = tmp_path / "resumed/wide/checkpoints"
        for path in folder.glob("step-*.safetensors"):
            if int(path.stem.removeprefix("step-")) >= lost:
                path.unlink()
    resumed = train_saes(resuming, data())
    for one, other in zip(straight, resumed, strict=True):
        assert one.content_hash() == other.content_hash()
    for name in SIZES:
        assert metrics(tmp_path / "straight" / name) == metrics(tmp_path / "resumed" / name)


def test_hook_points_of_their_own_sources(tmp_path):
    """Each SAE sees its hook point's batches, and the position of every source is restored."""

    def sources(count=None):
        kind: Any = TensorActivations if count is None else lambda *args: Interrupting(count, *args)
        return SeveralActivations({f"block{i}": kind(sparse_tokens(seed=i), 64) for i in (0, 1)})

    def recipes(folder, **options):
        return [
            TrainConfig(**RECIPE, **SIZES["wide"], hook_point=f"block{i}", out_dir=folder, **options) for i in (1, 0)
        ]

    saes = train_saes(recipes(tmp_path / "together"), sources())
    for i, sae in zip((1, 0), saes, strict=True):
        alone = train_sae(TrainConfig(**RECIPE, **SIZES["wide"]), TensorActivations(sparse_tokens(seed=i), 64))
        assert alone.content_hash() == sae.content_hash()
    with pytest.raises(Interrupted):
        train_saes(recipes(tmp_path / "resumed", resume=True), sources(7))
    resumed = train_saes(recipes(tmp_path / "resumed", resume=True), sources())
    assert [sae.content_hash() for sae in resumed] == [sae.content_hash() for sae in saes]
    shutil.rmtree(tmp_path / "resumed/block1")


def test_live_hook_points_come_of_one_call():
    """Tokens of two hook points stay side by side through the shuffle: row by row they are of one place and prompt."""
    prompts = ["a", "b", "c"]
    names = ["up_blocks.1.attentions.0", "up_blocks.1.attentions.1"]
    source = LiveActivations(pipeline(), prompts, names, SAMPLING, batch_size=16, buffer_tokens=100)
    activations, _ = sample_activations(pipeline(), ["a", "b"], SAMPLING.seed, names, SAMPLING)
    first, second = (activations[name].flatten(0, 2) for name in names)
    for batch in islice(source, 4):
        assert list(batch) == names
        for one, two in zip(*batch.values(), strict=True):
            places = (first == one).all(1).nonzero()[:, 0].tolist()
            assert any(torch.equal(second[place], two) for place in places)


def test_a_run_of_more_saes_than_before_does_not_start_afresh(tmp_path):
    """One that is finished, or well under way, is not thrown away for one that is new."""
    folder = tmp_path / "saes"
    train_sae(configs(folder)[0], data())
    before = sorted(path.name for path in (folder / "narrow/checkpoints").iterdir())
    with pytest.raises(
        ValueError, match=r"resume: expected a checkpoint of one step for all in .*, got steps \[12, 0, 0\]"
    ):
        train_saes(configs(folder, resume=True), data())
    assert sorted(path.name for path in (folder / "narrow/checkpoints").iterdir()) == before


def test_a_skipped_batch_is_skipped_by_all_and_resumed(tmp_path):
    x = sparse_tokens()
    x[100] = torch.nan
    straight = train_saes(configs(tmp_path / "straight", on_bad_batch="skip"), TensorActivations(x, 64))
    resuming = configs(tmp_path / "resumed", on_bad_batch="skip", resume=True)
    with pytest.raises(Interrupted):
        train_saes(resuming, Interrupting(10, x, 64))
    resumed = train_saes(resuming, TensorActivations(x, 64))
    assert [sae.content_hash() for sae in resumed] == [sae.content_hash() for sae in straight]
    for name in SIZES:
        assert metrics(tmp_path / "resumed" / name)[-1]["skipped"] >= 1
        assert metrics(tmp_path / "straight" / name) == metrics(tmp_path / "resumed" / name)


def test_what_cannot_be_trained_together_is_refused(tmp_path):
    recipe: dict[str, Any] = {"num_latents": 16, "k": 2, "progress": False, "device": "cpu"}
    with pytest.raises(ValueError, match="configs: expected some, with folders of their own"):
        train_saes([TrainConfig(**recipe, out_dir=tmp_path, steps=2)] * 2, data())
    with pytest.raises(ValueError, match=r"steps: expected one number for all, got \[2, 3\]"):
        train_saes([TrainConfig(**recipe, steps=steps) for steps in (2, 3)], data())
    with pytest.raises(ValueError, match="configs: expected some"):
        train_saes([], data())
    with pytest.raises(ValueError, match="checkpoint_every, keep_checkpoints: expected one interval for all"):
        train_saes([TrainConfig(**recipe, steps=2, checkpoint_every=every) for every in (2, 3)], data())
    uneven = LiveActivations(pipeline(), ["a"], HOOK_POINTS, SAMPLING, batch_size=16, buffer_tokens=100)
    with pytest.raises(ValueError, match="hook_point: expected several with maps of one size, got tokens a map"):
        next(iter(uneven))
    with pytest.raises(ValueError, match="sources: expected at least one"):
        SeveralActivations({})
