"""A surface with its colours: what the texture step hands to export, preview and comparison."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uni3d.errors import UsageError
from uni3d.mesh.renderable import Material, RenderableMesh


@dataclass(frozen=True)
class TexturedMesh:
    """One object with one texture; vertices are repeated along the seams of the atlas.

    vertices float32 [V, 3]; faces int64 [F, 3] outward; normals float32 [V, 3] unit; uv float32 [V, 2] in
    [0, 1], v pointing down as in glTF; texture uint8 [S, S, 3], sRGB display values with the light baked in.
    report: plain numbers from extraction, unwrapping and baking. Material maps, for a texture without light:
    roughness_metalness uint8 [S, S, 2], linear; normal_map uint8 [S, S, 3], directions in the frame of
    `glb_writer.tangents` from -1 (0) to 1 (255).
    """

    vertices: NDArray[np.float32]
    faces: NDArray[np.int64]
    normals: NDArray[np.float32]
    uv: NDArray[np.float32]
    texture: NDArray[np.uint8]
    report: dict[str, Any] = field(default_factory=dict)
    roughness_metalness: NDArray[np.uint8] | None = None
    normal_map: NDArray[np.uint8] | None = None

    @property
    def has_material_maps(self) -> bool:
        return self.roughness_metalness is not None or self.normal_map is not None

    def in_unit_box(self) -> tuple[TexturedMesh, NDArray[np.float64], float]:
        """The mesh centred on the origin with longest side 1, and (centre [3], scale) of the way back:
        original = mesh * scale + centre."""
        low, high = self.vertices.min(axis=0).astype(np.float64), self.vertices.max(axis=0).astype(np.float64)
        scale = float((high - low).max())
        if not np.isfinite(scale) or scale <= 0:
            raise UsageError("the mesh has no finite extent, so it cannot be scaled to the unit box")
        centre = (low + high) / 2
        fitted = np.clip((self.vertices - centre) / scale, -0.5, 0.5).astype(np.float32)
        return replace(self, vertices=fitted), centre, scale

    def as_renderable(self) -> RenderableMesh:
        """The same mesh for the ray caster."""
        opaque = np.full((*self.texture.shape[:2], 1), 255, np.uint8)
        texture = np.concatenate([self.texture, opaque], axis=2).astype(np.float32) / 255.0
        return RenderableMesh(
            vertices=self.vertices,
            faces=self.faces,
            corner_normals=self.normals[self.faces],
            corner_uv=self.uv[self.faces],
            corner_colour=None,
            face_material=np.zeros(len(self.faces), np.int64),
            materials=[Material(np.ones(4, np.float32), texture)],
        )

    def vertex_colours(self) -> NDArray[np.uint8]:
        """The texture's colour at each vertex, uint8 [V, 3] (bilinear)."""
        size_y, size_x = self.texture.shape[:2]
        x = np.clip(self.uv[:, 0] * size_x - 0.5, 0, size_x - 1)
        y = np.clip(self.uv[:, 1] * size_y - 0.5, 0, size_y - 1)
        x0, y0 = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
        x1, y1 = np.minimum(x0 + 1, size_x - 1), np.minimum(y0 + 1, size_y - 1)
        fx, fy = (x - x0)[:, None], (y - y0)[:, None]
        texture = self.texture.astype(np.float64)
        top = texture[y0, x0] * (1 - fx) + texture[y0, x1] * fx
        bottom = texture[y1, x0] * (1 - fx) + texture[y1, x1] * fx
        return np.rint(top * (1 - fy) + bottom * fy).astype(np.uint8)
