"""Operations on triangle surfaces, each against a shape whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh

from uni3d.mesh.manifold import separate_pinches
from uni3d.mesh.surface import (
    component_labels,
    open_edge_count,
    remove_degenerate_faces,
    signed_volumes,
    taubin_smooth,
    vertex_normals,
)


def two_boxes(shift: tuple[float, float, float]) -> trimesh.Trimesh:
    """Two unit boxes, the second one shifted, with common corners merged."""
    both = trimesh.util.concatenate([trimesh.creation.box(), trimesh.creation.box().apply_translation(shift)])
    both.merge_vertices()
    return both


@pytest.mark.parametrize("shift", [(1.0, 1.0, 0.0), (1.0, 1.0, 1.0), (-1.0, 0.0, 1.0)])
def test_boxes_that_touch_in_an_edge_or_a_corner_are_separated(shift: tuple[float, float, float]) -> None:
    boxes = two_boxes(shift)
    vertices, faces = separate_pinches(boxes.vertices.view(np.ndarray), boxes.faces.view(np.ndarray))
    assert open_edge_count(faces) == 0
    merged = trimesh.Trimesh(vertices, faces, process=True)
    assert merged.is_watertight and merged.is_winding_consistent
    assert merged.volume == pytest.approx(2.0, rel=1e-2)
    assert component_labels(faces, len(vertices))[0] == 2


def test_a_pinched_edge_counts_as_open_before() -> None:
    boxes = two_boxes((1.0, 1.0, 0.0))
    assert open_edge_count(boxes.faces.view(np.ndarray)) > 0
    assert not boxes.is_watertight


def test_a_sound_surface_is_left_alone() -> None:
    sphere = trimesh.creation.icosphere(subdivisions=2)
    vertices, faces = separate_pinches(sphere.vertices.view(np.ndarray), sphere.faces.view(np.ndarray))
    np.testing.assert_array_equal(vertices, sphere.vertices)
    np.testing.assert_array_equal(faces, sphere.faces)


def test_open_edges_are_counted() -> None:
    faces = trimesh.creation.box().faces.view(np.ndarray)
    assert open_edge_count(faces) == 0
    assert open_edge_count(faces[1:]) == 3
    turned = faces.copy()
    turned[0] = turned[0, ::-1]
    assert open_edge_count(turned) > 0


def test_volume_has_the_sign_of_the_orientation() -> None:
    box = trimesh.creation.box(extents=(1, 2, 3))
    vertices, faces = box.vertices.view(np.ndarray), box.faces.view(np.ndarray)
    assert signed_volumes(vertices + 5.0, faces).sum() == pytest.approx(6.0)
    assert signed_volumes(vertices + 5.0, faces[:, ::-1]).sum() == pytest.approx(-6.0)


def test_normals_do_not_depend_on_how_a_side_is_cut() -> None:
    box = trimesh.creation.box()
    normals = vertex_normals(box.vertices.view(np.ndarray), box.faces.view(np.ndarray))
    np.testing.assert_allclose(normals, np.sign(box.vertices) / np.sqrt(3), atol=1e-6)
    sphere = trimesh.creation.icosphere(subdivisions=3)
    smooth = vertex_normals(sphere.vertices.view(np.ndarray), sphere.faces.view(np.ndarray))
    np.testing.assert_allclose(smooth, sphere.vertices, atol=0.01)


def test_smoothing_takes_noise_away_and_leaves_the_size() -> None:
    sphere = trimesh.creation.icosphere(subdivisions=4)
    vertices, faces = sphere.vertices.view(np.ndarray), sphere.faces.view(np.ndarray)
    noise = np.random.default_rng(0).normal(0, 0.01, (len(vertices), 1))
    smooth = taubin_smooth(vertices * (1 + noise), faces, 10)
    radius = np.linalg.norm(smooth, axis=1)
    assert radius.std() < 0.5 * 0.01
    assert radius.mean() == pytest.approx(1.0, abs=0.005)


def test_slivers_are_collapsed_without_a_crack() -> None:
    sphere = trimesh.creation.icosphere(subdivisions=2)
    vertices, faces = sphere.vertices.view(np.ndarray).copy(), sphere.faces.view(np.ndarray)
    start, end = faces[0, 0], faces[0, 1]
    vertices[end] = vertices[start] + 1e-13
    cleaned, left = remove_degenerate_faces(vertices, faces)
    assert len(left) == len(faces) - 2
    assert open_edge_count(left) == 0
    assert trimesh.Trimesh(cleaned, left).area_faces.min() > 1e-6


def test_fins_are_removed() -> None:
    box = trimesh.creation.box()
    vertices = np.concatenate([box.vertices, [[2.0, 0.0, 0.0]]])
    fin = np.array([[0, 1, 8], [1, 0, 8]])
    faces = np.concatenate([box.faces, fin])
    cleaned, left = remove_degenerate_faces(vertices, faces)
    assert len(left) == 12 and len(cleaned) == 8
