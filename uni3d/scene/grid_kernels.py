"""Trilinear look-ups as Triton kernels: hash tables of all levels in one launch, and dense voxel grids.

The twins in plain torch are in `encoding`; both compute the same function of the same tables, so a backend
can be changed in the middle of a run. Nothing but points and tables is kept for the backward pass, where the
torch twin keeps eight indices and weights a point and level. Gradients reach the tables by atomic additions,
whose order varies: the last bits of a gradient do too. As in the twin, points get no gradient; normals are
differences of look-ups.

Tables are read as [slot, feature]: all features of a corner arrive in one access. Features are written as
[feature, point], so that neighbouring threads write neighbouring numbers, and handed out transposed.
Needs triton; imported only by whoever chose it. With TRITON_INTERPRET=1 set before the import, the kernels
run on a CPU as slow Python, for tests.
Legend: P points, C channels, L levels, F features a level, S slots, V vertices.
"""

# Triton reads the source of its functions; what their annotations say does not describe calling them.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # points a program


@triton.jit
def _corners_along(axis: tl.constexpr, points, index, is_point, resolution, is_high):
    """Vertex coordinate int32 [P, 8] and weight [P, 8] of the corners of each point's cell along one axis."""
    # Every thread reads the coordinates of its own corners: cheaper than one that reads and tells the others.
    place = points + 3 * index[:, None] + axis + 0 * is_high[None, :]
    position = tl.load(place, mask=is_point[:, None], other=0.0) * (resolution - 1)
    cell = tl.minimum(tl.maximum(position.to(tl.int32), 0), resolution - 2)
    fraction = tl.minimum(tl.maximum(position - cell, 0.0), 1.0)
    return cell + is_high[None, :], tl.where(is_high[None, :] == 1, fraction, 1 - fraction)


@triton.jit
def _corners(points, index, is_point, resolution):
    """The eight corners around points [P, 3] at `index`: x, y, z and trilinear weight, each [P, 8].

    Corner 4 z + 2 y + x as in the twin. The corners lie on an axis of their own, so that neighbouring threads
    read neighbours along x, which are often neighbours in memory.
    """
    corner = tl.arange(0, 8)
    x, weight_x = _corners_along(0, points, index, is_point, resolution, corner % 2)
    y, weight_y = _corners_along(1, points, index, is_point, resolution, corner // 2 % 2)
    z, weight_z = _corners_along(2, points, index, is_point, resolution, corner // 4)
    return x, y, z, weight_x * weight_y * weight_z


@triton.jit
def _level_slots(x, y, z, resolution, slot_mask):
    """Slots inside a level: hashed where `slot_mask` (slots - 1) is not 0, else one a vertex."""
    key_y = y.to(tl.uint32) * 2654435761
    key_z = z.to(tl.uint32) * 805459861
    hashed = (x.to(tl.uint32) ^ key_y ^ key_z).to(tl.int32) & slot_mask
    return tl.where(slot_mask != 0, hashed, x + resolution * (y + resolution * z))


@triton.jit
def _hash_forward(points, table, levels, features, num_points, FEATURES: tl.constexpr, POINTS: tl.constexpr):
    level = tl.program_id(1)
    resolution = tl.load(levels + 3 * level)
    first_slot = tl.load(levels + 3 * level + 1).to(tl.int64)
    slot_mask = tl.load(levels + 3 * level + 2)
    index = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    is_point = index < num_points
    feature = tl.arange(0, FEATURES)
    x, y, z, weight = _corners(points, index, is_point, resolution)
    slot = first_slot + _level_slots(x, y, z, resolution, slot_mask)
    place = table + slot[:, :, None] * FEATURES + feature[None, None, :]
    values = tl.load(place, mask=is_point[:, None, None], other=0.0)
    total = tl.sum(weight[:, :, None] * values, axis=1)
    row = (level * FEATURES + feature).to(tl.int64)
    tl.store(features + row[None, :] * num_points + index[:, None], total, mask=is_point[:, None])


@triton.jit
def _hash_backward(
    points,
    grad_table,
    levels,
    grad_features,
    num_points,
    point_stride,
    feature_stride,
    FEATURES: tl.constexpr,
    POINTS: tl.constexpr,
):
    level = tl.program_id(1)
    resolution = tl.load(levels + 3 * level)
    first_slot = tl.load(levels + 3 * level + 1).to(tl.int64)
    slot_mask = tl.load(levels + 3 * level + 2)
    index = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    is_point = index < num_points
    feature = tl.arange(0, FEATURES)
    row = (level * FEATURES + feature).to(tl.int64)
    source = grad_features + index[:, None] * point_stride + row[None, :] * feature_stride
    grad = tl.load(source, mask=is_point[:, None], other=0.0)
    x, y, z, weight = _corners(points, index, is_point, resolution)
    slot = first_slot + _level_slots(x, y, z, resolution, slot_mask)
    place = grad_table + slot[:, :, None] * FEATURES + feature[None, None, :]
    change = weight[:, :, None] * grad[:, None, :]
    # Samples that no pixel sees have no gradient: nobody should wait for adding their zeros. One answer for a
    # whole sample, so that the features of a slot can be added in one access.
    is_seen = tl.max(tl.abs(grad), axis=1) > 0
    tl.atomic_add(place, change, mask=(is_point & is_seen)[:, None, None], sem="relaxed")


@triton.jit
def _first_vertices(scenes, index, is_point, resolution, CHANNELS: tl.constexpr, MANY: tl.constexpr):
    """Where the grid of each point's scene begins, int64 [P, 1]; MANY: there is more than one."""
    if MANY:
        scene = tl.load(scenes + index, mask=is_point, other=0).to(tl.int64)
    else:
        scene = 0 * index
    return (scene * (CHANNELS * resolution * resolution * resolution))[:, None]


@triton.jit
def _dense_forward(
    points,
    scenes,
    grid,
    values,
    num_points,
    resolution,
    CHANNELS: tl.constexpr,
    POINTS: tl.constexpr,
    MANY: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    is_point = index < num_points
    x, y, z, weight = _corners(points, index, is_point, resolution)
    first = _first_vertices(scenes, index, is_point, resolution, CHANNELS, MANY)
    vertex = first + x + resolution * (y + resolution * z)
    for channel in tl.static_range(CHANNELS):
        place = grid + channel * resolution * resolution * resolution + vertex
        total = tl.sum(weight * tl.load(place, mask=is_point[:, None], other=0.0), axis=1)
        tl.store(values + channel * num_points + index, total, mask=is_point)


@triton.jit
def _dense_backward(
    points,
    scenes,
    grad_grid,
    grad_values,
    num_points,
    resolution,
    point_stride,
    channel_stride,
    CHANNELS: tl.constexpr,
    POINTS: tl.constexpr,
    MANY: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    is_point = index < num_points
    x, y, z, weight = _corners(points, index, is_point, resolution)
    first = _first_vertices(scenes, index, is_point, resolution, CHANNELS, MANY)
    vertex = first + x + resolution * (y + resolution * z)
    for channel in tl.static_range(CHANNELS):
        source = grad_values + index * point_stride + channel * channel_stride
        change = weight * tl.load(source, mask=is_point, other=0.0)[:, None]
        place = grad_grid + channel * resolution * resolution * resolution + vertex
        tl.atomic_add(place, change, mask=is_point[:, None] & (change != 0), sem="relaxed")


class _HashGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, points: Tensor, table: Tensor, levels: Tensor) -> Tensor:
        num_points, (num_levels, num_features) = points.shape[0], (levels.shape[0], table.shape[1])
        ctx.save_for_backward(points, levels)
        ctx.table_shape = table.shape
        features = table.new_empty(num_levels * num_features, num_points)
        with torch.cuda.device_of(points):
            _hash_forward[(triton.cdiv(num_points, BLOCK), num_levels)](
                points, table, levels, features, num_points, FEATURES=num_features, POINTS=BLOCK
            )
        return features.t()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor, None]:
        points, levels = ctx.saved_tensors
        (grad,) = grad_outputs
        grad_table = grad.new_zeros(ctx.table_shape)
        with torch.cuda.device_of(points):
            _hash_backward[(triton.cdiv(points.shape[0], BLOCK), levels.shape[0])](
                points,
                grad_table,
                levels,
                grad,
                points.shape[0],
                grad.stride(0),
                grad.stride(1),
                FEATURES=ctx.table_shape[1],
                POINTS=BLOCK,
            )
        return None, grad_table, None


class _DenseGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, points: Tensor, scenes: Tensor | None, grid: Tensor) -> Tensor:
        num_points, num_channels = points.shape[0], grid.shape[-4]
        ctx.save_for_backward(points, scenes)
        ctx.grid_shape = grid.shape
        values = grid.new_empty(num_channels, num_points)
        with torch.cuda.device_of(points):
            _dense_forward[(triton.cdiv(num_points, BLOCK),)](
                points,
                points if scenes is None else scenes,
                grid,
                values,
                num_points,
                grid.shape[-1],
                CHANNELS=num_channels,
                POINTS=BLOCK,
                MANY=scenes is not None,
            )
        return values.t()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, Tensor]:
        points, scenes = ctx.saved_tensors
        (grad,) = grad_outputs
        grad_grid = grad.new_zeros(ctx.grid_shape)
        with torch.cuda.device_of(points):
            _dense_backward[(triton.cdiv(points.shape[0], BLOCK),)](
                points,
                points if scenes is None else scenes,
                grad_grid,
                grad,
                points.shape[0],
                ctx.grid_shape[-1],
                grad.stride(0),
                grad.stride(1),
                CHANNELS=ctx.grid_shape[-4],
                POINTS=BLOCK,
                MANY=scenes is not None,
            )
        return None, None, grad_grid


def hash_look_up(points: Tensor, table: Tensor, levels: Tensor) -> Tensor:
    """Features float32 [P, L F] of points [P, 3] in [0, 1]^3 (clamped), differentiable in the table alone.

    Twin of `encoding.hash_look_up`. `table` is float32 [S, F] with F a power of two, `levels` int32 [L, 3]:
    vertices along an edge, first slot, and slots - 1 of a hashed level or 0 for a dense one.
    """
    if points.shape[0] == 0:
        return table.new_zeros(0, levels.shape[0] * table.shape[1]) + 0 * table.sum()
    return _HashGrid.apply(points.detach().contiguous(), table.contiguous(), levels)  # type: ignore[return-value]


def dense_look_up(points: Tensor, grid: Tensor, scenes: Tensor | None = None) -> Tensor:
    """Values float32 [P, C] of a cubic grid [C, G, G, G] at points [P, 3] in [0, 1]^3 (clamped); with the
    scene int64 [P] of each point, of grids [S, C, G, G, G].

    Twin of `encoding.weighted_corners` at `encoding.dense_corners`, and of `field_stack`'s look-up;
    differentiable in the grid alone.
    """
    if points.shape[0] == 0:
        return grid.new_zeros(0, grid.shape[-4]) + 0 * grid.sum()
    own = None if scenes is None else scenes.contiguous()
    return _DenseGrid.apply(points.detach().contiguous(), own, grid.contiguous())  # type: ignore[return-value]
