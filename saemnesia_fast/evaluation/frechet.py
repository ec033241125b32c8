"""FID: the Fréchet distance of two Gaussians (Heusel et al., arXiv 1706.08500)."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """|mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)), of the Gaussians fitted to two samples.

    The trace of the root is the sum of the roots of the eigenvalues of the symmetric C_1^(1/2) C_2 C_1^(1/2), in
    float64: no root of a matrix that is not symmetric, nothing imaginary, and any rank will do.

    Args:
        features, reference: [n, D] and [m, D] of any floating dtype, n, m >= 2; covariances divide by n - 1 and m - 1.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    for name, sample in (("features", features), ("reference", reference)):
        if sample.ndim != 2 or len(sample) < 2 or sample.shape[1] != features.shape[1]:
            raise ValueError(
                f"{name}: expected [n, D={features.shape[-1]}] with n >= 2 pictures, got {list(sample.shape)}"
            )
        if not sample.isfinite().all():
            raise ValueError(f"{name}: expected finite values")
    first, second = features.double(), reference.double()
    values, vectors = torch.linalg.eigh(_covariance(first))
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    other = _covariance(second)
    product = root @ other @ root
    roots = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt()
    apart = (first.mean(0) - second.mean(0)).square().sum()
    return max(0.0, float(apart + values.sum() + other.trace() - 2 * roots.sum()))


def _covariance(sample: Tensor) -> Tensor:
    centred = sample - sample.mean(0)
    return centred.T @ centred / (len(sample) - 1)
