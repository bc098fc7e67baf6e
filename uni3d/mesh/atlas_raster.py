"""Which texel belongs to which triangle of an atlas: vectorised rasterisation in numpy.

Used to bake textures and to measure overlaps. Coordinates are in texels: texel (row y, column x) has its
centre at (x + 0.5, y + 0.5). Legend: F triangles, K candidate or covered texels, S atlas size.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

# bounds the memory of one chunk of candidates to some hundred megabytes
MAX_CANDIDATES = 1 << 20
# barycentric weight from which a point counts as strictly inside, so that an edge shared by two triangles
# is no overlap
STRICTLY_INSIDE = 1e-6


def rasterise(
    corners: NDArray[np.floating], size: int, *, margin: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32], int]:
    """The texels within `margin` texels of the triangles, each given to the triangle nearest to its centre.

    corners: float [F, 3, 2] in texels. Returns (texel int64 [K] flat index y * S + x, ascending; face int64
    [K]; barycentric float32 [K, 3] of the point of the triangle nearest to the texel's centre, all in [0,
    1]; number of texels whose centre lies strictly inside more than one triangle).
    """
    face_of = np.full(size * size, -1, np.int64)
    weights = np.zeros((size * size, 3), np.float32)
    inside_count = np.zeros(size * size, np.int32)
    for texel, face, triangle, centre in _candidates(corners, size, 0.0):
        barycentric = _barycentric(triangle, centre)
        lowest = barycentric.min(axis=1)
        within = np.flatnonzero(lowest >= 0)
        inside_count += np.bincount(texel[lowest > STRICTLY_INSIDE], minlength=size * size).astype(np.int32)
        face_of[texel[within]] = face[within]
        weights[texel[within]] = barycentric[within]
    # The second pass asks for distances, which are dear, and only where no triangle covers the texel's
    # centre.
    is_free = face_of < 0
    distance = np.full(size * size, np.inf)
    for texel, face, triangle, centre in _candidates(corners, size, margin, is_free):
        barycentric, squared = _nearest_on_border(triangle, centre)
        near = np.flatnonzero(squared <= margin * margin)
        texel, face, barycentric, squared = texel[near], face[near], barycentric[near], squared[near]
        before = distance[texel]
        np.minimum.at(distance, texel, squared)
        wins = (squared == distance[texel]) & (squared < before)
        face_of[texel[wins]] = face[wins]
        weights[texel[wins]] = barycentric[wins]
    covered = np.flatnonzero(face_of >= 0)
    return covered, face_of[covered], weights[covered], int(np.sum(inside_count > 1))


def overlapping_faces(
    corners: NDArray[np.floating], size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of faces (first < second) whose insides share the centre of a texel; each pair once."""
    texels, faces = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for texel, face, triangle, centre in _candidates(corners, size, 0.0):
        inside = _barycentric(triangle, centre).min(axis=1) > STRICTLY_INSIDE
        texels.append(texel[inside])
        faces.append(face[inside])
    texel, face = np.concatenate(texels), np.concatenate(faces)
    order = np.lexsort((face, texel))
    texel, face = texel[order], face[order]
    again = np.flatnonzero(texel[1:] == texel[:-1])
    pairs = np.unique(np.stack([face[again], face[again + 1]], axis=1), axis=0)
    return pairs[:, 0], pairs[:, 1]


def _candidates(
    corners: NDArray[np.floating], size: int, margin: float, is_wanted: NDArray[np.bool_] | None = None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]]:
    """Chunks of (texel [K], face [K], triangle [K, 3, 2], texel centre [K, 2]) from bounding boxes."""
    corners = np.asarray(corners, dtype=np.float64)
    # texel x has its centre at x + 0.5, so the first and last one that matter are ceil(low - 0.5),
    # floor(high - 0.5)
    low = np.clip(np.ceil(corners.min(axis=1) - margin - 0.5), 0, size).astype(np.int64)
    high = np.clip(np.floor(corners.max(axis=1) + margin + 0.5), 0, size).astype(np.int64)
    extent = np.maximum(high - low, 0)
    count = extent[:, 0] * extent[:, 1]
    ends = np.cumsum(count)
    start = 0
    while start < len(corners):
        done = int(ends[start - 1]) if start else 0
        stop = max(int(np.searchsorted(ends, done + MAX_CANDIDATES, side="right")), start + 1)
        face = np.repeat(np.arange(start, stop), count[start:stop])
        place = np.arange(len(face)) - (ends - count - done)[face]
        row, column = np.divmod(place, extent[face, 0])
        x, y = low[face, 0] + column, low[face, 1] + row
        texel = y * size + x
        if is_wanted is not None:
            chosen = np.flatnonzero(is_wanted[texel])
            texel, face, x, y = texel[chosen], face[chosen], x[chosen], y[chosen]
        yield texel, face, corners[face], np.stack([x + 0.5, y + 0.5], axis=1)
        start = stop


def _barycentric(triangle: NDArray[np.float64], point: NDArray[np.float64]) -> NDArray[np.float64]:
    """Barycentric weights [K, 3] of points [K, 2] in triangles [K, 3, 2]; -1 for triangles without area."""
    ax, ay = triangle[:, 0, 0], triangle[:, 0, 1]
    bx, by = triangle[:, 1, 0] - ax, triangle[:, 1, 1] - ay
    cx, cy = triangle[:, 2, 0] - ax, triangle[:, 2, 1] - ay
    px, py = point[:, 0] - ax, point[:, 1] - ay
    area = bx * cy - by * cx
    is_solid = np.abs(area) > 1e-12
    area = np.where(is_solid, area, 1.0)
    second = np.where(is_solid, (px * cy - py * cx) / area, -1.0)
    third = np.where(is_solid, (bx * py - by * px) / area, -1.0)
    return np.stack([np.where(is_solid, 1.0 - second - third, -1.0), second, third], axis=1)


def _nearest_on_border(
    triangle: NDArray[np.float64], point: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights [K, 3] of the point of each triangle's border nearest to each point; squared distance [K]."""
    edge = np.roll(triangle, -1, axis=1) - triangle
    offset = point[:, None] - triangle
    length = np.maximum((edge * edge).sum(-1), 1e-24)
    along = np.clip((edge * offset).sum(-1) / length, 0.0, 1.0)
    gap = ((offset - along[..., None] * edge) ** 2).sum(-1)
    nearest = np.argmin(gap, axis=1)
    rows = np.arange(len(point))
    barycentric = np.zeros((len(point), 3))
    barycentric[rows, nearest] = 1.0 - along[rows, nearest]
    barycentric[rows, (nearest + 1) % 3] = along[rows, nearest]
    return barycentric, gap[rows, nearest]
