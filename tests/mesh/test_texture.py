"""Atlases and baking: no overlaps, no seams, no background, whichever way the surface was unwrapped."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor

from uni3d.errors import Uni3DError, UsageError
from uni3d.mesh import texture as texture_module
from uni3d.mesh import unwrap as unwrap_module
from uni3d.mesh.atlas_raster import overlapping_faces, rasterise
from uni3d.mesh.extraction import extract_surface
from uni3d.mesh.raycaster import Raycaster
from uni3d.mesh.renderable import Material
from uni3d.mesh.report import mesh_report
from uni3d.mesh.surface import Surface
from uni3d.mesh.texture import bake_texture
from uni3d.mesh.textured_mesh import TexturedMesh
from uni3d.mesh.unwrap import unwrap
from uni3d.scene.camera import Cameras


def rainbow(points: Tensor) -> Tensor:
    """Smooth colours that differ everywhere, at most 1.6 per unit of the scene."""
    return 0.5 + 0.4 * torch.sin(4 * points + torch.tensor([0.0, 1.0, 2.0]))


def bumps(points: Tensor) -> Tensor:
    """A blob with arms: charts fold over one another when it is projected carelessly."""
    arms = [
        60 * torch.exp(-((points - torch.tensor(centre)) ** 2).sum(-1) / (2 * 0.12**2))
        for centre in ((0.0, 0.0, 0.0), (0.4, 0.1, 0.0), (0.35, 0.45, 0.1), (0.0, 0.5, 0.0), (-0.4, 0.2, 0.3))
    ]
    return torch.stack(arms).sum(0)


@pytest.fixture(scope="module")
def surface() -> Surface:
    return extract_surface(bumps, 1.0, 64, max_triangles=3000)


@pytest.fixture(scope="module", params=["xatlas", "projection"])
def rainbow_mesh(surface: Surface, request: pytest.FixtureRequest) -> TexturedMesh:
    return bake_texture(surface, rainbow, 1024, unwrap_method=request.param)


def worst_error(mesh: TexturedMesh, num: int = 20000) -> np.ndarray:
    """Difference to `rainbow` of bilinear look-ups at random points of the surface, seams included."""
    random = np.random.default_rng(0)
    face = random.integers(len(mesh.faces), size=num)
    weights = random.dirichlet((0.4, 0.4, 0.4), size=num)
    points = np.einsum("kc,kcd->kd", weights, mesh.vertices[mesh.faces[face]])
    uv = np.einsum("kc,kcd->kd", weights, mesh.uv[mesh.faces[face]])
    probe = TexturedMesh(points, mesh.faces, mesh.normals, uv.astype(np.float32), mesh.texture)
    expected = rainbow(torch.from_numpy(points)).numpy() * 255
    return np.abs(probe.vertex_colours() - expected).max(axis=1)


@pytest.mark.parametrize("method", ["xatlas", "projection"])
def test_there_are_no_seams(surface: Surface, method: unwrap_module.UnwrapMethod) -> None:
    mesh = bake_texture(surface, rainbow, 512, unwrap_method=method)
    error = worst_error(mesh)
    # a texel is about 1/200 of the scene, so a look-up that is a whole texel off costs 2 levels
    assert error.max() <= 3.0
    assert mesh.report["uv_overlap_texels"] <= 2
    assert mesh.report["texture_coverage"] > 0.3
    assert mesh.report["unwrap_method"] == method
    np.testing.assert_array_equal(
        mesh.vertices[mesh.faces], surface.vertices[surface.faces], "the geometry does not change"
    )


def test_supersampling_gives_the_same_picture(surface: Surface) -> None:
    mesh = bake_texture(surface, rainbow, 256, unwrap_method="projection", supersample=2)
    assert worst_error(mesh).max() <= 6.0


def test_the_whole_texture_is_filled(surface: Surface) -> None:
    mesh = bake_texture(surface, lambda p: torch.ones_like(p), 256, unwrap_method="projection")
    assert (mesh.texture == 255).all()


@pytest.mark.parametrize("method", ["xatlas", "projection"])
def test_charts_keep_their_distance_and_are_not_mirrored(
    surface: Surface, method: unwrap_module.UnwrapMethod
) -> None:
    atlas = unwrap(surface.vertices, surface.faces, size=1024, gutter=8, method=method)
    assert atlas.uv.min() >= 0 and atlas.uv.max() <= 1
    triangle = atlas.uv[atlas.faces].astype(np.float64)
    first, second = triangle[:, 1] - triangle[:, 0], triangle[:, 2] - triangle[:, 0]
    area = first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]
    assert np.maximum(area, 0).sum() < 0.01 * np.abs(area).sum()
    np.testing.assert_array_equal(atlas.vertex_of[atlas.faces], surface.faces)


def test_mip_levels_show_neither_background_nor_other_charts(rainbow_mesh: TexturedMesh) -> None:
    """Charts are eight texels apart at 1024, so three halvings keep look-ups to their own chart."""
    mesh = rainbow_mesh
    report = mesh_report(mesh)
    assert report["gutter_texels"] >= 8 and report["uv_overlap_texels"] == 0
    level = mesh.texture.astype(np.float64)
    for _ in range(3):
        assert worst_error(replace(mesh, texture=np.rint(level).astype(np.uint8))).max() <= 3.0
        level = level.reshape(len(level) // 2, 2, len(level) // 2, 2, 3).mean(axis=(1, 3))
    error = worst_error(replace(mesh, texture=np.rint(level).astype(np.uint8)))
    assert np.percentile(error, 99) <= 3.0


@pytest.mark.parametrize(("size", "gutter"), [(256, 8), (1024, 8), (2048, 16)])
def test_the_gutter_grows_with_the_texture(
    surface: Surface, monkeypatch: pytest.MonkeyPatch, size: int, gutter: int
) -> None:
    asked = {}

    def stop(*_: object, **options: object) -> None:
        asked.update(options)
        raise InterruptedError

    monkeypatch.setattr(texture_module, "unwrap", stop)
    with pytest.raises(InterruptedError):
        bake_texture(surface, rainbow, size)
    assert asked["size"] == size and asked["gutter"] == gutter


def shown_error(mesh: TexturedMesh, size: int) -> float:
    """Largest difference, in display levels, between renders of the mesh and of `rainbow` on its vertices."""
    colours = rainbow(torch.from_numpy(mesh.vertices)).numpy()
    painted = np.concatenate([colours, np.ones((len(colours), 1), np.float32)], axis=1)
    exact = replace(
        mesh.as_renderable(),
        corner_uv=None,
        corner_colour=painted[mesh.faces],
        materials=[Material(np.ones(4, np.float32))],
    )
    camera = Cameras.from_lists([20.0], [15.0])
    shown, expected = (Raycaster(which).render(camera, size) for which in (mesh.as_renderable(), exact))
    return float(np.abs(shown.rgb - expected.rgb)[shown.alpha == 1].max() * 255)


def test_no_seam_shows_in_renders_from_near_and_far(rainbow_mesh: TexturedMesh) -> None:
    """From 256 pixels, which see the texture itself, down to 64, which see its third mip level."""
    mesh = rainbow_mesh
    for size in (256, 128, 64):
        assert shown_error(mesh, size) <= 5.0, size
    covered = rasterise(mesh.uv[mesh.faces] * 1024, 1024, margin=0.0)[0]
    unfilled = np.zeros((1024 * 1024, 3), np.uint8)
    unfilled[covered] = mesh.texture.reshape(-1, 3)[covered]
    background = replace(mesh, texture=unfilled.reshape(1024, 1024, 3))
    assert shown_error(background, 256) > 30.0 and shown_error(background, 64) > 30.0, "the test sees seams"


def test_normals_are_smooth_across_seams(surface: Surface) -> None:
    mesh = bake_texture(surface, rainbow, 256, unwrap_method="projection")
    np.testing.assert_allclose(np.linalg.norm(mesh.normals, axis=1), 1.0, atol=1e-5)
    _, first, same = np.unique(mesh.vertices, axis=0, return_index=True, return_inverse=True)
    np.testing.assert_array_equal(mesh.normals, mesh.normals[first][same.reshape(-1)])


def test_xatlas_that_is_late_is_replaced(surface: Surface, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        mesh = bake_texture(surface, rainbow, 256, unwrap_time_limit_s=0.01)
    assert mesh.report["unwrap_method"] == "projection"
    assert mesh.report["unwrap_seconds"] < 10
    assert "needed more than 0.01 s for" in caplog.text
    with pytest.raises(UsageError, match="more time, fewer triangles"):
        unwrap(surface.vertices, surface.faces, method="xatlas", time_limit_s=0.01)


def test_xatlas_that_fails_is_replaced(
    surface: Surface, monkeypatch: pytest.MonkeyPatch, tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('out of charts')")
    monkeypatch.setattr(unwrap_module, "XATLAS_SCRIPT", broken)
    atlas = unwrap(surface.vertices, surface.faces, size=256)
    assert atlas.method == "projection" and "out of charts" in caplog.text


def test_projection_cuts_what_folds_over_itself() -> None:
    """A spiral staircase of quads faces upward everywhere and covers the same ground twice."""
    turns = np.linspace(0, 4 * np.pi, 60)
    inner = np.stack([0.2 * np.cos(turns), 0.05 * turns, 0.2 * np.sin(turns)], axis=1)
    outer = np.stack([np.cos(turns), 0.05 * turns, np.sin(turns)], axis=1)
    vertices = np.concatenate([inner, outer])
    step = np.arange(59)
    quads = np.stack([step, step + 1, step + 61, step + 60], axis=1)
    faces = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    atlas = unwrap(vertices, faces, size=512, method="projection")
    assert len(overlapping_faces(atlas.uv[atlas.faces] * 512, 512)[0]) == 0


@pytest.mark.parametrize("arguments", [{"size": 1000}, {"size": 32}, {"supersample": 9}])
def test_arguments_out_of_range_are_refused(surface: Surface, arguments: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        bake_texture(surface, rainbow, **arguments)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="choose auto, xatlas or projection"):
        unwrap(surface.vertices, surface.faces, method="magic")  # type: ignore[arg-type]


def test_colours_that_are_not_finite_are_refused(surface: Surface) -> None:
    with pytest.raises(Uni3DError, match="not finite"):
        bake_texture(surface, lambda p: p * torch.nan, 64, unwrap_method="projection")


def test_raster_covers_exactly_the_texel_centres_of_a_triangle() -> None:
    corners = np.array([[[1.0, 1.0], [7.0, 1.0], [1.0, 7.0]]])
    texel, face, barycentric, overlap = rasterise(corners, 8, margin=0.0)
    centres = np.stack([texel % 8 + 0.5, texel // 8 + 0.5], axis=1)
    expected = [(x, y) for y in range(8) for x in range(8) if x >= 1 and y >= 1 and x + y + 1 <= 8]
    assert [(int(x), int(y)) for x, y in centres] == expected
    np.testing.assert_allclose(np.einsum("kc,kcd->kd", barycentric, corners[face]), centres, atol=1e-5)
    assert overlap == 0


def test_raster_margin_takes_the_nearest_point_of_the_triangle() -> None:
    corners = np.array([[[2.0, 2.0], [6.0, 2.0], [2.0, 6.0]]])
    texel, face, barycentric, _ = rasterise(corners, 8, margin=1.5)
    nearest = np.einsum("kc,kcd->kd", barycentric, corners[face])
    position = {int(t): point for t, point in zip(texel, nearest, strict=True)}
    np.testing.assert_allclose(position[1 * 8 + 1], (2.0, 2.0), atol=1e-6)
    np.testing.assert_allclose(position[1 * 8 + 3], (3.5, 2.0), atol=1e-6)
    assert 0 not in position and barycentric.min() >= 0


def test_raster_counts_overlaps() -> None:
    square = np.array([[[0.0, 0.0], [4.0, 0.0], [4.0, 4.0]], [[0.0, 0.0], [4.0, 4.0], [0.0, 4.0]]])
    assert rasterise(square, 8, margin=0.0)[3] == 0
    assert rasterise(np.concatenate([square, square[:1]]), 8, margin=0.0)[3] > 4
    assert [pair.tolist() for pair in overlapping_faces(np.concatenate([square, square[:1]]), 8)] == [
        [0],
        [2],
    ]


def test_a_box_gets_its_six_sides() -> None:
    box = trimesh.creation.box()
    atlas = unwrap(box.vertices.view(np.ndarray), box.faces.view(np.ndarray), size=256, method="projection")
    assert len(atlas.uv) == 24
