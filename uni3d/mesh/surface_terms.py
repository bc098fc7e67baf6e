"""Terms that keep an optimised surface smooth, and the smooth normals that it is shaded with.

Every term is a scalar to be multiplied by its weight and is differentiable in the vertices or distances.
Legend: V vertices, F faces, M edges of triangles, E cut edges of the lattice.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from uni3d.mesh.tetrahedra import SurfaceTopology


def face_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Normals [F, 3] of the faces, twice as long as their area."""
    first, second, third = (vertices[faces[:, corner]] for corner in range(3))
    return torch.linalg.cross(second - first, third - first)


def smooth_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Unit normals [V, 3] at the vertices, each face weighted by its area; +Y where all faces cancel."""
    of_face = face_normals(vertices, faces)
    total = torch.zeros_like(vertices).index_add(0, faces.reshape(-1), of_face.repeat_interleave(3, dim=0))
    length = total.norm(dim=1, keepdim=True)
    up = total.new_tensor([0.0, 1.0, 0.0]).expand_as(total)
    return torch.where(length > 1e-12, total / length.clamp(min=1e-12), up)


def normal_consistency(vertices: Tensor, topology: SurfaceTopology) -> Tensor:
    """Mean over edges of 1 - cos of the angle between the two faces there, in [0, 2]."""
    unit = functional.normalize(face_normals(vertices, topology.faces), dim=1, eps=1e-12)
    left, right = unit[topology.wings[:, 0]], unit[topology.wings[:, 1]]
    return (1 - (left * right).sum(dim=1)).mean()


def laplacian(vertices: Tensor, topology: SurfaceTopology) -> Tensor:
    """Mean over vertices of the distance to the mean of the neighbours (uniform Laplacian), scene units."""
    start, end = topology.mesh_edges[:, 0], topology.mesh_edges[:, 1]
    total = torch.zeros_like(vertices).index_add(0, start, vertices[end]).index_add(0, end, vertices[start])
    ones = vertices.new_ones(len(start))
    degree = vertices.new_zeros(len(vertices)).index_add(0, start, ones).index_add(0, end, ones)
    offset = total / degree.clamp(min=1)[:, None] - vertices
    # without a floor the root's slope is infinite where a vertex already is in the middle
    return (offset.square().sum(dim=1) + 1e-12).sqrt().mean()


def sign_entropy(distance: Tensor, topology: SurfaceTopology, spacing: float) -> Tensor:
    """Mean over cut edges of the cross entropy between one end's distance and the other end's sign, in nats.

    The regulariser of Munkberg et al. (2022, "Extracting triangular 3D models, materials, and lighting from
    images"): both ends are drawn to agree, so that sheets and bubbles that nothing holds go away. Distances
    are divided by `spacing`, so that the weight does not depend on the resolution.
    """
    inner, outer = (distance[topology.cut_edges[:, end]] / spacing for end in (0, 1))
    return (functional.softplus(-inner) + functional.softplus(outer)).mean()
