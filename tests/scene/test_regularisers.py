"""Regularisers against direct formulas, and the direction in which they push."""

from __future__ import annotations

import math

import pytest
import torch

from uni3d.errors import UsageError
from uni3d.scene.camera import ring_cameras
from uni3d.scene.packed import Segments
from uni3d.scene.radiance_field import RadianceField
from uni3d.scene.regularisers import (
    containment,
    distortion,
    fog_fraction,
    local_variation,
    off_centre,
    opacity_entropy,
    opacity_sparsity,
    orientation,
    total_variation,
    weight_entropy,
)
from uni3d.scene.renderer import RaySamples, RenderOutput, render


def _samples() -> RaySamples:
    """Two rays along -Z with four and two samples, and one without any."""
    generator = torch.Generator().manual_seed(0)
    distances = torch.tensor([1.0, 1.1, 1.5, 1.8, 0.9, 1.4], dtype=torch.float64)
    points = torch.zeros(6, 3, dtype=torch.float64)
    points[:, 2] = 1.5 - distances
    return RaySamples(
        segments=Segments.from_ray_index(torch.tensor([0, 0, 0, 0, 2, 2]), 3),
        weights=(torch.rand(6, generator=generator, dtype=torch.float64) * 0.25).requires_grad_(),
        distances=distances,
        points=points,
        directions=torch.tensor([[0.0, 0.0, -1.0]]).double().expand(3, 3),
        step=0.02,
    )


def _output() -> RenderOutput:
    return render(RadianceField(resolutions=(9,)), ring_cameras(2), 16, 16, num_samples=24)


def test_opacity_entropy_prefers_empty_or_full() -> None:
    opacity = torch.tensor([0.0, 1.0, 0.5, 0.2]).view(1, 1, 2, 2).requires_grad_()
    value = opacity_entropy(opacity)
    some = -(0.2 * math.log(0.2) + 0.8 * math.log(0.8))
    assert float(value.detach()) == pytest.approx((math.log(2) + some) / 4, abs=1e-3)
    value.backward()
    assert opacity.grad is not None and opacity.grad.isfinite().all()
    assert opacity.grad.flatten()[3] > 0  # faint pixels are pushed to empty


def test_opacity_sparsity_is_the_mean() -> None:
    assert float(opacity_sparsity(torch.tensor([[0.25, 0.75, 1.0, 0.0]]))) == 0.5


def test_distortion_is_the_double_sum() -> None:
    samples = _samples()
    expected = torch.zeros((), dtype=torch.float64)
    for part in (slice(0, 4), slice(4, 6)):
        weights, distances = samples.weights[part], samples.distances[part]
        gaps = (distances[:, None] - distances[None, :]).abs()
        expected = expected + (weights[:, None] * weights[None, :] * gaps).sum()
        expected = expected + samples.step / 3 * weights.square().sum()
    value = distortion(samples)
    torch.testing.assert_close(value, expected / 3)
    (ours,) = torch.autograd.grad(value, samples.weights)
    (theirs,) = torch.autograd.grad(expected / 3, samples.weights)
    torch.testing.assert_close(ours, theirs)


def test_weight_entropy_is_zero_for_one_surface() -> None:
    samples = _samples()
    assert float(weight_entropy(samples).detach()) > 0.3
    with torch.no_grad():
        samples.weights.copy_(torch.tensor([0.0, 0.9, 0.0, 0.0, 0.0, 0.4]))
    assert float(weight_entropy(samples).detach()) == pytest.approx(0.0, abs=1e-6)


def test_containment_and_centre() -> None:
    samples = _samples()
    beyond = (samples.points[:, 2].abs() - 0.5).clamp(min=0)
    torch.testing.assert_close(containment(samples), (samples.weights * beyond).sum() / 3)
    assert float(containment(samples).detach()) > 0
    field = RadianceField(resolutions=(13,))
    centred = render(
        field, ring_cameras(4, elevation_deg=0.0), 16, 16, num_samples=24, stop_transmittance=0.0
    )
    with torch.no_grad():
        field.density_grids[0][..., 7:] += 2.0
    shifted = render(
        field, ring_cameras(4, elevation_deg=0.0), 16, 16, num_samples=24, stop_transmittance=0.0
    )
    assert float(off_centre(centred).detach()) < 1e-4
    assert float(off_centre(shifted).detach()) > 1e-3


def test_orientation_charges_matter_that_faces_away() -> None:
    samples = _samples()
    with pytest.raises(UsageError, match="with_normals"):
        orientation(samples)
    toward = torch.tensor([[0.0, 0.0, 1.0]]).double().expand(6, 3)
    facing = RaySamples(**{**vars(samples), "normals": toward})
    away = RaySamples(**{**vars(samples), "normals": -toward})
    assert float(orientation(facing)) == 0
    torch.testing.assert_close(orientation(away), samples.weights.detach().sum() / 3)


def test_total_variation_is_the_mean_squared_difference() -> None:
    field = RadianceField(resolutions=(5, 8))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.normal_()
    reference = torch.zeros(())
    for grid in field.parameters():
        reference = reference + sum(
            (grid.diff(dim=axis).square().mean() for axis in (1, 2, 3)), torch.zeros(())
        )
    reference = reference / 2
    value = total_variation(field)
    torch.testing.assert_close(value, reference)
    ours = torch.autograd.grad(3 * value, list(field.parameters()))
    theirs = torch.autograd.grad(3 * reference, list(field.parameters()))
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected)
    generator = torch.Generator().manual_seed(0)
    slabs = torch.stack(
        [total_variation(field, generator=generator, fraction=0.5).detach() for _ in range(200)]
    )
    torch.testing.assert_close(slabs.mean(), value.detach(), rtol=0.1, atol=0)
    assert float(total_variation(field, density_weight=0.0).detach()) < float(value.detach())


def test_total_variation_refuses_hash_fields_and_local_variation_takes_them() -> None:
    field = RadianceField(
        encoding="hash", hash_options={"num_levels": 2, "table_size": 2**8, "max_resolution": 32}
    )
    with pytest.raises(UsageError, match="local_variation"):
        total_variation(field)
    points = torch.rand(64, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    near = local_variation(field, points, offset=0.005, generator=torch.Generator().manual_seed(1))
    far = local_variation(field, points, offset=0.1, generator=torch.Generator().manual_seed(1))
    assert 0 < float(near.detach()) < float(far.detach())
    near.backward()


def test_fog_fraction() -> None:
    opacity = torch.tensor([0.0, 0.05, 0.5, 0.95, 1.0, 1.0]).view(1, 1, 2, 3)
    assert fog_fraction(opacity) == pytest.approx(0.25)
    assert fog_fraction(torch.zeros(1, 1, 4, 4)) == 0.0
    assert fog_fraction(_output().opacity) > 0.5  # the starting blob is fog
