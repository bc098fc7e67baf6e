"""Antialiased silhouettes whose gradient moves vertices: blending of pixel pairs across silhouette edges.

After the analytic antialiasing of Laine et al., Modular Primitives for High-Performance Differentiable
Rendering, 2020, section 3.6: where a silhouette edge crosses the line between two pixel centres, the pixel
on the wrong side of the halfway point takes part of its neighbour's colour, linearly in the place of the
crossing. Rows are blended at edges nearer to vertical, columns at the others: each bit of a silhouette
counts once, so the sum of an image changes by exactly what the silhouette sweeps.

Unlike there, edges are not looked up in the triangle that a pixel sees: all silhouette edges are found
first and marked at the pairs they cross. The result stays right where triangles are smaller than pixels,
as they are at the rim of any round object. Legend: B cameras, C channels, V vertices, F faces, E edges, H W
pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from uni3d.mesh.edge_functions import edge_normals, gather_rows, pixel_centres, spread_rows


@dataclass(frozen=True)
class MeshEdges:
    """Which faces meet at which edges; depends on the faces alone.

    `ends` int64 [E, 2] and `opposite` int64 [E, 2]: the vertices of an edge, and the third vertices of its
    two faces, the same one twice at a border. E = 3 F: to have a size known without asking a GPU, every edge
    of two faces stands once in full and once with equal ends. Where more than two faces meet, two count.
    """

    ends: Tensor
    opposite: Tensor


def mesh_edges(faces: Tensor) -> MeshEdges:
    """The edges of faces int [F, 3]; worth keeping while the faces stay the same."""
    start = faces.long().reshape(-1)
    end, third = faces.long().roll(-1, dims=1).reshape(-1), faces.long().roll(-2, dims=1).reshape(-1)
    low, high = torch.minimum(start, end), torch.maximum(start, end)
    key, order = torch.sort((low << 32) | high, stable=True)
    low, high, third = low[order], high[order], third[order]
    is_repeated = key[1:] == key[:-1]
    no = is_repeated.new_zeros(min(1, len(key)))
    is_first, has_second = ~torch.cat([no, is_repeated]), torch.cat([is_repeated, no])
    return MeshEdges(
        ends=torch.stack([low, torch.where(is_first, high, low)], dim=1),
        opposite=torch.stack([third, torch.where(has_second, third.roll(-1), third)], dim=1),
    )


def blend_silhouettes(
    image: Tensor, projected: Tensor, edges: MeshEdges, face: Tensor, view_depth: Tensor, passes: ModuleType
) -> Tensor:
    """`image` [B, C, H, W] with its silhouettes antialiased; the gradient reaches `image` and `projected`.

    projected: float [B, V, 3] homogeneous pixels; face: int32 [B, H, W]; view_depth: float32 [B, H, W] along
    the viewing axis, infinite where there is no face; passes: the module that finds `crossing_edges`.
    """
    # Columns are the rows of the transposed picture.
    x, y, depth = projected.unbind(-1)
    swapped = torch.stack([y, x, depth], dim=-1)
    along_rows = _row_changes(image, projected, edges, face, view_depth, passes, wins_ties=True)
    along_columns = _row_changes(
        image.transpose(2, 3),
        swapped,
        edges,
        face.transpose(1, 2).contiguous(),
        view_depth.transpose(1, 2).contiguous(),
        passes,
        wins_ties=False,
    )
    return image + along_rows + along_columns.transpose(2, 3)


def _row_changes(
    image: Tensor,
    projected: Tensor,
    edges: MeshEdges,
    face: Tensor,
    view_depth: Tensor,
    passes: ModuleType,
    *,
    wins_ties: bool,
) -> Tensor:
    """What blending neighbours in rows adds to `image`, [B, C, H, W]."""
    with torch.no_grad():
        edge = passes.crossing_edges(
            projected.detach().float(), edges.ends, edges.opposite, face, view_depth, wins_ties=wins_ties
        )
    edge = edge[:, :, :-1]
    crossing = _crossings(projected, edges, edge)
    # The silhouette's distance to the right of the halfway point; that part of the right-hand pixel takes the
    # left one's colour, and the other way round on the left.
    beyond = (crossing - 0.5)[:, None]
    change = beyond * (image[..., :-1] - image[..., 1:])
    to_right = torch.nn.functional.pad(torch.where(beyond > 0, change, 0.0), (1, 0))
    to_left = torch.nn.functional.pad(torch.where(beyond > 0, 0.0, change), (0, 1))
    return to_right + to_left


def _crossings(projected: Tensor, edges: MeshEdges, edge: Tensor) -> Tensor:
    """Where edges int32 [B, H, W - 1] cross the lines between pixel centres, in [0, 1] from the left one;
    halfway where there is no edge."""
    is_crossed = edge >= 0
    num_cameras, num_vertices = projected.shape[:2]
    ends = edges.ends[spread_rows(edge, edges.ends.shape[0])]
    first = torch.arange(num_cameras, device=edge.device)[:, None, None, None] * num_vertices
    start, end = gather_rows(projected.reshape(-1, 3), ends + first, is_crossed).unbind(-2)
    nx, ny, nw = edge_normals(start, end).unbind(-1)
    x, y = pixel_centres(*edge.shape[1:], like=projected)
    nx = torch.where(is_crossed, nx, 1.0)
    return torch.where(is_crossed, -(ny * y + nw) / nx - x, 0.5)
