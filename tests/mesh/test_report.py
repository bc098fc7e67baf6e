"""The report finds what is wrong with a mesh, and the comparison says when it is not what was rendered."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from painted_box import box_density, side_colour

from uni3d.errors import UsageError
from uni3d.mesh.atlas_raster import rasterise
from uni3d.mesh.export import write_glb, write_mesh
from uni3d.mesh.report import compare_with_field, mesh_report, read_extras
from uni3d.mesh.textured_mesh import TexturedMesh
from uni3d.mesh.turntable import render_mesh
from uni3d.scene.camera import Cameras, ring_cameras
from uni3d.scene.regularisers import fog_fraction


def problems_of(mesh: TexturedMesh) -> str:
    """The problems of a mesh, apart from where it stands, as one text."""
    return "\n".join(mesh_report(mesh.in_unit_box()[0])["problems"])


def test_a_good_mesh_has_no_problems(box_mesh: TexturedMesh, tmp_path: Path) -> None:
    path = write_glb(box_mesh, tmp_path / "box.glb", {"prompt": "a box"})
    report = mesh_report(path)
    assert report["sound"] and report["problems"] == []
    assert report["triangles"] == len(box_mesh.faces)
    assert report["closed"] and report["outward"] and report["components"] == 1 and report["in_unit_box"]
    assert report["signed_volume"] == pytest.approx(8 * 0.45 * 0.32 * 0.22 / 0.9**3, rel=0.05)
    assert report["texture_size"] == [512, 512] and report["texture_power_of_two"]
    assert report["uv_overlap_texels"] == 0 and report["uv_mirrored_fraction"] < 1e-6
    assert report["gutter_texels"] >= 7
    assert report["file_bytes"] == path.stat().st_size
    assert report["extras"]["prompt"] == "a box"
    # the darkest side is blue, the brightest yellow (Rec. 709 weights)
    low, high = report["luminance"]
    assert low == pytest.approx(255 * (0.2126 * 0.1 + 0.7152 * 0.1 + 0.0722 * 0.9), abs=3)
    assert high == pytest.approx(255 * (0.2126 * 0.9 + 0.7152 * 0.8 + 0.0722 * 0.1), abs=3)
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize("suffix", [".obj", ".ply"])
def test_other_formats_are_measured_too(box_mesh: TexturedMesh, tmp_path: Path, suffix: str) -> None:
    report = mesh_report(write_mesh(box_mesh, tmp_path / f"box{suffix}"))
    assert report["sound"], report["problems"]
    assert (report["texture_size"] is None) == (suffix == ".ply")


def test_a_mesh_turned_inside_out_is_noticed(box_mesh: TexturedMesh, tmp_path: Path) -> None:
    turned = replace(box_mesh, faces=np.ascontiguousarray(box_mesh.faces[:, ::-1]))
    report = mesh_report(write_glb(turned, tmp_path / "box.glb"))
    assert not report["outward"] and report["closed"] and not report["sound"]
    assert "look inward" in report["problems"][0]


def test_holes_are_noticed(box_mesh: TexturedMesh) -> None:
    report = mesh_report(replace(box_mesh, faces=box_mesh.faces[5:]).in_unit_box()[0])
    assert not report["closed"] and 3 <= report["open_edges"] <= 15
    assert "not closed" in report["problems"][0]


def test_pieces_are_noticed(box_mesh: TexturedMesh) -> None:
    num = len(box_mesh.vertices)
    pieces = replace(
        box_mesh,
        vertices=np.concatenate([box_mesh.vertices, box_mesh.vertices * 0.2 + 2]),
        faces=np.concatenate([box_mesh.faces, box_mesh.faces + num]),
        normals=np.concatenate([box_mesh.normals] * 2),
        uv=np.concatenate([box_mesh.uv] * 2),
    )
    report = mesh_report(pieces.in_unit_box()[0])
    assert report["components"] == 2
    assert report["largest_area_fraction"] == pytest.approx(1 / 1.04, abs=1e-3)
    assert "falls into 2 pieces" in problems_of(pieces)


def test_overlapping_texture_coordinates_are_noticed(box_mesh: TexturedMesh) -> None:
    flat = (box_mesh.vertices[:, :2] - box_mesh.vertices[:, :2].min(axis=0)).astype(np.float32)
    report = mesh_report(replace(box_mesh, uv=flat / flat.max()))
    assert report["uv_overlap_fraction"] > 0.5
    assert 0.4 < report["uv_mirrored_fraction"] < 0.6, "front and back share the texture"
    assert any("overlap" in problem for problem in report["problems"])
    assert any("mirrored" in problem for problem in report["problems"])


def test_background_beside_the_charts_is_noticed(box_mesh: TexturedMesh) -> None:
    covered, _, _, _ = rasterise(box_mesh.uv[box_mesh.faces] * 512, 512, margin=0.0)
    unfilled = np.zeros((512 * 512, 3), np.uint8)
    unfilled[covered] = box_mesh.texture.reshape(-1, 3)[covered]
    assert "background bleeds" in problems_of(replace(box_mesh, texture=unfilled.reshape(512, 512, 3)))
    assert "background bleeds" not in problems_of(box_mesh)


def test_textures_of_odd_size_and_odd_colours_are_noticed(box_mesh: TexturedMesh) -> None:
    odd = problems_of(replace(box_mesh, texture=np.full((600, 600, 3), 5, np.uint8)))
    assert "600 x 600 is no power of two" in odd and "luminance" in odd
    assert "outside of 512 to 2048" in problems_of(
        replace(box_mesh, texture=np.full((64, 64, 3), 99, np.uint8))
    )


def test_coordinates_outside_of_the_texture_are_noticed(box_mesh: TexturedMesh) -> None:
    assert "outside of [0, 1]" in problems_of(replace(box_mesh, uv=box_mesh.uv + 0.5))


def test_an_object_that_is_not_in_the_unit_box_is_noticed(box_mesh: TexturedMesh, tmp_path: Path) -> None:
    report = mesh_report(write_glb(box_mesh, tmp_path / "box.glb", unit_box=False))
    assert report["problems"] == ["the object is not centred in the unit box"]
    assert report["extent"] == pytest.approx([0.9, 0.64, 0.44], abs=0.05)


def test_large_files_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "large.ply"
    trimesh.creation.icosphere(subdivisions=7).apply_scale(0.5).export(path)
    problems = "\n".join(mesh_report(path)["problems"])
    assert "triangles are more than 100000" in problems and "bytes, more than" in problems


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.glb").write_bytes(b"glTF\x02\0\0\0 not really")
    with pytest.raises(UsageError):
        mesh_report(tmp_path / "broken.glb")
    assert read_extras(tmp_path / "broken.glb") == {}
    with pytest.raises(UsageError):
        mesh_report(tmp_path / "missing.glb")


def field_views(cameras: Cameras, size: int, softness: float) -> tuple[np.ndarray, np.ndarray]:
    """Volume renders of the painted box over grey; `softness` thins it to a haze."""
    origins, directions = cameras.rays(size, size)
    depths = torch.linspace(1.2, 3.6, 160)
    points = origins[..., None, :] + depths[:, None] * directions[..., None, :]
    flat = points.reshape(-1, 3)
    density = (box_density(flat) * softness).reshape(points.shape[:-1])
    weight = 1 - torch.exp(-density * (depths[1] - depths[0]))
    left = torch.cumprod(torch.cat([torch.ones_like(weight[..., :1]), 1 - weight[..., :-1]], -1), -1)
    weight = weight * left
    colour = (weight[..., None] * side_colour(flat).reshape(points.shape)).sum(-2)
    alpha = weight.sum(-1)
    return (colour + 0.5 * (1 - alpha[..., None])).numpy(), alpha.numpy()


def test_a_mesh_matches_its_own_field(box_mesh: TexturedMesh) -> None:
    cameras = ring_cameras(4, elevation_deg=20.0)
    field_rgb, field_alpha = field_views(cameras, 48, 1.0)
    mesh_rgb, mesh_alpha = render_mesh(box_mesh, cameras, 48, background=0.5)
    result = compare_with_field(mesh_rgb, field_rgb, mesh_alpha, field_alpha)
    assert result["verdict"] == "match", result
    assert result["silhouette_iou"] > 0.93 and result["psnr_db"] > 20
    json.dumps(result, allow_nan=False)


def test_a_mesh_that_is_not_its_field_is_told(box_mesh: TexturedMesh) -> None:
    cameras = ring_cameras(3)
    field_rgb, field_alpha = field_views(cameras, 32, 1.0)
    smaller = replace(box_mesh, vertices=box_mesh.vertices * 0.7)
    mesh_rgb, mesh_alpha = render_mesh(smaller, cameras, 32, background=0.5)
    result = compare_with_field(mesh_rgb, field_rgb, mesh_alpha, field_alpha)
    assert result["verdict"] == "mismatch" and "silhouette is too small" in result["explanation"]
    grey = replace(box_mesh, texture=np.full_like(box_mesh.texture, 128))
    mesh_rgb, mesh_alpha = render_mesh(grey, cameras, 32, background=0.5)
    result = compare_with_field(mesh_rgb, field_rgb, mesh_alpha, field_alpha)
    assert result["verdict"] == "mismatch" and "colours differ" in result["explanation"]


def test_a_foggy_field_is_named_as_the_reason(box_mesh: TexturedMesh) -> None:
    cameras = ring_cameras(3)
    field_rgb, field_alpha = field_views(cameras, 32, 0.004)
    mesh_rgb, mesh_alpha = render_mesh(box_mesh, cameras, 32, background=0.5)
    result = compare_with_field(
        torch.from_numpy(mesh_rgb), torch.from_numpy(field_rgb), mesh_alpha, field_alpha
    )
    assert result["fog_fraction"] > 0.5
    assert result["verdict"] == "mismatch" and "foggy" in result["explanation"]


def test_fog_has_one_meaning() -> None:
    """Half of the silhouette is half opaque; nothing at all is empty, and not fog."""
    opacity = torch.zeros(1, 1, 4, 4)
    opacity[..., :2] = 1.0
    opacity[..., :2, :2] = 0.5
    assert fog_fraction(opacity) == fog_fraction(opacity.numpy()) == 0.5
    assert fog_fraction(torch.zeros(1, 1, 4, 4)) == 0.0
    for bad in (torch.zeros(0, 4, 4), torch.full((1, 2, 2), torch.nan)):
        with pytest.raises(UsageError, match="are empty or hold NaN"):
            fog_fraction(bad)


def test_identical_and_empty_views() -> None:
    random = np.random.default_rng(0)
    rgb, alpha = random.random((2, 8, 8, 3)), np.zeros((2, 8, 8))
    alpha[0, 2:6, 2:6] = 1.0
    result = compare_with_field(rgb, rgb, alpha, alpha)
    assert result["silhouette_iou"] == 1.0 and result["psnr_db"] == pytest.approx(100.0)
    assert compare_with_field(rgb, rgb, alpha * 0, alpha)["verdict"] == "mismatch"
