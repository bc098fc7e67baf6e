"""The unlit colour of any point of a mesh: material colour x texture x vertex colour.

The ray caster shades with it, and whoever starts from a mesh made elsewhere reads its colours here. Legend:
N points, F faces.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from uni3d.mesh.renderable import RenderableMesh


class BaseColour:
    """Looks up the colours of one mesh; textures are filtered to the size of a footprint on the surface."""

    def __init__(self, mesh: RenderableMesh) -> None:
        self.mesh = mesh
        self._colours = np.stack([material.colour for material in mesh.materials]).astype(np.float32)
        self._pyramids = _texture_pyramids(mesh)

    def at(
        self, face: NDArray[np.int64], barycentric: NDArray[np.floating], footprint: float = 0.0
    ) -> NDArray[np.float32]:
        """Unlit sRGB RGBA float32 [N, 4] in [0, 1].

        face int64 [N]; barycentric float [N, 3], weights of the face's corners; footprint: the size in the
        mesh's units that one colour stands for (0: the texture as it is).
        """
        barycentric = np.asarray(barycentric, dtype=np.float32)
        material = self.mesh.face_material[face]
        rgba = self._colours[material]
        if self.mesh.corner_uv is not None:
            for index, pyramid in self._pyramids.items():
                chosen = np.nonzero(material == index)[0]
                if len(chosen):
                    corner_uv = self.mesh.corner_uv[face[chosen]]
                    uv = np.einsum("nk,nkc->nc", barycentric[chosen], corner_uv)
                    rgba[chosen] *= pyramid.sample(uv, footprint)
        if self.mesh.corner_colour is not None:
            rgba = rgba * np.einsum("nk,nkc->nc", barycentric, self.mesh.corner_colour[face])
        return rgba

    def lowest_alpha(self) -> float:
        """The most transparent value of the materials' colours and of the textures in use."""
        textures = [float(pyramid.levels[0][..., 3].min()) for pyramid in self._pyramids.values()]
        return min(float(self._colours[:, 3].min()), *textures, 1.0)


def colour_at(
    mesh: RenderableMesh, face: NDArray[np.int64], barycentric: NDArray[np.floating]
) -> NDArray[np.float32]:
    """Unlit sRGB colours float32 [N, 3] in [0, 1] at points of the surface; for many calls keep a
    `BaseColour`."""
    return np.clip(BaseColour(mesh).at(face, barycentric)[:, :3], 0.0, 1.0)


class _TexturePyramid:
    """Box-filtered levels of one texture and the level that matches a footprint on the surface."""

    def __init__(self, texture: NDArray[np.float32], texels_per_unit: float) -> None:
        self.texels_per_unit = texels_per_unit
        self.levels = [texture]
        while max(self.levels[-1].shape[:2]) > 4:
            level = self.levels[-1]
            height, width = max(level.shape[0] // 2, 1), max(level.shape[1] // 2, 1)
            step_y, step_x = min(2, level.shape[0]), min(2, level.shape[1])
            trimmed = level[: height * step_y, : width * step_x]
            self.levels.append(trimmed.reshape(height, step_y, width, step_x, 4).mean(axis=(1, 3)))

    def sample(self, uv: NDArray[np.floating], footprint: float) -> NDArray[np.float32]:
        """Bilinear, repeating look-up [N, 4] at uv [N, 2]; `footprint` is a pixel's size in scene units."""
        texels = max(self.texels_per_unit * footprint, 1e-6)
        index = int(np.clip(round(math.log2(texels)), 0, len(self.levels) - 1))
        level = self.levels[index]
        height, width = level.shape[:2]
        x = (uv[:, 0] % 1.0) * width - 0.5
        y = (uv[:, 1] % 1.0) * height - 0.5
        x0, y0 = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
        fx, fy = (x - x0)[:, None].astype(np.float32), (y - y0)[:, None].astype(np.float32)
        x1, y1, x0, y0 = (x0 + 1) % width, (y0 + 1) % height, x0 % width, y0 % height
        top = level[y0, x0] * (1 - fx) + level[y0, x1] * fx
        bottom = level[y1, x0] * (1 - fx) + level[y1, x1] * fx
        return top * (1 - fy) + bottom * fy


def _texture_pyramids(mesh: RenderableMesh) -> dict[int, _TexturePyramid]:
    """One pyramid for each material whose texture is in use, by the index of the material."""
    pyramids: dict[int, _TexturePyramid] = {}
    if mesh.corner_uv is None:
        return pyramids
    corners = mesh.vertices[mesh.faces]
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    double_area = np.linalg.norm(cross, axis=1)
    for index, material in enumerate(mesh.materials):
        faces = np.nonzero(mesh.face_material == index)[0]
        if material.texture is None or len(faces) == 0:
            continue
        edges = mesh.corner_uv[faces, 1:] - mesh.corner_uv[faces, :1]
        uv_area = np.abs(edges[:, 0, 0] * edges[:, 1, 1] - edges[:, 0, 1] * edges[:, 1, 0])
        num_texels = material.texture.shape[0] * material.texture.shape[1]
        density = np.sqrt(uv_area.sum() * num_texels / max(float(double_area[faces].sum()), 1e-20))
        pyramids[index] = _TexturePyramid(material.texture, float(density))
    return pyramids
