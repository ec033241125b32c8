"""Activations on disk: content, resuming at the exact prompt, refusals, and the two commands (SPEC 5.1, 6.4)."""

import errno
import logging
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from diffusers import PNDMScheduler

from pipelines import HOOK_POINTS, generate, tiny_sd, tiny_sdxl
from saemnesia_fast.cli.inputs import read_prompts
from saemnesia_fast.cli.main import main
from saemnesia_fast.files import load_tensors, read_json
from saemnesia_fast.hookpoints import find_hook_point
from saemnesia_fast.sae import TopKSAE
from saemnesia_fast.training import CollectConfig, ShardActivations, collect, collect_activations, sampling

PROMPTS = [f"prompt {letter}" for letter in "abcdefg"]
# One call is 2 prompts x 2 steps x 16 tokens x 64 channels in float16, and as much at the second hook point.
CALL_BYTES = 2 * 2 * 16 * 64 * 2


def config(**options):
    defaults = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 64, "width": 64, "seed": 5}
    return CollectConfig(**(defaults | {"prompts_per_call": 2, "shard_bytes": 2 * CALL_BYTES} | options))


def gather(folder, hook_point):
    shards = read_json(folder / "index.json")["hook_points"][hook_point]["shards"]
    parts = [load_tensors(folder / shard["file"]) for shard in shards]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stop_after(calls, monkeypatch):
    """Let the pipeline be interrupted after so many calls."""
    sampled: list[list[str]] = []

    def failing(pipe, prompts, *arguments):
        if len(sampled) == calls:
            raise KeyboardInterrupt
        sampled.append(prompts)
        return sampling.sample_activations(pipe, prompts, *arguments)

    monkeypatch.setattr(collect, "sample_activations", failing)


@pytest.fixture
def pipe():
    return tiny_sd()


def by_hand(pipe, prompts, first_seed, hook_point):
    """The block's conditional output through a plain hook: [B, steps, H*W, C]."""
    seen = []
    block = find_hook_point(pipe.unet, hook_point)
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output[0].detach().clone()))
    generators = [torch.Generator().manual_seed(first_seed + i) for i in range(len(prompts))]
    generate(pipe, prompts, num_inference_steps=2, guidance_scale=3.0, generator=generators)
    handle.remove()
    rows = [x[len(prompts) :].permute(0, 2, 3, 1).reshape(len(prompts), -1, x.shape[1]) for x in seen]
    return torch.stack(rows, dim=1)


def test_shards_hold_the_conditional_half_of_every_step(pipe, tmp_path):
    collect_activations(pipe, PROMPTS, HOOK_POINTS, tmp_path, config(), progress=False)
    index = read_json(tmp_path / "index.json")
    assert index["finished"] is True
    assert index["prompts"] == PROMPTS
    for name, (tokens, d) in zip(HOOK_POINTS, ((16, 64), (64, 32)), strict=True):
        assert [shard["prompts"] for shard in index["hook_points"][name]["shards"]] == [2, 2, 2, 1]
        assert index["hook_points"][name]["d"] == d
        stored = gather(tmp_path, name)
        assert stored["activations"].dtype == torch.float16
        assert stored["prompts"].tolist() == [i for i in range(7) for _ in range(2)]
        assert stored["timesteps"].tolist() == [501, 1] * 7
        maps = stored["activations"].view(7, 2, tokens, d)
        for first in (0, 2, 4, 6):
            expected = by_hand(pipe, PROMPTS[first : first + 2], 5 + first, name).half()
            assert torch.equal(maps[first : first + 2], expected)


def test_shard_size_is_bounded(pipe, tmp_path):
    """shard_bytes bounds the largest tensor of a shard; a call that needs more has a shard of its own."""
    for bytes_, prompts in ((4 * CALL_BYTES, [4, 3]), (1, [2, 2, 2, 1])):
        folder = tmp_path / str(bytes_)
        collect_activations(pipe, PROMPTS, HOOK_POINTS, folder, config(shard_bytes=bytes_), progress=False)
        shards = read_json(folder / "index.json")["hook_points"][HOOK_POINTS[1]]["shards"]
        assert [shard["prompts"] for shard in shards] == prompts
        sizes = [load_tensors(folder / shard["file"])["activations"].nbytes for shard in shards]
        assert bytes_ == 1 or max(sizes) <= bytes_


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_an_interrupted_set_continues_to_the_same_files(calls, pipe, tmp_path, monkeypatch):
    collect_activations(pipe, PROMPTS, HOOK_POINTS, tmp_path / "straight", config(), progress=False)
    stop_after(calls, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        collect_activations(pipe, PROMPTS, HOOK_POINTS, tmp_path / "resumed", config(), progress=False)
    with pytest.raises(ValueError, match="was interrupted"):
        ShardActivations(tmp_path / "resumed", HOOK_POINTS[0], 16)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="holds an interrupted set with another sampling"):
        collect_activations(pipe, PROMPTS, HOOK_POINTS, tmp_path / "resumed", config(seed=6), progress=False)
    collect_activations(pipe, PROMPTS, HOOK_POINTS, tmp_path / "resumed", config(), progress=False)
    assert files(tmp_path / "resumed") == files(tmp_path / "straight")


def test_a_finished_set_is_not_overwritten(pipe, tmp_path):
    collect_activations(pipe, PROMPTS[:2], HOOK_POINTS[:1], tmp_path, config(), progress=False)
    before = files(tmp_path)
    with pytest.raises(FileExistsError, match="holds a finished set of activations"):
        collect_activations(pipe, PROMPTS[:2], HOOK_POINTS[:1], tmp_path, config(), progress=False)
    assert files(tmp_path) == before


def test_disk_need_of_the_papers_model():
    """SPEC 5.1: 32.8 MB a prompt at 50 steps of one hook point of SD 1.5."""
    assert collect._size(2 * 50 * 256 * 1280) == "32.8 MB"
    assert [collect._size(n) for n in (12, 999, 2730e9, 5e15)] == ["12 bytes", "999 bytes", "2.7 TB", "5000.0 TB"]


@pytest.mark.parametrize("done", [0, 4])
def test_disk_need_is_told_and_must_fit(done, pipe, tmp_path, monkeypatch, caplog):
    """What is still to come is counted, at all hook points; without room nothing is written."""
    if done:
        stop_after(done // 2, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            collect_activations(pipe, PROMPTS, HOOK_POINTS, tmp_path / "out", config(), progress=False)
        monkeypatch.undo()
        done -= 2  # the last call filled no shard
    before = files(tmp_path)
    per_prompt = 2 * 2 * (16 * 64 + 64 * 32)
    needed = (7 - done) * per_prompt
    free = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(collect.shutil, "disk_usage", lambda path: free)
    said = f"7 prompts need 86.0 kB, {tmp_path} has 86.0 kB free" if not done else "5 prompts need 61.4 kB"
    with pytest.raises(OSError, match=f"out_dir: {said}.*check_disk=False") as error:
        collect_activations(pipe, PROMPTS, HOOK_POINTS, tmp_path / "out", config(), progress=False)
    assert error.value.errno is None
    assert files(tmp_path) == before
    free.free = needed
    with caplog.at_level(logging.INFO, "saemnesia_fast"):
        collect_activations(pipe, PROMPTS, HOOK_POINTS, tmp_path / "out", config(), progress=False)
    assert f"4.1 kB a prompt at {HOOK_POINTS[0]} (2 maps x 16 tokens x 64 channels x 2 bytes)" in caplog.text
    assert f"8.2 kB a prompt at {HOOK_POINTS[1]} (2 maps x 64 tokens x 32 channels x 2 bytes)" in caplog.text
    stored = sum(gather(tmp_path / "out", name)["activations"].nbytes for name in HOOK_POINTS)
    assert stored == 7 * per_prompt


def test_a_disk_without_room_can_be_started_on_all_the_same(pipe, tmp_path, monkeypatch):
    """And the switch is no part of what the set is."""
    monkeypatch.setattr(collect.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    stop_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        collect_activations(pipe, PROMPTS, HOOK_POINTS, tmp_path, config(check_disk=False), progress=False)
    monkeypatch.undo()
    collect_activations(pipe, PROMPTS, HOOK_POINTS, tmp_path, config(), progress=False)


def test_steps_are_counted_as_the_scheduler_takes_them(pipe):
    """PNDM runs the UNet once more than it is asked to."""
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    seen = sampling.activation_shapes(pipe, HOOK_POINTS, config(num_inference_steps=5))
    assert seen == {HOOK_POINTS[0]: (6, 16, 64), HOOK_POINTS[1]: (6, 64, 32)}


def test_a_disk_that_fills_leaves_a_set_to_continue(pipe, tmp_path, monkeypatch):
    collect_activations(pipe, PROMPTS, HOOK_POINTS, tmp_path / "straight", config(), progress=False)
    save = collect.save_tensors

    def full(path, tensors):
        if path.name == "00001.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(path, tensors)

    monkeypatch.setattr(collect, "save_tensors", full)
    with pytest.raises(OSError, match=r"No space left on device.*00001\.safetensors"):
        collect_activations(pipe, PROMPTS, HOOK_POINTS, tmp_path / "full", config(), progress=False)
    monkeypatch.undo()
    collect_activations(pipe, PROMPTS, HOOK_POINTS, tmp_path / "full", config(), progress=False)
    assert files(tmp_path / "full") == files(tmp_path / "straight")


def test_a_damaged_interrupted_set_is_refused_by_the_file_s_name(pipe, tmp_path, monkeypatch):
    stop_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        collect_activations(pipe, PROMPTS, HOOK_POINTS, tmp_path, config(), progress=False)
    monkeypatch.undo()
    shard = tmp_path / HOOK_POINTS[1] / "00000.safetensors"
    for path, message in ((shard, "not a complete safetensors file"), (tmp_path / "index.json", "not an index")):
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match=f"{path.name}: {message}.* collect into a new folder"):
            collect_activations(pipe, PROMPTS, HOOK_POINTS, tmp_path, config(), progress=False)


def test_prompts_of_unlearn_canvas():
    """SPEC 5.2: 20 objects, 50 styles, with spaces for underscores; Seed_Images is none of them."""
    prompts = read_prompts("unlearn-canvas")
    assert len(set(prompts)) == len(prompts) == 20 * 51
    assert prompts[:2] == ["An image of Architectures.", "An image of Bears."]
    assert prompts[20] == "An image of Architectures in Abstractionism style."
    assert prompts[-1] == "An image of Waterfalls in Winter style."
    assert "An image of Bears in Van Gogh style." in prompts
    assert not any("Seed" in prompt or "_" in prompt for prompt in prompts)


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_activations_that_float16_cannot_hold_are_refused(value, pipe, tmp_path):
    """NaN, and values beyond float16's range, name the prompts and the hook point."""
    with torch.no_grad():
        find_hook_point(pipe.unet, HOOK_POINTS[1]).get_parameter("proj_out.bias")[3] = value
    with pytest.raises(ValueError, match=r"NaN or inf at up_blocks.1.attentions.0, prompts 0 to 1"):
        collect_activations(pipe, PROMPTS, HOOK_POINTS[1:], tmp_path, config(), progress=False)


def test_residual_stream_of_sdxl(tmp_path):
    """SPEC 3.6: SDXL's autoencoders read output - input."""
    pipe = tiny_sdxl()
    streams = {}
    for name, stream in (("output",) * 2, ("residual",) * 2, ("mapping", {HOOK_POINTS[0]: "residual"})):
        options = config(stream=stream)
        collect_activations(pipe, PROMPTS[:1], HOOK_POINTS[:1], tmp_path / name, options, progress=False)
        streams[name] = gather(tmp_path / name, HOOK_POINTS[0])["activations"].float()
    assert torch.equal(streams["mapping"], streams["residual"])
    inputs = []
    block = find_hook_point(pipe.unet, HOOK_POINTS[0])
    handle = block.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    collect_activations(pipe, PROMPTS[:1], HOOK_POINTS[:1], tmp_path / "again", config(), progress=False)
    handle.remove()
    expected = torch.stack([x[1].flatten(1).T for x in inputs[-2:]])
    torch.testing.assert_close(streams["output"] - streams["residual"], expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("prompts", "hook_points", "message"),
    [
        ([], HOOK_POINTS, "prompts: expected a non-empty list"),
        ("a cat", HOOK_POINTS, "prompts: expected a non-empty list"),
        (PROMPTS, [], "hook_points: expected a non-empty list of distinct names"),
        (PROMPTS, [HOOK_POINTS[0]] * 2, "hook_points: expected a non-empty list of distinct names"),
        (PROMPTS, ["nowhere"], "hook_point: the UNet has no 'nowhere'"),
    ],
)
def test_bad_requests_are_refused(prompts, hook_points, message, pipe, tmp_path):
    with pytest.raises(ValueError, match=message):
        collect_activations(pipe, prompts, hook_points, tmp_path, config(), progress=False)


def test_commands_collect_then_train(pipe, tmp_path, capsys):
    """`collect` and `train` on a pipeline in a folder: from shards, then from the live pipeline."""
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:3]) + "\n\n")
    source = ["--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.txt"), "--device", "cpu"]
    sampled = ["num-inference-steps", "2", "prompts-per-call", "2", "height", "64", "width", "64"]
    plain = [f"--{word}" if word[0].isalpha() else word for word in sampled]
    main(["collect", *source, *plain, "--hook-points", *HOOK_POINTS, "--out-dir", str(tmp_path / "activations")])
    recipe = ["--hook-point", HOOK_POINTS[0], "--batch-size", "32", "--expansion-factor", "2", "--k", "4"]
    recipe += ["--no-progress"]
    shards = ["--activations", str(tmp_path / "activations"), "--device", "cpu"]
    main(["train", *shards, *recipe, "--out-dir", str(tmp_path / "shards")])
    nested = [word.replace("--", "--sampling.") for word in plain]
    live = [*source, *nested, "--steps", "3", "--buffer-tokens", "64"]
    main(["train", *live, *recipe, "--out-dir", str(tmp_path / "live")])
    several = ["--more-hook-points", HOOK_POINTS[1], "--more-k", "2", "--more-expansion-factors", "1"]
    main(["train", *shards, *recipe, *several, "--out-dir", str(tmp_path / "several")])
    for name, k, factor in product(HOOK_POINTS, (4, 2), (2, 1)):
        sae = TopKSAE.from_pretrained(tmp_path / f"several/k{k}/x{factor}", subfolder=name)
        assert (sae.num_latents, sae.k) == (factor * sae.d, k)
    for run in ("shards", "live"):
        sae = TopKSAE.from_pretrained(tmp_path / run, subfolder=HOOK_POINTS[0])
        assert (sae.d, sae.num_latents, sae.k) == (64, 128, 4)
        assert all(parameter.isfinite().all() for parameter in sae.parameters())
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["train", *recipe, "--out-dir", str(tmp_path / "none")])
    assert "expected either --activations, or --model with --prompts" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["train", *shards, *recipe, *several, "--num-latents", "9", "--out-dir", str(tmp_path / "none")])
    assert "more_expansion_factors: expected none beside num_latents=9" in capsys.readouterr().err
