"""SAE weights and tokens that look like activations: sparse sums of dictionary directions over noise.

On plain noise every latent is as good as any other and a top-k is nothing but rounding; on zeros GEMMs run faster than
they ever do. Here a token is made of some twenty directions of the dictionary, few of them common, so that its first
latents stand out and the last of its k come from the tail, as in a trained SAE.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from harness import Case

ACTIVE = 20
CONCEPT_LATENTS = 8
FACTOR = -5.0
CHECKED_TOKENS = 512


class Weights(NamedTuple):
    """In the order in which the ops take them."""

    W_enc: Tensor
    """[N, d]."""
    b_enc: Tensor
    """[N]."""
    b_dec: Tensor
    """[d]."""
    W_dec: Tensor
    """[N, d], rows of unit norm."""


class Lines(NamedTuple):
    """One line of `ops.erase`, [1, S] each."""

    latents: Tensor
    thresholds: Tensor
    factors: Tensor


@lru_cache(maxsize=1)
def weights(d: int, num_latents: int, dtype: torch.dtype, device: str) -> Weights:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    W_dec = draw(num_latents, d)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    W_enc = W_dec + 0.1 * d**-0.5 * draw(num_latents, d)
    b_enc, b_dec = 0.1 * draw(num_latents) - 0.1, 0.5 * draw(d)
    return Weights(*(tensor.to(dtype) for tensor in (W_enc, b_enc, b_dec, W_dec)))


def tokens(case: Case, device: str) -> Tensor:
    """[M, d]. Latent 0 is the concept's: it fires on every token, by strengths from 1 to 6."""
    own = weights(case.d, case.N, case.weights_dtype, device)
    generator = torch.Generator(device).manual_seed(1)
    rank = torch.rand(case.M, ACTIVE, generator=generator, device=device)
    which = (case.N * rank**3).long().clamp_(1, case.N - 1)
    strength = torch.empty(case.M, ACTIVE, device=device).log_normal_(0.7, 0.5, generator=generator)
    x = torch.randn(case.M, case.d, generator=generator, device=device).mul_(0.2)
    for column in range(ACTIVE):
        x += strength[:, column, None] * own.W_dec[which[:, column]].float()
    concept = 1 + 5 * torch.rand(case.M, 1, generator=generator, device=device)
    return (x + concept * own.W_dec[0].float() + own.b_dec.float()).to(case.torch_dtype)


def as_block(x: Tensor) -> Tensor:
    """The tokens [M, d] laid out as a UNet's block leaves them: [2, H, W, C] read from an NCHW tensor, C = d."""
    rows = x.shape[0] // 2
    height = next(h for h in range(int(rows**0.5), 0, -1) if rows % h == 0)
    return x.view(2, height, rows // height, -1).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


def concept_lines(x: Tensor, own: Weights, flagged: int) -> Lines:
    """Latents 0 to 7 under one threshold, which `flagged` tokens of x [M, d] exceed with at least one of them."""
    pre = exact_pre_activations(x, own, CONCEPT_LATENTS).amax(1).sort(descending=True).values
    if flagged == 0:
        threshold = 2 * pre[0]
    elif flagged == len(pre):
        threshold = pre[-1] / 2
    else:
        threshold = (pre[flagged - 1] + pre[flagged]) / 2
    if int((pre > threshold.clamp(min=0)).sum()) != flagged:
        raise ValueError(f"flagged: no threshold is exceeded by {flagged} of {len(pre)} tokens")
    latents = torch.arange(CONCEPT_LATENTS, device=x.device)[None]
    return Lines(
        latents,
        torch.full(latents.shape, float(threshold), device=x.device),
        torch.full(latents.shape, FACTOR, device=x.device),
    )


def exact_pre_activations(x: Tensor, own: Weights, num_latents: int | None = None) -> Tensor:
    """`relu((x - b_dec) @ W_enc.T + b_enc)` in float64, [M, N] or of the first latents only."""
    W_enc, b_enc = own.W_enc[:num_latents].double(), own.b_enc[:num_latents].double()
    return torch.relu((x.double() - own.b_dec.double()) @ W_enc.T + b_enc)


def checked_rows(num_tokens: int, device: str) -> Tensor:
    """At most 512 tokens, evenly spread, on which answers are checked."""
    return torch.linspace(0, num_tokens - 1, min(num_tokens, CHECKED_TOKENS), device=device).long()


def relative_error(ours: Tensor, exact: Tensor) -> Tensor:
    """`||ours - exact|| / ||exact||` of each token [M, d]; NaN where ours is not finite."""
    return (ours.double() - exact).norm(dim=1) / exact.norm(dim=1)
