"""adam_latents: from the kept latents to updated W_enc and W_dec: gradients, their norm, the clip, Adam, unit rows.

torch.optim has none but float32 moments: its own are in every case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from activations import relative_error, tokens, weights
from harness import Case, Contest, Work
from providers import ours, torch_eager
from saemnesia_fast import ops
from saemnesia_fast.ops import EightBit, LatentGradients, LatentMoments, PairTerms, eight_bit, reference
from saemnesia_fast.ops.eight_bit import Moment

BASELINE = "torch.optim"
SIZES = {"cpu": (1024, 4096), "cuda": (4096, 16384)}
MOMENTS = {"": torch.float32, "bfloat16 moments": torch.bfloat16, "8bit moments": torch.uint8}
LIMIT = {"": 1e-4, "bfloat16 moments": 1e-2, "8bit moments": 5e-2}
BETA = 0.9
MOST_NORM = 1.0
CALLS = (1, 4)
"""When the answer is checked: the first, or behind the three before a capture that of the graph, or without one."""


def cases(device: str) -> list[Case]:
    return [Case("adam_latents", M=M, variant=variant) for M in SIZES[device] for variant in MOMENTS]


def work(case: Case) -> Work:
    """Both weights and four moments are read and written; the tokens and their gradients are read."""
    moment = MOMENTS[case.variant].itemsize
    traffic = 2 * case.N * case.d * (2 * 4 + 4 * moment) + 2 * case.M * case.d * 4 + case.M * case.k * (4 + 4)
    return Work(traffic, 2 * case.d * 3 * case.M * case.k)


def contest(case: Case, device: str) -> Contest:
    own, x = weights(case.d, case.N, torch.float32, device), tokens(case, device)
    W_enc, b_enc, b_dec, W_dec = own
    values, indices = ops.encode_topk(x, W_enc, b_enc, b_dec, case.k)
    grad = (ops.decode(values, indices, W_dec, b_dec) - x).contiguous()
    exact = reference.latent_gradients(
        [PairTerms(values.double(), indices, grad.double())], *(t.double() for t in (x, W_dec, b_dec))
    )
    norm = (exact.dW_enc.square().sum() + exact.dW_dec.square().sum()).sqrt()
    along = (exact.dW_dec * W_dec).sum(1, keepdim=True) / W_dec.double().square().sum(1, keepdim=True)
    wanted = [MOST_NORM / norm * rows for rows in (exact.dW_enc, exact.dW_dec - along * W_dec)]
    del exact, along

    def fused() -> Callable[[], Any]:
        """State of its own for each of our backends."""
        states: dict[str, tuple[LatentMoments, Tensor, Tensor, Iterator[int]]] = {}

        def call() -> tuple[Moment, Moment]:
            name = ops.current_backend()
            if name not in states:
                moments = LatentMoments(*(_zeros(W_enc, MOMENTS[case.variant]) for _ in range(4)))
                states[name] = moments, W_enc.clone(), W_dec.clone(), count(1)
            moments, encoder, decoder, steps = states[name]
            gradients = ops.sparse_gradients([PairTerms(values, indices, grad)], x, decoder, b_dec)
            scale = (MOST_NORM / gradients.squared_norm.sqrt()).clamp(max=1)
            ops.adam_latents(gradients, encoder, decoder, moments, next(steps), 0.0, scale=scale)
            return moments.exp_avg_enc, moments.exp_avg_dec

        return call

    def separate() -> Callable[[], Any]:
        """Gradients in buffers that stay, then pass after pass over them."""
        totals: list[LatentGradients] = []
        parameters = [torch.nn.Parameter(W.clone()) for W in (W_enc, W_dec)]
        optimizer = torch.optim.Adam(parameters, lr=0.0, fused=True, capturable=device == "cuda")

        def call() -> tuple[Tensor, ...]:
            if not totals:
                shapes = LatentGradients.shapes(W_dec)
                totals.append(LatentGradients(*(torch.empty(shape, device=device) for shape in shapes)))
            (total,) = totals
            for gradient in total:
                gradient.zero_()
            ops.latent_gradients(values, indices, grad, x, parameters[1].detach(), b_dec, out=total)
            parameters[0].grad, parameters[1].grad = total.dW_enc, total.dW_dec
            # clip_grad_norm_ takes one float32 norm of all numbers, which on a CPU is wrong in the third digit.
            norms = [torch.linalg.vector_norm(rows, dim=1) for rows in (total.dW_enc, total.dW_dec)]
            scale = (MOST_NORM / torch.linalg.vector_norm(torch.stack(norms))).clamp(max=1)
            total.dW_enc.mul_(scale)
            total.dW_dec.mul_(scale)
            decoder = parameters[1].data
            total.dW_dec.sub_((total.dW_dec * decoder).sum(1, keepdim=True) * decoder)
            optimizer.step()
            F.normalize(decoder, dim=1, out=decoder)
            return tuple(optimizer.state[parameter]["exp_avg"] for parameter in parameters)

        return call

    def errors(averages: Sequence[Moment]) -> Tensor:
        """Of both exp_avg, each as a whole. With a learning rate of 0 each of n calls has the same gradient: exp_avg is
        1 - beta^n of it."""
        found = []
        for got, want in zip(map(_widened, averages), wanted, strict=True):
            projection = float((got.double() * want).sum() / want.square().sum())
            share = min((1 - BETA**calls for calls in CALLS), key=lambda share: abs(share - projection))
            found.append(relative_error(got.double().reshape(1, -1) / share, want.reshape(1, -1)))
        return torch.cat(found)

    providers = [
        torch_eager(separate(), torch.float32, BASELINE),
        *ours("sparse_gradients", device, fused()),
    ]
    return Contest(case, work(case), providers, errors, LIMIT[case.variant], BASELINE)


def _zeros(W: Tensor, dtype: torch.dtype) -> Moment:
    return EightBit.zeros_like(W) if dtype == torch.uint8 else torch.zeros_like(W, dtype=dtype)


def _widened(exp_avg: Moment) -> Tensor:
    return eight_bit.widened(exp_avg, signed=True) if isinstance(exp_avg, EightBit) else exp_avg
