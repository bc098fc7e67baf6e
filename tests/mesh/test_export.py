"""Files: the right colours on the right sides, readable by others, whole or absent."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from painted_box import CENTRE, HALF_SIZES, SIDE_COLOURS

from uni3d.errors import Uni3DError, UsageError
from uni3d.mesh import glb_writer
from uni3d.mesh.export import write_glb, write_mesh, write_obj, write_ply
from uni3d.mesh.gltf_validator import validate_glb, validator_package
from uni3d.mesh.raycaster import Raycaster, load_renderable
from uni3d.mesh.report import load_in_scene, mesh_report, read_extras
from uni3d.mesh.surface import Surface
from uni3d.mesh.texture import bake_texture
from uni3d.mesh.textured_mesh import TexturedMesh
from uni3d.scene.camera import Cameras

EXTRAS = {
    "prompt": 'a "röd" box\n# not a comment',
    "seed": 7,
    "method": "uni-instruct",
    "versions": {"uni3d": "0"},
}
# camera (azimuth, elevation) -> index into SIDE_COLOURS: +X, -X, +Y, -Y, +Z, -Z
SIDE_SEEN = {(0, 0): 4, (90, 0): 0, (180, 0): 5, (-90, 0): 1, (0, 89): 2, (0, -89): 3}


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply"])
def test_every_side_has_its_colour(box_mesh: TexturedMesh, tmp_path: Path, suffix: str) -> None:
    """Golden test of axes and colours: an asymmetric box, seen from six sides, read back from the file."""
    path = write_mesh(box_mesh, tmp_path / f"box{suffix}", EXTRAS)
    caster = Raycaster(load_renderable(path))
    for (azimuth, elevation), side in SIDE_SEEN.items():
        view = caster.render(Cameras.from_lists([float(azimuth)], [float(elevation)]), 33)
        middle = view.rgb[14:19, 14:19].reshape(-1, 3)
        np.testing.assert_allclose(middle, SIDE_COLOURS[side].expand(25, 3).numpy(), atol=0.02)


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply", ".stl"])
def test_others_read_the_same_geometry(box_mesh: TexturedMesh, tmp_path: Path, suffix: str) -> None:
    path = write_mesh(box_mesh, tmp_path / f"box{suffix}", EXTRAS)
    loaded = trimesh.load(path, force="mesh")
    assert isinstance(loaded, trimesh.Trimesh)
    fitted, _, _ = box_mesh.in_unit_box()
    expected = fitted.vertices[fitted.faces]
    assert loaded.triangles.shape == expected.shape
    np.testing.assert_allclose(
        loaded.triangles.mean(axis=1), expected.mean(axis=1), atol=1e-6, err_msg="same faces, same order"
    )
    loaded.merge_vertices(merge_tex=True, merge_norm=True)
    assert loaded.is_watertight
    assert loaded.volume == pytest.approx(np.prod(HALF_SIZES.numpy() * 2) / 0.9**3, rel=0.05)
    np.testing.assert_allclose(loaded.extents, HALF_SIZES.numpy() * 2 / 0.9, atol=0.02)
    np.testing.assert_allclose(loaded.bounds.mean(axis=0), 0, atol=1e-6)
    assert loaded.extents.max() == pytest.approx(1.0, abs=1e-6)


def test_texture_and_material_of_the_glb(box_mesh: TexturedMesh, tmp_path: Path) -> None:
    loaded = trimesh.load(write_glb(box_mesh, tmp_path / "box.glb"), force="mesh")
    material = loaded.visual.material
    assert material.metallicFactor == 0 and material.roughnessFactor == 1
    np.testing.assert_array_equal(np.asarray(material.baseColorTexture.convert("RGB")), box_mesh.texture)
    np.testing.assert_allclose(np.linalg.norm(loaded.vertex_normals, axis=1), 1, atol=1e-4)
    document = _document(tmp_path / "box.glb")
    assert document["nodes"] == [{"name": "object", "mesh": 0}], "the node has no transform"
    assert document["extensionsUsed"] == ["KHR_materials_unlit"] and "extensionsRequired" not in document
    write_glb(box_mesh, tmp_path / "lit.glb", unlit=False)
    assert "KHR_materials_unlit" not in json.dumps(_document(tmp_path / "lit.glb"))


def test_vertex_colours_of_the_ply(box_surface: Surface, tmp_path: Path) -> None:
    mesh = bake_texture(box_surface, lambda points: 0.5 + 0.5 * points, 512, unwrap_method="projection")
    loaded = trimesh.load(write_ply(mesh, tmp_path / "box.ply"))
    assert len(loaded.vertices) == len(box_surface.vertices), "the seams are welded"
    _, centre, scale = mesh.in_unit_box()
    expected = 255 * (0.5 + 0.5 * (loaded.vertices * scale + centre))
    np.testing.assert_allclose(loaded.visual.vertex_colors[:, :3], expected, atol=2)


def test_the_obj_brings_its_material_and_texture(box_mesh: TexturedMesh, tmp_path: Path) -> None:
    write_obj(box_mesh, tmp_path / "my box.obj", EXTRAS)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["my box.obj", "my_box.mtl", "my_box.png"]
    text = (tmp_path / "my box.obj").read_text()
    assert "mtllib my_box.mtl\n" in text and "map_Kd my_box.png\n" in (tmp_path / "my_box.mtl").read_text()
    assert all(line.startswith("# ") for line in text.splitlines()[: len(EXTRAS)]), "no line breaks out"


def test_extras_come_back(box_mesh: TexturedMesh, tmp_path: Path) -> None:
    extras = read_extras(write_glb(box_mesh, tmp_path / "box.glb", EXTRAS))
    assert extras.items() >= EXTRAS.items()
    assert extras["scene_scale"] == pytest.approx(0.9, abs=0.02)
    np.testing.assert_allclose(extras["scene_centre"], CENTRE.numpy(), atol=0.02)
    placed = load_in_scene(tmp_path / "box.glb")
    np.testing.assert_allclose(
        placed.vertices[placed.faces],
        box_mesh.vertices[box_mesh.faces],
        atol=1e-6,
        err_msg="back in its scene",
    )


def test_a_texture_that_is_too_large_becomes_a_jpeg(box_mesh: TexturedMesh, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    noisy = replace(box_mesh, texture=noise)
    write_glb(noisy, tmp_path / "large.glb")
    path = write_glb(noisy, tmp_path / "small.glb", max_bytes=500_000)
    assert _document(tmp_path / "large.glb")["images"][0]["mimeType"] == "image/png"
    assert _document(path)["images"][0]["mimeType"] == "image/jpeg"
    assert path.stat().st_size <= 500_000 < (tmp_path / "large.glb").stat().st_size
    with pytest.raises(UsageError, match="fewer triangles or a smaller texture"):
        write_glb(noisy, tmp_path / "impossible.glb", max_bytes=1000)
    assert not (tmp_path / "impossible.glb").exists()


def test_the_default_budget_fits_the_limit(tmp_path: Path) -> None:
    """30,000 triangles and a 1024 px texture of noise, the worst there is, stay below 5 MB."""
    sphere = trimesh.creation.icosphere(subdivisions=5)
    random = np.random.default_rng(0)
    mesh = TexturedMesh(
        vertices=sphere.vertices.astype(np.float32),
        faces=sphere.faces.astype(np.int64),
        normals=sphere.vertices.astype(np.float32),
        uv=random.random((len(sphere.vertices), 2), dtype=np.float32),
        texture=random.integers(0, 256, (1024, 1024, 3), dtype=np.uint8),
    )
    assert write_glb(mesh, tmp_path / "worst.glb").stat().st_size <= 5_000_000


@pytest.mark.parametrize("field", ["vertices", "normals", "uv"])
@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply"])
def test_values_that_are_not_finite_are_refused(
    box_mesh: TexturedMesh, tmp_path: Path, suffix: str, field: str
) -> None:
    path = tmp_path / f"box{suffix}"
    write_mesh(box_mesh, path)
    before = {item.name: item.read_bytes() for item in tmp_path.iterdir()}
    values = getattr(box_mesh, field).copy()
    values[3] = np.nan
    with pytest.raises(Uni3DError, match=f"{field} hold values that are not finite"):
        write_mesh(replace(box_mesh, **{field: values}), path)
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == before


def test_extras_that_json_cannot_hold_are_refused(box_mesh: TexturedMesh, tmp_path: Path) -> None:
    for value in (float("nan"), torch.zeros(1), {1, 2}):
        with pytest.raises(UsageError, match="plain finite JSON values"):
            write_glb(box_mesh, tmp_path / "box.glb", {"bad": value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply"])
def test_a_write_that_fails_leaves_the_old_file(
    box_mesh: TexturedMesh, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_mesh(box_mesh, tmp_path / f"box{suffix}")
    before = {item.name: item.read_bytes() for item in tmp_path.iterdir()}

    def disk_full(self: Path, *_: object, **__: object) -> None:
        with self.open("wb") as file:
            file.write(b"half a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    monkeypatch.setattr(Path, "write_text", disk_full)
    darker = replace(box_mesh, texture=box_mesh.texture // 2, vertices=box_mesh.vertices[:, [1, 2, 0]])
    with pytest.raises(OSError, match="No space left"):
        write_mesh(darker, path)
    after = {item.name: item.read_bytes() for item in tmp_path.iterdir()}
    assert after[path.name] == before[path.name] and after.keys() == before.keys()


def test_unknown_suffixes_are_refused(box_mesh: TexturedMesh, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"use \.glb, \.obj, \.ply, \.stl, \.usdz"):
        write_mesh(box_mesh, tmp_path / "box.fbx")


def test_an_empty_or_inconsistent_mesh_is_refused(box_mesh: TexturedMesh, tmp_path: Path) -> None:
    with pytest.raises(Uni3DError, match="no triangles"):
        write_glb(replace(box_mesh, faces=box_mesh.faces[:0]), tmp_path / "box.glb")
    with pytest.raises(Uni3DError, match="do not exist"):
        write_glb(replace(box_mesh, faces=box_mesh.faces + 10**6), tmp_path / "box.glb")


@pytest.mark.parametrize("unlit", [True, False])
@pytest.mark.parametrize("max_bytes", [5_000_000, 150_000])
def test_gltf_validator_finds_nothing(
    box_mesh: TexturedMesh, tmp_path: Path, unlit: bool, max_bytes: int
) -> None:
    if validator_package() is None or shutil.which("node") is None:
        pytest.skip("needs node and `npm install gltf-validator` (folder in UNI3D_GLTF_VALIDATOR)")
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    mesh = replace(box_mesh, texture=noise)
    path = write_glb(mesh, tmp_path / "box.glb", EXTRAS, unlit=unlit, max_bytes=max_bytes)
    found = validate_glb(path)
    assert found == {"errors": 0, "warnings": 0, "infos": 0, "hints": 0, "messages": []}


def test_gltf_validator_counts_what_it_finds(box_mesh: TexturedMesh, tmp_path: Path) -> None:
    if validator_package() is None or shutil.which("node") is None:
        pytest.skip("needs node and `npm install gltf-validator` (folder in UNI3D_GLTF_VALIDATOR)")
    path = write_glb(box_mesh, tmp_path / "box.glb", EXTRAS)
    path.write_bytes(path.read_bytes()[:-40])
    found = validate_glb(path)
    assert isinstance(found, dict) and found["errors"] > 0 and found["messages"]


def test_what_is_written_is_sound(box_mesh: TexturedMesh, tmp_path: Path) -> None:
    report = mesh_report(write_glb(box_mesh, tmp_path / "box.glb", EXTRAS))
    assert report["problems"] == [] and report["sound"]


def test_long_indices_are_used_for_many_vertices() -> None:
    sphere = trimesh.creation.icosphere(subdivisions=7)
    mesh = TexturedMesh(
        sphere.vertices.astype(np.float32),
        sphere.faces.astype(np.int64),
        sphere.vertices.astype(np.float32),
        np.zeros((len(sphere.vertices), 2), np.float32),
        np.zeros((64, 64, 3), np.uint8),
    )
    assert len(mesh.vertices) > 65535
    content = glb_writer._glb_bytes(mesh, b"", "image/png", name="ball", unlit=True, extras={})
    document = json.loads(content[20 : 20 + int.from_bytes(content[12:16], "little")])
    assert document["accessors"][3]["componentType"] == 5125
    offset = 28 + int.from_bytes(content[12:16], "little") + document["bufferViews"][3]["byteOffset"]
    indices = np.frombuffer(content, "<u4", count=mesh.faces.size, offset=offset)
    np.testing.assert_array_equal(indices.reshape(-1, 3), mesh.faces)


def _document(path: Path) -> dict:
    content = path.read_bytes()
    return json.loads(content[20 : 20 + int.from_bytes(content[12:16], "little")])
