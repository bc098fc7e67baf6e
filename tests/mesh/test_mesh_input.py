"""Meshes that strangers made: read as they are, or refused in one sentence; never a traceback."""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from glb_samples import TRIANGLE, glb_bytes, triangle_document
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from uni3d.errors import UsageError
from uni3d.mesh import mesh_input
from uni3d.mesh.base_colour import colour_at
from uni3d.mesh.export import write_glb, write_obj, write_ply
from uni3d.mesh.mesh_files import load_mesh_file, load_renderable
from uni3d.mesh.mesh_input import InputLimits, packed, read_untrusted_file, read_untrusted_mesh, unpacked
from uni3d.mesh.textured_mesh import TexturedMesh

OBJ = "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nvt 0 0\nvt 1 0\nvt 0 1\n"
FACE = "usemtl a\nf 1/1 2/2 3/3\n"


def picture(size: tuple[int, int] = (4, 4), kind: str = "PNG") -> bytes:
    """An encoded orange picture."""
    encoded = io.BytesIO()
    Image.new("RGB", size, (255, 128, 0)).save(encoded, format=kind)
    return encoded.getvalue()


def textured_triangle(image: bytes, **changes: Any) -> bytes:
    """A GLB of one triangle with texture coordinates and a picture; `changes` replace parts of its JSON."""
    uv = np.array([[0, 0], [1, 0], [0, 1]], "<f4").tobytes()
    binary = TRIANGLE + uv + image
    document = triangle_document(None) | {
        "buffers": [{"byteLength": len(binary)}],
        "bufferViews": [
            {"buffer": 0, "byteLength": 36},
            {"buffer": 0, "byteOffset": 36, "byteLength": 24},
            {"buffer": 0, "byteOffset": 60, "byteLength": len(image)},
        ],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"},
            {"bufferView": 1, "componentType": 5126, "count": 3, "type": "VEC2"},
        ],
        "images": [{"bufferView": 2, "mimeType": "image/png"}],
        "textures": [{"source": 0}],
        "materials": [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0, "TEXCOORD_0": 1}, "material": 0}]}],
    }
    return glb_bytes(document | changes, binary)


def claiming(side: int) -> bytes:
    """A PNG of 16 pixels whose header claims `side` squared."""
    content = picture()
    header = content[12:16] + side.to_bytes(4, "big") * 2 + content[24:29]
    return content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:]


def as_equal(first: Any, second: Any) -> None:
    np.testing.assert_array_equal(first.vertices, second.vertices)
    np.testing.assert_array_equal(first.faces, second.faces)
    np.testing.assert_array_equal(first.face_material, second.face_material)
    for name in ("corner_normals", "corner_uv", "corner_colour"):
        left, right = getattr(first, name), getattr(second, name)
        assert (left is None) == (right is None), name
        if left is not None:
            np.testing.assert_array_equal(left, right)
    for left, right in zip(first.materials, second.materials, strict=True):
        assert left.name == right.name
        np.testing.assert_array_equal(left.colour, right.colour)
        assert (left.texture is None) == (right.texture is None)
        if left.texture is not None:
            np.testing.assert_allclose(left.texture, right.texture, atol=0.5 / 255)


def test_a_textured_glb_comes_through_the_process_unchanged(box_mesh: TexturedMesh, tmp_path: Path) -> None:
    path = write_glb(box_mesh, tmp_path / "box.glb", {"prompt": "a box"})
    before = path.read_bytes()
    file = read_untrusted_file(path)
    as_equal(file.mesh, load_renderable(path))
    assert file.picture_sizes == ((512, 512),) and file.is_unlit and file.extras["prompt"] == "a box"
    assert path.read_bytes() == before and [item.name for item in tmp_path.iterdir()] == ["box.glb"]


def test_every_kind_of_mesh_is_read(box_mesh: TexturedMesh, tmp_path: Path) -> None:
    """Vertex colours, several materials and textures, no colour, an open and a non-manifold surface."""
    write_ply(box_mesh, tmp_path / "colours.ply")
    write_obj(box_mesh, tmp_path / "texture.obj")
    trimesh.creation.icosphere(subdivisions=2).export(tmp_path / "plain.stl")
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "a.mtl").write_text("newmtl a\nmap_Kd a.png\nnewmtl b\nKd 0 0 1\n")
    fan = FACE + "usemtl b\nf 2 1 4\nf 1 2 3\n"
    (tmp_path / "fan.obj").write_text(f"mtllib a.mtl\n{OBJ}{fan}")
    for path in sorted(tmp_path.glob("*.[ops][btl][jly]")):
        file = load_mesh_file(path)
        as_equal(unpacked(packed(file)).mesh, file.mesh)
    fan_mesh = read_untrusted_mesh(tmp_path / "fan.obj")
    colours = colour_at(fan_mesh, np.arange(3), np.full((3, 3), 1 / 3))
    np.testing.assert_allclose(sorted(colours.tolist())[0], (0, 0, 1), atol=0.01)
    np.testing.assert_allclose(sorted(colours.tolist())[2], (1, 0.5, 0), atol=0.01)


def test_arrays_and_back(box_mesh: TexturedMesh, tmp_path: Path) -> None:
    file = load_mesh_file(write_glb(box_mesh, tmp_path / "box.glb"))
    arrays = packed(file)
    assert all(values.dtype.kind in "fiu" for values in arrays.values()), "nothing that needs a pickle"
    again = unpacked(arrays)
    as_equal(again.mesh, file.mesh)
    assert again == replace(file, mesh=again.mesh)
    for name, bad in {
        "faces": arrays["faces"] + 10**6,
        "face_material": arrays["face_material"] - 1,
        "vertices": arrays["vertices"][:, :2],
        "texture_0": arrays["texture_0"].astype(np.float32),
        "corner_uv": arrays["corner_uv"][1:],
    }.items():
        with pytest.raises(UsageError, match="handed back"):
            unpacked(arrays | {name: bad})


def test_a_shared_texture_travels_once() -> None:
    document = {"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}
    content = textured_triangle(picture(), materials=[document] * 3)
    arrays = packed(load_mesh_file("x.glb", data=content))
    assert [name for name in arrays if name.startswith("texture_") and name != "texture_of"] == ["texture_0"]


HOSTILE_GLB = {
    "empty": (b"", "header"),
    "text": (b"hello, this is no mesh at all", "header"),
    "cut off": (textured_triangle(picture())[:-30], "cut off"),
    "glTF 1": (b"glTF\x01\0\0\0" + b"\x18\0\0\0" + b"\4\0\0\0" + b"\0\0\0\0" + b"{}  ", "no glTF 2 file"),
    "no scene": (glb_bytes({"asset": {"version": "2.0"}}), "no triangles"),
    "points": (
        glb_bytes(
            triangle_document(None)
            | {"meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "mode": 0}]}]},
            TRIANGLE,
        ),
        "3 points or lines and no triangles",
    ),
    "external buffer": (glb_bytes(triangle_document("../../etc/passwd")), "external file"),
    "external picture": (textured_triangle(picture(), images=[{"uri": "http://a.b/c.png"}]), "external file"),
    "one point": (glb_bytes(triangle_document(None), b"\0" * 36), "has an area and finite corners"),
    "not finite": (glb_bytes(triangle_document(None), b"\xff" * 36), "has an area and finite corners"),
    "giant accessor": (glb_bytes(triangle_document(None, 10**9), TRIANGLE), "claims 1000000000 elements"),
    "too short": (glb_bytes(triangle_document(None, 10**4), TRIANGLE), "outside its buffer view"),
    "giant sparse": (
        glb_bytes(
            triangle_document(None)
            | {"accessors": [{"componentType": 5126, "count": 3, "type": "VEC3", "sparse": {"count": 10**9}}]}
        ),
        "sparse accessor replaces more",
    ),
    "deep JSON": (glb_bytes({"asset": {}})[:20] + b"[" * 10**5, "cut off"),
    "EPS picture": (textured_triangle(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "none of PNG"),
    "cut picture": (textured_triangle(picture((64, 64))[:80]), "texture is damaged"),
    "picture bomb": (
        textured_triangle(claiming(30_000)),
        "texture has more than 64000000 pixels",
    ),
    "large picture": (
        textured_triangle(claiming(9_000)),
        "texture has 9000x9000 pixels, more than the limit of 64000000",
    ),
    "meshopt": (
        textured_triangle(picture(), extensionsRequired=["EXT_meshopt_compression"]),
        "needs the glTF extension 'EXT_meshopt_compression'",
    ),
    "KTX2": (
        textured_triangle(picture(), images=[{"bufferView": 2, "mimeType": "image/ktx2"}]),
        "textures are KTX2",
    ),
    "cycle": (
        textured_triangle(picture(), nodes=[{"mesh": 0, "children": [0]}]),
        "holds a cycle",
    ),
}
OTHERS = {
    "points.ply": (
        b"ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nproperty float y\nproperty float z\n"
        b"end_header\n0 0 0\n1 1 1\n",
        "2 points or lines and no triangles",
    ),
    "giant.ply": (
        b"ply\nformat binary_little_endian 1.0\nelement vertex 99999999999\nproperty float x\n"
        b"property float y\nproperty float z\nend_header\n0000",
        "damaged",
    ),
    "cut.ply": (b"ply\nformat ascii 1.0\nele", "damaged"),
    "cut.stl": (b"\0" * 80 + (10**9).to_bytes(4, "little") + b"\0" * 50, "damaged|no triangles"),
    "points.obj": (b"v 0 0 0\nv 1 1 1\n", "2 points or lines and no triangles"),
    "index.obj": (b"v 0 0 0\nv 1 1 1\nf 1 2 9\n", "damaged"),
    "words.obj": (b"f a b c\n", "damaged|no triangles"),
    "flat.obj": (b"v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n", "has an area"),
}


def refusal(content: bytes, name: str = "x.glb") -> str:
    """The sentence with which a file is refused, read in this process."""
    with pytest.raises(UsageError) as caught:
        load_mesh_file(name, data=content)
    message = str(caught.value)
    assert "\n" not in message and "; " in message and "Error" not in message, message
    return message


@pytest.mark.parametrize("case", HOSTILE_GLB)
def test_hostile_glbs_are_refused_in_a_sentence(case: str) -> None:
    content, words = HOSTILE_GLB[case]
    assert words in refusal(content)


@pytest.mark.parametrize("name", OTHERS)
def test_other_hostile_files_are_refused_in_a_sentence(name: str) -> None:
    content, words = OTHERS[name]
    assert any(word in refusal(content, name) for word in words.split("|"))


@pytest.mark.parametrize("case", ["cut off", "EPS picture"])
def test_the_process_hands_back_the_sentence(case: str, tmp_path: Path) -> None:
    path = tmp_path / "mésh \udcff.glb"
    content, words = HOSTILE_GLB[case]
    path.write_bytes(content)
    with pytest.raises(UsageError, match=words) as caught:
        read_untrusted_mesh(path)
    assert caught.value.exit_code == 2 and path.read_bytes() == content


@pytest.mark.parametrize(
    ("library", "words"),
    [
        ("mtllib ../secret.mtl", "outside the folder"),
        ("mtllib /etc/passwd", "outside the folder"),
        ("mtllib link.mtl", "outside its folder"),
        ("mtllib climbs.mtl", "outside the folder"),
        ("mtllib http.mtl", "outside the folder"),
        ("mtllib ghost.mtl", "none of PNG"),
    ],
)
def test_an_obj_that_reaches_out_of_its_folder_is_refused(library: str, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "secret.mtl").write_text("newmtl a\nKd 1 0 0\n")
    (tmp_path / "secret.png").write_bytes(picture())
    (folder / "link.mtl").symlink_to(tmp_path / "secret.mtl")
    (folder / "climbs.mtl").write_text("newmtl a\nmap_Kd ..\\secret.png\n")
    (folder / "http.mtl").write_text("newmtl a\nmap_Kd http://127.0.0.1:9/x.png\n")
    (folder / "ghost.mtl").write_text("newmtl a\nmap_Kd ghost.mtl\n")
    (folder / "a.obj").write_text(f"{library}\n{OBJ}{FACE}")
    file = load_mesh_file(folder / "a.obj")
    assert words in file.refused and len(file.mesh.faces) == 1
    if library == "mtllib link.mtl":  # one is enough: the process refuses whatever has this sentence
        with pytest.raises(UsageError, match=words):
            read_untrusted_mesh(folder / "a.obj")


def test_what_is_missing_beside_an_obj_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.obj").write_text(f"mtllib a.mtl\n{OBJ}{FACE}")
    with caplog.at_level(logging.WARNING):
        assert len(read_untrusted_mesh(tmp_path / "a.obj").faces) == 1
    assert "refers to 'a.mtl', which is not beside it" in caplog.text


def test_paths_that_are_no_mesh_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.glb")
    (tmp_path / "folder.glb").mkdir()
    (tmp_path / "a.fbx").write_bytes(b"Kaydara")
    with (tmp_path / "large.glb").open("wb") as file:
        file.truncate(InputLimits().file_bytes + 1)
    for name, words in {
        "none.glb": "pass a file that exists",
        "x\0.glb": "pass a file that exists",
        "folder.glb": "is a folder",
        "pipe.glb": "is no ordinary file",
        "a.fbx": "convert it to one of .glb, .obj, .ply, .stl",
        "large.glb": "more than the limit of",
    }.items():
        with pytest.raises(UsageError, match=words):
            read_untrusted_mesh(tmp_path / name)


def test_instances_of_instances_stop_at_the_limit(tmp_path: Path) -> None:
    """A file of two kilobytes that asks for forty million triangles."""
    document = triangle_document(None) | {
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"},
            {"componentType": 5125, "count": 600_000, "type": "SCALAR"},
        ],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}],
        "nodes": [{"mesh": 0}] * 200,
        "scenes": [{"nodes": list(range(200))}],
    }
    path = tmp_path / "many.glb"
    path.write_bytes(glb_bytes(document, TRIANGLE))
    with pytest.raises(UsageError, match="above the limit of 2000000; simplify it"):
        read_untrusted_mesh(path)


def test_memory_processor_and_clock_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.glb"
    path.write_bytes(textured_triangle(picture((8000, 4000))))
    with pytest.raises(UsageError, match="needs more than 256 MB to be read"):
        read_untrusted_mesh(path, limits=InputLimits(memory_bytes=256 * 2**20))
    with pytest.raises(UsageError, match="within 0.01 s, the limit"):
        read_untrusted_mesh(path, limits=InputLimits(wall_s=0.01))
    with pytest.raises(UsageError, match="has 2 materials, more than the limit of 1"):
        read_untrusted_mesh(path, limits=InputLimits(materials=1))
    # The limit on processor time, with a body that never ends.
    script = (
        "from uni3d.mesh.mesh_input_process import *\nlimit_resources(InputLimits(cpu_s=1))\nwhile True: 0"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode in (-24, -9)
    monkeypatch.setattr(mesh_input.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -24))
    with pytest.raises(UsageError, match="processor time"):
        read_untrusted_mesh(path)
    monkeypatch.setattr(mesh_input.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -11))
    with pytest.raises(UsageError, match="made the reader fail"):
        read_untrusted_mesh(path)


FUZZ = """
import sys
from pathlib import Path
import numpy as np
from uni3d.errors import UsageError
from uni3d.mesh.mesh_files import load_mesh_file
from uni3d.mesh.mesh_input_process import InputLimits, limit_resources

limit_resources(InputLimits(memory_bytes=2 * 2**30))
random = np.random.default_rng(0)
for path in map(Path, sys.argv[1:]):
    content = path.read_bytes()
    cuts = random.integers(0, len(content), 40)
    damaged = [content[:cut] for cut in cuts]
    for _ in range(60):
        flipped = bytearray(content)
        for position in random.integers(0, min(len(content), 3000), 4):
            flipped[position] ^= 1 << int(random.integers(8))
        damaged.append(bytes(flipped))
    for number, data in enumerate(damaged):
        try:
            load_mesh_file(path, data=data, max_faces=10_000, max_vertices=30_000)
        except UsageError as error:
            assert str(error).count("\\n") == 0 and "; " in str(error), error
        except BaseException as error:
            raise SystemExit(f"{path.name} {number}: {error!r}") from error
"""


def test_cuts_and_flipped_bits_never_escape_as_another_error(tmp_path: Path) -> None:
    """500 damaged files in one process with two gigabytes."""
    sphere = trimesh.creation.icosphere(subdivisions=1)
    sphere.visual = trimesh.visual.TextureVisuals(
        uv=sphere.vertices[:, :2],
        material=trimesh.visual.material.PBRMaterial(baseColorTexture=Image.new("RGB", (16, 16))),
    )
    sphere.export(tmp_path / "a.glb")
    (tmp_path / "b.glb").write_bytes(textured_triangle(picture((32, 32))))
    plain = trimesh.creation.icosphere(subdivisions=1)
    for name in ("c.ply", "d.stl", "e.obj"):
        plain.export(tmp_path / name)
    files = sorted(map(str, tmp_path.iterdir()))
    done = subprocess.run([sys.executable, "-c", FUZZ, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-3, 300),
    st.floats(),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
    st.just([[0]]),
    st.just("data:;base64,AAAA"),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return [path] * bool(path) + [found for key, child in children for found in places(child, (*path, key))]


DOCUMENT = json.loads(textured_triangle(picture())[20:].split(b"\0")[0].rpartition(b"}")[0] + b"}")


@given(st.lists(st.tuples(st.sampled_from(places(DOCUMENT)), ODD), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_tampered_json_is_read_or_refused(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    document = copy.deepcopy(DOCUMENT)
    for path, value in changes:
        holder = document
        try:
            for key in path[:-1]:
                holder = holder[key]
            holder[path[-1]] = copy.deepcopy(value)  # ODD hands out the same list and dict every time
        except (TypeError, LookupError):
            continue  # an earlier change took this place away
    binary = textured_triangle(picture())[-(60 + len(picture()) + 3) :]
    try:
        load_mesh_file("x.glb", data=glb_bytes(document, binary), max_faces=1000, max_vertices=3000)
    except UsageError as error:
        assert "; " in str(error)
