"""Measurements on a mesh's triangles, for the report."""

from __future__ import annotations

from typing import Any

import numpy as np

from uni3d.mesh.orientation import non_manifold_edges, side_votes
from uni3d.mesh.renderable import RenderableMesh
from uni3d.mesh.surface import component_labels, face_areas, open_edge_count, signed_volumes

# Share of what is seen from outside that may be the back of faces: of closed bodies (slivers that rays slip
# past), and of open surfaces, of which a single sheet shows half.
MAX_BACK, MAX_BACK_OF_OPEN = 0.01, 0.75


def measure_geometry(mesh: RenderableMesh) -> dict[str, Any]:
    """The geometry keys of `report.mesh_report`, on vertices welded by position; plain JSON."""
    used = mesh.vertices[mesh.faces.reshape(-1)]
    is_finite = bool(np.isfinite(used).all())
    if not is_finite:
        return {
            "triangles": len(mesh.faces),
            "materials": len(np.unique(mesh.face_material)),
            "finite": False,
        }
    positions, welded = np.unique(used, axis=0, return_inverse=True)
    faces = welded.reshape(-1, 3).astype(np.int64)
    areas = face_areas(positions, faces)
    low, high = positions.min(axis=0).astype(np.float64), positions.max(axis=0).astype(np.float64)
    extent = float((high - low).max())
    num_components, label = component_labels(faces, len(positions))
    by_component = np.bincount(label, weights=areas, minlength=num_components)
    volume = float(signed_volumes(positions - (low + high) / 2, faces).sum())
    open_edges = open_edge_count(faces)
    if open_edges == 0 and num_components == 1:
        back = float(volume <= 0)
    else:
        front_votes, back_votes = side_votes(positions.astype(np.float32), faces)
        back = float(back_votes.sum() / max(int((front_votes + back_votes).sum()), 1))
    return {
        "triangles": len(faces),
        "vertices": len(positions),
        "materials": len(np.unique(mesh.face_material)),
        "finite": True,
        "open_edges": open_edges,
        "closed": open_edges == 0,
        "non_manifold_edges": non_manifold_edges(faces),
        "degenerate_faces": int(np.sum(areas == 0)),
        "signed_volume": volume,
        "seen_from_behind": back,
        "outward": (open_edges > 0 or volume > 0) and back <= (MAX_BACK_OF_OPEN if open_edges else MAX_BACK),
        "components": num_components,
        "largest_area_fraction": float(by_component.max() / max(float(areas.sum()), 1e-30)),
        "bounds": [low.tolist(), high.tolist()],
        "extent": [float(value) for value in high - low],
        "centre": [float(value) for value in (low + high) / 2],
        "in_unit_box": bool(abs(extent - 1) < 1e-3 and np.abs(low + high).max() < 2e-3),
    }
