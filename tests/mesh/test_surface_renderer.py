"""What the mesh stages show a teacher: the same as the ray caster, in colour, under a light, as normals."""

from __future__ import annotations

import numpy as np
import torch
import trimesh
from torch import Tensor

from uni3d.mesh.raycaster import Light
from uni3d.mesh.surface import Surface
from uni3d.mesh.surface_renderer import SurfaceRenderer, sample_lights, shade
from uni3d.mesh.texture import bake_surface_colours
from uni3d.mesh.turntable import render_mesh
from uni3d.scene.camera import ring_cameras

BALL = trimesh.creation.icosphere(3, 0.4)
SURFACE = Surface(BALL.vertices.astype(np.float32), BALL.faces.astype(np.int64), 0.0)
VERTICES, FACES = torch.from_numpy(SURFACE.vertices), torch.from_numpy(SURFACE.faces)


def _position_colour(points: Tensor, face: Tensor, barycentric: Tensor) -> Tensor:
    return (points + 0.5).clamp(0, 1)


def test_the_baked_mesh_shows_what_was_rendered() -> None:
    cameras = ring_cameras(3)
    drawn = SurfaceRenderer(VERTICES, FACES).render(cameras, 64, 0.5, colour=_position_colour, supersample=2)
    baked = bake_surface_colours(SURFACE, _position_colour, 128, unwrap_method="projection")
    expected, alpha = render_mesh(baked, cameras, 64, background=0.5)
    error = float(((drawn.image.permute(0, 2, 3, 1).numpy() - expected) ** 2).mean())
    assert -10 * np.log10(error) > 35.0
    assert np.abs(drawn.opacity[:, 0].numpy() - alpha).mean() < 0.005


def test_colours_know_their_face() -> None:
    by_face = torch.rand(len(FACES), 3)

    def colour(points: Tensor, face: Tensor, barycentric: Tensor) -> Tensor:
        corners = VERTICES[FACES[face]]
        torch.testing.assert_close((barycentric[..., None] * corners).sum(dim=1), points, atol=1e-4, rtol=0)
        return by_face[face]

    SurfaceRenderer(VERTICES, FACES).render(ring_cameras(2), 32, 0.0, colour=colour)
    bake_surface_colours(SURFACE, colour, 64, unwrap_method="projection")


def test_normals_of_a_ball_are_its_directions() -> None:
    cameras = ring_cameras(1, elevation_deg=0.0)
    drawn = SurfaceRenderer(VERTICES, FACES).render(cameras, 33, 0.0, colour=_position_colour, view="normals")
    middle = drawn.image[0, :, 16, 16] * 2 - 1
    torch.testing.assert_close(middle, torch.tensor([0.0, 0.0, 1.0]), atol=0.05, rtol=0)


def test_a_light_darkens_by_its_shade() -> None:
    light = Light(sky=0.5, ground=0.5, key=0.0)
    cameras, renderer = ring_cameras(1), SurfaceRenderer(VERTICES, FACES)
    plain = renderer.render(cameras, 32, 0.0, colour=_position_colour).image
    lit = renderer.render(cameras, 32, 0.0, colour=_position_colour, view="shaded", lights=[light]).image
    torch.testing.assert_close(lit, 0.5 * plain, atol=1e-5, rtol=0)


def test_a_larger_ball_covers_more_by_as_much_as_its_gradient_says() -> None:
    cameras = ring_cameras(1)

    def area(scale: Tensor) -> Tensor:
        return (
            SurfaceRenderer(VERTICES * scale, FACES)
            .render(cameras, 48, 0.0, colour=_position_colour)
            .opacity.sum()
        )

    scale = torch.tensor(1.0, requires_grad=True)
    area(scale).backward()
    assert scale.grad is not None
    with torch.no_grad():
        slope = float(area(torch.tensor(1.05)) - area(torch.tensor(0.95))) / 0.1
    assert abs(float(scale.grad) - slope) < 0.1 * slope


def test_learning_under_lights_takes_the_light_out_of_the_colours() -> None:
    """A grey object, fitted without a light and under other lights of the same kind as in its pictures: the
    second leaves less of the light in the colours."""
    normals = torch.nn.functional.normalize(torch.randn(400, 3), dim=1)
    generator = torch.Generator().manual_seed(0)
    shades = [
        torch.stack([shade(normals, light)[:, 0] for light in sample_lights(200, generator=generator)])
        for _ in range(2)
    ]
    pictures, own = 0.5 * shades[0], shades[1]
    # least squares over all pairs of a picture and an own light
    without_light = pictures.mean(dim=0)
    under_lights = pictures.mean(dim=0) * own.mean(dim=0) / own.square().mean(dim=0)
    spread = [float(colour.std() / colour.mean()) for colour in (without_light, under_lights)]
    assert spread[1] < 0.2 * spread[0]
    assert abs(float(under_lights.mean()) - 0.5) < 0.02
