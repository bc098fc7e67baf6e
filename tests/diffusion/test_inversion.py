"""DDIM run backwards: the exact flow of a Gaussian, and what ISM and SDI make of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from uni3d.diffusion.analytic import GaussianMixture
from uni3d.diffusion.inversion import ddim_inversion
from uni3d.losses import noise_schedule, recipes

STD, MEAN = 0.7, 1.3


def gaussian() -> GaussianMixture:
    return GaussianMixture(torch.full((1, 3), MEAN, dtype=torch.float64), STD**2)


def samples(num: int = 4) -> Tensor:
    noise = torch.randn(num, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return MEAN + STD * noise


def levels(last: float, num: int, first: float = 1e-3) -> Tensor:
    return torch.linspace(first, last, num, dtype=torch.float64)[:, None].expand(num, 4)


def exact_flow(x0: Tensor, sigma: float) -> Tensor:
    """The probability flow of a Gaussian stretches the distance to its mean with the standard deviation."""
    return MEAN + (x0 - MEAN) * (STD**2 + sigma**2) ** 0.5 / STD


def test_inversion_converges_to_the_probability_flow() -> None:
    x0, sigma = samples(), 2.0
    errors = [
        (ddim_inversion(gaussian(), x0, levels(sigma, num)).x - exact_flow(x0, sigma)).abs().max().item()
        for num in (51, 101, 201)
    ]
    # A first-order method: half the step, half the error.
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_a_point_is_carried_along_the_ray_from_it() -> None:
    """For a teacher that knows one picture, inverting that picture stays there: no noise leads to it."""
    point = GaussianMixture(torch.full((1, 3), MEAN, dtype=torch.float64), 1e-12)
    x0 = torch.full((4, 3), MEAN, dtype=torch.float64)
    torch.testing.assert_close(ddim_inversion(point, x0, levels(5.0, 6)).x, x0)


def test_the_interval_is_the_difference_of_noises() -> None:
    """eps(x_t) - eps(x_s) = -(D_t - D_s) / sigma_t: interval score matching in x0-predictions."""
    sigmas = levels(1.5, 6)
    inverted = ddim_inversion(gaussian(), samples(), sigmas)
    before = ddim_inversion(gaussian(), samples(), sigmas[:-1])
    eps_s = noise_schedule.eps_from_x0(before.x, gaussian()(before.x, sigmas[-2]), sigmas[-2])
    eps_t = noise_schedule.eps_from_x0(inverted.x, gaussian()(inverted.x, sigmas[-1]), sigmas[-1])
    difference = -(gaussian()(inverted.x, sigmas[-1]) - inverted.previous_x0) / sigmas[-1][:, None]
    torch.testing.assert_close(eps_t - eps_s, difference)


def gradient(name: str, num_levels: int) -> Tensor:
    """Of the student's loss for samples of an unguided Gaussian teacher, noise inverted in `num_levels`."""
    x0 = samples().requires_grad_()
    sigmas = levels(1.5, num_levels)
    inverted = ddim_inversion(gaussian(), x0.detach(), sigmas)
    recipe = recipes.get(name, time_weighting="uniform")
    loss = recipes.generator_loss(
        recipe,
        x0=x0,
        sigma=sigmas[-1],
        teacher_x0=gaussian()(inverted.x, sigmas[-1]),
        fake_x0=inverted.previous_x0 if recipe.student == "interval" else None,
    )
    return torch.autograd.grad(loss.sum(), x0)[0]


def test_ism_without_guidance_vanishes_with_the_interval() -> None:
    coarse, fine, finer = (gradient("ism", num).abs().max().item() for num in (11, 101, 1001))
    assert coarse > 1e-3 and fine < coarse / 5 and finer == pytest.approx(fine / 10, rel=0.2)


def test_sdi_pulls_a_sample_of_a_gaussian_to_its_mean() -> None:
    """D(x_t) - x0 = (x0 - mean)(s / sqrt(s^2 + sigma^2) - 1) along the exact flow, for every seed."""
    expected = (samples() - MEAN) * (1 - STD / (STD**2 + 1.5**2) ** 0.5)
    torch.testing.assert_close(gradient("sdi", 2001), expected, atol=2e-3, rtol=0)


def test_sdi_with_fresh_noise_is_sds() -> None:
    sds = recipes.get("sds", guidance_scale=7.5)
    sdi = recipes.get("sdi", noise="fresh", inversion_steps=0, inversion_guidance_scale=0.0)
    ignored = {"name": "sds", "title": sds.title, "note": ""}
    assert recipes.get("sds", guidance_scale=7.5) == sds
    assert {**vars(sdi), **ignored} == {**vars(sds), **ignored}


def test_inversions_are_counted() -> None:
    assert recipes.get("ism").network_passes == (2 + 4, 0, 0, 0)
    assert recipes.get("sdi").network_passes == (2 + 20, 0, 0, 0)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sds", {"noise": "inverted"}, "inverted noise takes at least one step"),
        ("sds", {"inversion_steps": 3}, "fresh noise none"),
        ("sds", {"student": "interval"}, "is a step of an inversion"),
        ("sds", {"noise": "invented"}, "did you mean 'inverted'"),
    ],
)
def test_recipes_of_inversions_that_contradict_themselves(
    name: str, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        recipes.get(name, **changes)


def test_one_level_is_no_inversion() -> None:
    with pytest.raises(ValueError, match="at least two"):
        ddim_inversion(gaussian(), samples(), levels(1.0, 1))
