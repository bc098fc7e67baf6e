"""Files into triangles with colours: GLB, OBJ and PLY read into one flat form for ray casting.

GLB is read here rather than through a scene library because three details decide whether an asset looks
right: skinned meshes must be posed by their joints, Draco buffers decoded, and linear material factors
turned into display colours. External references are refused: an asset is one file, or one file and the
folder (or archive) it lies in. Legend: V vertices, F faces.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import posixpath
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from uni3d.errors import MissingPackageError, UsageError

logger = logging.getLogger(__name__)

MAX_IMAGE_PIXELS = 64_000_000
PALE_GLASS = np.array([0.74, 0.82, 0.86], dtype=np.float32)

# What readers raise on bytes that do not mean what they claim.
_DAMAGE = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    struct.error,
)

_COMPONENT_TYPES = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_COMPONENT_COUNTS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}


@dataclass(frozen=True)
class Material:
    """Base colour: `colour` float32 [4] sRGB with alpha, times `texture` float32 [h, w, 4] sRGB or None."""

    colour: np.ndarray
    texture: np.ndarray | None = None
    name: str = ""


@dataclass(frozen=True)
class RenderableMesh:
    """Triangles ready to be shaded. Texture coordinates have v pointing down, as in glTF.

    vertices [V, 3] float32; faces [F, 3] int64; corner_normals [F, 3, 3] unit or None (flat);
    corner_uv [F, 3, 2] or None; corner_colour [F, 3, 4] sRGB RGBA or None; face_material [F] int64.
    """

    vertices: np.ndarray
    faces: np.ndarray
    corner_normals: np.ndarray | None
    corner_uv: np.ndarray | None
    corner_colour: np.ndarray | None
    face_material: np.ndarray
    materials: list[Material] = field(default_factory=list)

    def transformed(self, matrix: np.ndarray) -> RenderableMesh:
        """The mesh after the affine map `matrix` [4, 4]; normals follow by the inverse transpose."""
        matrix = np.asarray(matrix, dtype=np.float64)
        vertices = self.vertices @ matrix[:3, :3].T + matrix[:3, 3]
        normals = self.corner_normals
        if normals is not None:
            normals = _unit(normals @ np.linalg.pinv(matrix[:3, :3])).astype(np.float32)
        return replace(self, vertices=vertices.astype(np.float32), corner_normals=normals)

    def in_unit_box(self) -> RenderableMesh:
        """Centred on the origin with the longest side of the bounding box equal to 1."""
        used = self.vertices[self.faces.reshape(-1)]
        low, high = used.min(axis=0), used.max(axis=0)
        longest = float((high - low).max())
        if not np.isfinite(longest) or longest <= 0:
            raise UsageError("the mesh has no extent: every vertex lies at one point")
        vertices = (self.vertices - (low + high) / 2) / longest
        return replace(self, vertices=vertices.astype(np.float32))

    def turned(self, yaw_deg: float) -> RenderableMesh:
        """Turned about +Y so that what faced azimuth a faces a + `yaw_deg`."""
        if yaw_deg == 0:
            return self
        sin, cos = np.sin(np.deg2rad(yaw_deg)), np.cos(np.deg2rad(yaw_deg))
        matrix = np.eye(4)
        matrix[0, 0], matrix[0, 2], matrix[2, 0], matrix[2, 2] = cos, sin, -sin, cos
        return self.transformed(matrix)


def linear_to_srgb(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1 transfer function on values clipped to [0, 1]; float32."""
    clipped = np.clip(np.asarray(linear, dtype=np.float32), 0.0, 1.0)
    return np.where(clipped <= 0.0031308, 12.92 * clipped, 1.055 * clipped ** (1 / 2.4) - 0.055)


def srgb_to_linear(srgb: np.ndarray) -> np.ndarray:
    """Inverse of `linear_to_srgb`; float32."""
    clipped = np.clip(np.asarray(srgb, dtype=np.float32), 0.0, 1.0)
    return np.where(clipped <= 0.04045, clipped / 12.92, ((clipped + 0.055) / 1.055) ** 2.4)


def load_renderable(
    path: str | Path,
    *,
    max_texture: int = 1024,
    max_faces: int | None = None,
    read_sibling: Callable[[str], bytes] | None = None,
    data: bytes | None = None,
) -> RenderableMesh:
    """Read a GLB, OBJ or PLY file with its base colours.

    `read_sibling` maps a relative name to the bytes of a file beside an OBJ (material library, texture);
    the default looks into the folder of `path` and never above it. `data` replaces reading `path` (its
    suffix still names the format). Textures are reduced to `max_texture` pixels on their longer side.
    Raises UsageError for damaged files, external references, no faces, or more than `max_faces`.
    """
    path = Path(path)
    try:
        content = path.read_bytes() if data is None else data
        match path.suffix.lower():
            case ".glb":
                mesh = _read_glb(content, max_texture)
            case ".obj" | ".ply":
                mesh = _read_with_trimesh(
                    content, path, max_texture, read_sibling or _folder_reader(path.parent)
                )
            case suffix:
                raise UsageError(f"cannot read '{path.name}': '{suffix}' is not one of .glb, .obj, .ply")
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"cannot read '{path}': {error}") from error
    except MemoryError as error:
        raise UsageError(f"'{path.name}' is damaged or too large: it does not fit into memory") from error
    except _DAMAGE as error:
        raise UsageError(f"'{path.name}' is damaged: {type(error).__name__}: {error}") from error
    mesh = _without_degenerate_faces(mesh)
    if len(mesh.faces) == 0:
        raise UsageError(f"'{path.name}' holds no triangles")
    if max_faces is not None and len(mesh.faces) > max_faces:
        raise UsageError(f"'{path.name}' has {len(mesh.faces)} triangles, more than the limit of {max_faces}")
    return mesh


# ---------------------------------------------------------------- shared pieces


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _without_degenerate_faces(mesh: RenderableMesh) -> RenderableMesh:
    """Drop triangles without area or with non-finite corners; replace unusable corner normals."""
    corners = mesh.vertices[mesh.faces]
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = np.linalg.norm(cross, axis=1)
    keep = np.isfinite(corners).all(axis=(1, 2)) & np.isfinite(area) & (area > 0)

    def pick(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values[keep]

    normals = pick(mesh.corner_normals)
    if normals is not None:
        flat = (cross[keep] / area[keep, None])[:, None, :]
        usable = np.isfinite(normals).all(axis=-1) & (np.linalg.norm(normals, axis=-1) > 1e-6)
        normals = _unit(np.where(usable[..., None], normals, flat)).astype(np.float32)
    return replace(
        mesh,
        faces=mesh.faces[keep],
        corner_normals=normals,
        corner_uv=pick(mesh.corner_uv),
        corner_colour=pick(mesh.corner_colour),
        face_material=mesh.face_material[keep],
    )


def _texture_pixels(image: Image.Image, max_texture: int) -> np.ndarray:
    """RGBA float32 [h, w, 4] in [0, 1], area-averaged down to `max_texture` on the longer side."""
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise UsageError(f"a texture of {width}x{height} pixels is larger than {MAX_IMAGE_PIXELS} pixels")
    rgba = image.convert("RGBA")
    scale = max_texture / max(width, height)
    if scale < 1:
        rgba = rgba.resize(
            (max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BOX
        )
    return np.asarray(rgba, dtype=np.float32) / 255


def _opaque_glass(colour: np.ndarray) -> np.ndarray:
    """See-through materials become a solid pale tint: one surface per pixel, which is what 3D models need."""
    alpha = colour[3]
    if alpha <= 0.02 or alpha >= 0.98:
        return colour
    tint = colour[:3] * alpha + PALE_GLASS * (1 - alpha) if alpha < 0.6 else colour[:3]
    return np.array([*tint, 1.0], dtype=np.float32)


@dataclass
class _Soup:
    """Accumulates primitives of one file; every list holds per-face arrays."""

    corners: list[np.ndarray] = field(default_factory=list)
    normals: list[np.ndarray] = field(default_factory=list)
    uv: list[np.ndarray] = field(default_factory=list)
    colour: list[np.ndarray] = field(default_factory=list)
    material: list[np.ndarray] = field(default_factory=list)
    has_colour: bool = False

    def add(
        self,
        vertices: np.ndarray,
        faces: np.ndarray,
        material: int,
        normals: np.ndarray | None,
        uv: np.ndarray | None,
        colour: np.ndarray | None,
    ) -> None:
        num = len(faces)
        if num == 0:
            return
        if faces.min() < 0 or faces.max() >= len(vertices):
            raise ValueError("a face refers to a vertex that does not exist")
        self.corners.append(np.asarray(vertices, dtype=np.float32)[faces])
        zeros = np.zeros((num, 3, 3), np.float32)
        self.normals.append(zeros if normals is None else np.asarray(normals, dtype=np.float32)[faces])
        no_uv = np.zeros((num, 3, 2), np.float32)
        self.uv.append(no_uv if uv is None else np.nan_to_num(np.asarray(uv, dtype=np.float32)[faces]))
        self.colour.append(np.ones((num, 3, 4), np.float32) if colour is None else colour[faces])
        self.has_colour |= colour is not None
        self.material.append(np.full(num, material, dtype=np.int64))

    def mesh(self, materials: list[Material]) -> RenderableMesh:
        if not self.corners:
            raise UsageError("the file holds no triangles")
        corners = np.concatenate(self.corners)
        return RenderableMesh(
            vertices=corners.reshape(-1, 3),
            faces=np.arange(len(corners) * 3, dtype=np.int64).reshape(-1, 3),
            corner_normals=np.concatenate(self.normals),
            corner_uv=np.concatenate(self.uv) if any(m.texture is not None for m in materials) else None,
            corner_colour=np.concatenate(self.colour) if self.has_colour else None,
            face_material=np.concatenate(self.material),
            materials=materials,
        )


# ---------------------------------------------------------------- GLB


class _Glb:
    """Header, JSON and binary chunk of one GLB; accessors are bounds-checked (glTF 2.0, sections 3 and 4)."""

    def __init__(self, content: bytes) -> None:
        if len(content) < 20 or content[:4] != b"glTF":
            raise UsageError("the file does not start with the glTF binary header")
        if struct.unpack_from("<I", content, 8)[0] > len(content):
            raise UsageError("the file is shorter than its header says: it was cut off")
        json_length = struct.unpack_from("<I", content, 12)[0]
        self.json: dict[str, Any] = json.loads(content[20 : 20 + json_length])
        self.binary = b""
        start = 20 + json_length
        if start + 8 <= len(content):
            length = struct.unpack_from("<I", content, start)[0]
            self.binary = content[start + 8 : start + 8 + length]

    def buffer_view(self, index: int) -> bytes:
        view = self.json["bufferViews"][index]
        buffer = self.json["buffers"][view["buffer"]]
        data = self.binary if "uri" not in buffer else _embedded_data(buffer["uri"])
        start, length = view.get("byteOffset", 0), view["byteLength"]
        if start < 0 or length < 0 or start + length > len(data):
            raise ValueError("a buffer view lies outside its buffer")
        return data[start : start + length]

    def accessor(self, index: int) -> np.ndarray:
        """[count, components]; normalised integers become float32."""
        spec = self.json["accessors"][index]
        dtype = np.dtype(_COMPONENT_TYPES[spec["componentType"]])
        count, width = int(spec["count"]), _COMPONENT_COUNTS[spec["type"]]
        if count < 0 or count > 20_000_000:
            raise ValueError(f"an accessor claims {count} elements")
        if "bufferView" not in spec:
            return np.zeros((count, width), dtype)
        view = self.json["bufferViews"][spec["bufferView"]]
        data = self.buffer_view(spec["bufferView"])
        offset = spec.get("byteOffset", 0)
        stride = view.get("byteStride") or dtype.itemsize * width
        if count and offset + stride * (count - 1) + dtype.itemsize * width > len(data):
            raise ValueError("an accessor lies outside its buffer view")
        values = np.ndarray((count, width), dtype, data, offset, (stride, dtype.itemsize)).copy()
        return _normalised(values) if spec.get("normalized") else values

    def image(self, index: int) -> Image.Image:
        spec = self.json["images"][index]
        data = self.buffer_view(spec["bufferView"]) if "bufferView" in spec else _embedded_data(spec["uri"])
        return Image.open(io.BytesIO(data))


def _normalised(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "f":
        return values
    return np.maximum(values.astype(np.float32) / np.iinfo(values.dtype).max, -1.0)


def _embedded_data(uri: str) -> bytes:
    if not uri.startswith("data:"):
        raise UsageError(f"the file refers to an external file ('{uri[:60]}'); pack everything into one GLB")
    return base64.b64decode(uri.partition(",")[2])


def _glb_materials(glb: _Glb, max_texture: int) -> tuple[list[Material], list[int]]:
    """Materials and the texture coordinate set each one uses; one white default at the end."""
    images: dict[int, np.ndarray] = {}
    materials: list[Material] = []
    uv_sets: list[int] = []
    for spec in glb.json.get("materials", []):
        pbr = spec.get("pbrMetallicRoughness", {})
        factor = np.asarray(pbr.get("baseColorFactor", [1, 1, 1, 1]), dtype=np.float32)
        alpha_mode = spec.get("alphaMode", "OPAQUE")
        texture, uv_set = None, 0
        if "baseColorTexture" in pbr:
            reference = pbr["baseColorTexture"]
            uv_set = reference.get("texCoord", 0)
            source = _texture_source(glb.json["textures"][reference["index"]])
            if source not in images:
                images[source] = _texture_pixels(glb.image(source), max_texture)
            texture = images[source].copy()
            texture[..., :3] = linear_to_srgb(srgb_to_linear(texture[..., :3]) * factor[:3])
            if alpha_mode == "OPAQUE":
                texture[..., 3] = 1
            colour = np.ones(4, dtype=np.float32)
        else:
            emitted = np.asarray(spec.get("emissiveFactor", [0, 0, 0]), dtype=np.float32)
            alpha = float(factor[3]) if alpha_mode == "BLEND" else 1.0
            colour = np.array([*linear_to_srgb(factor[:3] + emitted), alpha], dtype=np.float32)
        materials.append(Material(_opaque_glass(colour), texture, str(spec.get("name", ""))))
        uv_sets.append(int(uv_set))
    materials.append(Material(np.array([0.8, 0.8, 0.8, 1.0], dtype=np.float32)))
    uv_sets.append(0)
    return materials, uv_sets


def _texture_source(texture: dict[str, Any]) -> int:
    if "source" in texture:
        return int(texture["source"])
    for extension in texture.get("extensions", {}).values():
        if isinstance(extension, dict) and "source" in extension:
            return int(extension["source"])
    raise ValueError("a texture has no image")


def _node_matrices(document: dict[str, Any]) -> dict[int, np.ndarray]:
    """World matrix [4, 4] of every node that the default scene shows."""
    nodes = document.get("nodes", [])
    scenes = document.get("scenes") or [{"nodes": list(range(len(nodes)))}]
    world: dict[int, np.ndarray] = {}
    pending = [(index, np.eye(4)) for index in scenes[document.get("scene", 0)].get("nodes", [])]
    while pending:
        index, parent = pending.pop()
        if index in world:
            raise ValueError("the node hierarchy holds a cycle")
        world[index] = parent @ _local_matrix(nodes[index])
        pending.extend((child, world[index]) for child in nodes[index].get("children", []))
    return world


def _local_matrix(node: dict[str, Any]) -> np.ndarray:
    if "matrix" in node:
        return np.asarray(node["matrix"], dtype=np.float64).reshape(4, 4).T
    x, y, z, w = node.get("rotation", [0.0, 0.0, 0.0, 1.0])
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * np.asarray(node.get("scale", [1, 1, 1]), dtype=np.float64)
    matrix[:3, 3] = node.get("translation", [0, 0, 0])
    return matrix


def _draco_reader(
    glb: _Glb, primitive: dict[str, Any]
) -> tuple[np.ndarray, Callable[[str], np.ndarray | None]]:
    try:
        import DracoPy
    except ImportError as error:
        raise MissingPackageError("this GLB is Draco-compressed; install DracoPy to read it") from error
    extension = primitive["extensions"]["KHR_draco_mesh_compression"]
    data = glb.buffer_view(extension["bufferView"])
    try:
        decoded: Any = DracoPy.decode(data)
    except Exception as error:  # its exceptions share no base class
        raise ValueError(f"the Draco data cannot be decoded: {error}") from error
    faces = np.asarray(decoded.faces, dtype=np.int64).reshape(-1, 3)

    def read(name: str) -> np.ndarray | None:
        if name not in extension["attributes"]:
            return None
        values = np.asarray(decoded.get_attribute_by_unique_id(extension["attributes"][name])["data"])
        accessor = primitive["attributes"].get(name)
        is_normalised = accessor is not None and glb.json["accessors"][accessor].get("normalized")
        return _normalised(values) if is_normalised else values

    return faces, read


def _plain_reader(
    glb: _Glb, primitive: dict[str, Any]
) -> tuple[np.ndarray, Callable[[str], np.ndarray | None]]:
    attributes = primitive["attributes"]
    if "indices" in primitive:
        indices = glb.accessor(primitive["indices"]).astype(np.int64).reshape(-1)
    else:
        indices = np.arange(glb.json["accessors"][attributes["POSITION"]]["count"], dtype=np.int64)
    faces = _triangles(indices, primitive.get("mode", 4))
    return faces, lambda name: glb.accessor(attributes[name]) if name in attributes else None


def _triangles(indices: np.ndarray, mode: int) -> np.ndarray:
    """Triangle list, strip (5) or fan (6) as [F, 3]."""
    if mode == 5:
        faces = np.stack([indices[:-2], indices[1:-1], indices[2:]], axis=1)
        faces[1::2] = faces[1::2][:, ::-1]
        return faces
    if mode == 6:
        return np.stack([np.full(len(indices) - 2, indices[0]), indices[1:-1], indices[2:]], axis=1)
    return indices[: len(indices) // 3 * 3].reshape(-1, 3)


def _skin_matrices(glb: _Glb, skin: dict[str, Any], world: dict[int, np.ndarray]) -> np.ndarray:
    """Joint matrices [J, 4, 4] of the default pose (glTF 2.0, section 3.7.3)."""
    joints = skin["joints"]
    inverse_bind = np.tile(np.eye(4), (len(joints), 1, 1))
    if "inverseBindMatrices" in skin:
        inverse_bind = glb.accessor(skin["inverseBindMatrices"]).reshape(-1, 4, 4).transpose(0, 2, 1)
    return np.stack([world.get(joint, np.eye(4)) @ inverse_bind[row] for row, joint in enumerate(joints)])


def _read_glb(content: bytes, max_texture: int) -> RenderableMesh:
    glb = _Glb(content)
    materials, uv_sets = _glb_materials(glb, max_texture)
    world = _node_matrices(glb.json)
    soup = _Soup()
    for index, matrix in world.items():
        node = glb.json["nodes"][index]
        if "mesh" not in node:
            continue
        for primitive in glb.json["meshes"][node["mesh"]]["primitives"]:
            if primitive.get("mode", 4) not in (4, 5, 6):
                continue  # points and lines have no surface
            is_draco = "KHR_draco_mesh_compression" in primitive.get("extensions", {})
            faces, read = (_draco_reader if is_draco else _plain_reader)(glb, primitive)
            positions, normals = read("POSITION"), read("NORMAL")
            if positions is None:
                continue
            material = primitive.get("material", len(materials) - 1)
            joints, weights = read("JOINTS_0"), read("WEIGHTS_0")
            if "skin" in node and joints is not None and weights is not None:
                pose = _skin_matrices(glb, glb.json["skins"][node["skin"]], world)
                weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-9)
                blended = np.einsum("vj,vjrc->vrc", weights, pose[joints.astype(np.int64)])
            else:
                blended = np.broadcast_to(matrix, (len(positions), 4, 4))
            linear = blended[:, :3, :3]
            positions = np.einsum("vrc,vc->vr", linear, positions) + blended[:, :3, 3]
            if normals is not None:
                # Cofactors rather than an inverse: defined for flattened (singular) matrices as well.
                cofactor = np.stack(
                    [np.cross(linear[:, (r + 1) % 3], linear[:, (r + 2) % 3]) for r in range(3)], axis=1
                )
                normals = _unit(np.einsum("vrc,vc->vr", cofactor, normals))
            colour = _vertex_colours(read("COLOR_0"))
            soup.add(positions, faces, material, normals, read(f"TEXCOORD_{uv_sets[material]}"), colour)
    return soup.mesh(materials)


def _vertex_colours(values: np.ndarray | None) -> np.ndarray | None:
    """[V, 4] sRGB. Exporters that leave an all-black colour attribute behind mean none."""
    if values is None:
        return None
    values = _normalised(values)
    if values[:, :3].mean() < 0.01:
        return None
    rgb = linear_to_srgb(values[:, :3])
    return np.concatenate([rgb, np.ones((len(rgb), 1), np.float32)], axis=1).astype(np.float32)


# ---------------------------------------------------------------- OBJ and PLY


def _folder_reader(folder: Path) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        relative = safe_relative_name(name)
        target = (folder / relative).resolve()
        if not target.is_relative_to(folder.resolve()):
            raise UsageError(f"'{name}' points outside the folder of the asset")
        return target.read_bytes()

    return read


def safe_relative_name(name: str) -> str:
    """Normalise a reference from a material library; refuse absolute names, URLs and names that climb up."""
    cleaned = posixpath.normpath(name.strip().replace("\\", "/"))
    if (
        not cleaned
        or cleaned.startswith(("/", "../"))
        or cleaned == ".."
        or ":" in cleaned
        or "\0" in cleaned
    ):
        raise UsageError(f"refused the reference '{name[:60]}': it points outside the folder of the asset")
    return cleaned


class _SiblingResolver:
    """What trimesh asks for files beside an OBJ; a missing file is absent, never looked for elsewhere."""

    def __init__(self, read: Callable[[str], bytes]) -> None:
        self._read = read

    def get(self, name: str) -> bytes:
        try:
            return self._read(safe_relative_name(name))
        except (OSError, KeyError) as error:
            raise FileNotFoundError(name) from error

    def __getitem__(self, name: str) -> bytes:
        return self.get(name)


def _read_with_trimesh(
    content: bytes, path: Path, max_texture: int, read_sibling: Callable[[str], bytes]
) -> RenderableMesh:
    try:
        import trimesh
    except ImportError as error:
        raise MissingPackageError("reading OBJ and PLY files needs trimesh; install it") from error
    file_type = path.suffix.lower()[1:]
    resolver: Any = _SiblingResolver(read_sibling) if file_type == "obj" else None
    loaded: Any = trimesh.load(
        io.BytesIO(content),
        file_type=file_type,
        process=False,
        resolver=resolver,
    )
    parts: list[Any] = loaded.dump() if isinstance(loaded, trimesh.Scene) else [loaded]
    materials: list[Material] = []
    soup = _Soup()
    for part in parts:
        faces = getattr(part, "faces", None)
        if faces is None or len(faces) == 0:
            continue
        visual: Any = part.visual
        materials.append(_trimesh_material(visual, max_texture))
        uv = getattr(visual, "uv", None)
        if uv is not None and len(uv) == len(part.vertices):
            uv = np.stack([uv[:, 0], 1 - uv[:, 1]], axis=1)
        else:
            uv = None
        colour = None
        if getattr(visual, "kind", None) == "vertex":
            colour = np.asarray(visual.vertex_colors, dtype=np.float32) / 255
        has_normals = "vertex_normals" in part._cache.cache
        normals = np.asarray(part.vertex_normals) if has_normals else None
        soup.add(part.vertices, np.asarray(faces, dtype=np.int64), len(materials) - 1, normals, uv, colour)
    return soup.mesh(materials)


def _trimesh_material(visual: Any, max_texture: int) -> Material:
    material = getattr(visual, "material", None)
    if material is None:
        return Material(
            np.ones(4, np.float32) if getattr(visual, "kind", None) == "vertex" else _default_colour()
        )
    name = str(getattr(material, "name", "") or "")
    extra: dict[str, Any] = getattr(material, "kwargs", {}) or {}
    image = getattr(material, "image", None)
    if image is not None:
        texture = _texture_pixels(image, max_texture)
        if texture[..., 3].min() > 0.98:
            texture[..., 3] = 1
        name = f"{name} {getattr(image, 'filename', '') or extra.get('map_kd', '')}".strip()
        return Material(np.ones(4, np.float32), texture, name)
    diffuse = getattr(material, "diffuse", None)
    rgb = _default_colour()[:3] if diffuse is None else np.asarray(diffuse, dtype=np.float32)[:3] / 255
    alpha = float(np.ravel(extra.get("d", 1.0))[0]) if "d" in extra else 1.0
    return Material(_opaque_glass(np.array([*rgb, alpha], dtype=np.float32)), None, name)


def _default_colour() -> np.ndarray:
    return np.array([0.75, 0.75, 0.75, 1.0], dtype=np.float32)
