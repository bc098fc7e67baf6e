"""Mesh files on disk or in memory into triangles with base colours: GLB, OBJ and PLY."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from uni3d.errors import MissingPackageError, UsageError
from uni3d.mesh.glb_reader import read_glb
from uni3d.mesh.renderable import (
    NO_TRIANGLES,
    Material,
    RenderableMesh,
    TriangleSoup,
    opaque_glass,
    safe_relative_name,
    texture_pixels,
    without_degenerate_faces,
)

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
    Raises UsageError, naming the file, for damaged files, external references, no faces, or more than
    `max_faces`; what the readers raise says only what is wrong with it and what to do.
    """
    path = Path(path)
    try:
        content = path.read_bytes() if data is None else data
        match path.suffix.lower():
            case ".glb":
                mesh = read_glb(content, max_texture)
            case ".obj" | ".ply":
                mesh = _read_with_trimesh(
                    content, path, max_texture, read_sibling or _folder_reader(path.parent)
                )
            case suffix:
                raise UsageError(f"'{suffix}' is not one of .glb, .obj, .ply; convert it to one of them")
        mesh = without_degenerate_faces(mesh)
        if len(mesh.faces) == 0:
            raise UsageError(NO_TRIANGLES)
        if max_faces is not None and len(mesh.faces) > max_faces:
            raise UsageError(
                f"it has {len(mesh.faces)} triangles, more than the limit of {max_faces}; simplify it"
            )
        return mesh
    except UsageError as error:
        raise UsageError(f"'{path}' cannot be read: {error}") from error
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read: {error.strerror or error}; check the path") from error
    except MemoryError as error:
        raise UsageError(
            f"'{path}' cannot be read: it does not fit into memory; it is damaged or needs simplifying"
        ) from error
    except _DAMAGE as error:
        # Only the text of a ValueError was written for a reader.
        reason = f" ({' '.join(str(error).split())[:200]})" if isinstance(error, ValueError) else ""
        raise UsageError(
            f"'{path}' cannot be read: it is damaged or was cut off{reason}; copy or export it again"
        ) from error


def _folder_reader(folder: Path) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        relative = safe_relative_name(name)
        target = (folder / relative).resolve()
        if not target.is_relative_to(folder.resolve()):
            raise UsageError(f"it refers to '{name[:60]}' outside its folder; put that file beside it")
        return target.read_bytes()

    return read


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
    soup = TriangleSoup()
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
        texture = texture_pixels(image, max_texture)
        if texture[..., 3].min() > 0.98:
            texture[..., 3] = 1
        name = f"{name} {getattr(image, 'filename', '') or extra.get('map_kd', '')}".strip()
        return Material(np.ones(4, np.float32), texture, name)
    diffuse = getattr(material, "diffuse", None)
    rgb = _default_colour()[:3] if diffuse is None else np.asarray(diffuse, dtype=np.float32)[:3] / 255
    alpha = float(np.ravel(extra.get("d", 1.0))[0]) if "d" in extra else 1.0
    return Material(opaque_glass(np.array([*rgb, alpha], dtype=np.float32)), None, name)


def _default_colour() -> np.ndarray:
    return np.array([0.75, 0.75, 0.75, 1.0], dtype=np.float32)
