"""The passes of the rasteriser that need no gradient, vectorised in torch: for the CPU, and as the twin of
the Triton kernels. Small faces are found faster this way than by building embree's tree anew in
each step and casting a ray a pixel.

Both passes list candidates (a triangle and a pixel of its bounding box; an edge and a row it crosses), test
all of them at once, and let the best of each pixel win by the minimum of a 64-bit key, which does not depend
on the order and so is the same in every run. Legend: B cameras, V vertices, F faces, E edges, H W pixels,
T triangles or edges of all cameras, K candidates.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from uni3d.mesh.edge_functions import NEAR_DEPTH, corner_normals, edge_normals

MAX_CANDIDATES = 1 << 20  # bounds the memory of a chunk to some hundred megabytes
BOX_MARGIN = 1e-2  # pixels; more than rounding can move a vertex
MIN_AREA = 1e-7  # square pixels; below it a triangle's edge functions are rounding errors
NOTHING = torch.iinfo(torch.int64).max


def visible_faces(projected: Tensor, faces: Tensor, height: int, width: int) -> Tensor:
    """The nearest face at each pixel centre, int32 [B, H, W], -1 for none; both sides of a face count.

    projected: float32 [B, V, 3] homogeneous pixels; faces: int64 [F, 3]. Of faces at the same depth the one
    with the lowest index wins. Faces with a vertex that is not finite are not drawn.
    """
    num_cameras, num_faces = projected.shape[0], faces.shape[0]
    corners = projected.index_select(1, faces.reshape(-1)).view(-1, 3, 3)
    low, high = _bounding_boxes(corners, height, width)
    keys = torch.full((num_cameras * height * width,), NOTHING, device=projected.device)
    drawn = torch.nonzero((high > low).all(dim=1))[:, 0]
    corners, low, extent = corners[drawn], low[drawn], (high - low)[drawn]
    # Edge normals and depths side by side: one gather a candidate instead of four.
    rows = torch.cat([corner_normals(corners).transpose(1, 2).reshape(-1, 9), corners[:, :, 2]], dim=1)
    for item, place in _candidates(extent[:, 0] * extent[:, 1]):
        columns = extent[item, 0]
        x, y = low[item, 0] + place % columns, low[item, 1] + place // columns
        nx, ny, nw, corner_depth = rows.index_select(0, item).view(-1, 4, 3).unbind(1)
        functions = nx * (x + 0.5)[:, None] + ny * (y + 0.5)[:, None] + nw
        total = functions.sum(-1)
        depth = (functions * corner_depth).sum(-1) / total
        is_inside = (functions.amin(-1) >= 0) | (functions.amax(-1) <= 0)
        hit = torch.nonzero(is_inside & (total != 0) & (depth > NEAR_DEPTH))[:, 0]
        triangle = drawn[item[hit]]
        pixel = (triangle // num_faces * height + y[hit]) * width + x[hit]
        keys.scatter_reduce_(0, pixel, _pack(depth[hit], triangle % num_faces), "amin")
    return unpack_keys(keys).view(num_cameras, height, width)


def crossing_edges(
    projected: Tensor, ends: Tensor, opposite: Tensor, face: Tensor, depth: Tensor, *, wins_ties: bool
) -> Tensor:
    """The silhouette edge that separates each pixel from its right-hand neighbour, int32 [B, H, W], -1 for
    none.

    An edge counts where it is a silhouette (all its faces lie on one side), nearer to vertical than to
    horizontal (or at 45 degrees if `wins_ties`), crosses the line between the two pixel centres, has the
    nearer pixel on its faces' side and lies before what the other pixel sees. Of several the one that
    leaves least of the other pixel's surface wins.

    projected: float32 [B, V, 3] homogeneous pixels; ends, opposite: int64 [E, 2], see `mesh_edges`; face:
    int32 [B, H, W]; depth: float32 [B, H, W] along the viewing axis, infinite where there is no face.
    """
    num_cameras, height, width = face.shape
    camera, edge, start, end, side = _silhouettes(projected, ends, opposite)
    normal = edge_normals(start, end)
    is_steep = normal[:, 0].abs() >= normal[:, 1].abs()
    if not wins_ties:
        is_steep &= normal[:, 0].abs() > normal[:, 1].abs()
    first_row, num_rows = _rows_crossed(start, end, height)
    keys = torch.full((num_cameras * height * width,), NOTHING, device=face.device)
    flat_face, flat_depth = face.reshape(-1), depth.reshape(-1)
    for item, place in _candidates(torch.where(is_steep, num_rows, 0)):
        row = first_row[item] + place
        x, crossing_depth = _crossing(start[item], end[item], normal[item], row + 0.5)
        column = torch.floor(x - 0.5)
        is_within = (column >= 0) & (column < width - 1)
        column = torch.where(is_within, column, 0.0)
        left = (camera[item] * height + row) * width + column.long()
        right = torch.where(is_within, left + 1, left)
        left_is_nearer = flat_depth[left] < flat_depth[right]
        faces_lie_left = (normal[item, 0] < 0) == (side[item] > 0)
        is_visible = crossing_depth < torch.maximum(flat_depth[left], flat_depth[right])
        is_between = (flat_face[left] != flat_face[right]) & (flat_depth[left] != flat_depth[right])
        hit = torch.nonzero(is_within & is_between & is_visible & (left_is_nearer == faces_lie_left))[:, 0]
        share = x - 0.5 - column
        left_over = torch.where(left_is_nearer, 1 - share, share).clamp(min=0)
        keys.scatter_reduce_(0, left[hit], _pack(left_over[hit], edge[item[hit]]), "amin")
    return unpack_keys(keys).view(num_cameras, height, width)


def _candidates(count: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of (item [K], place [K]): each item T as often as `count` int64 [T] says, places from 0."""
    ends = count.cumsum(0)
    total, first, done = int(ends[-1]) if len(count) else 0, 0, 0
    while done < total:
        last = max(int(torch.searchsorted(ends, done + MAX_CANDIDATES, right=True)), first + 1)
        items = torch.arange(first, last, device=count.device)
        item = items.repeat_interleave(count[first:last])
        place = torch.arange(len(item), device=count.device) - (ends - count - done)[item]
        yield item, place
        first, done = last, int(ends[last - 1])


def _bounding_boxes(corners: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """First and past-the-last (column, row), each int64 [T, 2], of the pixel centres that triangles [T, 3, 3]
    may cover; empty for those out of sight or without area, the whole image for those through the eye's
    plane."""
    depth = corners[..., 2]
    points = corners[..., :2] / depth[..., None]
    edges = points[:, 1:] - points[:, :1]
    area = (edges[:, 0, 0] * edges[:, 1, 1] - edges[:, 0, 1] * edges[:, 1, 0]).abs() / 2
    size = points.new_tensor([width, height])
    low = torch.ceil(points.amin(dim=1) - 0.5 - BOX_MARGIN).clamp(min=0).minimum(size)
    high = (torch.floor(points.amax(dim=1) - 0.5 + BOX_MARGIN) + 1).clamp(min=0).minimum(size)
    is_before, is_behind = (depth > NEAR_DEPTH).all(-1), (depth <= NEAR_DEPTH).all(-1)
    is_drawn = corners.isfinite().flatten(1).all(-1) & ~is_behind & ~(is_before & (area < MIN_AREA))
    low = torch.where(is_before[:, None], low, 0)
    high = torch.where(is_before[:, None], high, size)
    return torch.where(is_drawn[:, None], low, 0).long(), torch.where(is_drawn[:, None], high, 0).long()


def _silhouettes(
    projected: Tensor, ends: Tensor, opposite: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Camera [T], edge [T], end points [T, 3] twice, and the sign [T] of the edge function on the side of
    the faces, of all edges whose faces lie on one side."""
    start, end, *thirds = (projected.index_select(1, row) for row in (*ends.unbind(1), *opposite.unbind(1)))
    normal = edge_normals(start, end)
    # The normal is perpendicular to `start`; the difference loses less to rounding.
    sides = [(normal * (third - start)).sum(-1) for third in thirds]
    has_positive, has_negative = (sides[0] > 0) | (sides[1] > 0), (sides[0] < 0) | (sides[1] < 0)
    camera, edge = torch.nonzero(has_positive ^ has_negative, as_tuple=True)
    side = torch.where(has_positive[camera, edge], 1.0, -1.0)
    return camera, edge, start[camera, edge], end[camera, edge], side


def _rows_crossed(start: Tensor, end: Tensor, height: int) -> tuple[Tensor, Tensor]:
    """First row and number of rows, each int64 [T], whose centre line edges [T, 3] cross; an edge that ends
    on a line crosses it at one end only, so that a chain of edges crosses it once."""
    depth = torch.stack([start[:, 2], end[:, 2]])
    # Of an edge through the near plane only the part before it.
    share = ((NEAR_DEPTH - depth) / (depth.flip(0) - depth)).clamp(0, 1)
    share = torch.where(depth < NEAR_DEPTH, share, 0.0)[..., None]
    points = torch.stack([start, end])
    points = points + share * (points.flip(0) - points)
    y = points[..., 1] / points[..., 2]
    is_seen = (depth > NEAR_DEPTH).any(dim=0) & y.isfinite().all(dim=0)
    low, high = (torch.ceil(bound - 0.5).clamp(0, height) for bound in (y.amin(dim=0), y.amax(dim=0)))
    return torch.where(is_seen, low, 0).long(), torch.where(is_seen, high - low, 0).long()


def _crossing(start: Tensor, end: Tensor, normal: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x [K] in pixels, and depth [K], of edges [K, 3] where they cross the lines `y` [K]."""
    x = -(normal[:, 1] * y + normal[:, 2]) / normal[:, 0]
    step = end - start
    share = (y * start[:, 2] - start[:, 1]) / (step[:, 1] - y * step[:, 2])
    return x, start[:, 2] + share.clamp(0, 1) * step[:, 2]


def _pack(value: Tensor, index: Tensor) -> Tensor:
    """int64 keys that sort by `value` (float32, not negative), then by `index` below 2^31."""
    return (value.contiguous().view(torch.int32).long() << 32) | index


def unpack_keys(keys: Tensor) -> Tensor:
    """The int32 index in each key; -1 where nothing was written."""
    return torch.where(keys == NOTHING, -1, keys & 0xFFFFFFFF).int()
