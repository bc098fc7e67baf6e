"""Frechet distance and bootstrap intervals against numbers known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from uni3d.errors import UsageError
from uni3d.evaluation.statistics import bootstrap_rate, frechet_distance


def test_distance_of_a_set_to_itself_is_zero() -> None:
    features = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features, features) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(features, features.flip(0)) == pytest.approx(0.0, abs=1e-9)


def test_distance_of_shifted_and_scaled_gaussians_has_a_closed_form() -> None:
    # b = 3 a + 2: covariances commute, so d = |mean difference|^2 + sum (3 s_i - s_i)^2, s_i deviations.
    a = torch.randn(500, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    b = 3 * a + 2
    expected = (b.mean(0) - a.mean(0)).square().sum() + 4 * torch.trace(torch.cov(a.T))
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_distance_of_non_commuting_covariances() -> None:
    # For 2 x 2 matrices tr (A B)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)).
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(300, 2, generator=generator).double() @ torch.tensor([[2.0, 0.3], [0.0, 0.5]]).double()
    b = torch.randn(400, 2, generator=generator).double() @ torch.tensor([[0.4, 0.0], [0.9, 1.5]]).double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    assert not torch.allclose(cov_a @ cov_b, cov_b @ cov_a, rtol=1e-2)
    product = cov_a @ cov_b
    root_trace = (torch.trace(product) + 2 * torch.linalg.det(product).sqrt()).sqrt()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    expected = mean + torch.trace(cov_a) + torch.trace(cov_b) - 2 * root_trace
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(a, b) > 0
    assert frechet_distance(b, a) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3)),
        (torch.zeros(5, 3), torch.zeros(5, 4)),
        (torch.full((5, 3), float("nan")), torch.zeros(5, 3)),
    ],
)
def test_distance_refuses_what_it_cannot_compare(a: torch.Tensor, b: torch.Tensor) -> None:
    with pytest.raises(UsageError):
        frechet_distance(a, b)


def test_bootstrap_interval_is_near_the_normal_one() -> None:
    values = np.random.default_rng(0).random(400) < 0.8
    rate = bootstrap_rate(values.astype(float), num_resamples=2000)
    assert rate is not None
    error = 1.96 * np.sqrt(rate.mean * (1 - rate.mean) / 400)
    assert rate.mean == pytest.approx(values.mean())
    assert rate.low == pytest.approx(rate.mean - error, abs=0.01)
    assert rate.high == pytest.approx(rate.mean + error, abs=0.01)
    assert bootstrap_rate([]) is None
