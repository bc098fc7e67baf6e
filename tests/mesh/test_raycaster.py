"""The ray caster: camera convention, textures, light, reading of files, refusal of unsafe ones."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from glb_samples import TRIANGLE, glb_bytes, triangle_document
from PIL import Image

from uni3d.errors import UsageError
from uni3d.mesh.raycaster import Light, Material, Raycaster, RenderableMesh, load_renderable
from uni3d.mesh.renderable import linear_to_srgb, safe_relative_name, srgb_to_linear
from uni3d.scene.camera import Cameras

FACE_COLOURS = {
    (0, 0, 1): (0.9, 0.1, 0.1),
    (0, 0, -1): (0.1, 0.9, 0.1),
    (1, 0, 0): (0.1, 0.1, 0.9),
    (-1, 0, 0): (0.9, 0.9, 0.1),
    (0, 1, 0): (0.9, 0.1, 0.9),
    (0, -1, 0): (0.1, 0.9, 0.9),
}


def coloured_cube() -> trimesh.Scene:
    """A cube whose six faces are six meshes with plain materials (factors linear, as glTF has them)."""
    box = trimesh.creation.box()
    scene = trimesh.Scene()
    for normal, colour in FACE_COLOURS.items():
        part = box.submesh([np.nonzero(box.face_normals @ np.array(normal) > 0.9)[0]], append=True)
        factor = [*srgb_to_linear(np.array(colour)), 1.0]
        material = trimesh.visual.material.PBRMaterial(baseColorFactor=factor, alphaMode="OPAQUE")
        part.visual = trimesh.visual.TextureVisuals(uv=np.zeros((len(part.vertices), 2)), material=material)
        scene.add_geometry(part)
    return scene


@pytest.fixture
def cube_path(tmp_path: Path) -> Path:
    path = tmp_path / "cube.glb"
    path.write_bytes(coloured_cube().export(file_type="glb"))
    return path


def quad(texture: np.ndarray | None, *, colour: tuple[float, ...] = (1, 1, 1, 1)) -> RenderableMesh:
    """Unit square in the plane z = 0 facing +Z; v runs down, as in glTF."""
    corners = np.array([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]], np.float32)
    uv = np.array([[0, 1], [1, 1], [1, 0], [0, 0]], np.float32)
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    return RenderableMesh(
        vertices=corners,
        faces=faces,
        corner_normals=None,
        corner_uv=uv[faces],
        corner_colour=None,
        face_material=np.zeros(2, np.int64),
        materials=[Material(np.array(colour, np.float32), texture)],
    )


def centre_colour(mesh: RenderableMesh, azimuth: float, elevation: float) -> np.ndarray:
    view = Raycaster(mesh).render(Cameras.from_lists([azimuth], [elevation]), 33)
    assert view.alpha[16, 16] == 1
    return view.rgb[16, 16]


@pytest.mark.parametrize(
    ("azimuth", "elevation", "normal"),
    [
        (0, 0, (0, 0, 1)),
        (90, 0, (1, 0, 0)),
        (180, 0, (0, 0, -1)),
        (-90, 0, (-1, 0, 0)),
        (0, 90, (0, 1, 0)),
        (0, -90, (0, -1, 0)),
    ],
)
def test_each_side_of_a_cube_is_seen_from_its_camera(
    cube_path: Path, azimuth: float, elevation: float, normal: tuple[int, int, int]
) -> None:
    mesh = load_renderable(cube_path).in_unit_box()
    np.testing.assert_allclose(centre_colour(mesh, azimuth, elevation), FACE_COLOURS[normal], atol=0.02)


def test_right_of_the_picture_is_plus_x_and_rows_start_at_the_top(cube_path: Path) -> None:
    mesh = load_renderable(cube_path).in_unit_box()
    view = Raycaster(mesh).render(Cameras.from_lists([30.0], [30.0]), 64)
    colour_right = view.rgb[40, 46]
    np.testing.assert_allclose(colour_right, FACE_COLOURS[1, 0, 0], atol=0.05)
    top_row = np.nonzero(view.alpha[:, 32])[0][0]
    np.testing.assert_allclose(view.rgb[top_row + 2, 32], FACE_COLOURS[0, 1, 0], atol=0.05)


def test_silhouette_agrees_with_the_rays_of_the_camera(cube_path: Path) -> None:
    mesh = load_renderable(cube_path).in_unit_box()
    camera = Cameras.from_lists([37.0], [22.0])
    view = Raycaster(mesh).render(camera, 48, supersample=1)
    origins, directions = camera.rays(48, 48)
    near = (-0.5 * directions.sign() - origins) / directions
    far = (0.5 * directions.sign() - origins) / directions
    hits = (near.amax(dim=-1) < far.amin(dim=-1))[0].numpy()
    assert (hits != (view.alpha > 0)).mean() < 0.002


def test_texture_is_looked_up_with_v_down() -> None:
    texture = np.ones((2, 2, 4), np.float32)
    texture[0, 0, :3], texture[0, 1, :3] = (1, 0, 0), (0, 1, 0)
    texture[1, 0, :3], texture[1, 1, :3] = (0, 0, 1), (1, 1, 0)
    texture = texture.repeat(32, axis=0).repeat(32, axis=1)
    view = Raycaster(quad(texture)).render(Cameras.from_lists([0.0], [0.0]), 64)
    np.testing.assert_allclose(view.rgb[22, 22], (1, 0, 0), atol=0.02)
    np.testing.assert_allclose(view.rgb[22, 42], (0, 1, 0), atol=0.02)
    np.testing.assert_allclose(view.rgb[42, 22], (0, 0, 1), atol=0.02)
    np.testing.assert_allclose(view.rgb[42, 42], (1, 1, 0), atol=0.02)


def test_fine_textures_are_averaged_not_aliased() -> None:
    stripes = np.ones((512, 512, 4), np.float32)
    stripes[:, ::2, :3] = 0
    view = Raycaster(quad(stripes)).render(Cameras.from_lists([0.0], [0.0]), 32)
    inside = view.rgb[view.alpha > 0.99]
    assert inside.std() < 0.05
    np.testing.assert_allclose(inside.mean(), 0.5, atol=0.05)


def test_cut_out_texels_show_what_lies_behind() -> None:
    hole = np.ones((16, 16, 4), np.float32)
    hole[:, :8, 3] = 0
    view = Raycaster(quad(hole)).render(Cameras.from_lists([0.0], [0.0]), 64)
    assert view.alpha[32, 22] == 0
    assert view.alpha[32, 42] == 1


def test_light_is_fixed_to_the_world_and_bounded() -> None:
    mesh = quad(None)
    light = Light()
    front, back = (
        Raycaster(mesh).render(Cameras.from_lists([a], [0.0]), 33, light=light).rgb[16, 16, 0]
        for a in (0.0, 180.0)
    )
    assert front > back + 0.1
    normals = torch.nn.functional.normalize(
        torch.randn(500, 3, generator=torch.Generator().manual_seed(0)), dim=1
    )
    shade = light.shade(normals.numpy())
    assert 0.45 < shade.min() < 0.6
    assert 0.9 < shade.max() <= 1.0


def test_coverage_of_sums_to_alpha(cube_path: Path) -> None:
    view = Raycaster(load_renderable(cube_path).in_unit_box()).render(Cameras.from_lists([30.0], [20.0]), 32)
    chosen = view.hit_material == view.hit_material[0]
    parts = view.coverage_of(chosen) + view.coverage_of(~chosen)
    np.testing.assert_allclose(parts, view.alpha, atol=1e-6)
    assert 0 < chosen.mean() < 1


def test_obj_with_material_library_and_texture(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (200, 40, 40)).save(tmp_path / "paint.png")
    (tmp_path / "things.mtl").write_text("newmtl painted\nmap_Kd paint.png\nnewmtl plain\nKd 0.2 0.4 0.8\n")
    (tmp_path / "thing.obj").write_text(
        "mtllib things.mtl\nv -1 -1 0\nv 1 -1 0\nv 1 1 0\nv -1 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"
        "usemtl painted\nf 1/1 2/2 3/3\nusemtl plain\nf 1 3 4\n"
    )
    mesh = load_renderable(tmp_path / "thing.obj").in_unit_box()
    view = Raycaster(mesh).render(Cameras.from_lists([0.0], [0.0]), 64)
    np.testing.assert_allclose(view.rgb[40, 40], np.array([200, 40, 40]) / 255, atol=0.02)
    np.testing.assert_allclose(view.rgb[24, 24], (0.2, 0.4, 0.8), atol=0.02)


def test_references_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    for name in ("../secret.mtl", "/etc/passwd", "http://host/x.png", "a/../../b"):
        with pytest.raises(UsageError, match="outside"):
            safe_relative_name(name)
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "secret.mtl").write_text("newmtl m\nKd 1 0 0\n")
    (inner / "a.obj").write_text("mtllib ../secret.mtl\nusemtl m\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    try:
        mesh = load_renderable(inner / "a.obj")
    except UsageError:
        return
    assert not np.allclose(mesh.materials[0].colour[:3], (1, 0, 0))


def test_embedded_data_is_read_and_nodes_are_applied() -> None:
    uri = "data:application/octet-stream;base64," + base64.b64encode(TRIANGLE).decode()
    mesh = load_renderable("x.glb", data=glb_bytes(triangle_document(uri)))
    np.testing.assert_allclose(mesh.vertices, [[1, 0, 0], [3, 0, 0], [1, 2, 0]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (glb_bytes(triangle_document("other.bin")), "external file"),
        (glb_bytes(triangle_document(None, num_vertices=300_000), TRIANGLE), "damaged"),
        (glb_bytes(triangle_document(None), TRIANGLE)[:-20], "cut off"),
        (b"glTF", "header"),
        (b"", "header"),
        (b"\x00" * 500, "header"),
    ],
)
def test_damaged_and_external_glbs_are_refused_in_one_sentence(content: bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_renderable("x.glb", data=content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.ply", b"ply\nformat ascii 1.0\nele"),
        ("empty.ply", b""),
        ("cut.glb", glb_bytes(triangle_document(None), TRIANGLE)[:-20]),
        ("text.glb", b"not a GLB at all"),
        ("text.obj", b"hello"),
        ("odd.obj", b"v 1 2\nf 1 2 3\n"),
        ("flat.obj", b"v 0 0 0\nv 1 0 0\nf 1 2 2\n"),
        ("other.stl", b"solid"),
        ("other.fbx", b"Kaydara"),
        ("none.glb", None),
    ],
)
def test_refusals_name_the_file_and_a_way_on(name: str, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_renderable(path)
    message = str(caught.value)
    assert message.startswith(f"'{path}' cannot be read: ") and "; " in message
    assert "\n" not in message and "Error" not in message


def test_random_damage_never_escapes_as_another_error(cube_path: Path) -> None:
    content = bytearray(cube_path.read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(content)
        for position in rng.integers(12, len(broken), size=6):
            broken[position] = rng.integers(256)
        try:
            load_renderable("x.glb", data=bytes(broken))
        except UsageError:
            pass


def test_face_limit_and_unknown_suffix(cube_path: Path) -> None:
    with pytest.raises(UsageError, match="12 triangles"):
        load_renderable(cube_path, max_faces=11)
    with pytest.raises(UsageError, match=r"'\.fbx' is not one of \.glb, \.obj, \.ply, \.stl"):
        load_renderable("x.fbx", data=b"Kaydara")


def test_skinned_mesh_is_posed_by_its_joints() -> None:
    joints = np.zeros((3, 4), "u1").tobytes()
    weights = np.array([[1, 0, 0, 0]] * 3, "<f4").tobytes()
    binary = TRIANGLE + joints + weights
    document = triangle_document(None)
    document.update(
        buffers=[{"byteLength": len(binary)}],
        bufferViews=[
            {"buffer": 0, "byteOffset": 0, "byteLength": 36},
            {"buffer": 0, "byteOffset": 36, "byteLength": 12},
            {"buffer": 0, "byteOffset": 48, "byteLength": 48},
        ],
        accessors=[
            {"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"},
            {"bufferView": 1, "componentType": 5121, "count": 3, "type": "VEC4"},
            {"bufferView": 2, "componentType": 5126, "count": 3, "type": "VEC4"},
        ],
        meshes=[{"primitives": [{"attributes": {"POSITION": 0, "JOINTS_0": 1, "WEIGHTS_0": 2}}]}],
        nodes=[{"mesh": 0, "skin": 0, "translation": [9, 9, 9]}, {"translation": [0, 0, 5]}],
        skins=[{"joints": [1]}],
        scenes=[{"nodes": [0, 1]}],
    )
    mesh = load_renderable("x.glb", data=glb_bytes(document, binary))
    # The node's own transform is ignored for skinned meshes (glTF 2.0, section 3.7.3.3).
    np.testing.assert_allclose(mesh.vertices, [[0, 0, 5], [1, 0, 5], [0, 1, 5]])


def test_a_primitive_without_material_is_white() -> None:
    """As is a material that says nothing (glTF 2.0, sections 3.9 and 5.22)."""
    plain = load_renderable("x.glb", data=glb_bytes(triangle_document(None), TRIANGLE))
    np.testing.assert_allclose(plain.materials[plain.face_material[0]].colour, 1.0, atol=1e-6)
    document = triangle_document(None) | {"materials": [{}]}
    document["meshes"] = [{"primitives": [{"attributes": {"POSITION": 0}, "material": 0}]}]
    silent = load_renderable("x.glb", data=glb_bytes(document, TRIANGLE))
    np.testing.assert_allclose(silent.materials[silent.face_material[0]].colour, 1.0, atol=1e-6)


def test_srgb_functions_are_inverse() -> None:
    values = np.linspace(0, 1, 50, dtype=np.float32)
    np.testing.assert_allclose(linear_to_srgb(srgb_to_linear(values)), values, atol=1e-5)


def test_turning_by_ninety_degrees_brings_the_front_to_plus_x(cube_path: Path) -> None:
    mesh = load_renderable(cube_path).in_unit_box().turned(90)
    np.testing.assert_allclose(centre_colour(mesh, 90, 0), FACE_COLOURS[0, 0, 1], atol=0.02)
