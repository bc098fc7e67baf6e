"""Mesh files on disk or in memory into triangles with base colours: GLB, OBJ, PLY and STL."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from uni3d.errors import MissingPackageError, UsageError
from uni3d.mesh.glb_reader import read_glb
from uni3d.mesh.renderable import (
    Material,
    RenderableMesh,
    TriangleSoup,
    opaque_glass,
    open_picture,
    safe_relative_name,
    texture_pixels,
    without_degenerate_faces,
)

READ_SUFFIXES = (".glb", ".obj", ".ply", ".stl")
# of the pictures beside an OBJ; see `open_picture`
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TGA", "TIFF", "GIF")

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


@dataclass(frozen=True)
class MeshFile:
    """What a file holds: the mesh, and what the mesh alone does not tell.

    picture_sizes: (width, height) of every picture before it was reduced; num_dropped: triangles left out
    because they have no area or corners that are not finite; is_unlit: the file says so of all its materials;
    extras: `asset.extras` of a GLB; missing: names that an OBJ refers to and that are not beside it; refused:
    why a reference was not followed, "" if none was refused.
    """

    mesh: RenderableMesh
    picture_sizes: tuple[tuple[int, int], ...] = ()
    num_dropped: int = 0
    is_unlit: bool = False
    extras: dict[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    refused: str = ""


def load_renderable(
    path: str | Path,
    *,
    max_texture: int = 1024,
    max_faces: int | None = None,
    read_sibling: Callable[[str], bytes] | None = None,
    data: bytes | None = None,
) -> RenderableMesh:
    """The mesh of `load_mesh_file`; an OBJ keeps its shape where a reference is missing or refused."""
    file = load_mesh_file(
        path, max_texture=max_texture, max_faces=max_faces, read_sibling=read_sibling, data=data
    )
    return file.mesh


def load_mesh_file(
    path: str | Path,
    *,
    max_texture: int = 1024,
    max_faces: int | None = None,
    max_vertices: int | None = None,
    max_bytes: int | None = None,
    read_sibling: Callable[[str], bytes] | None = None,
    data: bytes | None = None,
) -> MeshFile:
    """Read a GLB, OBJ, PLY or STL file with its base colours.

    `read_sibling` maps a relative name to the bytes of a file beside an OBJ (material library, texture);
    the default looks into the folder of `path` and never above it, for files up to `max_bytes`. `data`
    replaces reading `path` (its suffix still names the format). Textures are reduced to `max_texture` pixels
    on their longer side. Raises UsageError, naming the file, for damaged files, external references, no
    faces, or more than `max_faces` or `max_vertices`; what the readers raise says only what is wrong with it
    and what to do.
    """
    path = Path(path)
    try:
        suffix = path.suffix.lower()
        if suffix not in READ_SUFFIXES:
            raise UsageError(
                f"'{suffix}' is not one of {', '.join(READ_SUFFIXES)}; convert it to one of them"
            )
        content = path.read_bytes() if data is None else data
        soup = TriangleSoup(max_faces, max_vertices)
        if suffix == ".glb":
            file = _read_glb(content, max_texture, soup)
        else:
            read = read_sibling or _folder_reader(path.parent, max_bytes)
            file = _read_with_trimesh(content, suffix[1:], max_texture, read, soup)
        mesh = without_degenerate_faces(file.mesh)
        num_dropped = len(file.mesh.faces) - len(mesh.faces)
        if len(mesh.faces) == 0:
            raise UsageError(
                f"none of its {num_dropped} triangles has an area and finite corners; export it again"
            )
        return replace(file, mesh=mesh, num_dropped=num_dropped)
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


def _read_glb(content: bytes, max_texture: int, soup: TriangleSoup) -> MeshFile:
    mesh, container = read_glb(content, max_texture, soup)
    materials = container.json.get("materials", [])
    return MeshFile(
        mesh,
        picture_sizes=tuple(container.picture(i).size for i in range(len(container.json.get("images", [])))),
        is_unlit=bool(materials) and all("KHR_materials_unlit" in m.get("extensions", {}) for m in materials),
        extras=container.extras(),
    )


def _folder_reader(folder: Path, max_bytes: int | None = None) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        relative = safe_relative_name(name)
        target = (folder / relative).resolve()
        if not target.is_relative_to(folder.resolve()):
            raise UsageError(f"it refers to '{name[:60]}' outside its folder; put that file beside it")
        if not target.is_file():
            raise FileNotFoundError(name)
        if max_bytes is not None and target.stat().st_size > max_bytes:
            raise UsageError(f"it refers to '{name[:60]}', which has more than {max_bytes} bytes; shrink it")
        return target.read_bytes()

    return read


class _SiblingResolver:
    """What trimesh asks for files beside an OBJ: first the material library, then its pictures.

    trimesh swallows whatever is raised here, so that is kept: `missing` names, which are never looked for
    elsewhere, and the first refusal. Pictures are opened here first, because Pillow runs other programs for
    some formats.
    """

    def __init__(self, read: Callable[[str], bytes]) -> None:
        self._read = read
        self._has_library = False
        self.missing: list[str] = []
        self.refused = ""

    def get(self, name: str) -> bytes:
        try:
            content = self._read(safe_relative_name(name))
            if self._has_library:
                open_picture(content, PICTURE_FORMATS)
            self._has_library = True
            return content
        except (OSError, KeyError) as error:
            self.missing.append(name[:200])
            raise FileNotFoundError(name) from error
        except UsageError as error:
            self.refused = self.refused or str(error)
            raise

    def __getitem__(self, name: str) -> bytes:
        return self.get(name)


def _read_with_trimesh(
    content: bytes,
    file_type: str,
    max_texture: int,
    read_sibling: Callable[[str], bytes],
    soup: TriangleSoup,
) -> MeshFile:
    try:
        import trimesh
    except ImportError as error:
        raise MissingPackageError("reading OBJ, PLY and STL files needs trimesh; install it") from error
    resolver = _SiblingResolver(read_sibling)
    given: Any = resolver if file_type == "obj" else None
    loaded: Any = trimesh.load(io.BytesIO(content), file_type=file_type, process=False, resolver=given)
    parts: list[Any] = loaded.dump() if isinstance(loaded, trimesh.Scene) else [loaded]
    materials: list[Material] = []
    sizes: list[tuple[int, int]] = []
    is_unlit = True
    for part in parts:
        faces = getattr(part, "faces", None)
        if faces is None or len(faces) == 0:
            soup.num_points += len(getattr(part, "vertices", ()))
            continue
        visual: Any = part.visual
        given = getattr(visual, "material", None)
        image = getattr(given, "image", None)
        # an OBJ's illumination model 0 is colour without light
        is_unlit &= (getattr(given, "kwargs", None) or {}).get("illum") == ["0"]
        sizes += [] if image is None else [image.size]
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
    return MeshFile(
        soup.mesh(materials),
        picture_sizes=tuple(sizes),
        is_unlit=is_unlit,
        missing=tuple(resolver.missing),
        refused=resolver.refused,
    )


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
