"""A mesh made elsewhere into one that an optimisation can start from, and the way back to where it was.

Vertices that coincide are merged, faces wound alike and outward, and places where the surface touches itself
taken apart, so that every edge has one or two faces. Colours stay with their faces. Legend: V vertices, F
faces.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uni3d.errors import UsageError
from uni3d.mesh.manifold import split_fans, split_pinched_edges
from uni3d.mesh.orientation import non_manifold_edges, oriented_outward
from uni3d.mesh.renderable import RenderableMesh
from uni3d.mesh.surface import Faces, Floats, component_labels, open_edge_count

# Vertices in one cell of this share of the longest side are one vertex.
WELD_CELL = 2.0**-20
# Pairing the faces around pinched edges is slow; more of them are cut open instead.
MAX_PAIRED_EDGES = 2000


@dataclass(frozen=True)
class Placement:
    """Where an object stood before it was moved into the scene: original = scene * scale + centre."""

    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: float = 1.0

    @classmethod
    def of(cls, mesh: RenderableMesh, *, longest_side: float = 1.0) -> Placement:
        """The placement of a mesh that will be centred with its longest side `longest_side` scene units."""
        used = mesh.vertices[mesh.faces.reshape(-1)].astype(np.float64)
        low, high = used.min(axis=0), used.max(axis=0)
        scale = float((high - low).max()) / longest_side
        if not np.isfinite(scale) or scale <= 0:
            raise UsageError("the mesh has no finite extent, so it cannot be scaled; pass another one")
        x, y, z = ((low + high) / 2).tolist()
        return cls((x, y, z), scale)

    def into_scene(self, points: Floats) -> NDArray[np.float32]:
        """Original positions [..., 3] as scene positions."""
        return ((points.astype(np.float64) - self.centre) / self.scale).astype(np.float32)

    def out_of_scene(self, points: Floats) -> NDArray[np.float32]:
        """Scene positions [..., 3] as original positions."""
        return (points.astype(np.float64) * self.scale + self.centre).astype(np.float32)


@dataclass(frozen=True)
class PreparedMesh:
    """A mesh ready for optimisation, in scene units.

    mesh: vertices float32 [V, 3] shared by the faces that meet there, faces int64 [F, 3] outward, texture
    coordinates and colours by corner (`base_colour.colour_at` reads them), no normals. placement: the way
    back. report: plain numbers, see `prepare_for_refine`.
    """

    mesh: RenderableMesh
    placement: Placement
    report: dict[str, Any] = field(default_factory=dict)


def prepare_for_refine(mesh: RenderableMesh, *, longest_side: float = 1.0) -> PreparedMesh:
    """Normalise and repair `mesh`; its scale and orientation stay, apart from the placement.

    Counts in the report: faces_dropped (collapsed or repeated after merging), faces_turned,
    non_manifold_edges (of three or more faces, now taken apart), faces_added, open_edges left, components.
    Raises UsageError for a mesh without extent.
    """
    placement = Placement.of(mesh, longest_side=longest_side)
    vertices, faces = _welded(placement.into_scene(mesh.vertices)[mesh.faces], longest_side)
    kept = _distinct_faces(faces)
    faces, turned = oriented_outward(vertices, faces[kept])
    source = _pick(mesh, kept, turned)
    num_pinched = non_manifold_edges(faces)
    cut_vertices, cut_faces, parent = vertices, faces, np.arange(len(faces))
    if 0 < num_pinched <= MAX_PAIRED_EDGES:
        cut_vertices, cut_faces, parent = split_pinched_edges(vertices, faces)
    weights = _weights_in_parent(cut_vertices, cut_faces, vertices, faces[parent])
    split_vertices, split_faces = split_fans(cut_vertices, cut_faces)
    repaired = replace(
        _cut(source, parent, weights), vertices=split_vertices.astype(np.float32), faces=split_faces
    )
    report = {
        "triangles": len(split_faces),
        "faces_dropped": len(mesh.faces) - int(kept.sum()),
        "faces_turned": int(turned.sum()),
        "non_manifold_edges": num_pinched,
        "faces_added": len(split_faces) - len(faces),
        "open_edges": open_edge_count(split_faces),
        "components": component_labels(split_faces, len(split_vertices))[0],
    }
    return PreparedMesh(repaired, placement, report)


def _welded(corners: NDArray[np.float32], longest_side: float) -> tuple[NDArray[np.float32], Faces]:
    """Corners [F, 3, 3] as vertices [V, 3] and faces [F, 3]; the first of those that coincide stands."""
    points = corners.reshape(-1, 3)
    cells = np.rint((points.astype(np.float64) / longest_side + 0.5) / WELD_CELL).astype(np.int64)
    key = (cells[:, 0] << 42) | (cells[:, 1] << 21) | cells[:, 2]
    _, first, index = np.unique(key, return_index=True, return_inverse=True)
    return points[first], index.reshape(-1, 3).astype(np.int64)


def _distinct_faces(faces: Faces) -> NDArray[np.bool_]:
    """Faces [F] with three different vertices that no earlier face has: two-sided sheets keep one side."""
    ordered = np.sort(faces, axis=1)
    is_solid = (ordered[:, 0] != ordered[:, 1]) & (ordered[:, 1] != ordered[:, 2])
    is_first = np.zeros(len(faces), bool)
    is_first[np.unique(ordered, axis=0, return_index=True)[1]] = True
    return is_solid & is_first


def _pick(mesh: RenderableMesh, kept: NDArray[np.bool_], turned: NDArray[np.bool_]) -> RenderableMesh:
    """What belongs to the corners of the faces that were kept, in their new order of corners."""

    def corners(values: NDArray[np.floating] | None) -> NDArray[np.floating] | None:
        return (
            None if values is None else np.where(turned[:, None, None], values[kept][:, ::-1], values[kept])
        )

    return replace(
        mesh,
        corner_normals=None,
        corner_uv=corners(mesh.corner_uv),
        corner_colour=corners(mesh.corner_colour),
        face_material=mesh.face_material[kept],
    )


def _weights_in_parent(
    vertices: Floats, faces: Faces, parent_vertices: Floats, parent_faces: Faces
) -> NDArray[np.float32]:
    """Barycentric weights [F, 3, 3] of each face's corners in the face that it was cut from."""
    weights = np.tile(np.eye(3, dtype=np.float32), (len(faces), 1, 1))
    cut = np.flatnonzero((faces != parent_faces).any(axis=1))
    corners = parent_vertices[parent_faces[cut]].astype(np.float64)
    edges = corners[:, 1:] - corners[:, :1]
    offset = vertices[faces[cut]].astype(np.float64) - corners[:, :1]
    along = offset @ np.linalg.pinv(edges)
    exact = np.concatenate([1 - along.sum(axis=-1, keepdims=True), along], axis=-1)
    clipped = np.clip(exact, 0.0, 1.0)
    weights[cut] = clipped / clipped.sum(axis=-1, keepdims=True)
    return weights


def _cut(mesh: RenderableMesh, parent: Faces, weights: NDArray[np.float32]) -> RenderableMesh:
    """What belongs to corners, interpolated to those of faces that were cut."""

    def corners(values: NDArray[np.floating] | None) -> NDArray[np.floating] | None:
        return None if values is None else np.einsum("fkc,fcd->fkd", weights, values[parent])

    return replace(
        mesh,
        corner_uv=corners(mesh.corner_uv),
        corner_colour=corners(mesh.corner_colour),
        face_material=mesh.face_material[parent],
    )
