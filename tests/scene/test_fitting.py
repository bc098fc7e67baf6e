"""A field fitted to exact views of a painted scene: the path from cameras to gradients, by its result."""

from __future__ import annotations

import pytest
import torch
from painted_scene import SIDE_COLOURS, paint
from torch import Tensor

from uni3d.scene.camera import Cameras, ring_cameras, sample_orbit_cameras
from uni3d.scene.occupancy import OccupancyGrid
from uni3d.scene.radiance_field import RadianceField
from uni3d.scene.regularisers import fog_fraction, opacity_entropy
from uni3d.scene.renderer import RenderOutput, render

SIZE = 40
BACKGROUND = 0.95


def _psnr(image: Tensor, truth: Tensor) -> float:
    return float(-10 * (image - truth).square().mean().log10())


def _fit(num_steps: int) -> tuple[RadianceField, OccupancyGrid]:
    generator = torch.Generator().manual_seed(0)
    field, occupancy = RadianceField(resolutions=(16, 32, 64)), OccupancyGrid(resolution=32)
    optimiser = torch.optim.Adam(
        field.parameter_groups({"density": 0.12, "colour": 0.06}), betas=(0.9, 0.99), eps=1e-15, fused=True
    )
    for step in range(num_steps):
        if step % 8 == 0:
            occupancy.update(field, generator=generator)
        cameras = sample_orbit_cameras(1, generator=generator)
        truth, _ = paint(cameras, SIZE, BACKGROUND)
        output = render(
            field, cameras, SIZE, SIZE, BACKGROUND, num_samples=48, generator=generator, occupancy=occupancy
        )
        loss = 10 * (output.image - truth).square().mean() + 0.02 * opacity_entropy(output.opacity)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return field, occupancy


def _look(fitted: tuple[RadianceField, OccupancyGrid], cameras: Cameras) -> RenderOutput:
    with torch.no_grad():
        return render(fitted[0], cameras, SIZE, SIZE, BACKGROUND, num_samples=80, occupancy=fitted[1])


@pytest.fixture(scope="module")
def fitted() -> tuple[RadianceField, OccupancyGrid]:
    return _fit(60)


def test_held_out_views_are_close(fitted: tuple[RadianceField, OccupancyGrid]) -> None:
    cameras = ring_cameras(6, elevation_deg=25.0)
    truth, mask = paint(cameras, SIZE, BACKGROUND)
    before = _psnr(_look(_fit(0), cameras).image, truth)
    output = _look(fitted, cameras)
    assert before < 17
    assert _psnr(output.image, truth) > 24
    found = output.opacity > 0.5
    assert (found & (mask > 0.5)).sum() / (found | (mask > 0.5)).sum() > 0.92


def test_silhouettes_are_crisp(fitted: tuple[RadianceField, OccupancyGrid]) -> None:
    assert fog_fraction(_look(fitted, ring_cameras(6)).opacity) < 0.25  # pixels of the outline are among them


def test_each_side_has_its_colour(fitted: tuple[RadianceField, OccupancyGrid]) -> None:
    image = _look(fitted, Cameras.from_lists([0.0, 90.0, 180.0, -90.0], [10.0] * 4)).image
    patch = image[:, :, 22:26, 18:22].mean(dim=(2, 3))
    expected = torch.stack([SIDE_COLOURS[2, 1], SIDE_COLOURS[0, 1], SIDE_COLOURS[2, 0], SIDE_COLOURS[0, 0]])
    assert (patch - expected).abs().max() < 0.15


def test_empty_space_is_skipped(fitted: tuple[RadianceField, OccupancyGrid]) -> None:
    assert fitted[1].occupied_fraction() < 0.6


def test_fitting_is_bitwise_repeatable() -> None:
    first, second = _fit(3)[0], _fit(3)[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
