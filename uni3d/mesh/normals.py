"""Normals of a mesh that is being optimised: torch, differentiable in the vertices.

The same definitions as in `surface`, whose numpy versions write files. Legend: V vertices, F faces.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def face_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Unit normals [F, 3], outward for counter-clockwise faces; 0 for a face without area."""
    first, second, third = vertices[faces.long()].unbind(1)
    return normalize(torch.linalg.cross(second - first, third - first), dim=-1, eps=1e-20)


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Smooth unit normals [V, 3]: face normals weighted by the angle that each face spans at the vertex.

    0 at a vertex without faces or whose faces cancel. The gradient of a face without area is 0.
    """
    faces = faces.long()
    corners = vertices[faces]
    towards_next, towards_last = corners.roll(-1, 1) - corners, corners.roll(-2, 1) - corners
    across = torch.linalg.cross(towards_next, towards_last)
    squared_sine = across.square().sum(-1)
    has_area = squared_sine > 0
    # acos would lose half the digits and its gradient at small angles; a square root has none at 0.
    sine = torch.where(has_area, squared_sine, 1.0).sqrt()
    angle = torch.atan2(sine, (towards_next * towards_last).sum(-1)) * has_area
    weighted = normalize(across, dim=-1, eps=1e-20) * angle[..., None]
    rows = faces.reshape(-1)
    total = torch.zeros_like(vertices).index_add_(0, rows, weighted.reshape(-1, 3))
    return normalize(total, dim=-1, eps=1e-20)
