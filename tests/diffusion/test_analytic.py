"""The Gaussian mixture teacher against torch.distributions, autograd and Monte Carlo."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from uni3d.diffusion.analytic import GaussianMixture

MEANS = torch.tensor([[-1.0, 0.5, 0.0], [1.0, 0.0, -0.5]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
FULL = torch.tensor(
    [
        [[0.5, 0.1, 0.0], [0.1, 0.4, -0.1], [0.0, -0.1, 0.6]],
        [[0.3, 0.0, 0.1], [0.0, 0.5, 0.0], [0.1, 0.0, 0.2]],
    ],
    dtype=torch.float64,
)
COVARIANCES = {
    "number": (0.4, 0.4 * torch.eye(3).repeat(2, 1, 1)),
    "isotropic": (torch.tensor([0.4, 0.9]), torch.stack([0.4 * torch.eye(3), 0.9 * torch.eye(3)])),
    "diagonal": (
        torch.tensor([[0.1, 0.2, 0.3], [1.0, 2.0, 3.0]]),
        torch.stack([torch.diag(torch.tensor([0.1, 0.2, 0.3])), torch.diag(torch.tensor([1.0, 2.0, 3.0]))]),
    ),
    "full": (FULL, FULL),
}

every_covariance = pytest.mark.parametrize("kind", COVARIANCES)


def points(*batch: int) -> Tensor:
    return 1.5 * torch.randn(*batch, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@every_covariance
@pytest.mark.parametrize("sigma", [0.0, 0.7, 20.0])
def test_log_density_matches_torch_distributions(kind: str, sigma: float) -> None:
    given, matrices = COVARIANCES[kind]
    mixture = GaussianMixture(MEANS, given, WEIGHTS)
    noisy = matrices.double() + sigma**2 * torch.eye(3, dtype=torch.float64)
    reference = MixtureSameFamily(Categorical(WEIGHTS), MultivariateNormal(MEANS, noisy))
    x = points(6, 4)
    torch.testing.assert_close(mixture.log_prob(x, sigma), reference.log_prob(x), rtol=1e-6, atol=1e-6)


@every_covariance
def test_score_is_the_gradient_and_denoiser_follows_tweedie(kind: str) -> None:
    mixture = GaussianMixture(MEANS, COVARIANCES[kind][0], WEIGHTS)
    x = points(5).requires_grad_()
    sigma = torch.tensor([0.1, 0.4, 1.0, 3.0, 50.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(mixture.log_prob(x, sigma).sum(), x)
    torch.testing.assert_close(mixture.score(x, sigma), gradient)
    torch.testing.assert_close(mixture.denoise(x, sigma), x + sigma[:, None] ** 2 * gradient)
    assert torch.equal(mixture(x, sigma), mixture.denoise(x, sigma))


@every_covariance
def test_denoiser_limits(kind: str) -> None:
    """No noise: x itself. All noise: the mean of the mixture."""
    mixture = GaussianMixture(MEANS, COVARIANCES[kind][0], WEIGHTS)
    x = points(5)
    torch.testing.assert_close(mixture.denoise(x, 0.0), x)
    mean = (WEIGHTS[:, None] * MEANS).sum(dim=0)
    torch.testing.assert_close(mixture.denoise(x, 1e6), mean.expand(5, 3), rtol=0, atol=1e-5)


def test_denoiser_is_the_posterior_mean() -> None:
    """Importance-weighted samples of x0 given x_t."""
    mixture = GaussianMixture(MEANS, FULL, WEIGHTS)
    x0 = mixture.sample(400_000, generator=torch.Generator().manual_seed(0))
    x_t, sigma = torch.tensor([0.3, -0.2, 0.4], dtype=torch.float64), 0.8
    weight = (-0.5 * (x0 - x_t).square().sum(dim=1) / sigma**2).softmax(dim=0)
    torch.testing.assert_close(
        mixture.denoise(x_t[None], sigma)[0], (weight[:, None] * x0).sum(dim=0), rtol=0, atol=5e-3
    )


@every_covariance
def test_samples_have_the_moments_of_the_mixture(kind: str) -> None:
    given, matrices = COVARIANCES[kind]
    mixture = GaussianMixture(MEANS, given, WEIGHTS)
    seed = torch.Generator().manual_seed(0)
    for sigma in (0.0, 0.5):
        x = mixture.sample(100_000, sigma, generator=seed)
        mean = WEIGHTS @ MEANS
        second = (WEIGHTS[:, None, None] * (matrices.double() + MEANS[:, :, None] * MEANS[:, None, :])).sum(
            dim=0
        )
        covariance = second - mean[:, None] * mean[None] + sigma**2 * torch.eye(3)
        torch.testing.assert_close(x.mean(dim=0), mean, rtol=0, atol=0.03)
        torch.testing.assert_close(x.mT.cov(), covariance, rtol=0, atol=0.06)


def test_same_seed_same_samples() -> None:
    mixture = GaussianMixture(MEANS, 0.1)
    one, other = (mixture.sample(5, 0.3, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one, other)


def test_images_as_events() -> None:
    """[B, C, H, W] in the place of a network, sigma [B]; the same numbers as for flat vectors."""
    means = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    images, flat = GaussianMixture(means, 0.3), GaussianMixture(means.flatten(1), 0.3)
    x, sigma = torch.randn(2, 4, 5, 6), torch.tensor([0.4, 2.0])
    assert images.denoise(x, sigma).shape == x.shape and images.log_prob(x, sigma).shape == (2,)
    torch.testing.assert_close(images.denoise(x, sigma).flatten(1), flat.denoise(x.flatten(1), sigma))
    assert images.sample(2).shape == (2, 4, 5, 6)


def test_dtypes() -> None:
    mixture = GaussianMixture(MEANS, FULL, WEIGHTS)
    for dtype, expected in ((torch.float16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
        assert mixture.denoise(points(2).to(dtype), 0.5).dtype == expected
    torch.testing.assert_close(
        mixture.denoise(points(4).float(), 80.0).double(),
        mixture.denoise(points(4), 80.0),
        rtol=1e-5,
        atol=1e-5,
    )


def test_differentiable_in_its_own_tensors() -> None:
    means, covariances = MEANS.clone().requires_grad_(), FULL.clone().requires_grad_()
    x = points(3)

    def log_prob(means: Tensor, covariances: Tensor) -> Tensor:
        symmetric = 0.5 * (covariances + covariances.mT)
        return GaussianMixture(means, symmetric, WEIGHTS).log_prob(x, 0.5)

    assert torch.autograd.gradcheck(log_prob, (means, covariances))


@pytest.mark.parametrize(
    "build",
    [
        lambda: GaussianMixture(torch.zeros(3), 1.0),
        lambda: GaussianMixture(MEANS, torch.ones(3)),
        lambda: GaussianMixture(MEANS, 1.0, torch.ones(3)),
        lambda: GaussianMixture(MEANS, 1.0).log_prob(torch.zeros(4, 2)),
    ],
)
def test_shapes_that_do_not_fit(build) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match="expected"):
        build()
