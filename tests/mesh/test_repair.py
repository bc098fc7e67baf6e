"""Meshes made elsewhere become manifold, outward and centred; their colours and their place are kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import trimesh

from uni3d.errors import UsageError
from uni3d.mesh.base_colour import colour_at
from uni3d.mesh.orientation import consistent_winding, non_manifold_edges, oriented_outward, side_votes
from uni3d.mesh.renderable import Material, RenderableMesh
from uni3d.mesh.repair import Placement, prepare_for_refine
from uni3d.mesh.surface import open_edge_count, signed_volumes


def as_soup(*meshes: trimesh.Trimesh, **changes: object) -> RenderableMesh:
    """Meshes as a file's reader hands them over: three vertices per face, the position as vertex colour."""
    corners = np.concatenate([mesh.triangles for mesh in meshes]).astype(np.float32)
    colour = np.concatenate([0.5 + 0.1 * corners, np.ones((*corners.shape[:2], 1), np.float32)], axis=2)
    soup = RenderableMesh(
        vertices=corners.reshape(-1, 3),
        faces=np.arange(3 * len(corners)).reshape(-1, 3),
        corner_normals=None,
        corner_uv=None,
        corner_colour=colour,
        face_material=np.zeros(len(corners), np.int64),
        materials=[Material(np.ones(4, np.float32))],
    )
    return replace(soup, **changes)


def box(extents: tuple[float, ...] = (1, 2, 3), at: tuple[float, ...] = (0, 0, 0)) -> trimesh.Trimesh:
    return trimesh.creation.box(extents).apply_translation(at)


def turned_at_random(mesh: RenderableMesh) -> RenderableMesh:
    is_turned = np.random.default_rng(0).random(len(mesh.faces)) < 0.5
    colour = mesh.corner_colour
    assert colour is not None
    return replace(
        mesh,
        faces=np.where(is_turned[:, None], mesh.faces[:, ::-1], mesh.faces),
        corner_colour=np.where(is_turned[:, None, None], colour[:, ::-1], colour),
    )


def test_a_soup_wound_at_random_becomes_a_solid() -> None:
    sphere = trimesh.creation.icosphere(subdivisions=3)
    prepared = prepare_for_refine(turned_at_random(as_soup(sphere)))
    mesh = prepared.mesh
    assert len(mesh.vertices) == len(sphere.vertices) and len(mesh.faces) == len(sphere.faces)
    assert open_edge_count(mesh.faces) == 0 and prepared.report["components"] == 1
    assert signed_volumes(mesh.vertices, mesh.faces).sum() == pytest.approx(sphere.volume / 8, rel=1e-4)


def test_colours_and_places_come_along() -> None:
    """The colour of a point says where it was, whatever was turned, merged, cut and scaled."""
    touching = as_soup(box((1, 1, 1), (10, 10, 10)), box((1, 1, 1), (11, 11, 10)))
    touching = replace(touching, corner_colour=touching.corner_colour - np.float32([1, 1, 1, 0]))
    prepared = prepare_for_refine(turned_at_random(touching), longest_side=1.5)
    random = np.random.default_rng(1)
    face, weights = random.integers(0, len(prepared.mesh.faces), 500), random.dirichlet((1, 1, 1), 500)
    points = np.einsum("nk,nkc->nc", weights, prepared.mesh.vertices[prepared.mesh.faces[face]])
    original = prepared.placement.out_of_scene(points)
    np.testing.assert_allclose(colour_at(prepared.mesh, face, weights), 0.1 * original - 0.5, atol=1e-3)
    assert np.ptp(prepared.mesh.vertices, axis=0).max() == pytest.approx(1.5, abs=1e-5)
    np.testing.assert_allclose(original.mean(axis=0), (10.5, 10.5, 10), atol=0.15)


def test_boxes_that_share_an_edge_are_taken_apart() -> None:
    prepared = prepare_for_refine(as_soup(box((1, 1, 1)), box((1, 1, 1), (1, 1, 0))))
    assert prepared.report["non_manifold_edges"] == 1 and prepared.report["faces_added"] == 2
    assert prepared.report["open_edges"] == 0 and non_manifold_edges(prepared.mesh.faces) == 0
    assert prepared.report["components"] == 2


def test_a_fin_on_a_surface_is_cut_off_as_a_sheet() -> None:
    """Three faces on one edge: two go on as a surface, the third has a border there."""
    square = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0.5, 0.5, 1]], float)
    fan = trimesh.Trimesh(square, [[0, 1, 2], [0, 2, 3], [0, 2, 4]], process=False)
    prepared = prepare_for_refine(as_soup(fan))
    assert prepared.report["non_manifold_edges"] == 1 and non_manifold_edges(prepared.mesh.faces) == 0
    assert len(prepared.mesh.faces) == 3


def test_an_open_box_inside_out_is_turned() -> None:
    open_box = box().submesh([range(10)], append=True)
    inside_out = as_soup(open_box, faces=as_soup(open_box).faces[:, ::-1])
    prepared = prepare_for_refine(inside_out)
    assert prepared.report["faces_turned"] == 10 and prepared.report["open_edges"] == 4
    front, back = side_votes(prepared.mesh.vertices, prepared.mesh.faces)
    assert front.sum() > 2 * back.sum(), "the inside is seen through the open side alone"


def test_one_of_two_bodies_inside_out_is_turned() -> None:
    """Their common volume is positive, so the sign of a sum would not tell."""
    small = box((1, 1, 1), (3, 0, 0))
    small.invert()
    prepared = prepare_for_refine(as_soup(box(), small))
    assert prepared.report["faces_turned"] == 12
    _, turned = oriented_outward(prepared.mesh.vertices, prepared.mesh.faces)
    assert not turned.any()


def test_the_wall_of_a_cavity_stays() -> None:
    wall = box((0.5, 1, 1.5))
    wall.invert()
    prepared = prepare_for_refine(as_soup(box(), wall))
    assert prepared.report["faces_turned"] == 0 and prepared.report["components"] == 2


def test_sheets_that_were_made_two_sided_keep_one_side() -> None:
    sheet = as_soup(trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2], [2, 1, 0]], process=False))
    prepared = prepare_for_refine(sheet)
    assert len(prepared.mesh.faces) == 1 and prepared.report["faces_dropped"] == 1


def test_a_moebius_strip_is_left_alone() -> None:
    turn = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    inner = np.stack([np.cos(turn), np.sin(turn), 0 * turn], axis=1) * (1 - 0.3 * np.cos(turn / 2))[:, None]
    outer = np.stack([np.cos(turn), np.sin(turn), 0 * turn], axis=1) * (1 + 0.3 * np.cos(turn / 2))[:, None]
    inner[:, 2], outer[:, 2] = -0.3 * np.sin(turn / 2), 0.3 * np.sin(turn / 2)
    step = np.arange(20)
    quads = np.stack([step, step + 1, step + 21, step + 20], axis=1)
    quads[-1] = [19, 20, 0, 39]  # the strip closes with its sides exchanged
    faces = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    turned, patch = consistent_winding(faces)
    assert not turned.any() and patch.max() == 0
    strip = as_soup(trimesh.Trimesh(np.concatenate([inner, outer]), faces, process=False))
    assert non_manifold_edges(prepare_for_refine(strip).mesh.faces) == 0


def test_placements_go_there_and_back() -> None:
    soup = as_soup(box((2, 4, 8), (1000, -20, 3)))
    placement = Placement.of(soup, longest_side=2.0)
    assert placement.centre == pytest.approx((1000, -20, 3)) and placement.scale == pytest.approx(4)
    inside = placement.into_scene(soup.vertices)
    np.testing.assert_allclose(np.abs(inside).max(axis=0), (0.25, 0.5, 1), atol=1e-6)
    np.testing.assert_allclose(placement.out_of_scene(inside), soup.vertices, rtol=1e-6)
    with pytest.raises(UsageError, match="no finite extent"):
        Placement.of(replace(soup, vertices=soup.vertices * 0))
