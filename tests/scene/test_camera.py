"""Axes, view words and rays: the conventions that everything else relies on."""

from __future__ import annotations

import math

import pytest
import torch
from painted_scene import SIDE_COLOURS, paint

from uni3d.scene.camera import (
    Cameras,
    frame_half_height,
    ring_cameras,
    sample_orbit_cameras,
    view_word,
)


@pytest.mark.parametrize(
    ("azimuth", "elevation", "word"),
    [
        (0, 0, "front"),
        (45, 0, "front"),
        (46, 0, "side"),
        (-45, 10, "front"),
        (90, 60, "side"),
        (-90, 0, "side"),
        (134, 0, "side"),
        (135, 0, "back"),
        (180, -10, "back"),
        (-180, 0, "back"),
        (360, 0, "front"),
        (-270, 0, "side"),
        (0, 60.1, "overhead"),
        (180, 90, "overhead"),
    ],
)
def test_view_word(azimuth: float, elevation: float, word: str) -> None:
    assert view_word(azimuth, elevation) == word


@pytest.mark.parametrize(
    ("azimuth", "elevation", "position"),
    [(0, 0, (0, 0, 2)), (90, 0, (2, 0, 0)), (180, 0, (0, 0, -2)), (-90, 0, (-2, 0, 0)), (30, 90, (0, 2, 0))],
)
def test_positions(azimuth: float, elevation: float, position: tuple[float, float, float]) -> None:
    cameras = Cameras.from_lists([azimuth], [elevation], radius=2.0)
    torch.testing.assert_close(cameras.positions()[0], torch.tensor(position).float(), atol=1e-6, rtol=0)


def test_axes_are_a_right_handed_frame_with_up_upwards() -> None:
    right, up, backward = sample_orbit_cameras(16, generator=torch.Generator().manual_seed(1)).axes()
    frame = torch.stack([right, up, backward], dim=1)
    torch.testing.assert_close(frame @ frame.mT, torch.eye(3).expand(16, 3, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(frame), torch.ones(16))
    assert (up[:, 1] > 0).all()
    assert (right[:, 1] == 0).all()


def test_rays_look_at_the_origin_with_row_zero_on_top() -> None:
    cameras = Cameras.from_lists([0.0, 70.0], [0.0, 35.0], radius=2.5)
    origins, directions = cameras.rays(5, 7)
    assert origins.shape == directions.shape == (2, 5, 7, 3)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(2, 5, 7))
    to_origin = -torch.nn.functional.normalize(cameras.positions(), dim=-1)
    torch.testing.assert_close(directions[:, 2, 3], to_origin, atol=1e-6, rtol=0)
    assert directions[0, 0, 3, 1] > 0 > directions[0, 4, 3, 1]
    assert directions[0, 2, 6, 0] > 0 > directions[0, 2, 0, 0]  # seen from the front, +X is on the right


def test_rays_span_the_field_of_view() -> None:
    _, directions = Cameras.from_lists([0.0], [0.0], fov_y_deg=40.0).rays(1000, 1000)
    edge = math.degrees(math.atan2(float(directions[0, 0, 500, 1]), -float(directions[0, 0, 500, 2])))
    assert edge == pytest.approx(20.0, abs=0.05)
    assert frame_half_height(2.0, 90.0) == pytest.approx(2.0)


def test_every_side_of_a_painted_box_shows_where_the_convention_says() -> None:
    cameras = Cameras.from_lists([0.0, 90.0, 180.0, -90.0], [0.0] * 4)
    image, _ = paint(cameras, 32, 1.0)
    below_centre = image[:, :, 19, 16]  # the box lies a little below the origin
    expected = torch.stack([SIDE_COLOURS[2, 1], SIDE_COLOURS[0, 1], SIDE_COLOURS[2, 0], SIDE_COLOURS[0, 0]])
    torch.testing.assert_close(below_centre, expected)


def test_sampled_cameras_are_stratified_in_range_and_repeatable() -> None:
    def draw(seed: int) -> Cameras:
        return sample_orbit_cameras(
            400, generator=torch.Generator().manual_seed(seed), overhead_probability=0.25
        )

    cameras = draw(3)
    is_overhead = cameras.elevation_deg > 45
    assert 0.15 < is_overhead.float().mean() < 0.35
    assert cameras.elevation_deg.min() >= -10
    assert cameras.elevation_deg.max() <= 85
    assert cameras.azimuth_deg.abs().max() <= 180
    assert 2.1 <= cameras.radius.min() <= cameras.radius.max() <= 2.7
    per_quadrant = torch.histc(cameras.azimuth_deg, bins=4, min=-180, max=180)
    assert ((per_quadrant - 100).abs() <= 2).all()
    assert torch.equal(draw(3).azimuth_deg, cameras.azimuth_deg)
    assert not torch.equal(draw(4).azimuth_deg, cameras.azimuth_deg)


def test_one_camera_at_a_time_still_covers_the_circle() -> None:
    generator = torch.Generator().manual_seed(0)
    azimuths = torch.cat([sample_orbit_cameras(1, generator=generator).azimuth_deg for _ in range(400)])
    per_quadrant = torch.histc(azimuths, bins=4, min=-180, max=180)
    assert per_quadrant.min() > 60


def test_ring_starts_at_the_front() -> None:
    ring = ring_cameras(4, elevation_deg=0.0)
    assert ring.azimuth_deg.tolist() == [0.0, 90.0, -180.0, -90.0]
    assert ring.view_words() == ["front", "side", "back", "side"]


def test_conditioning_is_periodic_and_sees_apparent_size() -> None:
    near, far = Cameras.from_lists([10.0], [5.0], radius=2.0), Cameras.from_lists([370.0], [5.0], radius=2.8)
    torch.testing.assert_close(near.conditioning()[:, :4], far.conditioning()[:, :4])
    assert near.conditioning().shape == (1, 5)
    assert float(near.conditioning()[0, 4] - far.conditioning()[0, 4]) == pytest.approx(
        math.log(1.4), abs=1e-5
    )


def test_slicing_and_device() -> None:
    cameras = ring_cameras(6)
    assert len(cameras[2:4]) == 2
    assert cameras[torch.tensor([5])].azimuth_deg.tolist() == [cameras.azimuth_deg[5].item()]
    assert cameras.to("cpu").rays(2, 2)[0].dtype == torch.float32


@pytest.mark.parametrize(("height", "width"), [(6, 9), (8, 4)])
def test_projection_sends_points_on_rays_to_pixel_centres(height: int, width: int) -> None:
    cameras = Cameras.from_lists([33.0, -140.0], [21.0, 70.0], fov_y_deg=55.0)
    origins, directions = cameras.rays(height, width)
    for camera in range(2):
        points = (origins + 1.7 * directions)[camera].reshape(-1, 3)
        x, y, depth = cameras.project(points, height, width)[camera].unbind(-1)
        column, row = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
        torch.testing.assert_close(x / depth, column.reshape(-1) + 0.5, atol=1e-4, rtol=0)
        torch.testing.assert_close(y / depth, row.reshape(-1) + 0.5, atol=1e-4, rtol=0)
        distance = depth * cameras.ray_lengths(height, width)[camera].reshape(-1)
        torch.testing.assert_close(distance, torch.full_like(distance, 1.7))


def test_points_behind_the_camera_have_negative_depth() -> None:
    cameras = Cameras.from_lists([33.0], [21.0])
    assert cameras.project(2 * cameras.positions(), 8, 8)[0, 0, 2] < 0
