"""Losses of the fake score and the discriminator, and the ratio that the logits become."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from uni3d.diffusion.analytic import GaussianMixture
from uni3d.losses import discriminator, fake_score, noise_schedule

# ---- fake score


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_weighting_is_the_plain_error_of_that_prediction(kind: str) -> None:
    x0, eps, prediction = torch.randn(3, 4, 2, 3, dtype=torch.float64)
    sigma = torch.tensor([0.1, 0.7, 1.0, 5.0], dtype=torch.float64)
    x = x0 + sigma[:, None, None] * eps
    target = noise_schedule.prediction_from_x0(x0, x, sigma, kind)
    output = noise_schedule.prediction_from_x0(prediction, x, sigma, kind)
    loss = fake_score.denoising_loss(prediction, x0, sigma, weighting=kind)
    torch.testing.assert_close(loss, (output - target).square().mean(dim=(1, 2)))
    total = fake_score.denoising_loss(prediction, x0, sigma, weighting=kind, reduction="sum")
    torch.testing.assert_close(total, 6 * loss)


def test_edm_weighting_is_the_error_of_the_network_output() -> None:
    """D = c_skip x + c_out F: weight |D - x0|^2 is |F - target|^2."""
    x0, prediction = torch.randn(2, 4, 5, dtype=torch.float64)
    sigma, sigma_data = torch.tensor([0.1, 0.7, 1.0, 5.0], dtype=torch.float64), 0.8
    c_out = (sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt())[:, None]
    loss = fake_score.denoising_loss(prediction, x0, sigma, weighting="edm", sigma_data=sigma_data)
    torch.testing.assert_close(loss, ((prediction - x0) / c_out).square().mean(dim=1))


def test_fake_score_loss_does_not_move_the_student() -> None:
    x0 = torch.randn(2, 3, requires_grad=True)
    prediction = torch.randn(2, 3, requires_grad=True)
    loss = fake_score.denoising_loss(prediction, x0, 0.5).sum()
    on_x0, on_prediction = torch.autograd.grad(loss, (x0, prediction), allow_unused=True)
    assert on_x0 is None and on_prediction.abs().sum() > 0


def test_fake_score_is_minimised_by_the_posterior_mean() -> None:
    mixture = GaussianMixture(torch.tensor([[-1.0], [1.5]], dtype=torch.float64), 0.2)
    seed = torch.Generator().manual_seed(0)
    x0 = mixture.sample(20_000, generator=seed)
    x = x0 + 0.6 * torch.randn(x0.shape, generator=seed, dtype=x0.dtype)
    shift = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    loss = fake_score.denoising_loss(mixture.denoise(x, 0.6) + shift, x0, 0.6).mean()
    (gradient,) = torch.autograd.grad(loss, shift)
    assert gradient.abs() < 0.05
    with pytest.raises(ValueError, match="did you mean 'eps'"):
        fake_score.denoising_loss(x, x0, 0.6, weighting="epps")
    with pytest.raises(ValueError, match="must be equal"):
        fake_score.denoising_loss(x[:1], x0, 0.6)


# ---- discriminator


def test_logistic_loss_is_binary_cross_entropy() -> None:
    real, fake = torch.randn(2, 3, 1, 4, 4)
    loss = discriminator.discriminator_loss(real, fake)
    ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
    expected = [
        binary_cross_entropy_with_logits(logits, label, reduction="none").mean(dim=(1, 2, 3))
        for logits, label in ((real, ones), (fake, zeros))
    ]
    torch.testing.assert_close(loss, 0.5 * (expected[0] + expected[1]))


def test_hinge_loss() -> None:
    logits = torch.tensor([[-2.0], [0.5], [3.0]])
    torch.testing.assert_close(discriminator.real_loss(logits, kind="hinge"), torch.tensor([3.0, 0.5, 0.0]))
    torch.testing.assert_close(discriminator.fake_loss(logits, kind="hinge"), torch.tensor([0.0, 1.5, 4.0]))


def test_optimal_logit_is_the_log_ratio() -> None:
    """At l = log q/p the expected logistic loss has no slope in any direction tried."""
    q = GaussianMixture(torch.tensor([[0.5], [-1.0]], dtype=torch.float64), 0.4)
    p = GaussianMixture(torch.tensor([[0.0]], dtype=torch.float64), 1.0)
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    log_ratio = q.log_prob(x) - p.log_prob(x)
    coefficients = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    logit = log_ratio + torch.cat([x**0, x, x.sin()], dim=1) @ coefficients
    cell = 16 / 4000
    loss = (
        (q.log_prob(x).exp() * discriminator.real_loss(logit)).sum()
        + (p.log_prob(x).exp() * discriminator.fake_loss(logit)).sum()
    ) * cell
    (gradient,) = torch.autograd.grad(loss, coefficients)
    assert gradient.abs().max() < 1e-8


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("non_saturating", lambda d: -d.log()),
        ("saturating", lambda d: (1 - d).log()),
        ("linear", lambda d: (1 - d).log() - d.log()),
        ("forward_kl", lambda d: -d / (1 - d)),
    ],
)
def test_adversarial_losses_in_terms_of_the_probability(kind: str, formula) -> None:  # noqa: ANN001
    logits = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    expected = formula(logits.sigmoid()).mean(dim=(1, 2, 3))
    torch.testing.assert_close(discriminator.adversarial_loss(logits, kind=kind), expected)


def test_log_ratio_from_logits() -> None:
    logits = torch.tensor([[1.0, 3.0], [40.0, 40.0], [-9.0, -1.0]], dtype=torch.float16).requires_grad_()
    log_ratio = discriminator.log_ratio_from_logits(logits)
    assert log_ratio.dtype == torch.float32 and log_ratio.tolist() == [2.0, 5.0, -5.0]
    (gradient,) = torch.autograd.grad(log_ratio.sum(), logits)
    # The mean is -5 in the last row: on the limit the gradient still passes.
    assert gradient.tolist() == [[0.5, 0.5], [0.0, 0.0], [0.5, 0.5]]
    assert discriminator.log_ratio_from_logits(torch.tensor([7.0]), max_abs=3.0).tolist() == [3.0]


def test_gradient_penalty() -> None:
    weights = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    inputs = torch.randn(4, 3, requires_grad=True)
    penalty = discriminator.gradient_penalty(inputs * weights, inputs)
    torch.testing.assert_close(penalty, (weights / 3).square().sum().expand(4))
    assert torch.autograd.grad(penalty.sum(), weights)[0].abs().sum() > 0


def test_errors() -> None:
    with pytest.raises(ValueError, match="3 real and 2 fake"):
        discriminator.discriminator_loss(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="did you mean 'hinge'"):
        discriminator.real_loss(torch.zeros(3), kind="hing")
    with pytest.raises(ValueError, match="did you mean 'saturating'"):
        discriminator.adversarial_loss(torch.zeros(3), kind="saturatin")
    with pytest.raises(ValueError, match="num_bins"):
        discriminator.RatioNormaliser(0)


# ---- ratio normalisation


def test_normaliser_makes_the_mean_ratio_one_in_each_bin() -> None:
    """A logit that is off by another constant in each bin: after some batches E[r] is 1 in all of them."""
    normaliser = discriminator.RatioNormaliser(4, sigma_min=0.1, sigma_max=10.0, horizon=4000.0)
    seed = torch.Generator().manual_seed(0)
    centres = torch.tensor([0.15, 0.5, 2.0, 6.0])
    assert normaliser.bin_index(centres).tolist() == [0, 1, 2, 3]
    assert normaliser.bin_index(torch.tensor([1e-6, 1e6])).tolist() == [0, 3]
    offsets = torch.tensor([-1.0, 0.0, 0.7, 2.0])

    def batch(num: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.randint(4, (num,), generator=seed)
        # exp(N(-s^2/2, s^2)) has mean one.
        return offsets[index] - 0.125 + 0.5 * torch.randn(num, generator=seed), centres[index]

    for _ in range(200):
        normaliser.update(*batch(64))
    normaliser.eval()
    log_ratio, sigma = batch(40_000)
    ratio = normaliser(log_ratio, sigma).exp()
    for centre in centres:
        assert ratio[sigma == centre].mean().item() == pytest.approx(1.0, abs=0.04)


def test_normaliser_counts_in_training_only_and_passes_gradients() -> None:
    normaliser = discriminator.RatioNormaliser(2, prior_count=1.0)
    log_ratio = torch.full((3,), math.log(3.0), requires_grad=True)
    sigma = torch.full((3,), 0.1)
    normalised = normaliser(log_ratio, sigma)
    # The prior counts as one ratio of 1, so the mean of bin 0 is (1 + 3 * 3) / 4.
    torch.testing.assert_close(normaliser.mean_ratio, torch.tensor([2.5, 1.0]))
    torch.testing.assert_close(normalised, torch.full((3,), math.log(3 / 2.5)))
    assert torch.autograd.grad(normalised.sum(), log_ratio)[0].tolist() == [1.0, 1.0, 1.0]
    before = normaliser.mean_ratio.clone()
    normaliser.eval()(log_ratio, sigma)
    assert torch.equal(normaliser.mean_ratio, before)


def test_normaliser_forgets_and_survives_bad_values() -> None:
    normaliser = discriminator.RatioNormaliser(1, horizon=10.0)
    for value, times in ((math.log(5.0), 50), (0.0, 60)):
        for _ in range(times):
            normaliser.update(torch.tensor([value]), torch.tensor([1.0]))
    assert normaliser.mean_ratio.item() == pytest.approx(1.0, abs=0.02)
    assert normaliser.count.item() == pytest.approx(10.0)
    normaliser.update(torch.tensor([math.nan, math.inf, 0.0]), torch.ones(3))
    assert normaliser.mean_ratio.isfinite().all()
    normaliser.update(torch.full((25,), math.log(2.0)), torch.ones(25))  # more than the horizon at once
    assert normaliser.mean_ratio.item() == pytest.approx(2.0)


def test_normaliser_state_is_in_its_state_dict() -> None:
    one, other = discriminator.RatioNormaliser(3), discriminator.RatioNormaliser(3)
    one.update(torch.randn(20), torch.rand(20) * 5 + 0.05)
    other.load_state_dict(one.state_dict())
    sigma = torch.tensor([0.05, 1.0, 9.0])
    assert set(one.state_dict()) == {"mean_ratio", "count"}
    assert torch.equal(one.eval()(torch.zeros(3), sigma), other.eval()(torch.zeros(3), sigma))
