"""A Gaussian mixture as a denoiser: exact density, score and x0-prediction at every noise level.

The teacher of tests and examples: it has the interface D(x, sigma) -> x0 of the networks, with nothing to
learn. As every quantity is differentiable in the mixture's own tensors too, it also serves as a student with
a known density.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Parts = tuple[Tensor, Tensor, Tensor]


class GaussianMixture:
    """sum_k weights[k] N(means[k], covariance_k), over samples of any shape ("event").

    Args:
        means: [K, *event], float32 or float64.
        covariances: variances as a float or [K] (isotropic) or [K, *event] (per element), or full matrices
            [K, D, D] with D the number of elements of an event.
        weights: [K], positive, made to sum to one; None is uniform.

    The methods take x [*batch, *event] and sigma as a float or a tensor that broadcasts against batch ([B]
    for a batch of B), at the process x = x0 + sigma eps, and compute in the dtype of x, float32 at least.
    Full matrices cost a Cholesky factor for each sigma, so give a grid one scalar sigma where possible.
    Raises ValueError for shapes that do not fit.
    """

    def __init__(self, means: Tensor, covariances: Tensor | float, weights: Tensor | None = None) -> None:
        if means.ndim < 2:
            raise ValueError(
                f"means have the shape {tuple(means.shape)}: expected [K, *event], so [K, 1] for numbers"
            )
        num, self.event_shape = means.shape[0], means.shape[1:]
        self.num_components, self.dim = num, math.prod(self.event_shape)
        self.means = means.reshape(num, self.dim)
        covariances = torch.as_tensor(covariances, dtype=means.dtype, device=means.device)
        if covariances.shape == (num, self.dim, self.dim):
            self.is_full = True
        elif covariances.ndim == 0 or covariances.shape == (num,) or covariances.shape == means.shape:
            self.is_full = False
            shape = (num, self.dim) if covariances.shape == means.shape else (-1, 1)
            covariances = covariances.reshape(shape).expand(num, self.dim)
        else:
            raise ValueError(
                f"covariances have the shape {tuple(covariances.shape)}: expected a number, [{num}], "
                f"{list(means.shape)} or [{num}, {self.dim}, {self.dim}]"
            )
        self.covariances = covariances
        weights = torch.ones(num).to(means) if weights is None else torch.as_tensor(weights).to(means)
        if weights.shape != (num,):
            raise ValueError(f"weights have the shape {tuple(weights.shape)}: expected [{num}]")
        self.log_weights = (weights / weights.sum()).log()

    def log_prob(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """log density of the diffused mixture, shape [*batch]."""
        log_joint, _, _ = self._parts(x, sigma)
        return log_joint.logsumexp(dim=-1)

    def score(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """grad log density of the diffused mixture, shaped as x."""
        log_joint, whitened, _ = self._parts(x, sigma)
        mean = (log_joint.softmax(dim=-1)[..., None] * whitened).sum(dim=-2)
        return -mean.reshape(x.shape)

    def denoise(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x0 | x], the x0-prediction, shaped as x. Exact for any sigma >= 0."""
        log_joint, _, posterior_means = self._parts(x, sigma)
        return (log_joint.softmax(dim=-1)[..., None] * posterior_means).sum(dim=-2).reshape(x.shape)

    __call__ = denoise

    def sample(self, num: int, sigma: float = 0.0, *, generator: torch.Generator | None = None) -> Tensor:
        """[num, *event] samples of the diffused mixture, without gradients."""
        means, covariances = self.means.detach(), self.covariances.detach()
        like = {"dtype": means.dtype, "device": means.device}
        index = torch.multinomial(self.log_weights.detach().exp(), num, replacement=True, generator=generator)
        noise = torch.randn(num, self.dim, generator=generator, **like)
        if self.is_full:
            factors = torch.linalg.cholesky(covariances)
            spread = torch.einsum("nij,nj->ni", factors[index], noise)
        else:
            spread = covariances.sqrt()[index] * noise
        x0 = means[index] + spread
        if sigma > 0:
            x0 = x0 + sigma * torch.randn(num, self.dim, generator=generator, **like)
        return x0.reshape(num, *self.event_shape)

    def _parts(self, x: Tensor, sigma: Tensor | float) -> Parts:
        """For every component: log(weight density) [*batch, K], (C + sigma^2)^-1 (x - mean) and E[x0 | x, k]
        [*batch, K, D]."""
        x = x if x.dtype == torch.float64 else x.float()
        batch = x.shape[: x.ndim - len(self.event_shape)]
        if x.shape[len(batch) :] != self.event_shape:
            raise ValueError(
                f"x has the shape {tuple(x.shape)}: expected a batch of {tuple(self.event_shape)}"
            )
        means, covariances = self.means.to(x), self.covariances.to(x)
        offset = x.reshape(*batch, 1, self.dim) - means
        variance = (
            torch.as_tensor(sigma).to(x).square()[..., None, None]
        )  # [*sigma, 1, 1], to meet [*batch, K, D]
        if self.is_full:
            noisy = covariances + variance[..., None] * torch.eye(self.dim, dtype=x.dtype, device=x.device)
            factor = torch.linalg.cholesky(noisy)
            whitened = torch.cholesky_solve(offset[..., None], factor)[..., 0]
            log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
            shrunk = (covariances @ whitened[..., None])[..., 0]
        else:
            noisy = covariances + variance
            whitened = offset / noisy
            log_det = noisy.log().sum(dim=-1)
            shrunk = covariances / noisy * offset
        square = (offset * whitened).sum(dim=-1)
        log_joint = self.log_weights.to(x) - 0.5 * (square + log_det + self.dim * math.log(2 * math.pi))
        return log_joint, whitened, means + shrunk
