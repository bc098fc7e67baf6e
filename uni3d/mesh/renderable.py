"""Triangles with base colours, in the one flat form that the ray caster shades.

Readers of files build it through `TriangleSoup`. Legend: V vertices, F faces.
"""

from __future__ import annotations

import io
import posixpath
import struct
import warnings
import zlib
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from uni3d.errors import UsageError

MAX_IMAGE_PIXELS = 64_000_000
# What Pillow raises for pictures that are cut off or altered.
_PICTURE_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    struct.error,
    zlib.error,
)
NO_TRIANGLES = "it holds no triangles; export its surface as triangles"
PALE_GLASS = np.array([0.74, 0.82, 0.86], dtype=np.float32)


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
            normals = unit_vectors(normals @ np.linalg.pinv(matrix[:3, :3])).astype(np.float32)
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


def unit_vectors(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def without_degenerate_faces(mesh: RenderableMesh) -> RenderableMesh:
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
        normals = unit_vectors(np.where(usable[..., None], normals, flat)).astype(np.float32)
    return replace(
        mesh,
        faces=mesh.faces[keep],
        corner_normals=normals,
        corner_uv=pick(mesh.corner_uv),
        corner_colour=pick(mesh.corner_colour),
        face_material=mesh.face_material[keep],
    )


def open_picture(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """A picture in one of Pillow's `formats`, opened but not decoded; UsageError if it is another, damaged,
    or larger than MAX_IMAGE_PIXELS.

    Pillow hands some formats to other programs (EPS to Ghostscript), so the caller says which it means.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError:
        raise UsageError(
            f"a texture has more than {MAX_IMAGE_PIXELS} pixels, the limit; scale it down"
        ) from None
    except _PICTURE_DAMAGE as error:
        raise UsageError(
            f"a texture is damaged or none of {', '.join(formats)}; export it as PNG or JPEG"
        ) from error
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise UsageError(
            f"a texture has {width}x{height} pixels, more than the limit of {MAX_IMAGE_PIXELS}; scale it down"
        )
    return image


def texture_pixels(image: Image.Image, max_texture: int) -> np.ndarray:
    """RGBA float32 [h, w, 4] in [0, 1], area-averaged down to `max_texture` on the longer side."""
    width, height = image.size
    try:
        rgba = image.convert("RGBA")
    except _PICTURE_DAMAGE as error:
        raise UsageError("a texture is damaged or was cut off; export the mesh again") from error
    scale = max_texture / max(width, height)
    if scale < 1:
        rgba = rgba.resize(
            (max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BOX
        )
    return np.asarray(rgba, dtype=np.float32) / 255


def opaque_glass(colour: np.ndarray) -> np.ndarray:
    """See-through materials become a solid pale tint: one surface per pixel, which is what 3D models need."""
    alpha = colour[3]
    if alpha <= 0.02 or alpha >= 0.98:
        return colour
    tint = colour[:3] * alpha + PALE_GLASS * (1 - alpha) if alpha < 0.6 else colour[:3]
    return np.array([*tint, 1.0], dtype=np.float32)


@dataclass
class TriangleSoup:
    """Accumulates primitives of one file; every list holds per-face arrays.

    max_faces, max_vertices: UsageError as soon as the file has more. num_points: vertices of parts without
    triangles, for the message about a point cloud.
    """

    max_faces: int | None = None
    max_vertices: int | None = None
    num_points: int = 0
    num_faces: int = 0
    num_vertices: int = 0
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
        self.num_faces += num
        self.num_vertices += len(vertices)
        for what, number, limit in (
            ("triangles", self.num_faces, self.max_faces),
            ("vertices", self.num_vertices, self.max_vertices),
        ):
            if limit is not None and number > limit:
                raise UsageError(f"it has {number} {what} or more, above the limit of {limit}; simplify it")
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
        if not self.corners and self.num_points:
            raise UsageError(
                f"it holds {self.num_points} points or lines and no triangles; reconstruct its surface first"
            )
        if not self.corners:
            raise UsageError(NO_TRIANGLES)
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
