"""Triton kernels that walk along rays: finding occupied places, counting lit samples, compositing.

One thread follows one ray, so nothing is stored for places that are not kept, and prefix sums need no second
pass over memory. The twins in plain torch are `marching.count_occupied`, `marching.occupied_places`,
`marching.absorb` and `packed.composite`. Needs triton; see `grid_kernels` for how it is tested.
Legend: R rays, K lattice places on a ray, N samples, C features.
"""

# Triton reads the source of its functions; what their annotations say does not describe calling them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from uni3d.scene.marching import Allotment, Lattice
from uni3d.scene.occupancy import OccupancyGrid
from uni3d.scene.packed import Segments

RAYS = 64  # a program: one a thread of two warps, so that small images reach many multiprocessors
NUM_WARPS = 2


@triton.jit
def _load_ray(origins, directions, start, count, ray, is_ray, half_extent, per_unit):
    """Where rays stand in cells at distance 0, how many cells they pass in a unit, and their lattice."""
    x = (tl.load(origins + 3 * ray, mask=is_ray, other=0.0) + half_extent) * per_unit
    y = (tl.load(origins + 3 * ray + 1, mask=is_ray, other=0.0) + half_extent) * per_unit
    z = (tl.load(origins + 3 * ray + 2, mask=is_ray, other=0.0) + half_extent) * per_unit
    slope_x = tl.load(directions + 3 * ray, mask=is_ray, other=0.0) * per_unit
    slope_y = tl.load(directions + 3 * ray + 1, mask=is_ray, other=0.0) * per_unit
    slope_z = tl.load(directions + 3 * ray + 2, mask=is_ray, other=0.0) * per_unit
    first = tl.load(start + ray, mask=is_ray, other=0.0)
    num_places = tl.load(count + ray, mask=is_ray, other=0)
    return x, y, z, slope_x, slope_y, slope_z, first, num_places


@triton.jit
def _is_occupied(occupied, x, y, z, slope_x, slope_y, slope_z, distance, is_place, size):
    """1 for a distance inside an occupied cell, else 0; cells are stored z, y, x."""
    cell_x = tl.minimum(tl.maximum(x + slope_x * distance, 0.0), size - 1.0).to(tl.int32)
    cell_y = tl.minimum(tl.maximum(y + slope_y * distance, 0.0), size - 1.0).to(tl.int32)
    cell_z = tl.minimum(tl.maximum(z + slope_z * distance, 0.0), size - 1.0).to(tl.int32)
    flag = tl.load(occupied + (cell_z * size + cell_y) * size + cell_x, mask=is_place, other=0)
    return flag.to(tl.int32)


@triton.jit
def _count_occupied(
    origins, directions, start, count, occupied, found, num_rays, step, size, half_extent, per_unit,
    RAYS: tl.constexpr,
):  # fmt: skip
    ray = tl.program_id(0) * RAYS + tl.arange(0, RAYS)
    is_ray = ray < num_rays
    x, y, z, slope_x, slope_y, slope_z, first, num_places = _load_ray(
        origins, directions, start, count, ray, is_ray, half_extent, per_unit
    )
    total = tl.zeros([RAYS], dtype=tl.int32)
    for place in range(0, tl.max(num_places)):
        distance = first + place * step
        total += _is_occupied(
            occupied, x, y, z, slope_x, slope_y, slope_z, distance, place < num_places, size
        )
    tl.store(found + ray, total.to(tl.int64), mask=is_ray)


@triton.jit
def _write_places(
    origins, directions, start, count, occupied, wanted, kept, end, places,
    num_rays, step, size, half_extent, per_unit, RAYS: tl.constexpr,
):  # fmt: skip
    ray = tl.program_id(0) * RAYS + tl.arange(0, RAYS)
    is_ray = ray < num_rays
    x, y, z, slope_x, slope_y, slope_z, first, num_places = _load_ray(
        origins, directions, start, count, ray, is_ray, half_extent, per_unit
    )
    num_entries = tl.maximum(tl.load(wanted + ray, mask=is_ray, other=1).to(tl.int32), 1)
    num_kept = tl.maximum(tl.load(kept + ray, mask=is_ray, other=0).to(tl.int32), 1)
    first_slot = tl.load(end + ray, mask=is_ray, other=0) - num_kept
    entry = tl.zeros([RAYS], dtype=tl.int32)
    for place in range(0, tl.max(num_places)):
        distance = first + place * step
        flag = _is_occupied(occupied, x, y, z, slope_x, slope_y, slope_z, distance, place < num_places, size)
        number = ((entry + 1) * num_kept - 1) // num_entries
        run_begin = number * num_entries // num_kept
        run_end = (number + 1) * num_entries // num_kept
        is_kept = (flag == 1) & (entry == run_begin + (run_end - run_begin - 1) // 2)
        tl.store(places + first_slot + number, tl.zeros([RAYS], tl.int64) + place, mask=is_kept)
        entry += flag


@triton.jit
def _absorbed(optical_depth):
    """1 - exp(-x), exact to float32 also for small x, where the difference would lose digits."""
    small = optical_depth * (1 - optical_depth * (0.5 - optical_depth * 0.16666667))
    return tl.where(optical_depth < 0.02, small, 1 - tl.exp(-optical_depth))


@triton.jit
def _absorb(optical_depth, start, end, lit, opacities, num_rays, limit, RAYS: tl.constexpr):
    ray = tl.program_id(0) * RAYS + tl.arange(0, RAYS)
    is_ray = ray < num_rays
    first = tl.load(start + ray, mask=is_ray, other=0)
    num_samples = (tl.load(end + ray, mask=is_ray, other=0) - first).to(tl.int32)
    before = tl.zeros([RAYS], dtype=tl.float32)
    total = tl.zeros([RAYS], dtype=tl.int32)
    for number in range(0, tl.max(num_samples)):
        is_sample = number < num_samples
        total += (is_sample & (before < limit)).to(tl.int32)
        before += tl.load(optical_depth + first + number, mask=is_sample, other=0.0)
        tl.store(opacities + first + number, _absorbed(before), mask=is_sample)
    tl.store(lit + ray, total.to(tl.int64), mask=is_ray)


@triton.jit
def _composite_forward(
    optical_depth, features, distances, start, end, weights, passed, sums, num_rays,
    FEATURES: tl.constexpr, RAYS: tl.constexpr,
):  # fmt: skip
    # One program a column: walking again costs less than accumulators in two dimensions, whose threads would
    # have to wait for each other at every sample.
    # The column is a block because the interpreter of triton 3.9 turns a mask made of a scalar into integers.
    column = tl.zeros([RAYS], tl.int32) + tl.program_id(1)
    ray = tl.program_id(0) * RAYS + tl.arange(0, RAYS)
    is_ray = ray < num_rays
    first = tl.load(start + ray, mask=is_ray, other=0)
    num_samples = (tl.load(end + ray, mask=is_ray, other=0) - first).to(tl.int32)
    transmittance = tl.full([RAYS], 1.0, dtype=tl.float32)
    total = tl.zeros([RAYS], dtype=tl.float32)
    for number in range(0, tl.max(num_samples)):
        is_sample = number < num_samples
        sample = first + number
        depth = tl.load(optical_depth + sample, mask=is_sample, other=0.0)
        weight = transmittance * _absorbed(depth)
        transmittance *= tl.exp(-depth)
        tl.store(weights + sample, weight, mask=is_sample & (column == 0))
        tl.store(passed + sample, transmittance, mask=is_sample & (column == 0))
        value = tl.load(
            features + sample * FEATURES + column, mask=is_sample & (column < FEATURES), other=0.0
        )
        value += tl.load(distances + sample, mask=is_sample & (column == FEATURES + 1), other=0.0)
        total += weight * tl.where(column == FEATURES, 1.0, value)
    tl.store(sums + ray * (FEATURES + 2) + column, total, mask=is_ray)


@triton.jit
def _composite_backward(
    features, distances, start, end, weights, passed, grad_weights, grad_sums, grad_depth, grad_features,
    num_rays, FEATURES: tl.constexpr, RAYS: tl.constexpr,
):  # fmt: skip
    ray = tl.program_id(0) * RAYS + tl.arange(0, RAYS)
    is_ray = ray < num_rays
    first = tl.load(start + ray, mask=is_ray, other=0)
    last = tl.load(end + ray, mask=is_ray, other=0) - 1
    num_samples = (last + 1 - first).to(tl.int32)
    row = grad_sums + ray * (FEATURES + 2)
    grad_opacity = tl.load(row + FEATURES, mask=is_ray, other=0.0)
    grad_distance = tl.load(row + FEATURES + 1, mask=is_ray, other=0.0)
    behind = tl.zeros([RAYS], dtype=tl.float32)  # what the light that passes is still worth
    for number in range(0, tl.max(num_samples)):
        is_sample = number < num_samples
        sample = last - number
        weight = tl.load(weights + sample, mask=is_sample, other=0.0)
        worth = tl.load(grad_weights + sample, mask=is_sample, other=0.0) + grad_opacity
        worth += grad_distance * tl.load(distances + sample, mask=is_sample, other=0.0)
        for column in tl.static_range(FEATURES):
            grad = tl.load(row + column, mask=is_sample, other=0.0)
            worth += grad * tl.load(features + sample * FEATURES + column, mask=is_sample, other=0.0)
            tl.store(grad_features + sample * FEATURES + column, weight * grad, mask=is_sample)
        after = tl.load(passed + sample, mask=is_sample, other=0.0)
        tl.store(grad_depth + sample, worth * after - behind, mask=is_sample)
        behind += worth * weight


def _programs(num_rays: int) -> int:
    return triton.cdiv(num_rays, RAYS)


def _walk(lattice: Lattice, occupancy: OccupancyGrid) -> tuple[list[Tensor], list[float]]:
    """Tensors and numbers that both walks through the grid start from."""
    # One camera's origins are one row repeated by a stride of 0.
    rays = [lattice.origins, lattice.directions, lattice.start, lattice.count]
    cells = occupancy.is_occupied.view(torch.uint8)
    size = occupancy.resolution
    numbers = [lattice.step, size, occupancy.half_extent, size / (2 * occupancy.half_extent)]
    return [tensor.contiguous() for tensor in (*rays, cells)], numbers


def count_occupied(lattice: Lattice, occupancy: OccupancyGrid) -> Tensor:
    """Number of places in occupied cells on each ray, int64 [R]; twin of `marching.count_occupied`."""
    num_rays = lattice.start.shape[0]
    found = torch.empty(num_rays, dtype=torch.int64, device=lattice.start.device)
    tensors, numbers = _walk(lattice, occupancy)
    with torch.cuda.device_of(found):
        _count_occupied[(_programs(num_rays),)](
            *tensors, found, num_rays, *numbers, RAYS=RAYS, num_warps=NUM_WARPS
        )
    return found


def occupied_places(lattice: Lattice, occupancy: OccupancyGrid, allotment: Allotment) -> Tensor:
    """The place that each slot's sample stands at, int64 [N]; twin of `marching.occupied_places`."""
    num_rays = lattice.start.shape[0]
    places = torch.zeros(allotment.budget, dtype=torch.int64, device=lattice.start.device)
    tensors, numbers = _walk(lattice, occupancy)
    with torch.cuda.device_of(places):
        _write_places[(_programs(num_rays),)](
            *tensors, allotment.wanted, allotment.kept, allotment.end, places,
            num_rays, *numbers, RAYS=RAYS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return places


def absorb(optical_depth: Tensor, segments: Segments, stop_transmittance: float) -> tuple[Tensor, Tensor]:
    """Lit samples of each ray, int64 [R], and opacity through each sample [N]; twin of `marching.absorb`."""
    lit, opacities = torch.empty_like(segments.start), torch.zeros_like(optical_depth)
    limit = -math.log(stop_transmittance) if stop_transmittance > 0 else math.inf
    with torch.cuda.device_of(lit):
        _absorb[(_programs(segments.num_rays),)](
            optical_depth.contiguous(), segments.start, segments.end, lit, opacities,
            segments.num_rays, limit, RAYS=RAYS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return lit, opacities


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, optical_depth: Tensor, features: Tensor, distances: Tensor, start: Tensor, end: Tensor
    ) -> tuple[Tensor, Tensor]:
        num_rays, num_features = start.shape[0], features.shape[1]
        weights = torch.zeros_like(optical_depth)
        passed = torch.zeros_like(optical_depth)
        sums = features.new_empty(num_rays, num_features + 2)
        with torch.cuda.device_of(features):
            _composite_forward[(_programs(num_rays), num_features + 2)](
                optical_depth, features, distances, start, end, weights, passed, sums, num_rays,
                FEATURES=num_features, RAYS=RAYS, num_warps=NUM_WARPS,
            )  # fmt: skip
        ctx.save_for_backward(features, distances, start, end, weights, passed)
        return weights, sums

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        features, distances, start, end, weights, passed = ctx.saved_tensors
        grad_weights, grad_sums = (grad.contiguous() for grad in grad_outputs)
        num_rays, num_features = start.shape[0], features.shape[1]
        grad_depth, grad_features = torch.zeros_like(weights), torch.zeros_like(features)
        with torch.cuda.device_of(features):
            _composite_backward[(_programs(num_rays),)](
                features, distances, start, end, weights, passed, grad_weights, grad_sums,
                grad_depth, grad_features, num_rays,
                FEATURES=num_features, RAYS=RAYS, num_warps=NUM_WARPS,
            )  # fmt: skip
        return grad_depth, grad_features, None, None, None


def composite(
    optical_depth: Tensor, features: Tensor, distances: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    """Weights [N] and sums [R, C + 2] over rays; twin of `packed.composite`.

    Samples that lie in no segment get weight 0 and no gradient.
    """
    return _Composite.apply(  # type: ignore[return-value]
        optical_depth.contiguous(),
        features.contiguous(),
        distances.contiguous(),
        segments.start.contiguous(),
        segments.end.contiguous(),
    )
