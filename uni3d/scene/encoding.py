"""Trilinear look-ups: dense voxel grids and multiresolution hash tables, in plain torch.

Both end in the same two steps: find the eight corners around each point (index and weight), then form the
weighted sum of the corners' values. Index and weight are found once per point and resolution and shared by
every channel. The sum is `embedding_bag` forwards and a one-dimensional `scatter_add_` backwards, channel by
channel: of grid_sample, index_add_, sparse products and embedding_bag's own backward, this pair was the
fastest on a CPU (60,000 points, 96^3 vertices, 4 channels, 2 threads: 3 + 6 ms, against 11 + 21 ms for
grid_sample). Positions get no gradient: normals are differences of look-ups, and a training loss on analytic
normals would need second derivatives. `grid_kernels` holds the same functions for GPUs, which need neither
index nor weight in memory.
Legend: P points, C channels, V stored vertices, G vertices along an edge, L levels, F features, S slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uni3d.errors import UsageError

EncodingBackend = Literal["torch", "triton", "tinycudann"]
HASH_PRIMES = (1, 2_654_435_761, 805_459_861)  # Teschner et al. 2003, as used by Mueller et al. 2022


@dataclass(frozen=True)
class Corners:
    """The eight corners around P points.

    Flat vertex `index` int64 [P, 8], and `weight` [P, 8] whose rows sum to 1.
    """

    index: Tensor
    weight: Tensor


def _cell_and_fraction(points: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """Lower corner int32 [3, P] and position inside the cell [3, P] of points [P, 3] in [0, 1]^3."""
    position = points.t().contiguous().mul_(resolution - 1)
    cell = position.to(torch.int32).clamp_(0, resolution - 2)
    return cell, (position - cell).clamp_(0, 1)


def _corner_weights(fraction: Tensor) -> Tensor:
    """Trilinear weights [P, 8], corner 4 z + 2 y + x, from fractions [3, P]."""
    x1, y1, z1 = fraction.unbind(0)
    x0, y0, z0 = (1 - fraction).unbind(0)
    z0y0, z0y1, z1y0, z1y1 = z0 * y0, z0 * y1, z1 * y0, z1 * y1
    return torch.stack(
        [z0y0 * x0, z0y0 * x1, z0y1 * x0, z0y1 * x1, z1y0 * x0, z1y0 * x1, z1y1 * x0, z1y1 * x1], dim=1
    )


def dense_corners(points: Tensor, resolution: int) -> Corners:
    """Corners in a grid of `resolution`^3 vertices, x fastest, of points [P, 3] in [0, 1]^3 (clamped)."""
    cell, fraction = _cell_and_fraction(points, resolution)
    row, plane = resolution, resolution * resolution
    base = (cell[2] * plane + cell[1] * row + cell[0]).to(torch.int64)
    corner = torch.arange(8, device=points.device)  # made there: a GPU need not wait for a copy
    offsets = corner % 2 + corner // 2 % 2 * row + corner // 4 * plane
    return Corners(base[:, None] + offsets, _corner_weights(fraction))


def hashed_corners(points: Tensor, resolution: int, table_size: int) -> Corners:
    """Corners hashed into `table_size` slots (a power of two) for points [P, 3] in [0, 1]^3 (clamped)."""
    cell, fraction = _cell_and_fraction(points, resolution)
    low = cell.to(torch.int64)
    keys = [(low[axis] * HASH_PRIMES[axis], (low[axis] + 1) * HASH_PRIMES[axis]) for axis in range(3)]
    hashed = [x ^ y ^ z for z in keys[2] for y in keys[1] for x in keys[0]]
    return Corners(torch.stack(hashed, dim=1) & (table_size - 1), _corner_weights(fraction))


class _WeightedCorners(torch.autograd.Function):
    """table [C, V], index [P, 8], weight [P, 8] -> [P, C]; differentiable in the table only."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(index, weight)
        ctx.table_shape = table.shape
        channels = [
            nn.functional.embedding_bag(index, channel[:, None], mode="sum", per_sample_weights=weight)
            for channel in table
        ]
        return channels[0] if len(channels) == 1 else torch.cat(channels, dim=1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None]:
        (grad_values,) = grad_outputs
        index, weight = ctx.saved_tensors
        grad_table = grad_values.new_zeros(ctx.table_shape)
        flat_index = index.reshape(-1)
        for channel, grad_channel in zip(grad_table, grad_values.unbind(1), strict=True):
            channel.scatter_add_(0, flat_index, (weight * grad_channel[:, None]).reshape(-1))
        return grad_table, None, None


def weighted_corners(table: Tensor, corners: Corners) -> Tensor:
    """Interpolated values [P, C] of `table` [C, ...] (all but the first axis flattened into vertices)."""
    return _WeightedCorners.apply(table.flatten(1), corners.index, corners.weight)  # type: ignore[return-value]


@dataclass(frozen=True)
class Level:
    """One resolution of a hash encoding: `resolution` vertices along an edge, kept in `num_slots` rows of the
    table from `first_slot` on, one vertex a slot unless `is_hashed`."""

    resolution: int
    first_slot: int
    num_slots: int
    is_hashed: bool


def hash_look_up(points: Tensor, table: Tensor, levels: tuple[Level, ...]) -> Tensor:
    """Features [P, L F] of points [P, 3] in [0, 1]^3 (clamped), from a table [S, F] that holds all levels."""
    features = []
    for level, rows in zip(levels, table.split([level.num_slots for level in levels]), strict=True):
        corners = (
            hashed_corners(points, level.resolution, level.num_slots)
            if level.is_hashed
            else dense_corners(points, level.resolution)
        )
        features.append(weighted_corners(rows.t(), corners))
    return torch.cat(features, dim=1)


class HashGridEncoding(nn.Module):
    """Multiresolution hash encoding with linear interpolation (Instant NGP, Mueller et al. 2022).

    Level l has floor(base * growth^l) vertices along an edge, from `base_resolution` to `max_resolution`;
    levels that fit are stored densely, finer ones share `table_size` hashed slots. All levels lie in one
    `table` [S, F], the features of a slot side by side, starting uniform in +-1e-4.

    Args:
        backend: who looks up: "torch", "triton" (`grid_kernels`) or "tinycudann". All compute the same
            function of the same table; see `backends.choose_encoding_backend`.

    Raises UsageError for sizes that are no powers of two.
    """

    levels_on_device: Tensor

    def __init__(
        self,
        *,
        num_levels: int = 12,
        features_per_level: int = 2,
        table_size: int = 2**17,
        base_resolution: int = 16,
        max_resolution: int = 256,
        backend: EncodingBackend = "torch",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value, example in (
            ("table_size", table_size, 2**17),
            ("features_per_level", features_per_level, 2),
        ):
            if value < 1 or value & (value - 1):
                raise UsageError(f"{name} is {value}; it must be a power of two, e.g. {example}")
        growth = math.exp(math.log(max_resolution / base_resolution) / max(1, num_levels - 1))
        self.table_size = table_size
        self.backend = backend
        self.resolutions = tuple(int(base_resolution * growth**level + 1e-6) for level in range(num_levels))
        self.num_features = num_levels * features_per_level
        self.levels = _levels(self.resolutions, table_size)
        values = [
            torch.rand(features_per_level, level.num_slots, generator=generator) for level in self.levels
        ]
        self.table = nn.Parameter((torch.cat(values, dim=1) * 2 - 1).mul_(1e-4).t().contiguous())
        rows = [
            (level.resolution, level.first_slot, level.num_slots - 1 if level.is_hashed else 0)
            for level in self.levels
        ]
        self.register_buffer("levels_on_device", torch.tensor(rows, dtype=torch.int32), persistent=False)

    def forward(self, points: Tensor) -> Tensor:
        """Features [P, L F] of points [P, 3] in [0, 1]^3; no gradient to the points."""
        if self.backend == "triton":
            from uni3d.scene import grid_kernels

            return grid_kernels.hash_look_up(points, self.table, self.levels_on_device)
        if self.backend == "tinycudann":
            from uni3d.scene import tinycudann_encoding

            return tinycudann_encoding.hash_look_up(points, self.table, self.levels)
        return hash_look_up(points, self.table, self.levels)


def _levels(resolutions: tuple[int, ...], table_size: int) -> tuple[Level, ...]:
    levels: list[Level] = []
    first_slot = 0
    for resolution in resolutions:
        num_slots = min(resolution**3, table_size)
        levels.append(Level(resolution, first_slot, num_slots, resolution**3 > table_size))
        first_slot += num_slots
    return tuple(levels)
