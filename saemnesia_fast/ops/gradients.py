"""The slots around the gradients, on the ops that the C++ and the CUDA library share (csrc/gradient_ops.h)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend, reference
from .eight_bit import Moment, as_given
from .reference import DenseRows, LatentGradients, PairTerms, SparseGradients, compute_dtype


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[M, d] of [..., d], contiguous."""
    return x.reshape(-1, x.shape[-1]).to(dtype).contiguous()


def _joined(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[P]: the numbers of all tensors, one after another."""
    parts = [tensor.reshape(-1).to(dtype) for tensor in tensors]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


class Given(NamedTuple):
    """The first arguments of the library's latent_gradients (csrc/gradient_ops.h)."""

    values: Tensor
    latents: Tensor
    extra: Tensor | None
    grads: list[Tensor]
    widths: list[int]
    x: Tensor
    W_dec: Tensor
    b_dec: Tensor


class GradientSlots(NamedTuple):
    """The slots of one library."""

    library: Any
    """torch.ops.saemnesia_fast_cpu or _cuda."""
    widens: bool
    """Whether rows are handed over in the compute dtype, rather than in their own where they all share one."""

    def _dtype_of_rows(self, dtype: torch.dtype, *rows: Tensor) -> torch.dtype:
        own = {x.dtype for x in rows}
        return own.pop() if len(own) == 1 and not self.widens and dtype == torch.float32 else dtype

    def _weight(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        fits = self.widens or (weight.dtype == torch.float64) == (dtype == torch.float64)
        return weight.contiguous() if fits else weight.to(dtype).contiguous()

    def given(self, terms: Sequence[PairTerms], x: Tensor, W_dec: Tensor, b_dec: Tensor) -> Given:
        """The terms as the library takes them."""
        dtype = compute_dtype(x)
        row_dtype = self._dtype_of_rows(dtype, x, *(term.grad_x_hat for term in terms))
        extra = None
        if any(term.extra_d_value is not None for term in terms):
            extras = [t.extra_d_value if t.extra_d_value is not None else torch.zeros_like(t.values) for t in terms]
            extra = _joined(extras, dtype)
        return Given(
            _joined([term.values for term in terms], dtype),
            _joined([term.indices for term in terms], torch.int32),
            extra,
            [_rows(term.grad_x_hat, row_dtype) for term in terms],
            [term.values.shape[-1] for term in terms],
            _rows(x, row_dtype),
            self._weight(W_dec, dtype),
            b_dec.to(dtype).contiguous(),
        )

    def latent_gradients(
        self,
        terms: Sequence[PairTerms],
        x: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        W_enc: Tensor | None,
        out: LatentGradients | None = None,
    ) -> LatentGradients:
        dtype = compute_dtype(x)
        dW_enc, dW_dec = (
            (out.dW_enc, out.dW_dec) if out else (W_dec.new_empty(W_dec.shape, dtype=dtype) for _ in range(2))
        )
        db_enc = dW_enc.new_empty(len(dW_enc))
        given = self.given(terms, x, W_dec, b_dec)
        self.library.latent_gradients(*given, dW_enc, db_enc, dW_dec, out is not None)
        sums = [
            self.library.sum_rows(grad, None, db_enc)
            for grad, term in zip(given.grads, terms, strict=True)
            if term.adds_b_dec
        ]
        db_dec = sum(sums, start=torch.zeros_like(given.b_dec))
        if W_enc is not None:
            db_dec -= self.library.sum_rows(self._weight(W_enc, dtype), db_enc, db_enc)
        if out is None:
            return LatentGradients(dW_enc, db_enc, dW_dec, db_dec)
        out.db_enc.add_(db_enc)
        out.db_dec.add_(db_dec)
        return out

    def encoder_gradients(
        self, d_value: Tensor, indices: Tensor, x: Tensor, b_dec: Tensor, num_latents: int
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(x)
        rows = _rows(x, self._dtype_of_rows(dtype, x))
        dW_enc = rows.new_empty(num_latents, x.shape[-1], dtype=dtype)
        db_enc = dW_enc.new_empty(num_latents)
        extra = _joined([d_value], dtype)
        self.library.latent_gradients(
            torch.zeros_like(extra),
            _joined([indices], torch.int32),
            extra,
            [rows],
            [indices.shape[-1]],
            rows,
            None,
            b_dec.to(dtype).contiguous(),
            dW_enc,
            db_enc,
            None,
            False,
        )
        return dW_enc, db_enc

    def decoder_gradient(self, values: Tensor, indices: Tensor, grad_x_hat: Tensor, num_latents: int) -> Tensor:
        dtype = compute_dtype(values)
        rows = _rows(grad_x_hat, self._dtype_of_rows(dtype, grad_x_hat))
        dW_dec = rows.new_empty(num_latents, rows.shape[1], dtype=dtype)
        self.library.latent_gradients(
            _joined([values], dtype),
            _joined([indices], torch.int32),
            None,
            [rows],
            [indices.shape[-1]],
            None,
            None,
            None,
            None,
            None,
            dW_dec,
            False,
        )
        return dW_dec

    def gather_dot(self, indices: Tensor, rows: Tensor, grad: Tensor) -> Tensor:
        dtype = compute_dtype(grad)
        latents = indices.reshape(-1, indices.shape[-1]).to(torch.int32).contiguous()
        return self.library.gather_dot(latents, self._weight(rows, dtype), _rows(grad, dtype)).view(indices.shape)

    def adam_rows(self, W: Tensor, grad: Tensor, exp_avg: Moment, exp_avg_sq: Moment, *arguments: Any) -> None:
        self.library.adam_rows(W, grad, *as_given((exp_avg, exp_avg_sq)), *arguments)

    def sparse_gradients(
        self, terms: Sequence[PairTerms], x: Tensor, W_dec: Tensor, b_dec: Tensor, dense: DenseRows | None
    ) -> SparseGradients:
        return reference.sparse_gradients(
            terms, x, W_dec, b_dec, dense, gradients=self.latent_gradients, adam=self.adam_rows
        )

    def register(self, name: str, refuse: Callable[[torch.device], backend.Refusal | None]) -> None:
        """Fill the slots of backend `name`."""
        gradients = (self.latent_gradients, self.encoder_gradients, self.decoder_gradient, self.gather_dot)
        for op in (*gradients, self.adam_rows, self.sparse_gradients):
            backend.register(op.__name__, name, op, refuse)
