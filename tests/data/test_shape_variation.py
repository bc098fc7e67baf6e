"""Changes of shape: what a random map does to vertices, normals and flat faces, and on average."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh

from uni3d.data.shape_variation import ShapeChange, sample_shape_change
from uni3d.mesh.renderable import Material, RenderableMesh, unit_vectors

DEVIATIONS = {"scale_deviation": 0.2, "taper_deviation": 0.2, "lean_deviation": 0.06}


def ball() -> RenderableMesh:
    sphere = trimesh.creation.icosphere(subdivisions=4)
    vertices = sphere.vertices.astype(np.float32) / 2
    faces = sphere.faces.astype(np.int64)
    return RenderableMesh(
        vertices=vertices,
        faces=faces,
        corner_normals=unit_vectors(vertices[faces]).astype(np.float32),
        corner_uv=None,
        corner_colour=None,
        face_material=np.zeros(len(faces), dtype=np.int64),
        materials=[Material(np.ones(4, dtype=np.float32))],
    )


def changes(num: int) -> list[ShapeChange]:
    rng = np.random.default_rng(0)
    return [sample_shape_change(rng, **DEVIATIONS) for _ in range(num)]


def test_no_change_changes_nothing() -> None:
    mesh = ball().in_unit_box()
    same = ShapeChange(np.eye(3), np.zeros(3)).apply(mesh)
    np.testing.assert_allclose(same.vertices, mesh.vertices, atol=1e-6)
    assert same.corner_normals is not None and mesh.corner_normals is not None
    np.testing.assert_allclose(same.corner_normals, mesh.corner_normals, atol=1e-6)


def test_normals_stay_unit_and_on_the_surface_pointing_outwards() -> None:
    for change in changes(20):
        mesh = change.apply(ball())
        assert mesh.corner_normals is not None
        np.testing.assert_allclose(np.linalg.norm(mesh.corner_normals, axis=-1), 1, atol=1e-5)
        corners = mesh.vertices[mesh.faces]
        flat = unit_vectors(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]))
        middle = unit_vectors(mesh.corner_normals.mean(axis=1))
        assert np.einsum("fc,fc->f", flat, middle).min() > 0.999
        assert np.einsum("fc,fc->f", flat, corners.mean(axis=1)).min() > 0


def test_the_result_fills_the_unit_box_again() -> None:
    for change in changes(5):
        vertices = change.apply(ball()).vertices
        low, high = vertices.min(axis=0), vertices.max(axis=0)
        assert vertices.dtype == np.float32
        assert (high - low).max() == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(low + high, 0, atol=1e-5)


def test_what_is_flat_stays_flat() -> None:
    grid = np.stack(np.meshgrid([0.5], np.linspace(-0.5, 0.5, 5), np.linspace(-0.5, 0.5, 5)), axis=-1)
    wall = (grid.reshape(-1, 3) @ np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]) * 0.6
    for change in changes(5):
        moved = wall @ change.matrix.T / (1 + wall @ change.taper)[:, None]
        assert np.linalg.svd(moved - moved.mean(axis=0))[1][2] < 1e-6


def test_a_map_neither_turns_nor_favours_a_side() -> None:
    drawn = changes(4000)
    matrices = np.array([change.matrix for change in drawn])
    tapers = np.array([change.taper for change in drawn])
    assert (np.linalg.det(matrices) > 0).all()
    assert np.abs(tapers).sum(axis=1).max() < 2
    for row, column in ((0, 2), (2, 0), (1, 0), (1, 2)):
        assert (matrices[:, row, column] == 0).all()
    for values in (matrices[:, 0, 1], matrices[:, 2, 1], np.log(matrices[:, 0, 0]), *tapers.T):
        assert abs(values.mean()) < 4 * values.std() / len(drawn) ** 0.5
    assert np.log(matrices[:, 1, 1]).std() == pytest.approx(0.2, rel=0.1)


def test_the_same_generator_draws_the_same_changes() -> None:
    for one, two in zip(changes(3), changes(3), strict=True):
        np.testing.assert_array_equal(one.matrix, two.matrix)
        np.testing.assert_array_equal(one.taper, two.taper)
