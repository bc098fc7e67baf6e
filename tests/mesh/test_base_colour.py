"""Colours of points on a surface: material, texture and vertex colours, as the ray caster shows them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from uni3d.mesh.base_colour import BaseColour, colour_at
from uni3d.mesh.raycaster import Raycaster
from uni3d.mesh.renderable import Material, RenderableMesh
from uni3d.scene.camera import Cameras


@pytest.fixture
def two_squares() -> RenderableMesh:
    """A plain orange square on the left, and on the right one with a ramp from black to white downwards."""
    corners = np.array([[-1, 0, 0], [0, 0, 0], [0, 1, 0], [-1, 1, 0]], np.float32)
    uv = np.array([[0, 1], [1, 1], [1, 0], [0, 0]], np.float32)
    square = np.array([[0, 1, 2], [0, 2, 3]])
    ramp = np.ones((256, 4, 4), np.float32)
    ramp[..., :3] = ((np.arange(256) + 0.5) / 256)[:, None, None]
    return RenderableMesh(
        vertices=np.concatenate([corners, corners + np.float32([1, 0, 0])]),
        faces=np.concatenate([square, square + 4]),
        corner_normals=None,
        corner_uv=np.concatenate([uv[square]] * 2),
        corner_colour=None,
        face_material=np.array([0, 0, 1, 1]),
        materials=[Material(np.array([1, 0.5, 0, 1], np.float32)), Material(np.ones(4, np.float32), ramp)],
    )


def test_plain_and_textured_materials(two_squares: RenderableMesh) -> None:
    random = np.random.default_rng(0)
    face, weights = random.integers(0, 4, 500), random.dirichlet((1, 1, 1), 500)
    points = np.einsum("nk,nkc->nc", weights, two_squares.vertices[two_squares.faces[face]])
    colours = colour_at(two_squares, face, weights)
    assert colours.shape == (500, 3) and colours.dtype == np.float32
    np.testing.assert_allclose(colours[face < 2], [[1, 0.5, 0]] * int(np.sum(face < 2)), atol=1e-6)
    inside = (face >= 2) & (abs(points[:, 1] - 0.5) < 0.49)
    np.testing.assert_allclose(colours[inside], np.repeat(1 - points[inside, 1:2], 3, axis=1), atol=1e-3)


def test_vertex_colours_multiply(two_squares: RenderableMesh) -> None:
    corner_colour = np.ones((4, 3, 4), np.float32)
    corner_colour[0, 0, :3] = 0.0
    tinted = replace(two_squares, corner_colour=corner_colour)
    colours = colour_at(tinted, np.zeros(3, np.int64), np.array([[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0]]))
    np.testing.assert_allclose(colours, [[0, 0, 0], [1, 0.5, 0], [0.5, 0.25, 0]], atol=1e-6)


def test_the_ray_caster_shows_these_colours(two_squares: RenderableMesh) -> None:
    """One ray per pixel, and the textured square nearly filling the picture: no footprint to average over."""
    view = Raycaster(two_squares).render(Cameras.from_lists([0.0], [0.0]), 64, supersample=1)
    column = (view.hit_pixel % 64 + 0.5) / 32 - 1
    assert set(view.hit_face.tolist()) == {0, 1, 2, 3}
    left = column < -0.05
    np.testing.assert_allclose(view.hit_albedo[left], [[1, 0.5, 0]] * int(left.sum()), atol=1e-6)


def test_a_footprint_averages(two_squares: RenderableMesh) -> None:
    colours = BaseColour(two_squares)
    face, corner = np.array([2]), np.array([[0.02, 0.96, 0.02]])
    assert colours.at(face, corner)[0, 0] == pytest.approx(0.98, abs=0.01)
    assert colours.at(face, corner, footprint=2.0)[0, 0] == pytest.approx(0.5, abs=0.2)


def test_the_lowest_alpha_is_found(two_squares: RenderableMesh) -> None:
    assert BaseColour(two_squares).lowest_alpha() == 1.0
    texture = two_squares.materials[1].texture
    assert texture is not None
    texture[3, 2, 3] = 0.25
    assert BaseColour(two_squares).lowest_alpha() == 0.25
