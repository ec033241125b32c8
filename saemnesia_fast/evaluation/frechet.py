"""FID: the Fréchet distance of two Gaussians (Heusel et al., arXiv 1706.08500)."""

from __future__ import annotations

import torch
from torch import Tensor


class Gaussian:
    """Fitted to a sample of D numbers each that comes in parts, of which none is kept.

    In float64; parts join as in Chan, Golub and LeVeque, Updating Formulae for Computing Sample Variances (1979).
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self._scatter = torch.zeros(width, width, dtype=torch.float64)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, D) of the whole sample."""
        return self.count, len(self.mean)

    @property
    def covariance(self) -> Tensor:
        """[D, D], divided by n - 1."""
        return self._scatter / (self.count - 1)

    def add(self, sample: Tensor) -> Gaussian:
        """Join [n, D] of any floating dtype; n = 0 changes nothing."""
        if len(sample):
            part = sample.to("cpu", torch.float64)
            mean = part.mean(0)
            part = part - mean
            apart, count = mean - self.mean, self.count + len(part)
            self._scatter += part.T @ part + apart.outer(apart) * (self.count * len(part) / count)
            self.mean += apart * (len(part) / count)
            self.count = count
        return self


def frechet_distance(features: Tensor | Gaussian, reference: Tensor | Gaussian) -> float:
    """|mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)), of the Gaussians fitted to two samples.

    The trace of the root is the sum of the roots of the eigenvalues of the symmetric C_1^(1/2) C_2 C_1^(1/2), in
    float64: no root of a matrix that is not symmetric, nothing imaginary, and any rank will do.

    Args:
        features, reference: [n, D] and [m, D] of any floating dtype, n, m >= 2, or the Gaussians fitted to them;
            covariances divide by n - 1 and m - 1.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    for name, sample in (("features", features), ("reference", reference)):
        if len(sample.shape) != 2 or sample.shape[0] < 2 or sample.shape[1] != features.shape[1]:
            raise ValueError(
                f"{name}: expected [n, D={features.shape[-1]}] with n >= 2 pictures, got {list(sample.shape)}"
            )
        if not (sample.mean if isinstance(sample, Gaussian) else sample).isfinite().all():
            raise ValueError(f"{name}: expected finite values")
    first, second = (
        one if isinstance(one, Gaussian) else Gaussian(one.shape[1]).add(one) for one in (features, reference)
    )
    values, vectors = torch.linalg.eigh(first.covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    other = second.covariance
    product = root @ other @ root
    roots = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt()
    apart = (first.mean - second.mean).square().sum()
    return max(0.0, float(apart + values.sum() + other.trace() - 2 * roots.sum()))
