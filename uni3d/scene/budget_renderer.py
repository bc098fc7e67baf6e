"""The renderer for GPUs: the picture of `renderer.render`, in a fixed number of samples and without waiting.

A renderer that packs exactly the samples it needs has to ask the device how many there are, several times
an image, and its memory follows the answer. Here a budget fixes all shapes beforehand: memory is bounded,
nothing is read back, and a CUDA graph can hold the whole. While the budget suffices, samples are those of
`renderer.render`, one by one. Beyond it every ray has fewer, which stand for more: the image loses detail
along the rays, but no ray is left out.

Two budgets: candidates in occupied cells, 16 times as many as rays, get a density without gradient, and what
light reaches of them becomes `max_samples` samples with gradient. A ray that must give up samples keeps its
candidates' opacity exactly: its samples stand at equal shares of it, as if drawn from the ray's weights, and
each carries its share. Slots that are not needed repeat others at weight zero.
Legend: R rays, M candidates, N samples, C features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from uni3d.errors import UsageError
from uni3d.random_streams import SharedStream
from uni3d.scene import marching, packed
from uni3d.scene.camera import Cameras
from uni3d.scene.marching import (
    Allotment,
    Lattice,
    allot,
    along,
    lattice_shift,
    max_places,
    middle,
    places_inside,
    run_bounds,
    scene_bounds,
)
from uni3d.scene.occupancy import OccupancyGrid
from uni3d.scene.packed import Segments
from uni3d.scene.renderer import Field, RaySamples, RenderOutput, picture

Kernels = Literal["triton", "torch"]
SAMPLES_PER_RAY = 8
CANDIDATES_PER_RAY = 16


def render_within_budget(
    field: Field,
    cameras: Cameras,
    height: int,
    width: int,
    background: Tensor | float = 1.0,
    *,
    num_samples: int = 80,
    generator: torch.Generator | SharedStream | None = None,
    occupancy: OccupancyGrid | None = None,
    stop_transmittance: float = 1e-3,
    max_samples: int | None = None,
    with_normals: bool = False,
    kernels: Kernels = "triton",
) -> RenderOutput:
    """Render `field` from `cameras`; arguments as of `renderer.render`, but for two.

    Args:
        max_samples: samples with gradient, the number whatever the scene; 8 times the number of rays unless
            given.
        kernels: "triton" (`ray_kernels`) or their twins in "torch".

    Raises UsageError for a background of another shape, or fewer samples than rays.
    """
    num_rays = len(cameras) * height * width
    budget = SAMPLES_PER_RAY * num_rays if max_samples is None else max_samples
    if budget < num_rays:
        raise UsageError(
            f"max_samples is {budget}, but {len(cameras)} images of {height} x {width} have {num_rays} rays; "
            f"allow at least one sample a ray"
        )
    walk = ray_functions(kernels)
    step = 2 * field.half_extent / num_samples
    with torch.no_grad():
        lattice = _lattice(field, cameras, height, width, num_samples, generator, occupancy)
        num_candidates = max(CANDIDATES_PER_RAY * num_rays, budget)
        candidates = _candidates(lattice, occupancy, num_candidates, walk)
        chosen = _lit(field, lattice, candidates, stop_transmittance, budget, walk)
        points = along(lattice.origins, lattice.directions, chosen.ray_index, chosen.distances)
    density, colour = field(points)
    normals = field.normals(points) if with_normals else None
    features = colour if normals is None else torch.cat([colour, normals], dim=1)
    weights, sums = walk.composite(density * chosen.lengths, features, chosen.distances, chosen.segments)
    samples = RaySamples(
        chosen.segments, weights, chosen.distances, points, lattice.directions, step, normals
    )
    return picture(sums.view(len(cameras), height, width, -1), background, samples)


@dataclass(frozen=True)
class RayFunctions:
    """What loops along rays; `marching` and `packed` say what each does."""

    count_occupied: Callable[[Lattice, OccupancyGrid], Tensor]
    occupied_places: Callable[[Lattice, OccupancyGrid, Allotment], Tensor]
    absorb: Callable[[Tensor, Segments, float], tuple[Tensor, Tensor]]
    composite: Callable[[Tensor, Tensor, Tensor, Segments], tuple[Tensor, Tensor]]


def ray_functions(kernels: Kernels) -> RayFunctions:
    """The functions of one kind; "triton" imports triton."""
    if kernels == "torch":
        return RayFunctions(
            marching.count_occupied, marching.occupied_places, marching.absorb, packed.composite
        )
    from uni3d.scene import ray_kernels

    return RayFunctions(
        ray_kernels.count_occupied, ray_kernels.occupied_places, ray_kernels.absorb, ray_kernels.composite
    )


@dataclass(frozen=True)
class _Slots:
    """A full budget of samples: the used slots of each ray, the ray [N] and distance [N] of every slot, and
    for what length it stands, float32 [N]: 0 for unused slots, which repeat the places of used ones."""

    segments: Segments
    ray_index: Tensor
    distances: Tensor
    lengths: Tensor


def _lattice(
    field: Field,
    cameras: Cameras,
    height: int,
    width: int,
    num_samples: int,
    generator: torch.Generator | SharedStream | None,
    occupancy: OccupancyGrid | None,
) -> Lattice:
    origins, directions = (rays.reshape(-1, 3) for rays in cameras.rays(height, width))
    step = 2 * field.half_extent / num_samples
    shift = lattice_shift(origins, generator)
    bounds = scene_bounds(field.half_extent, occupancy, origins)
    first, count = places_inside(origins, directions, bounds, shift, step)
    return Lattice(
        origins, directions, (first + shift) * step, count.to(torch.int32), step, max_places(num_samples)
    )


def _candidates(lattice: Lattice, occupancy: OccupancyGrid | None, budget: int, walk: RayFunctions) -> _Slots:
    """Samples in occupied cells, as many as the budget has room for."""
    wanted = lattice.count.long() if occupancy is None else walk.count_occupied(lattice, occupancy)
    allotment = allot(wanted, budget)
    segments = allotment.segments()
    begin, end = run_bounds(allotment, segments)
    if occupancy is None:
        places = middle(begin, end)
    else:
        places = walk.occupied_places(lattice, occupancy, allotment)
    is_used, source = _usage(allotment)
    ray_index = segments.ray_index[source]
    distances = lattice.start[ray_index] + places[source] * lattice.step
    lengths = (end - begin) * lattice.step * is_used
    return _Slots(segments, ray_index, distances, lengths)


def _lit(
    field: Field,
    lattice: Lattice,
    candidates: _Slots,
    stop_transmittance: float,
    budget: int,
    walk: RayFunctions,
) -> _Slots:
    """The candidates that light reaches, as many as the budget has room for."""
    points = along(lattice.origins, lattice.directions, candidates.ray_index, candidates.distances)
    density = torch.cat([field.density(part) for part in points.split(budget)])
    num_lit, opacity = walk.absorb(density * candidates.lengths, candidates.segments, stop_transmittance)
    allotment = allot(num_lit, budget)
    segments = allotment.segments()
    candidate, share = _chosen_candidates(candidates.segments, opacity, allotment, segments)
    is_thinned = (allotment.kept < allotment.wanted)[segments.ray_index]
    is_used, source = _usage(allotment)
    # A share of opacity as optical depth, spread over the density at the place that stands for it.
    lengths = torch.where(
        is_thinned, share / density[candidate].clamp(min=1e-12), candidates.lengths[candidate]
    )
    place = candidate[source]
    return _Slots(segments, candidates.ray_index[place], candidates.distances[place], lengths * is_used)


def _chosen_candidates(
    candidates: Segments, opacity: Tensor, allotment: Allotment, segments: Segments
) -> tuple[Tensor, Tensor]:
    """The candidate of each slot, int64 [N], and the optical depth that is its share on a thinned ray, [N].

    `opacity` [M] is that of the ray through each candidate. On a thinned ray with opacity o and k samples,
    sample j is the candidate in which (j + 1/2) o / k is reached, and takes the light from j o / k to
    (j + 1) o / k.
    """
    ray, num_rays, num_candidates = segments.ray_index, segments.num_rays, opacity.shape[0]
    number = torch.arange(allotment.budget, device=ray.device) - segments.start[ray]
    last_lit = (candidates.start + allotment.wanted - 1).clamp(min=0, max=num_candidates - 1)
    whole = opacity[last_lit].double().clamp(max=1 - 1e-6)[ray]
    kept = allotment.kept[ray].clamp(min=1)
    # Ascending over all rays, since opacities lie between 0 and 1 and rays are 2 apart.
    slot = torch.arange(num_candidates, device=ray.device)
    level = torch.where(slot < candidates.end[-1], 2 * candidates.ray_index + opacity.double(), 2 * num_rays)
    at_quantile = torch.searchsorted(level, 2 * ray + (number + 0.5) / kept * whole)
    is_thinned = (allotment.kept < allotment.wanted)[ray]
    candidate = torch.where(is_thinned, at_quantile, candidates.start[ray] + number)
    begin, end = number / kept * whole, (number + 1).clamp(max=kept) / kept * whole
    share = torch.log1p(-begin.clamp(max=1 - 1e-6)) - torch.log1p(-end)
    return candidate.clamp(min=0, max=num_candidates - 1), share.float()


def _usage(allotment: Allotment) -> tuple[Tensor, Tensor]:
    """Which slots are used, bool [N], and the used slot whose place each has, int64 [N]."""
    slot = torch.arange(allotment.budget, device=allotment.end.device)
    num_used = allotment.end[-1]
    return slot < num_used, slot % num_used.clamp(min=1)
