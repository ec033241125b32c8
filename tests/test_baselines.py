"""The baselines on tiny random pipelines: what they change, by numbers, and that nothing of it stays."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines import generate, tiny_sd, tiny_sd2, tiny_sdxl
from saemnesia_fast.evaluation.baselines import ESD, UCE, NegativePrompt, NeuronMasking
from saemnesia_fast.evaluation.baselines.prompts import asking, last_word, others, text_states
from saemnesia_fast.evaluation.baselines.weights import swapped
from saemnesia_fast.files import load_tensors

PROMPTS = {"cat": ["a cat", "one cat"], "dog": ["a dog", "one dog"], "old": ["one cat", "one dog"]}
SHORT: dict[str, Any] = {"iterations": 2, "batch_size": 2, "steps": 2, "learning_rate": 1e-3}


def bits(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: torch.nn.Module) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


METHODS = [
    NegativePrompt(),
    UCE(PROMPTS),
    ESD(PROMPTS, **SHORT),
    ESD(PROMPTS, trained="u", **SHORT),
    NeuronMasking(PROMPTS, share=0.1, steps=2),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}_{getattr(method, 'trained', '')}")
def test_a_method_acts_while_open_and_leaves_no_trace(method):
    pipe = tiny_sd()
    before, plain = bits(pipe.unet), generate(pipe, "a cat")
    with method.erased(pipe, ["cat"]) as arguments:
        assert (generate(pipe, "a cat", **arguments) - plain).abs().max() > 1e-3
    assert changed(before, pipe.unet) == set()
    with pytest.raises(KeyboardInterrupt), method.erased(pipe, ["cat"]):
        raise KeyboardInterrupt
    assert changed(before, pipe.unet) == set()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in pipe.unet.parameters())
    assert torch.equal(generate(pipe, "a cat"), plain)
    assert method.source


@pytest.mark.parametrize(
    "method", [METHODS[n] for n in (1, 2, 4)], ids=lambda method: f"{method.name}_{getattr(method, 'trained', '')}"
)
def test_the_order_of_concepts_does_not_matter_and_unknown_ones_are_refused(method):
    pipe = tiny_sd()
    weights = []
    for concepts in (["cat", "dog"], ["dog", "cat"]):
        with method.erased(pipe, concepts):
            weights.append(bits(pipe.unet))
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-5, atol=1e-6)
    with (
        pytest.raises(ValueError, match=r"concepts: expected some of cat, dog, old, got 'cow'"),
        method.erased(pipe, ["cow"]),
    ):
        pass
    with pytest.raises(ValueError, match="at least one"), method.erased(pipe, []):
        pass


def test_prompts_are_shared_out_between_asked_and_others():
    assert asking(PROMPTS, ["dog", "old"]) == ["a dog", "one dog", "one cat"]
    assert others(PROMPTS, ["a dog", "one dog"]) == ["a cat", "one cat"]


def test_text_states_are_what_the_unet_reads():
    pipe = tiny_sd()
    seen = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    generate(pipe, ["a cat", "one dog"], num_inference_steps=1)
    hook.remove()
    assert torch.equal(text_states(pipe, ["", "", "a cat", "one dog"]), seen[0])
    assert [last_word(pipe, text) for text in ("", "a", "cat", "a cat", 30 * "x")] == [0, 1, 3, 4, 14]


def test_negative_prompt_names_all_concepts():
    with NegativePrompt("a picture of {}").erased(tiny_sd(), ["cat", "dog"]) as arguments:
        assert arguments == {"negative_prompt": "a picture of cat, a picture of dog"}


def test_swapped_checks_before_it_writes():
    layer = torch.nn.Linear(3, 2)
    before = bits(layer)
    wrong = {"bias": torch.zeros(2), "weight": torch.zeros(3, 2)}
    with pytest.raises(ValueError, match=r"weight: expected \[2, 3\], got \[3, 2\]"), swapped(layer, wrong):
        pass
    assert changed(before, layer) == set()


def states_of(pipe: Any, texts: Sequence[str]) -> Tensor:
    return text_states(pipe, texts).double()


@pytest.mark.parametrize("build", [tiny_sd, tiny_sd2, tiny_sdxl])
def test_uce_is_the_least_squares_solution(build):
    """arXiv 2308.14761, equation 7, for every layer by itself, row by row of the stacked problem."""
    pipe = build()
    method = UCE(PROMPTS, {"cat": {"dog": ["a dog", "one dog"]}}, erase_scale=0.7, preserve_scale=0.3, ridge=0.1)
    old = states_of(pipe, ["a cat", "one cat"]).flatten(0, 1)
    guide = states_of(pipe, ["a dog", "one dog"]).flatten(0, 1)
    kept = states_of(pipe, ["a dog", "one dog"]).flatten(0, 1)
    before = bits(pipe.unet)
    with method.erased(pipe, ["cat"]):
        assert changed(before, pipe.unet) == {
            f"{name}.weight" for name, _ in pipe.unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))
        }
        for name in changed(before, pipe.unet):
            W = before[name].double()
            scales = [0.7**0.5, 0.3**0.5, 0.1**0.5]
            eye = torch.eye(W.shape[1], dtype=torch.float64)
            given = torch.cat([s * part for s, part in zip(scales, (old, kept, eye), strict=True)])
            wanted = torch.cat([s * part @ W.T for s, part in zip(scales, (guide, kept, eye), strict=True)])
            solved = torch.linalg.lstsq(given, wanted).solution.T
            torch.testing.assert_close(pipe.unet.get_parameter(name).double(), solved, rtol=1e-5, atol=1e-6)


def test_uce_gives_the_concept_the_guides_keys_and_leaves_the_others_alone():
    pipe = tiny_sd()
    prompts = {"cat": ["cat"], "dog": ["dog"]}
    # Padding apart, which all three share in part: the states of the words themselves are far from one another.
    W = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight
    cat, dog, cow = states_of(pipe, ["cat", "dog", "cow"])
    before = W.detach().double().clone()
    with UCE(prompts, {"cat": {"cow": ["cow"]}}, ridge=1e-6).erased(pipe, ["cat"]):
        after = W.detach().double()
        to_guide = (cat @ after.T - cow @ before.T).norm() / (cat @ before.T - cow @ before.T).norm()
        drift = (dog @ after.T - dog @ before.T).norm() / (dog @ before.T).norm()
    assert to_guide < 0.2 and drift < 0.1


def test_uce_lays_prompt_and_guide_side_by_side_by_their_last_words():
    pipe = tiny_sd()
    method = UCE(PROMPTS | {"cat": ["a cat"]}, {"cat": {"dog": ["one dog"], "x": ["x"], "cow": ["cow"]}})
    old, new = method._pairs(pipe, ["cat", "dog"])
    (text, guide) = states_of(pipe, ["a cat", "x"])
    assert torch.equal(old[:13], text[3:]) and torch.equal(new[:13], guide[:-3])
    with pytest.raises(ValueError, match="guides: expected 2 for 'cat', one a prompt, got 1"):
        UCE(PROMPTS, {"cat": {"x": ["x"]}})._pairs(pipe, ["cat"])


@pytest.mark.parametrize("trained", ["x", "u"])
def test_esd_is_adam_on_the_negative_guidance_of_the_concept_along_sampled_steps(trained):
    """arXiv 2303.07345, equation 7, with DDIM written out: two iterations of a trajectory of two steps."""
    pipe = tiny_sd()
    options: dict[str, Any] = {"batch_size": 2, "steps": 2, "learning_rate": 1e-3, "eta": 1.5, "guidance_scale": 3.0}
    ours = ESD({"cat": ["a cat"]}, trained, iterations=2, seed=5, **options).weights(pipe, ["cat"])

    frozen, unet = pipe.unet, copy.deepcopy(pipe.unet)
    weights = {name: p for name, p in unet.named_parameters() if (".attn2." in name) == (trained == "x")}
    adam = torch.optim.Adam(weights.values(), lr=1e-3)
    cat, empty = (text_states(pipe, [text]).expand(2, -1, -1) for text in ("a cat", ""))
    generator = torch.Generator().manual_seed(5)
    torch.randint(1, (2,), generator=generator)  # which of the prompts, one of one
    x = torch.randn(2, 4, 8, 8, generator=generator)
    alphas = pipe.scheduler.alphas_cumprod
    for t, alpha, below in ((501, alphas[501], alphas[1]), (1, alphas[1], alphas[0])):
        with torch.no_grad():
            neutral, asked = (frozen(x, t, encoder_hidden_states=text).sample for text in (empty, cat))
            unguided = unet(x, t, encoder_hidden_states=empty).sample
        answer = unet(x, t, encoder_hidden_states=cat).sample
        adam.zero_grad()
        (answer - (neutral - 1.5 * (asked - neutral))).square().mean().backward()
        adam.step()
        noise = unguided + 3 * (answer.detach() - unguided)
        clean = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        x = below.sqrt() * clean + (1 - below).sqrt() * noise
    assert ours.keys() == weights.keys()
    moved, expected = (
        torch.cat([(some[name] - frozen.get_parameter(name)).detach().flatten() for name in weights])
        for some in (ours, weights)
    )
    assert moved.abs().max() > 1e-3 and (moved - expected).norm() < 0.02 * expected.norm()


def test_esd_answers_the_concept_with_its_negative_guidance():
    pipe = tiny_sd()
    x = torch.randn(8, 4, 8, 8)
    cat, empty = (text_states(pipe, [text]).expand(8, -1, -1) for text in ("a cat", ""))
    with torch.no_grad():
        neutral, asked = (pipe.unet(x, 501, encoder_hidden_states=text).sample for text in (empty, cat))
        target = neutral - (asked - neutral)
        method = ESD({"cat": ["a cat"]}, iterations=16, batch_size=2, steps=4, learning_rate=2e-3)
        with method.erased(pipe, ["cat"]):
            answer = pipe.unet(x, 501, encoder_hidden_states=cat).sample
    assert (answer - target).norm() < 0.8 * (asked - target).norm()


def test_esd_trains_once_for_each_unet_set_of_concepts_and_settings(tmp_path, monkeypatch):
    pipe = tiny_sd()
    method = ESD(PROMPTS, folder=tmp_path, **SHORT)
    first = method.weights(pipe, ["cat", "dog"])
    (path,) = tmp_path.iterdir()
    for name, value in load_tensors(path).items():
        assert torch.equal(value, first[name])
    ESD(PROMPTS, folder=tmp_path, seed=1, **SHORT).weights(pipe, ["cat", "dog"])
    method.weights(tiny_sd(seed=1), ["cat", "dog"])
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr(ESD, "_train", lambda *arguments: pytest.fail("trained again"))
    again = method.weights(pipe, ["dog", "cat", "cat"])
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)


def test_esd_refuses_what_it_cannot_train():
    with pytest.raises(ValueError, match="trained: expected one of x, u, got 'y'"):
        ESD(PROMPTS, trained="y")
    with pytest.raises(ValueError, match="reads nothing but text"), ESD(PROMPTS).erased(tiny_sdxl(), ["cat"]):
        pass


def test_neuron_masking_cuts_the_neurons_that_answer_to_the_concept_in_most_steps():
    activations = torch.ones(4, 4, 10) + 0.01 * torch.rand(4, 4, 10)
    asks = torch.tensor([True, True, False, False])
    activations[:, :2, 3] += 1  # always
    activations[:1, :2, 5] += 2  # in one step
    activations[:, 2:, 7] += 1  # for the others
    steady = NeuronMasking(PROMPTS, share=0.1)._selected(activations, asks)
    assert steady.tolist() == [n == 3 for n in range(10)]
    ever = NeuronMasking(PROMPTS, share=0.2, agreement=0.25)._selected(activations, asks)
    assert ever[3] and ever[5] and not ever[7]


def test_neuron_masking_measures_the_conditional_half_and_silences_what_it_cuts():
    pipe = tiny_sd()
    method = NeuronMasking(PROMPTS, share=0.05, steps=2, guidance_scale=5.0)
    texts = ["a cat", "one cat", "a dog", "one dog"]
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].ff.net[2]
    name = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    generators = [torch.Generator().manual_seed(n) for n in range(4)]
    generate(pipe, texts, num_inference_steps=2, height=None, width=None, generator=generators)
    hook.remove()
    expected = torch.stack([one[4:].abs().mean(1) for one in seen])
    torch.testing.assert_close(method._activations(pipe, texts)[name], expected, rtol=1e-5, atol=1e-6)

    before = layer.weight.detach().clone()
    cut = method.neurons(pipe, ["cat", "dog"])[name]
    assert torch.equal(cut, method.neurons(pipe, ["cat"])[name] | method.neurons(pipe, ["dog"])[name])
    with method.erased(pipe, ["cat", "dog"]):
        assert torch.equal(layer.weight, torch.where(cut, 0, before)) and cut.any()


def test_neuron_masking_refuses_what_it_cannot_tell_apart():
    pipe = tiny_sd()
    with pytest.raises(ValueError, match="prompts: expected some that do not ask for 'cat'"):
        NeuronMasking({"cat": ["a cat"]}, steps=1).neurons(pipe, ["cat"])
    with pytest.raises(ValueError, match="layers: expected ends of"):
        NeuronMasking(PROMPTS, steps=1, layers=("attn9",)).neurons(pipe, ["cat"])
