"""latent_gradients: gradients of the four parameters from the kept latents, new or added to those of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from activations import relative_error, tokens, weights
from harness import Case, Contest, Work
from providers import _import_alone, ours, peer, torch_compiled, torch_eager
from saemnesia_fast import ops
from saemnesia_fast.ops import LatentGradients, PairTerms, reference

BASELINE = "index_add"
SIZES = {"cpu": (512, 1024), "cuda": (1024, 4096, 16384)}
DTYPES = {"cpu": ("float32",), "cuda": ("float16", "float32")}
VARIANTS = ("", "added")
LIMIT = {"float32": 1e-4, "float16": 1e-4}
"""Sums are in float32 whatever the tokens are; a row's gradient may cancel."""


def cases(device: str) -> list[Case]:
    return [
        Case("latent_gradients", M=M, dtype=dtype, variant=variant)
        for dtype in DTYPES[device]
        for M in SIZES[device]
        for variant in VARIANTS
    ]


def work(case: Case) -> Work:
    """Of W_dec and W_enc the rows that are used; the gradients' rows written, all if new, else the used also read."""
    size, used = case.torch_dtype.itemsize, min(case.N, case.M * case.k)
    gradients = 2 * case.d * 4 * (2 * used if case.variant else case.N)
    traffic = 2 * (used + case.M) * case.d * size + case.M * case.k * (size + 4) + gradients
    return Work(traffic, 2 * case.d * (3 * case.M * case.k + used))


def contest(case: Case, device: str) -> Contest:
    dtype = case.torch_dtype
    own, x = weights(case.d, case.N, dtype, device), tokens(case, device)
    W_enc, b_enc, b_dec, W_dec = own
    values, indices = ops.encode_topk(x, W_enc, b_enc, b_dec, case.k)
    grad = (ops.decode(values, indices, W_dec, b_dec) - x).contiguous()
    arguments = (values, indices, grad, x, W_dec, b_dec, W_enc)

    def zeros() -> LatentGradients:
        shapes = LatentGradients.shapes(W_dec)
        return LatentGradients(*(torch.zeros(shape, dtype=torch.float32, device=device) for shape in shapes))

    def index_add(out: Sequence[Tensor]) -> Sequence[Tensor]:
        dW_enc, db_enc, dW_dec, db_dec = out
        flat, wide = indices.flatten().long(), grad.float()
        d_value = torch.einsum("mkd,md->mk", W_dec[indices.long()].float(), wide) * (values > 0)
        dW_dec.index_add_(0, flat, (values.float()[..., None] * wide[:, None]).flatten(0, 1))
        centred = x.float() - b_dec.float()
        dW_enc.index_add_(0, flat, (d_value[..., None] * centred[:, None]).flatten(0, 1))
        fresh = torch.zeros_like(db_enc).index_add_(0, flat, d_value.flatten())
        db_enc += fresh
        db_dec += wide.sum(0) - fresh @ W_enc.float()
        return out

    def sparsify(module: Any) -> Callable[[], Any]:
        """Backward through its encoder and decoder, the graph kept from one call to the next."""
        parameters = [t.detach().requires_grad_() for t in (W_enc, b_enc, W_dec, b_dec)]
        with torch.enable_grad():
            encoded = module.fused_encoder(x - parameters[3], parameters[0], parameters[1], case.k, "topk")
            if device == "cuda":
                decoder = _import_alone("sparsify.utils").decoder_impl
                x_hat = decoder(encoded.top_indices, encoded.top_acts, parameters[2].mT)
            else:
                x_hat = F.embedding_bag(
                    encoded.top_indices, parameters[2], per_sample_weights=encoded.top_acts, mode="sum"
                )
            x_hat = x_hat + parameters[3]
        return lambda: torch.autograd.grad(x_hat, parameters, grad, retain_graph=True)

    totals: dict[str, LatentGradients] = {}

    def total(name: str) -> LatentGradients:
        """The buffers of one provider."""
        if name not in totals:
            totals[name] = zeros()
        return totals[name]

    if case.variant == "added":
        providers = [
            torch_eager(lambda: index_add(total("torch")), dtype, BASELINE),
            *ours(
                "latent_gradients", device, lambda: ops.latent_gradients(*arguments, out=total(ops.current_backend()))
            ),
        ]
    else:
        providers = [
            torch_eager(lambda: index_add(zeros()), dtype, BASELINE),
            torch_compiled(lambda: index_add(zeros()), dtype),
            peer("eai-sparsify", "sparsify.fused_encoder", dtype, sparsify),
            *ours("latent_gradients", device, lambda: ops.latent_gradients(*arguments)),
        ]
    doubled = PairTerms(values.double(), indices, grad.double())
    exact = reference.latent_gradients([doubled], *(t.double() for t in (x, W_dec, b_dec, W_enc)))

    def errors(gradients: Sequence[Tensor]) -> Tensor:
        """Of each of the four as a whole; where calls have added up, of their mean: of the first, or of those before a
        capture and the fourth."""
        wanted = exact.dW_dec.flatten()
        projection = float(gradients[2].double().flatten() @ wanted / (wanted @ wanted))
        calls = 4 if case.variant == "added" and projection > 2.5 else 1
        pairs = zip(gradients, exact, strict=True)
        return torch.cat(
            [relative_error(got.double().reshape(1, -1) / calls, want.reshape(1, -1)) for got, want in pairs]
        )

    return Contest(case, work(case), providers, errors, LIMIT[case.dtype], BASELINE)
