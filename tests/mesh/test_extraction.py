"""Surfaces out of fields: closed, outward, of the right size, at the level that looks like the rendering."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor

from uni3d.errors import Uni3DError, UsageError
from uni3d.mesh.extraction import EmptySurfaceError, extract_surface, silhouette_score
from uni3d.mesh.surface import Surface, component_labels
from uni3d.scene.camera import ring_cameras


def hard_sphere(points: Tensor) -> Tensor:
    return 200.0 * (points.norm(dim=-1) < 0.4)


def edged_sphere(points: Tensor) -> Tensor:
    """A sphere whose edge falls off over a few hundredths, as fields of real runs do."""
    return 100.0 * torch.sigmoid((0.4 - points.norm(dim=-1)) / 0.01)


def soft_blob(points: Tensor) -> Tensor:
    return 40.0 * torch.exp(-(points**2).sum(-1) / (2 * 0.2**2))


def hard_box(points: Tensor) -> Tensor:
    return 300.0 * (points.abs() < torch.tensor([0.4, 0.3, 0.2])).all(-1)


def torus(points: Tensor) -> Tensor:
    ring = torch.stack([points[:, [0, 2]].norm(dim=-1) - 0.35, points[:, 1]], -1)
    return 300.0 * (ring.norm(dim=-1) < 0.12)


def ball(points: Tensor, centre: tuple[float, float, float], radius: float) -> Tensor:
    return 200.0 * ((points - torch.tensor(centre)).norm(dim=-1) < radius)


def smooth_noise(seed: int) -> Callable[[Tensor], Tensor]:
    """A random field of many bumps: what decimation finds hard."""
    generator = torch.Generator().manual_seed(seed)
    waves = torch.randn(12, 3, generator=generator) * 9
    phases = torch.rand(12, generator=generator) * 6.3

    def density(points: Tensor) -> Tensor:
        bumps = torch.sin(points @ waves.T + phases).sum(-1)
        return 50.0 * torch.sigmoid(3 * bumps) * (points.norm(dim=-1) < 0.7)

    return density


@pytest.mark.parametrize(
    ("density", "volume", "extent"),
    [
        (hard_sphere, 4 / 3 * math.pi * 0.4**3, (0.8, 0.8, 0.8)),
        (hard_box, 8 * 0.4 * 0.3 * 0.2, (0.8, 0.6, 0.4)),
        (torus, 2 * math.pi**2 * 0.35 * 0.12**2, (0.94, 0.24, 0.94)),
    ],
)
def test_solids_have_the_right_volume_and_look_outward(
    density: Callable[[Tensor], Tensor], volume: float, extent: tuple[float, float, float]
) -> None:
    surface = extract_surface(density, 1.0, 72, max_triangles=4000)
    mesh = trimesh.Trimesh(surface.vertices, surface.faces, process=True)
    assert mesh.is_watertight and mesh.is_winding_consistent
    assert surface.report["closed"] and surface.report["open_edges"] == 0
    assert mesh.volume == pytest.approx(volume, rel=0.08)
    assert mesh.volume == pytest.approx(surface.report["volume"], rel=1e-3)
    np.testing.assert_allclose(np.ptp(surface.vertices, axis=0), extent, atol=2.5 * surface.report["spacing"])
    assert surface.vertices.dtype == np.float32 and surface.faces.dtype == np.int64


def test_the_torus_keeps_its_hole() -> None:
    surface = extract_surface(torus, 1.0, 64, max_triangles=2000)
    assert trimesh.Trimesh(surface.vertices, surface.faces).euler_number == 0


@pytest.mark.parametrize("budget", [400, 1500, 6000])
def test_the_budget_is_used_and_kept(budget: int) -> None:
    surface = extract_surface(edged_sphere, 1.0, 64, max_triangles=budget)
    assert 0.98 * budget <= len(surface.faces) <= budget


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [800, 5000])
def test_rough_fields_stay_closed_after_decimation(seed: int, budget: int) -> None:
    surface = extract_surface(smooth_noise(seed), 1.0, 48, max_triangles=budget)
    mesh = trimesh.Trimesh(surface.vertices, surface.faces, process=True)
    assert mesh.is_watertight and mesh.is_winding_consistent and mesh.volume > 0
    assert mesh.area_faces.min() > 0
    assert len(surface.faces) <= budget


def test_a_soft_blob_is_cut_where_it_renders_half_opaque() -> None:
    """A ray at distance r has optical depth 40 s sqrt(2 pi) exp(-r^2 / 2 s^2), s = 0.2: ln 2 at r = 0.519."""
    surface = extract_surface(soft_blob, 1.0, 64)
    radius = np.linalg.norm(surface.vertices, axis=1)
    assert radius.mean() == pytest.approx(0.519, abs=0.025)
    assert radius.std() < 0.005


@pytest.mark.parametrize("resolution", [48, 96])
def test_a_sharp_object_is_cut_in_the_middle_of_its_step(resolution: int) -> None:
    surface = extract_surface(hard_sphere, 1.0, resolution, smoothing_iterations=0)
    radius = np.linalg.norm(surface.vertices, axis=1)
    assert radius.mean() == pytest.approx(0.4, abs=0.2 * surface.report["spacing"])
    assert surface.report["silhouette_agreement"] > 0.99


@pytest.mark.parametrize("turn_deg", [0.0, 30.0])
def test_thin_plates_survive(turn_deg: float) -> None:
    cos, sin = math.cos(math.radians(turn_deg)), math.sin(math.radians(turn_deg))

    def plate(points: Tensor) -> Tensor:
        across = cos * points[:, 1] + sin * points[:, 2]
        along = cos * points[:, 2] - sin * points[:, 1]
        return 300.0 * ((points[:, 0].abs() < 0.4) & (across.abs() < 0.015) & (along.abs() < 0.4))

    surface = extract_surface(plate, 1.0, 96)
    assert surface.report["closed"] and surface.report["components_found"] == 1
    # three grid nodes thick: the number of nodes inside is the precision there is
    assert surface.report["volume"] == pytest.approx(0.8 * 0.8 * 0.03, rel=0.4)


def test_fog_is_left_out() -> None:
    """A haze that renders 86 % opaque over the whole box must not become a cube."""
    surface = extract_surface(lambda points: edged_sphere(points) + 1.0, 1.0, 64)
    assert surface.report["fog_density"] == pytest.approx(1.0, abs=0.01)
    assert np.linalg.norm(surface.vertices, axis=1).max() < 0.46
    speckled = extract_surface(
        lambda points: edged_sphere(points) + torch.sin(300 * points[:, 0]).abs() + 0.2, 1.0, 64
    )
    assert np.linalg.norm(speckled.vertices, axis=1).max() < 0.46


def test_fog_in_a_ball_around_the_object_is_left_out() -> None:
    surface = extract_surface(
        lambda points: edged_sphere(points) + 1.0 * (points.norm(dim=-1) < 0.9), 1.0, 64
    )
    assert np.linalg.norm(surface.vertices, axis=1).max() < 0.46


def test_floaters_go_and_large_parts_stay() -> None:
    def density(points: Tensor) -> Tensor:
        speck = ball(points, (0.7, 0.7, 0.7), 0.06) + ball(points, (-0.8, 0.0, 0.1), 0.05)
        return hard_sphere(points) + speck + ball(points, (0.0, 0.75, 0.0), 0.2)

    surface = extract_surface(density, 1.0, 96)
    assert surface.report["floaters_removed"] == 2
    assert 0 < surface.report["floater_area_fraction"] < 0.05
    assert surface.report["components_found"] == 4
    assert surface.vertices[:, 0].max() < 0.45
    assert surface.vertices[:, 1].max() == pytest.approx(0.95, abs=0.03)


def block(points: Tensor, centre: tuple[float, float, float], half: tuple[float, float, float]) -> Tensor:
    return 200.0 * ((points - torch.tensor(centre)).abs() < torch.tensor(half)).all(-1)


def chair(leg_width: float, joint: float = 0.0) -> Callable[[Tensor], Tensor]:
    """Seat, back and four legs half a unit long, inside the unit box; the legs end `joint` below the seat."""

    def density(points: Tensor) -> Tensor:
        # off the grid's planes, so that no width is a lucky one
        points = points - torch.tensor([0.004, 0.002, -0.004])
        parts = [
            block(points, (0, 0, 0), (0.25, 0.02, 0.25)),
            block(points, (0, 0.25, -0.23), (0.25, 0.25, 0.02)),
        ]
        for x in (-0.22, 0.22):
            for z in (-0.22, 0.22):
                half = (leg_width / 2, 0.25 - joint / 2, leg_width / 2)
                parts.append(block(points, (x, -0.25 - joint / 2 - 0.02 * (joint > 0), z), half))
        return torch.stack(parts).amax(0)

    return density


def num_legs(surface: Surface, height: float) -> int:
    """Pieces of the surface in the plane Y = `height`: the faces that it cuts, joined by their vertices."""
    y = surface.vertices[surface.faces][..., 1]
    cut = surface.faces[(y.min(axis=1) <= height) & (y.max(axis=1) >= height)]
    return component_labels(cut, len(surface.vertices))[0]


@pytest.mark.parametrize(
    ("leg_width", "resolution", "budget"),
    [(0.03, 128, 30_000), (0.03, 96, 5000), (0.02, 96, 5000), (0.015, 128, 30_000)],
)
def test_thin_legs_survive(leg_width: float, resolution: int, budget: int) -> None:
    surface = extract_surface(chair(leg_width), 0.6, resolution, max_triangles=budget)
    assert surface.report["closed"] and surface.report["components_found"] == 1
    assert len(surface.faces) <= budget
    assert [num_legs(surface, height) for height in (-0.1, -0.25, -0.4, -0.48)] == [4, 4, 4, 4]


def test_legs_that_lost_their_joints_stay_and_lumps_go() -> None:
    """A leg has 3 per cent of the area of seat and back, a lump 1.4; but the legs are long."""

    def density(points: Tensor) -> Tensor:
        lumps = [ball(points, (x, 0.4, 0.4), 0.035) for x in (-0.4, 0.0, 0.4)]
        return torch.stack([chair(0.02, joint=0.03)(points), *lumps]).amax(0)

    surface = extract_surface(density, 0.6, 128)
    assert surface.report["components_found"] == 8 and surface.report["floaters_removed"] == 3
    assert num_legs(surface, -0.3) == 4
    assert surface.vertices[:, 2].max() < 0.3


def test_a_lump_of_a_hundredth_of_the_volume_goes_and_a_second_object_stays() -> None:
    """Beside a compact object the lump has more of the area: 4.3 per cent at 0.9 per cent of the volume."""

    def density(points: Tensor) -> Tensor:
        pair = ball(points, (-0.3, 0.0, 0.0), 0.2) + ball(points, (0.3, 0.0, 0.0), 0.15)
        return pair + ball(points, (0.0, 0.45, 0.0), 0.2 * 0.009 ** (1 / 3))

    surface = extract_surface(density, 0.6, 128)
    assert surface.report["components_found"] == 3 and surface.report["floaters_removed"] == 1
    assert surface.vertices[:, 1].max() < 0.21
    assert surface.report["volume"] == pytest.approx(4 / 3 * math.pi * (0.2**3 + 0.15**3), rel=0.03)


def test_cavities_are_filled_on_request() -> None:
    def hollow(points: Tensor) -> Tensor:
        return hard_sphere(points) * (points.norm(dim=-1) > 0.3) + ball(points, (0.0, 0.0, 0.0), 0.1)

    filled = extract_surface(hollow, 1.0, 64)
    assert filled.report["volume"] == pytest.approx(4 / 3 * math.pi * 0.4**3, rel=0.05)
    assert filled.report["cavities_removed"] == 1 and filled.report["components_found"] == 1
    kept = extract_surface(hollow, 1.0, 64, fill_cavities=False)
    assert kept.report["components_found"] == 3
    assert kept.report["volume"] < 0.8 * filled.report["volume"]


def test_what_touches_the_border_is_closed_there() -> None:
    surface = extract_surface(lambda points: torch.full((len(points),), 50.0), 0.5, 32)
    assert surface.report["closed"]
    assert surface.report["volume"] == pytest.approx(1.0, rel=0.1)


def test_a_given_level_is_used() -> None:
    surface = extract_surface(soft_blob, 1.0, 64, iso_level=40.0 * math.exp(-0.5), smoothing_iterations=0)
    assert surface.iso_level == pytest.approx(40.0 * math.exp(-0.5))
    assert np.linalg.norm(surface.vertices, axis=1).mean() == pytest.approx(0.2, abs=0.005)


def test_rendered_opacity_chooses_the_level() -> None:
    """Views that show a disc of radius 0.3 have the blob cut there, and not where it is half opaque."""
    cameras = ring_cameras(3)
    origins, directions = cameras.rays(48, 48)
    distance = torch.linalg.cross(origins, directions).norm(dim=-1)
    opacity = (distance < 0.3).float()[:, None]
    score = silhouette_score(soft_blob, 1.0, cameras, opacity)
    assert score(40.0 * math.exp(-(0.3**2) / 0.08)) > 0.95
    assert score(1.0) < 0.5 and score(100.0) == 0.0
    surface = extract_surface(soft_blob, 1.0, 64, level_score=score)
    assert surface.report["iso_rule"] == "caller's score"
    assert np.linalg.norm(surface.vertices, axis=1).mean() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize(
    "density",
    [lambda p: torch.zeros(len(p)), lambda p: torch.full((len(p),), 0.05), lambda p: 0.4 * soft_blob(p) / 40],
    ids=["nothing", "haze", "ghost"],
)
def test_an_empty_field_says_what_to_do(density: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(EmptySurfaceError, match="no surface to extract.*train for more steps"):
        extract_surface(density, 1.0, 32)


def test_a_level_that_is_too_high_is_named() -> None:
    with pytest.raises(EmptySurfaceError, match="500"):
        extract_surface(hard_sphere, 1.0, 32, iso_level=500.0)


def test_densities_that_are_not_finite_are_refused() -> None:
    with pytest.raises(Uni3DError, match="not finite"):
        extract_surface(lambda points: hard_sphere(points) / 0.0 * 0.0, 1.0, 32)


@pytest.mark.parametrize(
    "arguments", [{"resolution": 8}, {"max_triangles": 10}, {"iso_level": -1.0}, {"iso_level": math.nan}]
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        extract_surface(hard_sphere, 1.0, **({"resolution": 32} | arguments))  # type: ignore[arg-type]


def test_the_result_is_the_same_every_time() -> None:
    first, second = (extract_surface(torus, 1.0, 48, max_triangles=1000) for _ in range(2))
    np.testing.assert_array_equal(first.vertices, second.vertices)
    np.testing.assert_array_equal(first.faces, second.faces)


def test_chunks_do_not_matter() -> None:
    whole = extract_surface(torus, 1.0, 40)
    pieces = extract_surface(torus, 1.0, 40, chunk_size=1000)
    np.testing.assert_array_equal(whole.vertices, pieces.vertices)
