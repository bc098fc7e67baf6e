"""`uni3d inspect` for anybody's mesh: what is a limit, what is information, and the exit code."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh

from uni3d import cli
from uni3d.mesh import texture_measures
from uni3d.mesh.atlas_raster import rasterise
from uni3d.mesh.export import write_glb
from uni3d.mesh.gltf_validator import ENVIRONMENT_VARIABLE, validate_glb, validator_package
from uni3d.mesh.mesh_files import load_mesh_file
from uni3d.mesh.report import inspect_file, judged, mesh_report
from uni3d.mesh.textured_mesh import TexturedMesh


def box(extents: tuple[float, ...] = (1, 1, 1), at: tuple[float, ...] = (0, 0, 0)) -> trimesh.Trimesh:
    return trimesh.creation.box(extents).apply_translation(at)


def measured(mesh: trimesh.Trimesh, folder: Path, name: str = "mesh.ply") -> dict[str, Any]:
    """The report of a mesh that went through a file, read in this process."""
    mesh.export(folder / name)
    return mesh_report(load_mesh_file(folder / name))


def test_the_command_prints_every_check_and_returns_one_for_a_missed_limit(
    box_mesh: TexturedMesh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_glb(box_mesh, tmp_path / "good.glb", {"prompt": "a box"})
    assert cli.main(["inspect", str(good), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["limits"].values()) == {"kept"} and report["missed"] == []
    assert report["extras"]["prompt"] == "a box" and report["bounds"][1][0] == pytest.approx(0.5)
    turned = replace(box_mesh, faces=np.ascontiguousarray(box_mesh.faces[:, ::-1]))
    bad = write_glb(turned, tmp_path / "bad.glb")
    assert cli.main(["inspect", str(bad)]) == 1
    out = capsys.readouterr().out
    assert "outward: the faces look inward" in out and "closed: kept" in out
    assert "triangles: kept" in out and "charts not mirrored: 100 % of the texture is mirrored" in out


def test_a_sheet_is_open_and_that_is_no_fault(tmp_path: Path) -> None:
    sheet = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 1, 2], [0, 2, 3]])
    report = measured(sheet, tmp_path)
    assert report["missed"] == [] and "not closed (4 open edges)" in report["information"]["closed"]
    assert 0.2 < report["seen_from_behind"] < 0.75 and report["outward"] and not report["sound"]


def test_an_open_surface_inside_out_is_a_fault(tmp_path: Path) -> None:
    half = box().submesh([range(10)], append=True)
    assert measured(half, tmp_path)["outward"]
    half.invert()
    report = measured(half, tmp_path)
    assert not report["outward"] and "of what is seen from outside is the back" in report["missed"][0]


def test_one_of_two_bodies_inside_out_is_a_fault(tmp_path: Path) -> None:
    """Though the volume of both together is positive."""
    small = box((0.5, 0.5, 0.5), (2, 0, 0))
    small.invert()
    report = measured(trimesh.util.concatenate([box(), small]), tmp_path)
    assert report["signed_volume"] > 0 and report["closed"] and not report["outward"]
    assert "2 pieces" in report["information"]["one piece"]


def test_a_cavity_is_no_fault(tmp_path: Path) -> None:
    wall = box((0.5, 0.5, 0.5))
    wall.invert()
    report = measured(trimesh.util.concatenate([box(), wall]), tmp_path)
    assert report["outward"] and report["seen_from_behind"] == 0 and report["missed"] == []


def test_pinched_edges_and_faces_without_area_are_counted(tmp_path: Path) -> None:
    touching = trimesh.util.concatenate([box(), box((1, 1, 1), (1, 1, 0))])
    report = measured(touching, tmp_path, "touching.stl")
    assert report["non_manifold_edges"] == 1 and report["missed"] == []
    (tmp_path / "sliver.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\nf 1 2 2\nf 1 3 3\n")
    report = mesh_report(tmp_path / "sliver.obj")
    assert report["degenerate_faces"] == 2 and "2 triangles have no area" in report["problems"]


def test_dark_colours_are_a_fault_of_lit_materials_alone(box_mesh: TexturedMesh, tmp_path: Path) -> None:
    """The limit is on reflectances; unlit colours hold light and shadow."""
    half_black = box_mesh.texture.copy()
    half_black[:256] = 0
    for unlit in (True, False):
        path = write_glb(replace(box_mesh, texture=half_black), tmp_path / "box.glb", unlit=unlit)
        report = mesh_report(path)
        kept = report["information" if unlit else "limits"]["luminance"] == "kept"
        assert report["unlit"] == unlit and kept == unlit


def test_textures_of_several_materials_are_measured_by_picture(box_mesh: TexturedMesh) -> None:
    """Two materials that show one picture share its texels, so faces of both overlap there."""
    mesh = box_mesh.as_renderable()
    half = np.arange(len(mesh.faces)) % 2
    twice = replace(mesh, face_material=half, materials=mesh.materials * 2)
    assert mesh_report(twice)["uv_overlap_texels"] == 0
    first_half = mesh.corner_uv[:1].repeat(len(mesh.faces), axis=0)
    assert mesh_report(replace(twice, corner_uv=first_half))["uv_overlap_fraction"] > 0.9
    other = replace(mesh.materials[0], texture=np.full((64, 48, 4), 0.5, np.float32))
    report = mesh_report(replace(mesh, face_material=half, materials=[mesh.materials[0], other]))
    assert report["picture_sizes"] == [[512, 512], [48, 64]]
    assert "48 x 64 is no power of two" in "\n".join(report["missed"])


def test_a_texture_on_every_face_is_measured_in_bounded_time(
    box_mesh: TexturedMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on walls of bricks: each face shows all of the texture. A sample of the faces tells the overlap."""
    monkeypatch.setattr(texture_measures, "MAX_MEASURED_TEXELS", 2**21)
    seen = []

    def counted(corners: np.ndarray, size: int, *, margin: float) -> Any:
        seen.append(len(corners))
        return rasterise(corners, size, margin=margin)

    monkeypatch.setattr(texture_measures, "rasterise", counted)
    mesh = box_mesh.as_renderable()
    whole = np.broadcast_to(np.float32([[0, 1], [1, 1], [1, 0]]), (len(mesh.faces), 3, 2))
    report = mesh_report(replace(mesh, corner_uv=whole))
    assert seen == [7] and report["uv_overlap_fraction"] > 0.99
    assert mesh_report(mesh)["uv_overlap_texels"] == 0 and seen[1] == len(mesh.faces)


def test_points_on_a_palette_have_the_luminance_of_their_texel(box_mesh: TexturedMesh) -> None:
    mesh = box_mesh.as_renderable()
    white = np.ones((512, 512, 4), np.float32)
    on_a_point = replace(mesh, corner_uv=np.full_like(mesh.corner_uv, 0.25))
    report = mesh_report(replace(on_a_point, materials=[replace(mesh.materials[0], texture=white)]))
    assert report["luminance"] == pytest.approx([255, 255]) and report["uv_coverage"] == 0


def test_what_the_validator_says_is_a_limit(
    box_mesh: TexturedMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    path = write_glb(box_mesh, tmp_path / "box.glb")
    report = inspect_file(path)
    assert report["gltf_validator"].startswith("not run: ") and "glTF-Validator" not in report["limits"]
    said = {"errors": 1, "warnings": 0, "infos": 0, "hints": 0, "messages": ["BAD: it is"]}
    assert "1 errors and 0 warnings (BAD: it is)" in judged(report | {"gltf_validator": said})["missed"][0]


def test_the_validator_finds_what_is_wrong(box_mesh: TexturedMesh, tmp_path: Path) -> None:
    if validator_package() is None or shutil.which("node") is None:
        pytest.skip("needs node and `npm install gltf-validator` (folder in UNI3D_GLTF_VALIDATOR)")
    path = write_glb(replace(box_mesh, normals=box_mesh.normals * 2), tmp_path / "box.glb")
    found = validate_glb(path)
    assert isinstance(found, dict) and found["errors"] > 0 and "NON_UNIT" in found["messages"][0]
