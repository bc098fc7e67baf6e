"""Closed triangle surfaces as arrays: what the mesh room measures on them and how it cleans them.

The step between marching cubes (`extraction.py`) and the texture (`texture.py`). Plain numpy, one function
per operation, every function returns new arrays. Legend: V vertices, F faces, E directed edges. Vertices
are float [V, 3] in scene units, faces int64 [F, 3], counter-clockwise seen from outside.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Floats = NDArray[np.floating]
Faces = NDArray[np.int64]

# Taubin, "A signal processing approach to fair surface design" (1995): a shrinking step followed by a
# slightly larger inflating one passes frequencies below k = 1/lambda + 1/mu (here 0.1) and damps the ones
# above.
TAUBIN_LAMBDA = 0.5
TAUBIN_MU = -1.0 / (1.0 / TAUBIN_LAMBDA - 0.1)

# A face is degenerate when its area is below this share of the square of the longest side of the bounding
# box.
DEGENERATE_AREA = 1e-10

# A component is long if its longest side is at least this share of the largest component's.
LONG_PART = 0.25


@dataclass(frozen=True)
class Surface:
    """A triangle surface cut out of a field.

    vertices float32 [V, 3] in scene coordinates; faces int64 [F, 3], outward; iso_level the density at
    which it was cut (1 / scene length); report: plain numbers about how it was made, see `extract_surface`.
    """

    vertices: NDArray[np.float32]
    faces: Faces
    iso_level: float
    report: dict[str, Any] = field(default_factory=dict)


def face_normals(vertices: Floats, faces: Faces) -> NDArray[np.float64]:
    """Normals of the faces, [F, 3]; their length is twice the area (zero for a collapsed face)."""
    corners = vertices.astype(np.float64)[faces]
    return np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])


def face_areas(vertices: Floats, faces: Faces) -> NDArray[np.float64]:
    """Area of each face, [F], in squared scene units."""
    return 0.5 * np.linalg.norm(face_normals(vertices, faces), axis=1)


def signed_volumes(vertices: Floats, faces: Faces) -> NDArray[np.float64]:
    """Each face's share of the enclosed volume, [F]; the sum is positive when faces look outward."""
    corners = vertices.astype(np.float64)[faces]
    return np.einsum("fi,fi->f", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])) / 6.0


def vertex_normals(vertices: Floats, faces: Faces) -> NDArray[np.float32]:
    """Smooth unit normals, [V, 3], each face weighted by the angle it spans at the vertex.

    The weight makes the normal independent of how the surface is cut into triangles (Thuermer and Wuethrich
    1998). A vertex whose faces cancel gets +Y, so that the result is always of unit length.
    """
    corners = vertices.astype(np.float64)[faces]
    unit = _normalise(face_normals(vertices, faces))
    normals = np.zeros((len(vertices), 3))
    for corner in range(3):
        towards_next = _normalise(corners[:, (corner + 1) % 3] - corners[:, corner])
        towards_last = _normalise(corners[:, (corner + 2) % 3] - corners[:, corner])
        angle = np.arccos(np.clip(np.einsum("fi,fi->f", towards_next, towards_last), -1.0, 1.0))
        for axis in range(3):
            normals[:, axis] += np.bincount(
                faces[:, corner], weights=unit[:, axis] * angle, minlength=len(vertices)
            )
    normals = _normalise(normals)
    normals[np.linalg.norm(normals, axis=1) < 0.5] = (0.0, 1.0, 0.0)
    # once more in float32: glTF wants unit length to 5e-4, and rounding must not add up
    return _normalise(normals).astype(np.float32)


def open_edge_count(faces: Faces) -> int:
    """Directed edges without exactly one partner running the other way; 0 means closed and consistent."""
    if len(faces) == 0:
        return 0
    start, end = faces.reshape(-1), np.roll(faces, -1, axis=1).reshape(-1)
    base = int(faces.max()) + 1
    forward, forward_count = np.unique(start * base + end, return_counts=True)
    backward = end * base + start
    has_partner = np.isin(forward, backward)
    return int(np.sum(~has_partner) + np.sum(forward_count[has_partner] - 1))


def component_labels(faces: Faces, num_vertices: int) -> tuple[int, NDArray[np.int32]]:
    """Number of components and the component of each face, [F]; a common vertex connects two faces."""
    if len(faces) == 0:
        return 0, np.zeros(0, np.int32)
    start, end = faces.reshape(-1), np.roll(faces, -1, axis=1).reshape(-1)
    links = sparse.coo_matrix(
        (np.ones(len(start), np.int8), (start, end)), shape=(num_vertices, num_vertices)
    )
    _, of_vertex = sparse.csgraph.connected_components(links, directed=False)
    used, of_face = np.unique(of_vertex[faces[:, 0]], return_inverse=True)
    return len(used), of_face.astype(np.int32)


def compact(vertices: Floats, faces: Faces) -> tuple[Floats, Faces]:
    """Drop vertices that no face uses."""
    used, flat = np.unique(faces, return_inverse=True)
    return vertices[used], flat.reshape(-1, 3).astype(np.int64)


def keep_large_components(
    vertices: Floats, faces: Faces, *, min_area_fraction: float, drop_cavities: bool
) -> tuple[Floats, Faces, dict[str, float]]:
    """Remove floaters, and on request the inner walls of cavities.

    A component stays if its area is at least `min_area_fraction` of the largest one's; a fifth of that does
    for one that is long beside it: floaters are lumps, and a chair's leg that lost its joint is not. A cavity
    is a component of negative volume: its faces look inward. The largest component always stays. Returns the
    surface and {"components_found", "floaters_removed", "floater_area_fraction", "cavities_removed"}.
    """
    num, label = component_labels(faces, len(vertices))
    area = np.bincount(label, weights=face_areas(vertices, faces), minlength=num)
    volume = np.bincount(label, weights=signed_volumes(vertices, faces), minlength=num)
    largest = int(np.argmax(area))
    is_cavity = (volume < 0) & drop_cavities
    length = _component_lengths(vertices, faces, label, num)
    needed = np.where(length >= LONG_PART * length[largest], min_area_fraction / 5, min_area_fraction)
    is_floater = (area < needed * area[largest]) & ~is_cavity
    keep = ~(is_cavity | is_floater)
    keep[largest] = True
    counts = {
        "components_found": num,
        "floaters_removed": int(np.sum(is_floater & ~keep)),
        "floater_area_fraction": float(area[is_floater & ~keep].sum() / area.sum()),
        "cavities_removed": int(np.sum(is_cavity & ~keep)),
    }
    return (*compact(vertices, faces[keep[label]]), counts)


def _component_lengths(
    vertices: Floats, faces: Faces, label: NDArray[np.int32], num: int
) -> NDArray[np.float64]:
    """Longest side of each component's bounding box, [num]."""
    low, high = np.full((num, 3), np.inf), np.full((num, 3), -np.inf)
    for corner in range(3):
        np.minimum.at(low, label, vertices[faces[:, corner]])
        np.maximum.at(high, label, vertices[faces[:, corner]])
    return (high - low).max(axis=1)


def taubin_smooth(vertices: Floats, faces: Faces, iterations: int) -> NDArray[np.float64]:
    """Smooth voxel steps away without shrinking the object; vertices float64 [V, 3], same faces."""
    num = len(vertices)
    start, end = faces.reshape(-1), np.roll(faces, -1, axis=1).reshape(-1)
    rows, columns = np.concatenate([start, end]), np.concatenate([end, start])
    adjacency = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(num, num))
    adjacency.data[:] = 1.0
    degree = np.maximum(np.asarray(adjacency.sum(axis=1)).reshape(-1, 1), 1.0)
    moved = vertices.astype(np.float64)
    for _ in range(iterations):
        for factor in (TAUBIN_LAMBDA, TAUBIN_MU):
            moved = moved + factor * (adjacency @ moved / degree - moved)
    return moved


def decimate(vertices: Floats, faces: Faces, max_triangles: int) -> tuple[Floats, Faces]:
    """Quadric edge collapse down to at most `max_triangles` (unchanged if it has no more than that)."""
    import fast_simplification

    # the target is missed where every collapse that is left would fold the surface; then go on bolder
    for aggression in (5, 7, 9):
        if len(faces) <= max_triangles:
            break
        simplified: Any = fast_simplification.simplify(
            np.ascontiguousarray(vertices, dtype=np.float64),
            np.ascontiguousarray(faces, dtype=np.int32),
            target_count=max_triangles,
            agg=aggression,
        )
        vertices, faces = remove_degenerate_faces(simplified[0], simplified[1].astype(np.int64))
    return vertices, faces


def remove_degenerate_faces(vertices: Floats, faces: Faces) -> tuple[Floats, Faces]:
    """Remove faces without area and two-sided fins, keeping a closed surface closed.

    Dropping a sliver would leave a crack, so its shortest edge is collapsed instead: both faces at that edge
    vanish and their neighbours meet.
    """
    extent = float(np.ptp(vertices, axis=0).max()) if len(vertices) else 0.0
    for _ in range(8):
        faces = _drop_fins(faces)
        slivers = np.flatnonzero(face_areas(vertices, faces) <= DEGENERATE_AREA * extent**2)
        if len(slivers) == 0:
            break
        corners = vertices[faces[slivers]]
        length = np.linalg.norm(corners - np.roll(corners, -1, axis=1), axis=2)
        shortest = np.argmin(length, axis=1)
        removed = faces[slivers, shortest]
        kept = faces[slivers, (shortest + 1) % 3]
        target = np.arange(len(vertices))
        # one collapse per vertex and round: chains are resolved by the next round
        busy: set[int] = set()
        for old, new in zip(removed.tolist(), kept.tolist(), strict=True):
            if old not in busy and new not in busy:
                target[old] = new
                busy.update((old, new))
        faces = target[faces]
    return compact(vertices, _drop_fins(faces))


def _drop_fins(faces: Faces) -> Faces:
    """Remove faces that use a vertex twice, opposite faces on the same vertices, and repeated faces."""
    distinct = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])
    faces = faces[distinct]
    if len(faces) == 0:
        return faces
    ordered = np.sort(faces, axis=1)
    _, group, size = np.unique(ordered, axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    if size.max() == 1:
        return faces
    low = np.argmin(faces, axis=1)
    rows = np.arange(len(faces))
    is_even = faces[rows, (low + 1) % 3] < faces[rows, (low + 2) % 3]
    balance = np.bincount(group, weights=np.where(is_even, 1.0, -1.0))
    keep = np.zeros(len(faces), bool)
    for turn, sign in ((is_even, 1.0), (~is_even, -1.0)):
        candidates = np.flatnonzero(turn & (balance[group] * sign > 0))
        _, first = np.unique(group[candidates], return_index=True)
        keep[candidates[first]] = True
    return faces[keep]


def _normalise(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)
