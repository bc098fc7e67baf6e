"""Roughness, metalness and normal maps in GLB files, and the formats beside GLB."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from uni3d.errors import MissingPackageError, Uni3DError
from uni3d.mesh.export import write_mesh
from uni3d.mesh.glb_container import GlbContainer
from uni3d.mesh.glb_writer import tangents, write_glb
from uni3d.mesh.gltf_validator import validate_glb, validator_package
from uni3d.mesh.mesh_files import load_renderable
from uni3d.mesh.repair import Placement
from uni3d.mesh.textured_mesh import TexturedMesh
from uni3d.outputs import MESH_SUFFIXES, check_output_file

HAS_USD = importlib.util.find_spec("pxr") is not None


@pytest.fixture
def full_mesh(box_mesh: TexturedMesh) -> TexturedMesh:
    """The box with both maps: a gradient of roughness, half of it metal, and normals that lean along u."""
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8), (64, 64))
    metal = np.repeat(np.uint8([[0, 255]]), 32, axis=1).repeat(64, axis=0)
    leaning = np.full((64, 64, 3), np.uint8([200, 128, 230]))
    return replace(box_mesh, roughness_metalness=np.stack([ramp, metal], axis=2), normal_map=leaning)


def test_maps_are_written_where_gltf_looks_for_them(full_mesh: TexturedMesh, tmp_path: Path) -> None:
    glb = GlbContainer(write_glb(full_mesh, tmp_path / "box.glb").read_bytes())
    material = glb.json["materials"][0]
    surface = material["pbrMetallicRoughness"]
    assert surface["metallicFactor"] == surface["roughnessFactor"] == 1.0, "factors that leave the texture"
    assert "extensions" not in material and "extensionsUsed" not in glb.json, "lit"
    assert full_mesh.roughness_metalness is not None and full_mesh.normal_map is not None

    def pixels(reference: dict[str, int]) -> np.ndarray:
        picture = glb.picture(glb.texture_source(reference["index"]))
        assert not {"gamma", "srgb", "icc_profile"} & set(picture.info), "linear values have no profile"
        return np.asarray(picture)

    np.testing.assert_array_equal(pixels(surface["baseColorTexture"]), full_mesh.texture)
    # roughness in green, metalness in blue (glTF 2.0, section 3.9.2)
    np.testing.assert_array_equal(
        pixels(surface["metallicRoughnessTexture"])[..., 1:], full_mesh.roughness_metalness
    )
    np.testing.assert_array_equal(pixels(material["normalTexture"]), full_mesh.normal_map)


def test_without_maps_metalness_is_zero_and_said(box_mesh: TexturedMesh, tmp_path: Path) -> None:
    for unlit in (None, True, False):
        glb = GlbContainer(write_glb(box_mesh, tmp_path / "box.glb", unlit=unlit).read_bytes())
        surface = glb.json["materials"][0]["pbrMetallicRoughness"]
        assert surface["metallicFactor"] == 0.0 and "metallicRoughnessTexture" not in surface
        assert ("KHR_materials_unlit" in glb.json.get("extensionsUsed", [])) == (unlit is not False)
        assert "TANGENT" not in glb.json["meshes"][0]["primitives"][0]["attributes"]


def test_tangents_follow_the_picture(box_mesh: TexturedMesh) -> None:
    """T runs along growing u and B = w N x T up the picture, measured on every face."""
    frame = tangents(box_mesh)[box_mesh.faces].mean(axis=1)
    normal = box_mesh.normals[box_mesh.faces].mean(axis=1)
    edge = box_mesh.vertices[box_mesh.faces][:, 1:] - box_mesh.vertices[box_mesh.faces][:, :1]
    turn = box_mesh.uv[box_mesh.faces][:, 1:] - box_mesh.uv[box_mesh.faces][:, :1]
    along = np.linalg.inv(turn.astype(np.float64)) @ edge  # rows dP/du, dP/dv
    flat = np.linalg.norm(normal, axis=1) > 0.95  # away from the rounded edges
    upward = np.cross(normal, frame[:, :3]) * frame[:, 3:]
    for direction, expected in ((frame[:, :3], along[:, 0]), (upward, -along[:, 1])):
        cosine = np.einsum("fc,fc->f", direction, expected) / (
            np.linalg.norm(direction, axis=1) * np.linalg.norm(expected, axis=1)
        )
        assert np.quantile(cosine[flat], 0.05) > 0.9
    assert set(np.unique(tangents(box_mesh)[:, 3])) == {1.0}
    mirrored = replace(box_mesh, uv=box_mesh.uv * np.float32([-1, 1]) + np.float32([1, 0]))
    assert set(np.unique(tangents(mirrored)[:, 3])) == {-1.0}
    unit = tangents(box_mesh)[:, :3]
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.einsum("vc,vc->v", unit, box_mesh.normals), 0, atol=1e-5)


def test_gltf_validator_finds_nothing_in_maps(full_mesh: TexturedMesh, tmp_path: Path) -> None:
    if validator_package() is None or shutil.which("node") is None:
        pytest.skip("needs node and `npm install gltf-validator` (folder in UNI3D_GLTF_VALIDATOR)")
    found = validate_glb(write_glb(full_mesh, tmp_path / "box.glb"))
    assert found == {"errors": 0, "warnings": 0, "infos": 0, "hints": 0, "messages": []}


def test_maps_of_another_shape_are_refused(full_mesh: TexturedMesh, tmp_path: Path) -> None:
    bad = replace(full_mesh, normal_map=np.zeros((8, 8, 4), np.uint8))
    with pytest.raises(Uni3DError, match=r"normal_map is uint8 \(8, 8, 4\); expected uint8 \[S, S, 3\]"):
        write_glb(bad, tmp_path / "box.glb")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply", ".stl"])
def test_a_mesh_goes_back_to_where_it_was(box_mesh: TexturedMesh, tmp_path: Path, suffix: str) -> None:
    """A placement and `unit_box=False` keep scale and position of a mesh made elsewhere."""
    placement = Placement((10.0, -20.0, 30.0), 4.0)
    placed = replace(box_mesh, vertices=placement.out_of_scene(box_mesh.vertices))
    again = load_renderable(write_mesh(placed, tmp_path / f"box{suffix}", unit_box=False))
    np.testing.assert_allclose(
        again.vertices[again.faces], placed.vertices[placed.faces], atol=1e-4, err_msg="same faces and order"
    )


def test_an_output_that_needs_a_missing_package_is_refused_before_any_work(tmp_path: Path) -> None:
    assert ".usdz" in MESH_SUFFIXES
    if HAS_USD:
        pytest.skip("usd-core is installed")
    with pytest.raises(MissingPackageError, match=r'pip install "uni3d\[usd\]"'):
        check_output_file(tmp_path / "box.usdz", overwrite=False)


def test_usdz_without_its_package_is_refused(box_mesh: TexturedMesh, tmp_path: Path) -> None:
    if HAS_USD:
        pytest.skip("usd-core is installed")
    with pytest.raises(MissingPackageError, match="usd-core"):
        write_mesh(box_mesh, tmp_path / "box.usdz")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not HAS_USD, reason="needs usd-core")
def test_usdz_holds_the_mesh_and_its_texture(box_mesh: TexturedMesh, tmp_path: Path) -> None:
    import zipfile

    from pxr import Usd, UsdGeom, UsdShade

    path = write_mesh(box_mesh, tmp_path / "box.usdz", {"prompt": "a röd box"})
    stage = Usd.Stage.Open(str(path))
    mesh = UsdGeom.Mesh(stage.GetPrimAtPath("/object/mesh"))
    fitted, _, _ = box_mesh.in_unit_box()
    np.testing.assert_array_equal(np.array(mesh.GetPointsAttr().Get()), fitted.vertices)
    np.testing.assert_array_equal(
        np.array(mesh.GetFaceVertexIndicesAttr().Get()).reshape(-1, 3), fitted.faces
    )
    assert UsdGeom.GetStageUpAxis(stage) == "Y" and UsdGeom.GetStageMetersPerUnit(stage) == 1.0
    material, _ = UsdShade.MaterialBindingAPI(mesh).ComputeBoundMaterial()
    assert material.ComputeSurfaceSource()[0].GetIdAttr().Get() == "UsdPreviewSurface"
    assert json.loads(stage.GetRootLayer().customLayerData["uni3d"])["prompt"] == "a röd box"
    with zipfile.ZipFile(path) as package:
        assert {info.compress_type for info in package.infolist()} == {zipfile.ZIP_STORED}
        picture = next(name for name in package.namelist() if name.endswith(".png"))
        with Image.open(io.BytesIO(package.read(picture))) as image:
            np.testing.assert_array_equal(np.asarray(image), box_mesh.texture)
    assert [item.name for item in tmp_path.iterdir()] == ["box.usdz"]
