"""Repairs where a surface touches itself in an edge or a vertex, so that it is a manifold afterwards.

Used after decimation (`extraction.py`). Half-edge h of a face array runs from its corner h (row h // 3,
column h % 3) to the next corner of the same face. Legend: V vertices, F faces.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from uni3d.mesh.surface import Faces, Floats


def separate_pinches(vertices: Floats, faces: Faces) -> tuple[Floats, Faces]:
    """Make the surface manifold where parts of it touch in an edge or a vertex.

    Edge collapses now and then leave four faces on one edge. They are paired so that each pair bounds one
    wedge of the solid, and all pairs but one get a vertex in the middle of the edge, a thousandth off
    towards their own side. Then every vertex gets one copy per fan of faces, moved apart in the same way,
    so that a program that merges equal positions keeps them apart. Adds a few faces; an edge with a border
    is left as it is.
    """
    vertices, faces, _ = split_pinched_edges(vertices, faces)
    return split_fans(vertices, faces)


def split_pinched_edges(vertices: Floats, faces: Faces) -> tuple[Floats, Faces, Faces]:
    """The first half of `separate_pinches`: vertices, faces, and for each face [F] the one it was cut from.

    Cut faces keep their place and their corners but one; the ones that are added come last.
    """
    parent = np.arange(len(faces))
    for _ in range(8):
        num_before = len(faces)
        vertices, faces, cut_from = _split_pinched_edges_once(vertices, faces)
        parent = parent[cut_from]
        if len(faces) == num_before:
            break
    return vertices, faces, parent


def _half_edges(faces: Faces, base: int) -> tuple[Faces, Faces, Faces, Faces, Faces]:
    """Keys of the half-edges and of their opposites [3F], how often each key occurs, how often its opposite
    does, and one half-edge that runs the other way (valid where there is one). Half-edge h starts at corner
    h."""
    start, end = faces.reshape(-1), np.roll(faces, -1, axis=1).reshape(-1)
    key, opposite = start * base + end, end * base + start
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    left = np.searchsorted(ordered, opposite, side="left")
    num_opposite = np.searchsorted(ordered, opposite, side="right") - left
    num_same = np.searchsorted(ordered, key, side="right") - np.searchsorted(ordered, key, side="left")
    return key, opposite, num_same, num_opposite, order[np.minimum(left, len(order) - 1)]


def _split_pinched_edges_once(vertices: Floats, faces: Faces) -> tuple[Floats, Faces, Faces]:
    """One round of `split_pinched_edges`, at most one edge per face."""
    base = len(vertices)
    key, opposite, num_same, num_opposite, _ = _half_edges(faces, base)
    pinched = np.unique(np.minimum(key, opposite)[(num_same > 1) & (num_same == num_opposite)])
    busy: set[int] = set()
    new_vertices, new_faces = [vertices], faces.copy()
    added: list[list[int]] = []
    cut_from = list(range(len(faces)))
    for edge in pinched.tolist():
        start, end = edge // base, edge % base
        pairs = _pair_around_edge(
            vertices, faces, start, end, np.flatnonzero(key == edge), np.flatnonzero(opposite == edge)
        )
        touched = {half_edge // 3 for pair in pairs for half_edge in pair}
        if touched & busy:
            continue
        busy |= touched
        for pair in pairs[1:]:
            apexes = [int(faces[h // 3, (h % 3 + 2) % 3]) for h in pair]
            middle = (vertices[start] + vertices[end]) / 2
            middle = middle + 1e-3 * (vertices[apexes].mean(axis=0) - middle)
            new_vertex = base + len(new_vertices) - 1
            new_vertices.append(middle[None].astype(vertices.dtype))
            for half_edge, apex in zip(pair, apexes, strict=True):
                face, corner = divmod(half_edge, 3)
                added.append([new_vertex, int(faces[face, (corner + 1) % 3]), apex])
                cut_from.append(face)
                new_faces[face, (corner + 1) % 3] = new_vertex
    if not added:
        return vertices, faces, np.array(cut_from)
    return (
        np.concatenate(new_vertices),
        np.concatenate([new_faces, np.array(added, np.int64)]),
        np.array(cut_from),
    )


def _pair_around_edge(
    vertices: Floats, faces: Faces, start: int, end: int, along_edge: Faces, against_edge: Faces
) -> list[tuple[int, int]]:
    """Pair each half-edge along an edge with the one against it that lies across the solid."""
    origin, axis = vertices[start].astype(np.float64), (vertices[end] - vertices[start]).astype(np.float64)
    axis = axis / max(float(np.linalg.norm(axis)), 1e-30)
    reference = np.cross(axis, np.eye(3)[int(np.argmin(np.abs(axis)))])
    side = np.cross(axis, reference)

    def angle(half_edge: int) -> float:
        offset = vertices[faces[half_edge // 3, (half_edge % 3 + 2) % 3]] - origin
        return float(np.arctan2(offset @ side, offset @ reference))

    # a face that runs along the edge has its outside at growing angles, so the solid lies at smaller ones
    candidates = against_edge.tolist()
    pairs = []
    for half_edge in along_edge.tolist():
        here = angle(half_edge)
        gaps = [(here - angle(other)) % (2 * np.pi) for other in candidates]
        pairs.append((half_edge, candidates.pop(int(np.argmin(gaps)))))
    return pairs


def split_fans(vertices: Floats, faces: Faces) -> tuple[Floats, Faces]:
    """The second half of `separate_pinches`: one vertex per fan of faces, copies moved a thousandth towards
    their own faces. Faces keep their order; edges that are no edge of two consistent faces become borders."""
    base = len(vertices)
    _, _, num_same, num_opposite, partner = _half_edges(faces, base)
    edge = np.flatnonzero((num_same == 1) & (num_opposite == 1))
    partner = partner[edge]
    rows = np.concatenate([edge, edge - edge % 3 + (edge + 1) % 3])
    columns = np.concatenate([partner - partner % 3 + (partner + 1) % 3, partner])
    links = sparse.coo_matrix((np.ones(len(rows), np.int8), (rows, columns)), shape=(faces.size,) * 2)
    num_fans, fan = sparse.csgraph.connected_components(links, directed=False)
    vertex_of_fan = np.zeros(num_fans, np.int64)
    vertex_of_fan[fan] = faces.reshape(-1)
    is_copy = np.bincount(vertex_of_fan, minlength=base)[vertex_of_fan] > 1
    if not is_copy.any():
        return vertices, faces
    moved = vertices[vertex_of_fan]
    others = (vertices[np.roll(faces, -1, axis=1)] + vertices[np.roll(faces, -2, axis=1)]).reshape(-1, 3) / 2
    sums = [np.bincount(fan, weights=others[:, axis], minlength=num_fans) for axis in range(3)]
    centre = np.stack(sums, axis=1) / np.bincount(fan, minlength=num_fans)[:, None]
    moved[is_copy] += (1e-3 * (centre - moved)[is_copy]).astype(moved.dtype)
    return moved, fan.reshape(-1, 3).astype(np.int64)
