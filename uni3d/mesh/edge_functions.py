"""Edge functions in homogeneous pixels: what decides whether a triangle covers a pixel, and where.

A vertex is (x w, y w, w) as `Cameras.project` gives it, a pixel centre the direction (x, y, 1). The plane
through the eye and an edge has the normal of the edge; its product with the pixel's direction is the edge
function. Three of the same sign mean a hit, and their shares are perspective-correct barycentric
coordinates (Olano and Greer, Triangle Scan Conversion using 2D Homogeneous Coordinates, 1997): no clipping,
no division by a depth that may be zero. Legend: B cameras, V vertices, F faces, E edges, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEAR_DEPTH = 1e-3  # scene units; nothing nearer is seen


def edge_normals(start: Tensor, end: Tensor) -> Tensor:
    """Normals [..., 3] of the planes through the eye and the edges between homogeneous pixels [..., 3].

    Twice start x end, written so that the reverse edge has exactly the negated normal whatever the rounding
    (with fused multiply-adds too), which leaves no gap between two triangles; and so that short edges far
    from the eye lose no digits to cancellation.
    """
    sx, sy, sw = (start + end).unbind(-1)
    dx, dy, dw = (end - start).unbind(-1)
    return torch.stack([sy * dw - sw * dy, sw * dx - sx * dw, sx * dy - sy * dx], dim=-1)


def corner_normals(corners: Tensor) -> Tensor:
    """Normals [..., 3, 3] of the edges that face corners 0, 1 and 2 of triangles [..., 3, 3]."""
    return edge_normals(corners.roll(-1, dims=-2), corners.roll(-2, dims=-2))


def pixel_centres(height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """x [1, W] and y [H, 1] of pixel centres, with the device and dtype of `like`."""
    x = torch.arange(width, device=like.device, dtype=like.dtype) + 0.5
    y = torch.arange(height, device=like.device, dtype=like.dtype) + 0.5
    return x[None, :], y[:, None]


def spread_rows(index: Tensor, num_rows: int) -> Tensor:
    """int32 `index` as int64, with a different row in place of each -1.

    All of them at row 0 would queue up at one address when gradients are added on a GPU.
    """
    places = torch.arange(index.numel(), device=index.device).view(index.shape) % num_rows
    return torch.where(index >= 0, index.long(), places)


def gather_rows(table: Tensor, index: Tensor, is_used: Tensor) -> Tensor:
    """Rows [..., K, C] of `table` [R, C] at int64 `index` [..., K]; 0 where `is_used` [...] is not, whatever
    the row holds.

    `index_select`, because its gradient is one deterministic scatter on a CPU and plain atomic additions on
    a GPU, where that of `table[index]` sorts.
    """
    rows = table.index_select(0, index.reshape(-1)).view(*index.shape, table.shape[-1])
    return torch.where(is_used[..., None, None], rows, 0.0)


def hit_points(projected: Tensor, faces: Tensor, face: Tensor) -> tuple[Tensor, Tensor]:
    """Where pixels see their faces; the gradient reaches `projected`.

    projected: float [B, V, 3] homogeneous pixels; faces: int64 [F, 3], F > 0; face: int32 [B, H, W], -1 for
    none. Returns barycentric coordinates [B, H, W, 3] and depth along the viewing axis [B, H, W], both 0
    where there is no face.
    """
    num_cameras, num_vertices = projected.shape[:2]
    is_hit = face >= 0
    vertex = faces[spread_rows(face, faces.shape[0])]
    first = torch.arange(num_cameras, device=face.device)[:, None, None, None] * num_vertices
    corners = gather_rows(projected.reshape(-1, 3), vertex + first, is_hit)
    nx, ny, nw = corner_normals(corners).unbind(-1)
    x, y = pixel_centres(*face.shape[1:], like=projected)
    functions = nx * x[..., None] + ny * y[..., None] + nw
    total = torch.where(is_hit, functions.sum(-1), 1.0)
    barycentric = functions / total[..., None]
    return barycentric, (barycentric * corners[..., 2]).sum(-1)
