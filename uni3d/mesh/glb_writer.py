"""Textured meshes as binary glTF 2.0: geometry, base colour, and where it has them roughness, metalness and
a normal map.

Why the material is unlit: the colours were learned from lit pictures, so they already hold the light. A
viewer that lights them again darkens every shadow twice. glTF has a word for this, KHR_materials_unlit:
viewers that know it (three.js, Babylon.js, model-viewer, Blender, Unity, Unreal, Godot) show exactly the
colours of the preview. It is listed as used, not as required: other viewers fall back on the metallic 0,
roughness 1 material underneath, which is the mildest relighting there is; that is also why normals are
written. `unlit=False` leaves the extension out for scenes that want to relight the object, and a mesh with
material maps is lit because they say nothing otherwise. Legend: V vertices, F faces, S texture size.
"""

from __future__ import annotations

import io
import json
import logging
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from uni3d.errors import Uni3DError, UsageError
from uni3d.mesh.textured_mesh import TexturedMesh
from uni3d.training.checkpoint import atomic_write

logger = logging.getLogger(__name__)

MAX_BYTES = 5_000_000
JPEG_QUALITIES = (95, 90, 85, 75, 60)

_GLB_MAGIC, _GLB_VERSION, _JSON_CHUNK, _BIN_CHUNK = 0x46546C67, 2, 0x4E4F534A, 0x004E4942
_FLOAT, _UNSIGNED_SHORT, _UNSIGNED_INT = 5126, 5123, 5125
_VERTEX_BUFFER, _INDEX_BUFFER = 34962, 34963
_LINEAR, _LINEAR_MIPMAP_LINEAR, _CLAMP = 9729, 9987, 33071


def write_glb(
    mesh: TexturedMesh,
    path: str | Path,
    extras: dict[str, Any] | None = None,
    *,
    name: str = "object",
    unlit: bool | None = None,
    unit_box: bool = True,
    max_bytes: int = MAX_BYTES,
) -> Path:
    """Write one binary glTF 2.0 file and return its path.

    extras: JSON values (prompt, seed, method, versions, ...) kept in `asset.extras`, to which `scene_scale`
    and `scene_centre` are added: scene position = position in the file * scale + centre. name: of node,
    mesh and material. unit_box: centre the object and make its longest side 1. unlit: show the colours as
    they are; None: unless the mesh has material maps. The base colour is a PNG if the file then stays within
    `max_bytes`, else a JPEG of the best quality that does; material maps are PNGs.

    Raises Uni3DError for numbers that are not finite or a mesh that is inconsistent, UsageError for extras
    that JSON cannot hold or a file that cannot be made small enough; an existing file is then left as it
    was.
    """
    check_mesh(mesh)
    centre, scale = np.zeros(3), 1.0
    if unit_box:
        mesh, centre, scale = mesh.in_unit_box()
    placed = (extras or {}) | {"scene_scale": scale, "scene_centre": [float(value) for value in centre]}
    unlit = not mesh.has_material_maps if unlit is None else unlit
    content = b""
    for image, mime_type in _encodings(mesh.texture):
        content = _glb_bytes(mesh, image, mime_type, name=name, unlit=unlit, extras=placed)
        if len(content) <= max_bytes:
            return write_bytes(path, content)
        logger.info("%s texture makes %d bytes, more than %d", mime_type, len(content), max_bytes)
    raise UsageError(
        f"the mesh needs {len(content)} bytes and {max_bytes} are allowed; "
        "use fewer triangles or a smaller texture"
    )


@dataclass
class _Binary:
    """The binary chunk while it grows, with the buffer views and accessors that point into it."""

    chunk: bytes = b""
    views: list[dict[str, Any]] = field(default_factory=list)
    accessors: list[dict[str, Any]] = field(default_factory=list)

    def view(self, content: bytes, target: int | None = None) -> int:
        """Append bytes; the index of their buffer view."""
        view: dict[str, Any] = {"buffer": 0, "byteOffset": len(self.chunk), "byteLength": len(content)}
        self.views.append(view | ({"target": target} if target else {}))
        self.chunk += content + b"\0" * (-len(content) % 4)
        return len(self.views) - 1

    def vertices(self, values: NDArray[np.floating], *, with_bounds: bool = False) -> int:
        """Append one value per vertex [V, 2 to 4]; the index of the accessor."""
        values = values.astype("<f4")
        bounds = {"min": values.min(axis=0).tolist(), "max": values.max(axis=0).tolist()}
        accessor = {
            "bufferView": self.view(values.tobytes(), _VERTEX_BUFFER),
            "componentType": _FLOAT,
            "count": len(values),
            "type": f"VEC{values.shape[1]}",
        }
        self.accessors.append(accessor | (bounds if with_bounds else {}))
        return len(self.accessors) - 1

    def indices(self, faces: NDArray[np.int64], num_vertices: int) -> int:
        """Append faces [F, 3]; the index of the accessor."""
        # 65535 is kept free: it means "restart" to graphics drivers
        is_short = num_vertices < 65535
        content = faces.reshape(-1).astype("<u2" if is_short else "<u4").tobytes()
        accessor = {
            "bufferView": self.view(content, _INDEX_BUFFER),
            "componentType": _UNSIGNED_SHORT if is_short else _UNSIGNED_INT,
            "count": faces.size,
            "type": "SCALAR",
        }
        self.accessors.append(accessor)
        return len(self.accessors) - 1


def _glb_bytes(
    mesh: TexturedMesh, image: bytes, mime_type: str, *, name: str, unlit: bool, extras: dict[str, Any]
) -> bytes:
    """The whole file: header, JSON chunk, binary chunk."""
    binary = _Binary()
    attributes = {
        "POSITION": binary.vertices(mesh.vertices, with_bounds=True),
        "NORMAL": binary.vertices(mesh.normals),
        "TEXCOORD_0": binary.vertices(mesh.uv),
    }
    if mesh.normal_map is not None:
        attributes["TANGENT"] = binary.vertices(tangents(mesh))
    primitive = {
        "attributes": attributes,
        "indices": binary.indices(mesh.faces, len(mesh.vertices)),
        "material": 0,
    }
    pictures = [("colour", image, mime_type), *((*entry, "image/png") for entry in _map_pictures(mesh))]
    document: dict[str, Any] = {
        "asset": {"version": "2.0", "generator": "uni3d", "extras": extras},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"name": name, "mesh": 0}],
        "meshes": [{"name": name, "primitives": [primitive]}],
        "materials": [_material(name, [what for what, _, _ in pictures], unlit=unlit)],
        "textures": [{"sampler": 0, "source": index} for index in range(len(pictures))],
        "images": [
            {"name": f"{name} {what}", "bufferView": binary.view(content), "mimeType": kind}
            for what, content, kind in pictures
        ],
        "samplers": [
            {"magFilter": _LINEAR, "minFilter": _LINEAR_MIPMAP_LINEAR, "wrapS": _CLAMP, "wrapT": _CLAMP}
        ],
        "accessors": binary.accessors,
        "bufferViews": binary.views,
        "buffers": [{"byteLength": len(binary.chunk)}],
    }
    if unlit:
        document["extensionsUsed"] = ["KHR_materials_unlit"]
    text = json_text(document).encode("utf-8")
    text += b" " * (-len(text) % 4)
    length = 12 + 8 + len(text) + 8 + len(binary.chunk)
    header = struct.pack("<III", _GLB_MAGIC, _GLB_VERSION, length)
    json_chunk = struct.pack("<II", len(text), _JSON_CHUNK) + text
    return header + json_chunk + struct.pack("<II", len(binary.chunk), _BIN_CHUNK) + binary.chunk


def _material(name: str, pictures: list[str], *, unlit: bool) -> dict[str, Any]:
    """The material whose textures are `pictures`, in this order. Its metalness is always said: glTF's default
    is 1, a mirror."""
    surface: dict[str, Any] = {
        "baseColorTexture": {"index": 0},
        "metallicFactor": 0.0,
        "roughnessFactor": 1.0,
    }
    material: dict[str, Any] = {"name": name, "pbrMetallicRoughness": surface}
    if "roughness and metalness" in pictures:
        # the factors multiply the texture
        surface["metallicRoughnessTexture"] = {"index": pictures.index("roughness and metalness")}
        surface["metallicFactor"] = 1.0
    if "normals" in pictures:
        material["normalTexture"] = {"index": pictures.index("normals")}
    if unlit:
        material["extensions"] = {"KHR_materials_unlit": {}}
    return material


def _map_pictures(mesh: TexturedMesh) -> Iterator[tuple[str, bytes]]:
    """The material maps as (what, PNG bytes). Their values are linear; no colour profile is written."""
    if mesh.roughness_metalness is not None:
        # glTF 2.0, section 3.9.2: roughness in green, metalness in blue; red is left white for occlusion
        full = np.full((*mesh.roughness_metalness.shape[:2], 1), 255, np.uint8)
        yield "roughness and metalness", _png(np.concatenate([full, mesh.roughness_metalness], axis=2))
    if mesh.normal_map is not None:
        yield "normals", _png(mesh.normal_map)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format="PNG")
    return encoded.getvalue()


def tangents(mesh: TexturedMesh) -> NDArray[np.float32]:
    """Tangents float32 [V, 4] for normal maps: unit, square to the normal, along growing u; w = +-1.

    A texel (x, y, z) of the normal map is the direction x T + y B + z N with B = w N x T, which points up in
    the picture, towards falling v (glTF 2.0, section 3.7.2.1).
    """
    corners, uv = mesh.vertices[mesh.faces].astype(np.float64), mesh.uv[mesh.faces].astype(np.float64)
    edge, turn = corners[:, 1:] - corners[:, :1], uv[:, 1:] - uv[:, :1]
    area = turn[:, 0, 0] * turn[:, 1, 1] - turn[:, 0, 1] * turn[:, 1, 0]
    # dP/du times the area in the texture, so that large faces count for more
    along_u = (turn[:, 1, 1:] * edge[:, 0] - turn[:, 0, 1:] * edge[:, 1]) * np.sign(area)[:, None]
    summed, sign = np.zeros((len(mesh.vertices), 3)), np.zeros(len(mesh.vertices))
    for corner in range(3):
        np.add.at(summed, mesh.faces[:, corner], along_u)
        np.add.at(sign, mesh.faces[:, corner], area)
    normals = mesh.normals.astype(np.float64)
    flat = summed - normals * np.einsum("vc,vc->v", summed, normals)[:, None]
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    # a vertex whose faces cancel: any direction square to the normal
    fallback = np.cross(normals, np.eye(3)[np.argmin(np.abs(normals), axis=1)])
    flat = np.where(length > 1e-12, flat, fallback)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)
    # v points down: a picture that is not mirrored has negative area
    return np.concatenate([flat, np.where(sign > 0, -1.0, 1.0)[:, None]], axis=1).astype(np.float32)


def write_bytes(path: str | Path, content: bytes) -> Path:
    """The file appears whole or not at all."""
    return atomic_write(path, lambda temporary: temporary.write_bytes(content))


def _encodings(texture: NDArray[np.uint8]) -> Iterator[tuple[bytes, str]]:
    """The texture as (bytes, MIME type), from the best encoding to the smallest, each made on demand."""
    picture = Image.fromarray(texture)
    yield _png(texture), "image/png"
    for quality in JPEG_QUALITIES:
        encoded = io.BytesIO()
        # full chroma resolution: colours change abruptly where charts meet
        picture.save(encoded, format="JPEG", quality=quality, subsampling=0)
        yield encoded.getvalue(), "image/jpeg"


def json_text(value: Any, *, ascii_only: bool = False) -> str:
    """Compact JSON; UsageError for what it cannot hold."""
    try:
        return json.dumps(value, ensure_ascii=ascii_only, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise UsageError(f"the extras of a mesh must be plain finite JSON values: {error}") from error


def check_mesh(mesh: TexturedMesh) -> None:
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
    for what, values, channels in (
        ("roughness_metalness", mesh.roughness_metalness, 2),
        ("normal_map", mesh.normal_map, 3),
    ):
        if values is not None and (values.dtype != np.uint8 or values.shape[2:] != (channels,)):
            raise Uni3DError(f"{what} is {values.dtype} {values.shape}; expected uint8 [S, S, {channels}]")
