"""Textured meshes into files: GLB first, OBJ and PLY on request.

The last step of the mesh room. The exported object is Y up with its front towards +Z, centred in the unit
box, its node has no transform, and the file carries where it came from. Files appear whole or not at all.

Why the material is unlit: the colours were learned from lit pictures, so they already hold the light. A
viewer that lights them again darkens every shadow twice. glTF has a word for this, KHR_materials_unlit:
viewers that know it (three.js, Babylon.js, model-viewer, Blender, Unity, Unreal, Godot) show exactly the
colours of the preview. It is listed as used, not as required: other viewers fall back on the metallic 0,
roughness 1 material underneath, which is the mildest relighting there is; that is also why normals are
written. `unlit=False` leaves the extension out for scenes that want to relight the object. Legend: V
vertices, F faces.
"""

from __future__ import annotations

import io
import json
import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from uni3d.errors import Uni3DError, UsageError
from uni3d.mesh.textured_mesh import TexturedMesh
from uni3d.outputs import obj_companions
from uni3d.training.checkpoint import atomic_write

__all__ = ["TexturedMesh", "write_glb", "write_mesh", "write_obj", "write_ply"]

logger = logging.getLogger(__name__)

MAX_BYTES = 5_000_000
JPEG_QUALITIES = (95, 90, 85, 75, 60)

_GLB_MAGIC, _GLB_VERSION, _JSON_CHUNK, _BIN_CHUNK = 0x46546C67, 2, 0x4E4F534A, 0x004E4942
_FLOAT, _UNSIGNED_SHORT, _UNSIGNED_INT = 5126, 5123, 5125
_VERTEX_BUFFER, _INDEX_BUFFER = 34962, 34963
_LINEAR, _LINEAR_MIPMAP_LINEAR, _CLAMP = 9729, 9987, 33071


def write_mesh(
    mesh: TexturedMesh,
    path: str | Path,
    extras: dict[str, Any] | None = None,
    *,
    unlit: bool = True,
    unit_box: bool = True,
    roughness: float = 1.0,
    metalness: float = 0.0,
    max_bytes: int = MAX_BYTES,
) -> Path:
    """Write `mesh` in the format of the suffix of `path`: .glb, .obj or .ply; UsageError for another one.

    unit_box as in `write_glb`, for every format; the rest is for GLB alone.
    """
    match Path(path).suffix.lower():
        case ".glb":
            return write_glb(
                mesh,
                path,
                extras,
                unlit=unlit,
                unit_box=unit_box,
                roughness=roughness,
                metalness=metalness,
                max_bytes=max_bytes,
            )
        case ".obj":
            return write_obj(mesh, path, extras, unit_box=unit_box)
        case ".ply":
            return write_ply(mesh, path, extras, unit_box=unit_box)
        case suffix:
            raise UsageError(f"cannot write a mesh as '{suffix or Path(path).name}'; use .glb, .obj or .ply")


def write_glb(
    mesh: TexturedMesh,
    path: str | Path,
    extras: dict[str, Any] | None = None,
    *,
    name: str = "object",
    unlit: bool = True,
    unit_box: bool = True,
    roughness: float = 1.0,
    metalness: float = 0.0,
    max_bytes: int = MAX_BYTES,
) -> Path:
    """Write one binary glTF 2.0 file and return its path.

    extras: JSON values (prompt, seed, method, versions, ...) kept in `asset.extras`, to which `scene_scale`
    and `scene_centre` are added: scene position = position in the file * scale + centre. name: of node,
    mesh and material. unit_box: centre the object and make its longest side 1. roughness, metalness:
    constants of the material in [0, 1], seen where the texture is lit. The texture is a PNG if the file then
    stays within `max_bytes`, else a JPEG of the best quality that does.

    Raises Uni3DError for numbers that are not finite or a mesh that is inconsistent, UsageError for extras
    that JSON cannot hold or a file that cannot be made small enough; an existing file is then left as it
    was.
    """
    mesh, placed = _placed(mesh, extras, unit_box)
    content = b""
    constants = {"metallicFactor": metalness, "roughnessFactor": roughness}
    for image, mime_type in _encodings(mesh.texture):
        content = _glb_bytes(
            mesh, image, mime_type, name=name, unlit=unlit, constants=constants, extras=placed
        )
        if len(content) <= max_bytes:
            return _write_bytes(path, content)
        logger.info("%s texture makes %d bytes, more than %d", mime_type, len(content), max_bytes)
    raise UsageError(
        f"the mesh needs {len(content)} bytes and {max_bytes} are allowed; "
        "use fewer triangles or a smaller texture"
    )


def write_obj(
    mesh: TexturedMesh, path: str | Path, extras: dict[str, Any] | None = None, *, unit_box: bool = True
) -> Path:
    """Write a Wavefront OBJ with a material library and a PNG of the same name beside it; returns the OBJ's
    path.

    unit_box as in `write_glb`; Y up; the extras and the placement become comment lines. The OBJ comes last,
    so that whoever sees it finds the other two.
    """
    mesh, placed = _placed(mesh, extras, unit_box)
    path = Path(path)
    library, picture = obj_companions(path)
    # illum 0: the colour as it is, without lights
    material = f"newmtl surface\nKa 0 0 0\nKd 1 1 1\nKs 0 0 0\nillum 0\nmap_Kd {picture.name}\n"
    lines = [f"# {key}: {_json(value)}" for key, value in placed.items()]
    lines += [f"mtllib {library.name}", f"o {library.stem}"]
    lines += [f"v {x:.7g} {y:.7g} {z:.7g}" for x, y, z in mesh.vertices.tolist()]
    lines += [f"vt {u:.7g} {1 - v:.7g}" for u, v in mesh.uv.tolist()]
    lines += [f"vn {x:.5g} {y:.5g} {z:.5g}" for x, y, z in mesh.normals.tolist()]
    lines += ["usemtl surface"]
    lines += [f"f {a}/{a}/{a} {b}/{b}/{b} {c}/{c}/{c}" for a, b, c in (mesh.faces + 1).tolist()]
    text = "\n".join(lines) + "\n"
    atomic_write(picture, lambda temporary: Image.fromarray(mesh.texture).save(temporary, format="PNG"))
    atomic_write(library, lambda temporary: temporary.write_text(material, encoding="utf-8"))
    return atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_ply(
    mesh: TexturedMesh, path: str | Path, extras: dict[str, Any] | None = None, *, unit_box: bool = True
) -> Path:
    """Write a binary PLY with one sRGB colour per vertex, without texture and seams; Y up, unit_box as in
    `write_glb`."""
    mesh, placed = _placed(mesh, extras, unit_box)
    positions, first, welded = np.unique(mesh.vertices, axis=0, return_index=True, return_inverse=True)
    layout = [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("nx", "<f4"), ("ny", "<f4"), ("nz", "<f4")]
    layout += [("red", "u1"), ("green", "u1"), ("blue", "u1")]
    rows = np.zeros(len(positions), layout)
    for index, axis in enumerate("xyz"):
        rows[axis], rows[f"n{axis}"] = positions[:, index], mesh.normals[first, index]
    for index, channel in enumerate(("red", "green", "blue")):
        rows[channel] = mesh.vertex_colours()[first, index]
    triangles = np.zeros(len(mesh.faces), [("count", "u1"), ("index", "<i4", 3)])
    triangles["count"], triangles["index"] = 3, welded.reshape(-1)[mesh.faces]
    header = ["ply", "format binary_little_endian 1.0"]
    # PLY headers are ASCII
    header += [f"comment {key}: {_json(value, ascii_only=True)}" for key, value in placed.items()]
    header += [f"element vertex {len(rows)}"]
    header += [f"property {'uchar' if kind == 'u1' else 'float'} {key}" for key, kind in layout]
    header += [f"element face {len(triangles)}", "property list uchar int vertex_indices", "end_header"]
    content = ("\n".join(header) + "\n").encode("ascii") + rows.tobytes() + triangles.tobytes()
    return _write_bytes(path, content)


def _placed(
    mesh: TexturedMesh, extras: dict[str, Any] | None, unit_box: bool
) -> tuple[TexturedMesh, dict[str, Any]]:
    """The checked mesh where the file shows it, and the extras with the way back to the scene."""
    _check(mesh)
    centre, scale = np.zeros(3), 1.0
    if unit_box:
        mesh, centre, scale = mesh.in_unit_box()
    placement = {"scene_scale": scale, "scene_centre": [float(value) for value in centre]}
    return mesh, (extras or {}) | placement


def _glb_bytes(
    mesh: TexturedMesh,
    image: bytes,
    mime_type: str,
    *,
    name: str,
    unlit: bool,
    constants: dict[str, float],
    extras: dict[str, Any],
) -> bytes:
    """The whole file: header, JSON chunk, binary chunk."""
    # 65535 is kept free: it means "restart" to graphics drivers
    index_type, index_code = (
        ("<u2", _UNSIGNED_SHORT) if len(mesh.vertices) < 65535 else ("<u4", _UNSIGNED_INT)
    )
    indices = mesh.faces.reshape(-1).astype(index_type)
    parts = [
        (mesh.vertices.astype("<f4").tobytes(), _VERTEX_BUFFER),
        (mesh.normals.astype("<f4").tobytes(), _VERTEX_BUFFER),
        (mesh.uv.astype("<f4").tobytes(), _VERTEX_BUFFER),
        (indices.tobytes(), _INDEX_BUFFER),
        (image, None),
    ]
    binary, views = b"", []
    for content, target in parts:
        view: dict[str, Any] = {"buffer": 0, "byteOffset": len(binary), "byteLength": len(content)}
        views.append(view | ({"target": target} if target else {}))
        binary += content + b"\0" * (-len(content) % 4)
    num = len(mesh.vertices)
    bounds = {"min": mesh.vertices.min(axis=0).tolist(), "max": mesh.vertices.max(axis=0).tolist()}
    material: dict[str, Any] = {
        "name": name,
        "pbrMetallicRoughness": {"baseColorTexture": {"index": 0}, **constants},
    }
    document: dict[str, Any] = {
        "asset": {"version": "2.0", "generator": "uni3d", "extras": extras},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"name": name, "mesh": 0}],
        "meshes": [
            {
                "name": name,
                "primitives": [
                    {
                        "attributes": {"POSITION": 0, "NORMAL": 1, "TEXCOORD_0": 2},
                        "indices": 3,
                        "material": 0,
                    }
                ],
            }
        ],
        "materials": [material],
        "textures": [{"sampler": 0, "source": 0}],
        "images": [{"name": f"{name} colour", "bufferView": 4, "mimeType": mime_type}],
        "samplers": [
            {"magFilter": _LINEAR, "minFilter": _LINEAR_MIPMAP_LINEAR, "wrapS": _CLAMP, "wrapT": _CLAMP}
        ],
        "accessors": [
            {"bufferView": 0, "componentType": _FLOAT, "count": num, "type": "VEC3", **bounds},
            {"bufferView": 1, "componentType": _FLOAT, "count": num, "type": "VEC3"},
            {"bufferView": 2, "componentType": _FLOAT, "count": num, "type": "VEC2"},
            {"bufferView": 3, "componentType": index_code, "count": len(indices), "type": "SCALAR"},
        ],
        "bufferViews": views,
        "buffers": [{"byteLength": len(binary)}],
    }
    if unlit:
        material["extensions"] = {"KHR_materials_unlit": {}}
        document["extensionsUsed"] = ["KHR_materials_unlit"]
    text = _json(document).encode("utf-8")
    text += b" " * (-len(text) % 4)
    length = 12 + 8 + len(text) + 8 + len(binary)
    header = struct.pack("<III", _GLB_MAGIC, _GLB_VERSION, length)
    json_chunk = struct.pack("<II", len(text), _JSON_CHUNK) + text
    return header + json_chunk + struct.pack("<II", len(binary), _BIN_CHUNK) + binary


def _write_bytes(path: str | Path, content: bytes) -> Path:
    return atomic_write(path, lambda temporary: temporary.write_bytes(content))


def _encodings(texture: NDArray[np.uint8]) -> Iterator[tuple[bytes, str]]:
    """The texture as (bytes, MIME type), from the best encoding to the smallest, each made on demand."""
    picture = Image.fromarray(texture)
    encoded = io.BytesIO()
    picture.save(encoded, format="PNG")
    yield encoded.getvalue(), "image/png"
    for quality in JPEG_QUALITIES:
        encoded = io.BytesIO()
        # full chroma resolution: colours change abruptly where charts meet
        picture.save(encoded, format="JPEG", quality=quality, subsampling=0)
        yield encoded.getvalue(), "image/jpeg"


def _json(value: Any, *, ascii_only: bool = False) -> str:
    try:
        return json.dumps(value, ensure_ascii=ascii_only, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise UsageError(f"the extras of a mesh must be plain finite JSON values: {error}") from error


def _check(mesh: TexturedMesh) -> None:
    """Refuse what would make a file that viewers choke on."""
    num = len(mesh.vertices)
    if len(mesh.faces) == 0 or num == 0:
        raise Uni3DError("the mesh has no triangles, so there is nothing to write; extract a surface first")
    for what, values in (("vertices", mesh.vertices), ("normals", mesh.normals), ("uv", mesh.uv)):
        if len(values) != num:
            raise Uni3DError(f"the mesh has {num} vertices but {len(values)} {what}; they must be as many")
        if not np.isfinite(values).all():
            raise Uni3DError(f"the mesh's {what} hold values that are not finite; it was not written")
    if mesh.faces.min() < 0 or mesh.faces.max() >= num:
        raise Uni3DError(f"the mesh's faces point at vertices that do not exist (there are {num})")
    if mesh.texture.dtype != np.uint8 or mesh.texture.ndim != 3 or mesh.texture.shape[2] != 3:
        raise Uni3DError(
            f"the texture is {mesh.texture.dtype} {mesh.texture.shape}; expected uint8 [S, S, 3]"
        )
