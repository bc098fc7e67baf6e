"""Distance to a triangle mesh, negative inside: how an optimised surface starts from a mesh.

The sign comes from counting crossings along the three axes in both directions, and the majority of the six
counts decides, so a hole in one side does not let the outside in. What bounds no solid, such as a leaf of a
single layer, has no inside; around it the distance to a thin slab is taken instead. Plain numpy.
Legend: P points, F faces, X Y Z nodes of a regular grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import spatial

from uni3d.mesh.surface import Faces, Floats, face_areas, face_normals

# Half the thickness of the slab around what bounds no solid, in grid spacings; thinner ones slip through.
SLAB_HALF_THICKNESS = 0.6
# A ray exactly through an edge would count it twice or not at all, so rays are moved off the grid by this.
RAY_OFFSET = (1.37e-4, 2.11e-4)
MAX_SAMPLES = 2_000_000
EXACT_WITHIN = 3.0  # grid spacings


class NearestSurface:
    """Finds the nearest point of a mesh's surface: by samples of it, then exactly on the sample's triangle.

    vertices float [V, 3], faces int64 [F, 3]; spacing: how far apart the samples may be, scene units.
    """

    def __init__(self, vertices: Floats, faces: Faces, spacing: float) -> None:
        self.corners = np.asarray(vertices, np.float64)[faces]
        area = face_areas(vertices, faces)
        wanted = np.maximum(np.ceil(area / spacing**2), 1).astype(np.int64)
        if wanted.sum() > MAX_SAMPLES:
            wanted = np.maximum(wanted * MAX_SAMPLES // wanted.sum(), 1)
        self._face = np.repeat(np.arange(len(faces)), wanted)
        random = np.random.default_rng(0).random((len(self._face), 2))
        root = np.sqrt(random[:, 0])
        weights = np.stack([1 - root, root * (1 - random[:, 1]), root * random[:, 1]], axis=1)
        samples = np.einsum("sk,skc->sc", weights, self.corners[self._face])
        # corners are samples as well: spikes end at them
        self._face = np.concatenate([self._face, np.repeat(np.arange(len(faces)), 3)])
        self._tree: Any = spatial.KDTree(np.concatenate([samples, self.corners.reshape(-1, 3)]))

    def query(self, points: Floats) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Face [P] and barycentric weights [P, 3] of the nearest surface point to each of `points` [P, 3]."""
        from trimesh.triangles import closest_point, points_to_barycentric

        points = np.asarray(points, np.float64)
        face = self._face[self._tree.query(points)[1]]
        nearest = closest_point(self.corners[face], points)
        weights = np.clip(points_to_barycentric(self.corners[face], nearest, method="cramer"), 0.0, 1.0)
        return face, weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)

    def distance(self, points: Floats, limit: float) -> NDArray[np.float64]:
        """Distance [P] of each of `points` [P, 3] to the surface, at most `limit`: far from a surface every
        sample is about as near, and finding the nearest would take long."""
        from trimesh.triangles import closest_point

        points = np.asarray(points, np.float64)
        sample = self._tree.query(points, distance_upper_bound=limit)[1]
        is_near = sample < self._tree.n
        found = np.full(len(points), limit)
        near = points[is_near]
        nearest = closest_point(self.corners[self._face[sample[is_near]]], near)
        found[is_near] = np.minimum(np.linalg.norm(near - nearest, axis=1), limit)
        return found


@dataclass(frozen=True)
class Grid:
    """Nodes `origin + spacing * index` for indices below `shape`."""

    origin: NDArray[np.float64]
    spacing: float
    shape: tuple[int, int, int]

    def points(self) -> NDArray[np.float64]:
        """The nodes in the order of a C array of `shape`, [P, 3]."""
        index = np.stack(np.unravel_index(np.arange(np.prod(self.shape)), self.shape), axis=-1)
        return self.origin + self.spacing * index


def signed_distance(vertices: Floats, faces: Faces, grid: Grid, *, keep_sheets: bool) -> NDArray[np.float64]:
    """Distances [X, Y, Z] at the nodes of `grid`, negative inside and exact within three spacings.

    keep_sheets: give surfaces without an inside the thickness of a slab; without it they vanish, which is
    right for a mesh that is known to be closed.
    """
    points, limit = grid.points(), EXACT_WITHIN * grid.spacing
    distance = NearestSurface(vertices, faces, grid.spacing / 4).distance(points, limit)
    inside = is_inside(vertices, faces, grid)
    signed = np.where(inside, -distance.reshape(grid.shape), distance.reshape(grid.shape))
    sheets = faces[_is_sheet(vertices, faces, grid, inside)] if keep_sheets else faces[:0]
    if len(sheets) == 0:
        return signed
    to_sheets = NearestSurface(vertices, sheets, grid.spacing / 4).distance(points, limit)
    return np.minimum(signed, to_sheets.reshape(grid.shape) - SLAB_HALF_THICKNESS * grid.spacing)


def _is_sheet(vertices: Floats, faces: Faces, grid: Grid, inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether a face has the outside on both of its sides, bool [F]: looked up a spacing from its middle."""
    normal = face_normals(vertices, faces)
    unit = normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-30)
    middle = np.asarray(vertices, np.float64)[faces].mean(axis=1)
    has_inside = np.zeros(len(faces), bool)
    for side in (-grid.spacing, grid.spacing):
        index = np.rint((middle + side * unit - grid.origin) / grid.spacing).astype(np.int64)
        has_inside |= inside[tuple(np.clip(index, 0, np.array(grid.shape) - 1).T)]
    return ~has_inside


def is_inside(vertices: Floats, faces: Faces, grid: Grid) -> NDArray[np.bool_]:
    """Whether each node lies inside the mesh, bool [X, Y, Z]: more than half of the six axis directions
    agree that it is enclosed."""
    votes = np.zeros(grid.shape, np.int8)
    for axis in range(3):
        below, above = _windings(vertices, faces, grid, axis)
        votes += (below != 0).astype(np.int8) + (above != 0).astype(np.int8)
    return votes > 3


def _windings(
    vertices: Floats, faces: Faces, grid: Grid, axis: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Signed crossings between each node and infinity, downwards and upwards along `axis`, [X, Y, Z] each."""
    u, v = (axis + 1) % 3, (axis + 2) % 3
    order = [u, v, axis]
    corners = (np.asarray(vertices, np.float64)[faces][..., order] - grid.origin[order]) / grid.spacing
    corners[..., :2] -= RAY_OFFSET
    num_u, num_v, num_w = grid.shape[u], grid.shape[v], grid.shape[axis]
    column, height, sign = _column_crossings(corners, num_u, num_v)
    # crossing number k lies between the nodes ceil - 1 and ceil
    above_node = np.clip(np.ceil(height), 0, num_w).astype(np.int64)
    counts = np.zeros((num_u * num_v, num_w + 1), np.int64)
    np.add.at(counts, (column, above_node), sign)
    total = np.cumsum(counts, axis=1)
    below = total[:, :-1].reshape(num_u, num_v, num_w)
    above = (total[:, -1:] - total[:, :-1]).reshape(num_u, num_v, num_w)
    return np.moveaxis(below, (0, 1, 2), (u, v, axis)), np.moveaxis(above, (0, 1, 2), (u, v, axis))


def _column_crossings(
    corners: NDArray[np.float64], num_u: int, num_v: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Where the vertical lines through whole (u, v) meet triangles [F, 3, 3]: column, height, and +1 for a
    face that looks up, -1 for one that looks down."""
    low = np.maximum(np.ceil(corners[..., :2].min(axis=1)), 0).astype(np.int64)
    high = np.minimum(np.floor(corners[..., :2].max(axis=1)), [num_u - 1, num_v - 1]).astype(np.int64)
    width = np.maximum(high - low + 1, 0)
    number = width[:, 0] * width[:, 1]
    face = np.repeat(np.arange(len(corners)), number)
    within = np.arange(len(face)) - np.repeat(np.cumsum(number) - number, number)
    u = low[face, 0] + within // width[face, 1]
    v = low[face, 1] + within % width[face, 1]
    place = np.stack([u, v], axis=1)
    a, b, c = (corners[face, k] for k in range(3))
    area = _cross(b[:, :2] - a[:, :2], c[:, :2] - a[:, :2])
    weight_b, weight_c = (
        np.divide(part, area, out=np.full_like(area, -1.0), where=area != 0)  # -1: a face seen edge on
        for part in (
            _cross(place - a[:, :2], c[:, :2] - a[:, :2]),
            _cross(b[:, :2] - a[:, :2], place - a[:, :2]),
        )
    )
    hit = (weight_b >= 0) & (weight_c >= 0) & (weight_b + weight_c <= 1)
    height = a[:, 2] + weight_b * (b[:, 2] - a[:, 2]) + weight_c * (c[:, 2] - a[:, 2])
    column = u * num_v + v
    return column[hit], height[hit], np.sign(area[hit]).astype(np.int64)


def _cross(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    return first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]
