"""Samplers against the closed form of a Gaussian, and what a seed means."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from uni3d.diffusion.analytic import GaussianMixture
from uni3d.diffusion.edm import EDMConfig, EDMDenoiser, preset
from uni3d.distillation.sampling import (
    Churn,
    SamplerSettings,
    SeedNoise,
    heun_sigmas,
    sample_heun,
    sample_one_step,
    sample_seeds,
    sampled_dataset,
    settings_for,
    start_of,
    to_pixels,
    with_churn,
)
from uni3d.errors import UsageError

MEAN, SPREAD = torch.tensor([0.3, -0.2], dtype=torch.float64), 0.5
TEACHER = GaussianMixture(MEAN[None], SPREAD**2)
SMALL = dataclasses.replace(
    preset("cifar10-32x32-cond-vp"),
    model_channels=16,
    channel_mult=(1, 2),
    resolution=8,
    num_blocks=1,
    attention_resolutions=(4,),
)


def exact_end(noise: Tensor, sigma_max: float) -> Tensor:
    """Where the ODE of N(mean, spread^2) ends that starts at sigma_max * noise."""
    return MEAN + (sigma_max * noise - MEAN) * SPREAD / math.hypot(SPREAD, sigma_max)


def ode_error(num_steps: int) -> float:
    noise = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # The last step is Euler's, so its error stays unless the level before it is low.
    sigmas = heun_sigmas(num_steps, sigma_min=1e-5)
    return (sample_heun(TEACHER, noise, sigmas) - exact_end(noise, 80.0)).abs().max().item()


def test_heun_is_of_second_order() -> None:
    errors = [ode_error(num_steps) for num_steps in (64, 128, 256)]
    assert errors[2] < 1e-3
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(2, abs=0.2)


def test_edms_eighteen_steps_come_near() -> None:
    noise = torch.randn(64, 2, dtype=torch.float64)
    error = sample_heun(TEACHER, noise, heun_sigmas(18)) - exact_end(noise, 80.0)
    assert error.abs().mean() < 0.06 * SPREAD


@pytest.mark.parametrize("num_steps", [1, 2, 18])
def test_n_steps_are_two_n_less_one_evaluations(num_steps: int) -> None:
    levels: list[float] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        levels.append(sigma[0].item())
        return TEACHER(x, sigma)

    sample_heun(denoise, torch.randn(3, 2, dtype=torch.float64), heun_sigmas(num_steps))
    assert len(levels) == 2 * num_steps - 1 == SamplerSettings(num_steps=num_steps).num_evaluations
    assert levels[0] == pytest.approx(80.0)
    if num_steps > 1:
        assert levels[-1] == pytest.approx(0.002)


def test_the_schedule_is_equation_five() -> None:
    sigmas = heun_sigmas(5, sigma_min=0.1, sigma_max=10, rho=3)
    expected = [(10 ** (1 / 3) + i / 4 * (0.1 ** (1 / 3) - 10 ** (1 / 3))) ** 3 for i in range(5)]
    assert sigmas.tolist() == pytest.approx([*expected, 0.0]) and sigmas.dtype == torch.float64
    with pytest.raises(ValueError, match="at least 1"):
        heun_sigmas(0)


def test_the_stochastic_sampler_keeps_the_distribution() -> None:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(20_000, 2, dtype=torch.float64, generator=generator)

    def draw(shape: object) -> Tensor:
        return torch.randn(20_000, 2, dtype=torch.float64, generator=generator)

    found = sample_heun(TEACHER, noise, heun_sigmas(40), churn=Churn(amount=20), draw=draw)
    plain = sample_heun(TEACHER, noise, heun_sigmas(40))
    assert (found - plain).abs().mean() > 0.2  # other images of the same noise
    torch.testing.assert_close(found.mean(0), MEAN, atol=0.02, rtol=0)
    torch.testing.assert_close(found.std(0), MEAN.new_full((2,), SPREAD), atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="pass draw"):
        sample_heun(TEACHER, noise, heun_sigmas(4), churn=Churn(amount=1))


def test_churn_acts_between_its_limits_and_no_more_than_doubles_the_variance() -> None:
    churn = Churn(amount=80, sigma_min=0.05, sigma_max=50)
    assert churn.gamma(0.04, 18) == churn.gamma(60, 18) == 0
    assert churn.gamma(1, 18) == math.sqrt(2) - 1
    assert churn.gamma(1, 800) == 0.1
    with pytest.raises(UsageError, match="leave --churn out"):
        with_churn(SamplerSettings(num_steps=None), churn)


def test_one_step_is_one_evaluation_at_sigma_init() -> None:
    noise = torch.randn(4, 2, dtype=torch.float64)
    made = sample_one_step(TEACHER, noise, sigma_init=2.5)
    torch.testing.assert_close(made, TEACHER(2.5 * noise, 2.5))


@pytest.fixture(scope="module")
def net() -> EDMDenoiser:
    return EDMDenoiser(SMALL, generator=torch.Generator().manual_seed(0)).eval()


def test_the_noise_of_a_seed_is_its_own() -> None:
    noise, classes, _ = start_of([5, 6, 7], SMALL)
    alone, alone_class, _ = start_of([6], SMALL)
    assert torch.equal(noise[1:2], alone) and torch.equal(classes[1:2], alone_class)
    assert not torch.equal(noise[0], noise[1])
    given, given_class, _ = start_of([6], SMALL, class_index=3)
    assert torch.equal(given, alone) and given_class.tolist() == [3]
    unconditional = dataclasses.replace(SMALL, label_dim=0)
    assert torch.equal(start_of([6], unconditional)[0], alone) and start_of([6], unconditional)[1] is None
    # What a seed means must never change: images are quoted by it.
    assert noise[0, 0, 0, 0].item() == pytest.approx(
        torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(5))[0, 0, 0].item()
    )
    drawn = SeedNoise(range(400)).classes(10)
    assert drawn.bincount(minlength=10).min() > 15


@pytest.mark.parametrize(
    "settings",
    [
        SamplerSettings(num_steps=2),
        SamplerSettings(num_steps=2, churn=Churn(amount=1)),
        SamplerSettings(num_steps=None),
    ],
)
def test_an_image_does_not_depend_on_its_batch(net: EDMDenoiser, settings: SamplerSettings) -> None:
    whole = sample_seeds(net, [3, 4, 5], settings=settings)
    assert whole.shape == (3, 3, 8, 8)
    torch.testing.assert_close(whole[1:2], sample_seeds(net, [4], settings=settings), atol=1e-4, rtol=1e-4)
    again = sample_seeds(net, [3, 4, 5], settings=settings)
    assert torch.equal(whole, again)


def test_seeds_are_a_data_set(net: EDMDenoiser) -> None:
    told: list[int] = []
    settings = SamplerSettings(num_steps=None)
    dataset = sampled_dataset(
        net, range(10, 17), name="s", settings=settings, batch_size=3, progress=told.append
    )
    parts = list(dataset.batches(4))
    assert [part.shape for part in parts] == [(4, 3, 8, 8), (3, 3, 8, 8)] and sum(told) == 7
    assert parts[0].dtype == np.uint8
    _, classes, _ = start_of(range(10, 17), SMALL)
    assert dataset.labels.tolist() == classes.tolist() and dataset.num_classes == 10
    other = sampled_dataset(net, [12], name="s", settings=settings)
    assert np.abs(other.images()[0].astype(int) - parts[0][2].astype(int)).max() <= 1
    fixed = sampled_dataset(net, [1, 2], name="s", settings=settings, class_index=4)
    assert fixed.labels.tolist() == [4, 4]


def test_pixels() -> None:
    x = torch.tensor([-2.0, -1.0, -0.9999, 0.0, 1.0, 3.0])
    assert to_pixels(x).tolist() == [0, 0, 0, 128, 255, 255]
    levels = torch.arange(256)
    assert to_pixels(levels / 127.5 - 1).tolist() == levels.tolist()


def unconditional() -> EDMConfig:
    return dataclasses.replace(SMALL, label_dim=0)


def test_what_cannot_be_sampled_is_one_sentence(net: EDMDenoiser) -> None:
    settings = SamplerSettings()
    with pytest.raises(UsageError, match="knows the classes 0 to 9"):
        sampled_dataset(net, [0], name="s", settings=settings, class_index=10)
    with pytest.raises(UsageError, match="unconditional"):
        start_of([0], unconditional(), class_index=0)
    with pytest.raises(UsageError, match="at least one"):
        sampled_dataset(net, [], name="s", settings=settings)
    with pytest.raises(UsageError, match="out of range"):
        sampled_dataset(net, [-1], name="s", settings=settings)


def test_a_student_says_that_it_is_one() -> None:
    assert settings_for({}).num_steps == 18 and settings_for({"file": "x"}, num_steps=4).num_steps == 4
    student = settings_for({"student": {"sigma_init": 2}})
    assert student.num_steps is None and student.sigma_init == 2.0 and student.num_evaluations == 1
    with pytest.raises(UsageError, match="leave --steps out"):
        settings_for({"student": {"sigma_init": 2.5}}, num_steps=3)
    for damaged in ({"student": 1}, {"student": {}}, {"student": {"sigma_init": "x"}}):
        with pytest.raises(UsageError, match="damaged"):
            settings_for(damaged)
    assert SamplerSettings(num_steps=None).record()["sampler"] == "one_step"
    assert SamplerSettings(churn=Churn(amount=1)).record()["s_churn"] == 1
