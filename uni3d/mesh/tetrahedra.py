"""Marching tetrahedra on a body-centred cubic lattice: a surface whose vertices carry gradient.

The lattice has the corners and the centres of cubes as nodes; each face between two cubes gives four
tetrahedra around the line that joins the cubes' centres, all of one shape (two edges of the cube's side h,
four of 0.87 h). A signed distance at the nodes, negative inside, cuts them: the zero crossing of each edge is
a vertex. Neighbouring tetrahedra share their crossings and the nodes on the border are outside, so the
surface is closed and oriented outward whatever the values are; as in DMTet (Shen et al. 2021) nodes may also
move.
Legend: N nodes, T tetrahedra, E cut edges = V vertices, F faces.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# A tetrahedron of the lattice is 0.5 h wide in its narrowest direction, so that none turns inside out while
# no node moves farther than half of that.
MAX_SHIFT = 0.25
EDGES = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


@dataclass(frozen=True)
class TetrahedralLattice:
    """positions float32 [N, 3]; tetrahedra int32 [T, 4], positively oriented; is_border bool [N]; spacing the
    cube's side h, in scene units."""

    positions: Tensor
    tetrahedra: Tensor
    is_border: Tensor
    spacing: float


@dataclass(frozen=True)
class SurfaceTopology:
    """What of the surface depends on signs alone, so that it is reused until a sign changes.

    cut_edges int64 [E, 2]: inner and outer node of each edge that the surface crosses; faces int64 [F, 3];
    mesh_edges int64 [M, 2]: vertices of each edge of the triangles; wings int64 [M, 2]: the two faces there.
    """

    cut_edges: Tensor
    faces: Tensor
    mesh_edges: Tensor
    wings: Tensor


def build_lattice(
    low: NDArray[np.floating], high: NDArray[np.floating], resolution: int
) -> TetrahedralLattice:
    """The lattice over the box from `low` [3] to `high` [3], `resolution` cubes along its longest side, with
    two more cubes on all sides. The ends of that side lie between two layers of nodes, not on one."""
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    spacing = float((high - low).max()) / (resolution - 0.5)
    shape = np.maximum(np.ceil((high - low) / spacing - 1e-6).astype(int), 1) + 4
    origin = (low + high) / 2 - shape * spacing / 2
    corner_index = np.arange(np.prod(shape + 1)).reshape(shape + 1)
    centre_index = corner_index.size + np.arange(np.prod(shape)).reshape(shape)
    corners = origin + spacing * np.stack(np.unravel_index(corner_index, tuple(shape + 1)), axis=-1)
    centres = origin + spacing * (
        np.stack(np.unravel_index(np.arange(centre_index.size), tuple(shape)), axis=-1) + 0.5
    )
    positions = np.concatenate([corners.reshape(-1, 3), centres])
    tetrahedra = np.concatenate([_around_faces(corner_index, centre_index, axis) for axis in range(3)])
    is_border = np.ones(len(positions), bool)
    is_border[corner_index[1:-1, 1:-1, 1:-1]] = False
    is_border[centre_index[1:-1, 1:-1, 1:-1]] = False
    return TetrahedralLattice(
        torch.from_numpy(positions.astype(np.float32)),
        torch.from_numpy(tetrahedra.astype(np.int32)),
        torch.from_numpy(is_border),
        spacing,
    )


def _around_faces(
    corner_index: NDArray[np.int64], centre_index: NDArray[np.int64], axis: int
) -> NDArray[np.int64]:
    """The four tetrahedra of every face between two cubes that follow each other along `axis`, [T, 4]."""
    corner = np.moveaxis(corner_index, (axis, (axis + 1) % 3, (axis + 2) % 3), (0, 1, 2))[1:-1]
    centre = np.moveaxis(centre_index, (axis, (axis + 1) % 3, (axis + 2) % 3), (0, 1, 2))
    ring = [corner[:, :-1, :-1], corner[:, 1:, :-1], corner[:, 1:, 1:], corner[:, :-1, 1:]]
    before, after = centre[:-1], centre[1:]
    four = [np.stack([before, after, ring[side], ring[(side + 1) % 4]], axis=-1) for side in range(4)]
    return np.stack(four).reshape(-1, 4)


def _triangle_table() -> Tensor:
    """Up to two triangles for each of the 16 sign patterns, as edge numbers, int64 [16, 2, 3]; -1: none."""
    edge_number = {frozenset(edge): number for number, edge in enumerate(EDGES)}
    table = torch.full((16, 2, 3), -1, dtype=torch.long)
    for order in itertools.permutations(range(4)):
        if not _is_even(order):
            continue
        a, b, c, d = order
        corner = [edge_number[frozenset(edge)] for edge in ((a, b), (a, c), (a, d))]
        table[1 << a, 0] = torch.tensor(corner)
        table[15 - (1 << a), 0] = torch.tensor(corner[::-1])
        first, second, third, fourth = (
            edge_number[frozenset(edge)] for edge in ((a, c), (a, d), (b, d), (b, c))
        )
        table[(1 << a) | (1 << b)] = torch.tensor([[first, second, third], [first, third, fourth]])
    return table


def _is_even(order: tuple[int, ...]) -> bool:
    return sum(left > right for left, right in itertools.combinations(order, 2)) % 2 == 0


_TRIANGLES = _triangle_table()


def surface_topology(is_inside: Tensor, tetrahedra: Tensor) -> SurfaceTopology:
    """Cut `tetrahedra` [T, 4] between the nodes that are inside (bool [N]) and those that are not.

    Deterministic; all parts are empty where nothing is cut.
    """
    device, num_nodes = is_inside.device, is_inside.shape[0]
    inside = is_inside[tetrahedra.reshape(-1)].view(-1, 4)
    pattern = (inside * torch.tensor([1, 2, 4, 8], device=device)).sum(dim=1)
    is_cut = (pattern > 0) & (pattern < 15)
    cut, pattern = tetrahedra[is_cut].long(), pattern[is_cut]
    local = _TRIANGLES.to(device)[pattern]  # [K, 2, 3]
    owner = torch.arange(len(cut), device=device)[:, None].expand(-1, 2)
    is_triangle = local[:, :, 0] >= 0
    corner_edges, owner = local[is_triangle], owner[is_triangle]  # [F, 3], [F]
    ends = torch.tensor(EDGES, device=device)[corner_edges]  # [F, 3, 2]
    nodes = cut[owner[:, None, None], ends]
    first_inside = is_inside[nodes[..., 0]]
    inner = torch.where(first_inside, nodes[..., 0], nodes[..., 1])
    outer = torch.where(first_inside, nodes[..., 1], nodes[..., 0])
    key, faces = torch.unique(inner * num_nodes + outer, return_inverse=True)
    cut_edges = torch.stack([key.div(num_nodes, rounding_mode="floor"), key % num_nodes], dim=1)
    mesh_edges, wings = winged_edges(faces)
    return SurfaceTopology(cut_edges, faces, mesh_edges, wings)


def winged_edges(faces: Tensor) -> tuple[Tensor, Tensor]:
    """Edges of a closed surface `faces` [F, 3] as vertex pairs [M, 2], and the two faces at each, [M, 2]."""
    start, end = faces.reshape(-1), faces.roll(-1, dims=1).reshape(-1)
    base = int(faces.max()) + 1 if faces.numel() else 1
    key = torch.minimum(start, end) * base + torch.maximum(start, end)
    order = torch.argsort(key, stable=True)
    face = (order // 3).view(-1, 2)  # each edge occurs twice, once in either direction
    key = key[order].view(-1, 2)[:, 0]
    return torch.stack([key.div(base, rounding_mode="floor"), key % base], dim=1), face


def crossing_points(positions: Tensor, distance: Tensor, cut_edges: Tensor) -> Tensor:
    """Zero crossings [E, 3] of `distance` [N] on `cut_edges`, straight in between; differentiable in both."""
    inner, outer = cut_edges[:, 0], cut_edges[:, 1]
    depth, height = -distance[inner], distance[outer]
    share = (depth / (depth + height).clamp(min=1e-12))[:, None]
    return torch.lerp(positions[inner], positions[outer], share)
