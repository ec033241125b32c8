"""The ops as plain loops over Python floats, written from SPEC 1, 3 and 4.3: an oracle independent of the reference."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


def rows(tensor: Tensor) -> Any:
    """A tensor [..., n] as a float64 (or integer) array [M, n]."""
    return tensor.detach().double().numpy().reshape(-1, tensor.shape[-1])


def pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> list[list[float]]:
    weight, bias, shift = W_enc.detach().double().numpy(), b_enc.tolist(), b_dec.tolist()
    out = []
    for token in rows(x):
        centred = [a - b for a, b in zip(token, shift, strict=True)]
        dots = [sum(a * b for a, b in zip(centred, row, strict=True)) for row in weight]
        out.append([max(dot + b, 0.0) for dot, b in zip(dots, bias, strict=True)])
    return out


def topk(pre: list[float], k: int) -> list[int]:
    return sorted(range(len(pre)), key=lambda i: (-pre[i], i))[:k]


def encode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int) -> tuple[Tensor, Tensor]:
    pres = pre_activations(x, W_enc, b_enc, b_dec)
    kept = [topk(pre, k) for pre in pres]
    values = [[pre[i] for i in indices] for pre, indices in zip(pres, kept, strict=True)]
    shape = (*x.shape[:-1], k)
    return torch.tensor(values, dtype=torch.float64).view(shape), torch.tensor(kept, dtype=torch.int32).view(shape)


def decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    weight = W_dec.detach().double().numpy()
    out = []
    for token, kept in zip(rows(values), rows(indices).astype(int), strict=True):
        x_hat = b_dec.detach().double().numpy().copy()
        for value, latent in zip(token, kept, strict=True):
            x_hat += value * weight[latent]
        out.append(x_hat)
    return torch.tensor(np.array(out)).view(*values.shape[:-1], W_dec.shape[1])


def erase(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    W_dec: Tensor,
    k: int,
    latents: Tensor,
    thresholds: Tensor,
    factors: Tensor,
    mode: str,
    norm_scaled: bool = False,
) -> Tensor:
    """latents, thresholds, factors: [G, S]."""
    out = []
    tokens, weight, shift = rows(x), W_dec.detach().double().numpy(), b_dec.detach().double().numpy()
    for m, pre in enumerate(pre_activations(x, W_enc, b_enc, b_dec)):
        kept = topk(pre, k)
        line = m * len(latents) // len(tokens)
        norm = math.sqrt(sum(pre[i] ** 2 for i in kept)) if norm_scaled else 1.0
        delta = np.zeros_like(shift)
        for latent, threshold, factor in zip(latents[line], thresholds[line], factors[line], strict=True):
            z = pre[latent] if int(latent) in kept else 0.0
            if z > threshold:
                delta += (float(factor) * norm - 1) * z * weight[latent]
        x_hat = shift + sum(pre[i] * weight[i] for i in kept)
        out.append({"exact": tokens[m], "released": 2 * x_hat - tokens[m], "reconstruct": x_hat}[mode] + delta)
    return torch.tensor(np.array(out)).view(x.shape)


def latent_gradients(
    values: Tensor,
    indices: Tensor,
    grad_x_hat: Tensor,
    x: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    W_enc: Tensor | None = None,
    extra_d_value: Tensor | None = None,
) -> tuple[Tensor, ...]:
    weight, shift = W_dec.detach().double().numpy(), b_dec.detach().double().numpy()
    dW_enc, dW_dec = np.zeros_like(weight), np.zeros_like(weight)
    db_enc, db_dec = np.zeros(len(weight)), np.zeros_like(shift)
    extra = np.zeros_like(rows(values)) if extra_d_value is None else rows(extra_d_value)
    pairs = zip(rows(values), rows(indices).astype(int), rows(grad_x_hat), rows(x), extra, strict=True)
    for token_values, kept, grad, token, more in pairs:
        db_dec += grad
        for value, latent, extra_term in zip(token_values, kept, more, strict=True):
            d_value = (float(grad @ weight[latent]) if value > 0 else 0.0) + extra_term
            dW_dec[latent] += value * grad
            dW_enc[latent] += d_value * (token - shift)
            db_enc[latent] += d_value
    if W_enc is not None:
        db_dec -= W_enc.detach().double().numpy().T @ db_enc
    return tuple(torch.tensor(gradient) for gradient in (dW_enc, db_enc, dW_dec, db_dec))
