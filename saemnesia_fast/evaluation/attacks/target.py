"""What an attack works on: pictures of one erased concept, their loss, their judge, and what was found so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..methods import Benchmark
from .prefix import FreePrefix, reading


@dataclass(frozen=True)
class Asked:
    """A request under another text."""

    request: Any
    prompt: str

    def __getattr__(self, name: str) -> Any:
        return getattr(self.request, name)


@dataclass
class Finding:
    """What became of one prompt."""

    prompt: str
    seed: int
    before: float
    """The judge's probability of the erased concept in the picture of the bare prompt."""
    found_before: bool
    """It is recognised there, without an attack."""
    after: float
    """Highest probability of all its pictures."""
    found: bool
    """It is recognised in one of them."""
    tokens: list[str]
    """The free tokens of the best picture, or those nearest to its free embeddings; none if that of the bare prompt."""
    text: str
    """The best prompt as text."""
    writable: bool
    """The text is read as just what was painted from: anybody could type it."""
    pictures: int = 1
    """Painted, that of the bare prompt included."""
    gradients: int = 0
    """Passes forth and back through the UNet."""


class Target:
    """R requests for one concept on a pipeline that erases it.

    Args:
        benchmark: paints and judges; its pipeline is a Stable Diffusion one, and erases already.
        wanted: the requests.
        kind: that of the concept, which all of them ask for.
        arguments: for the pipeline's calls, from `Method.erased`.
        latents: [R, C, H, W] of the pictures that the plain pipeline paints for them, times the VAE's scaling factor.
        timesteps: those of the denoising.
        tokens: k, free tokens before each prompt.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        wanted: Sequence[Any],
        kind: str,
        arguments: Mapping[str, Any],
        latents: Tensor,
        timesteps: Tensor,
        tokens: int,
    ) -> None:
        self.benchmark = benchmark
        self.wanted = list(wanted)
        self.kind = kind
        self.arguments = arguments
        self.latents = latents
        self.timesteps = timesteps.to(latents.device).long()
        self.tokens = tokens
        self.prefix = FreePrefix(benchmark.pipe, [one.prompt for one in wanted], tokens)
        probability, hit = self._judged(self.wanted, torch.arange(len(self.wanted)))
        self.findings = [
            Finding(one.prompt, one.seed, p, h, p, h, [], one.prompt, True)
            for one, p, h in zip(wanted, probability.tolist(), hit.tolist(), strict=True)
        ]

    def __len__(self) -> int:
        return len(self.wanted)

    @property
    def vocabulary(self) -> Tensor:
        """[V, D] float32: embeddings of the tokens that a prefix may hold."""
        return self.prefix.vocabulary

    @property
    def open(self) -> Tensor:
        """Rows in whose pictures the concept is yet to be recognised."""
        return torch.tensor([row for row, one in enumerate(self.findings) if not one.found], dtype=torch.long)

    def nearest(self, prefix: Tensor) -> Tensor:
        """Positions in the vocabulary [..., k] of the tokens nearest to embeddings [..., k, D]."""
        return self.prefix.nearest(prefix)

    def loss(self, prefix: Tensor, rows: Tensor, draws: int, generator: torch.Generator) -> Tensor:
        """Denoising loss [n] of the plain pictures through the erasing UNet, prompts `rows` behind prefixes [n, k, D].

        `E |prediction(x_t, t, prompt) - wanted|^2` over `draws` timesteps and noises, where
        `x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise` and wanted is what the scheduler says the UNet predicts. Draws are
        made for all rows, so that those of one do not depend on which others there are.
        """
        pipe, device = self.benchmark.pipe, self.latents.device
        shape = (len(self), draws, *self.latents.shape[1:])
        steps = torch.randint(len(self.timesteps), shape[:2], generator=generator)[rows].to(device)
        noise = torch.randn(shape, generator=generator)[rows].to(device).flatten(0, 1)
        t = self.timesteps[steps.flatten()]
        a = pipe.scheduler.alphas_cumprod.to(device, torch.float32)[t].view(-1, 1, 1, 1)
        x = self.latents[rows.to(device)].repeat_interleave(draws, 0)
        signal, spread = a.sqrt(), (1 - a).sqrt()
        wanted = {"epsilon": noise, "v_prediction": signal * noise - spread * x, "sample": x}
        states = self.prefix.states(prefix, rows).repeat_interleave(draws, 0)
        noisy = signal * x + spread * noise
        if pipe.do_classifier_free_guidance:  # as it paints: an edit may read both halves
            empty = self.prefix.empty.expand_as(states)
            noisy, t, states = (torch.cat(both) for both in ((noisy, noisy), (t, t), (empty, states)))
        noisy = noisy.to(pipe.unet.dtype)
        prediction = pipe.unet(noisy, t, encoder_hidden_states=states.to(noisy), return_dict=False)[0][-len(x) :]
        for row in rows.tolist():
            self.findings[row].gradients += draws
        error = prediction.float() - wanted[pipe.scheduler.config.prediction_type]
        return error.square().flatten(1).mean(1).view(len(rows), draws).mean(1)

    @torch.no_grad()
    def attempt(self, prefix: Tensor, rows: Tensor) -> Tensor:
        """Paint prompts `rows` [n] behind prefixes [n, k, D], note what is best: the concept's probability [n]."""
        states = self.prefix.states(prefix, rows)
        asked = [Asked(self.wanted[row], f"{n}: {self.wanted[row].prompt}") for n, row in enumerate(rows.tolist())]
        with reading(self.benchmark.pipe, {one.prompt: state for one, state in zip(asked, states, strict=True)}):
            probability, hit = self._judged(asked, rows)
        best: dict[int, int] = {}
        for n, row in enumerate(rows.tolist()):
            finding = self.findings[row]
            finding.pictures += 1
            # A recognised concept is worth more than a probable one.
            if (bool(hit[n]), float(probability[n])) > (finding.found, finding.after):
                finding.found, finding.after = bool(hit[n]), float(probability[n])
                best[row] = n
        for row, n in best.items():
            self._describe(self.findings[row], prefix[n].float())
        return probability

    def records(self) -> list[dict[str, Any]]:
        """The findings as JSON, probabilities to four digits."""
        return [
            {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(one).items()}
            for one in self.findings
        ]

    def _judged(self, wanted: Sequence[Any], rows: Tensor) -> tuple[Tensor, Tensor]:
        """(probability of the concept [n], whether it is the likeliest of its kind [n]) in new pictures."""
        images = self.benchmark.paint(wanted, arguments=self.arguments)
        probabilities = self.benchmark.judged(images).probabilities[self.kind].cpu()
        classes = torch.tensor([getattr(self.wanted[row], self.kind) for row in rows.tolist()])
        chosen = probabilities.gather(1, classes[:, None])[:, 0]
        return chosen, probabilities.argmax(1) == classes

    def _describe(self, finding: Finding, prefix: Tensor) -> None:
        tokenizer = self.benchmark.pipe.tokenizer
        positions = self.nearest(prefix)
        ids = self.prefix.ids(positions)
        finding.tokens = tokenizer.convert_ids_to_tokens(ids)
        finding.text = f"{tokenizer.decode(ids)} {finding.prompt}"
        start, *words = tokenizer(finding.prompt).input_ids
        said = torch.equal(prefix, self.vocabulary[positions])
        finding.writable = said and tokenizer(finding.text).input_ids == [start, *ids, *words]
