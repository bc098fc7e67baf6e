"""Places along rays: where rays meet the scene, which places may hold matter, and which of them are worth a
sample when only so many may be taken.

The last is decided without asking the device how many there are. Every ray has a lattice of places; those in
occupied cells are its entries. `allot` shares a budget among the rays: all entries if they fit, else equally
thinned, and never fewer than one for a ray that has any. A ray with w entries and k samples cuts its entries
into k runs of nearly equal length; a sample stands in the middle of its run and for all of it. All shapes
follow from the sizes of image, lattice and budget. `ray_kernels` has kernels for what loops over places.
Legend: R rays, K lattice places on a ray, N samples within the budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from uni3d.device_draws import uniform
from uni3d.random_streams import SharedStream
from uni3d.scene.occupancy import OccupancyGrid
from uni3d.scene.packed import Segments, exclusive_sum

PLACES_PER_CHUNK = 2**24  # about 600 MB of temporaries


def lattice_shift(origins: Tensor, generator: torch.Generator | SharedStream | None) -> Tensor:
    """Part of a step, in [0, 1), by which each ray's lattice is moved, [R]; without a generator one half."""
    if generator is None:
        return torch.full_like(origins[:, 0], 0.5)
    return uniform(origins.shape[0], generator=generator, device=origins.device)


def along(origins: Tensor, directions: Tensor, ray_index: Tensor, distances: Tensor) -> Tensor:
    """Points [N, 3] at `distances` [N] on the rays `ray_index` [N]."""
    return torch.addcmul(origins[ray_index], directions[ray_index], distances[:, None])


def scene_bounds(half_extent: float, occupancy: OccupancyGrid | None, like: Tensor) -> Tensor:
    """Box [2, 3] around the occupied cells, or around the cube, on the device of `like`."""
    if occupancy is not None:
        return occupancy.bounds
    corner = torch.full((1, 3), half_extent, device=like.device)
    return torch.cat([-corner, corner])


def box_interval(origins: Tensor, directions: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Distances [R] at which rays enter and leave the box `bounds` [2, 3]; entry > exit for a miss."""
    sign = torch.where(directions < 0, -1.0, 1.0)
    inverse = sign / directions.abs().clamp(min=1e-9)  # no 0 * inf for rays that run along a face
    to_low, to_high = (bounds[0] - origins) * inverse, (bounds[1] - origins) * inverse
    entry = torch.minimum(to_low, to_high).amax(dim=-1).clamp(min=0)
    return entry, torch.maximum(to_low, to_high).amin(dim=-1)


def places_inside(
    origins: Tensor, directions: Tensor, bounds: Tensor, shift: Tensor, step: float
) -> tuple[Tensor, Tensor]:
    """First place k and number of places of each ray's lattice inside the box `bounds`, float [R] each.

    Places are at (k + `shift` [R]) * `step` from the camera for whole k.
    """
    entry, leave = box_interval(origins, directions, bounds)
    first = torch.ceil(entry / step - shift)
    return first, (torch.floor(leave / step - shift) - first + 1).clamp(min=0)


@dataclass(frozen=True)
class Lattice:
    """Equally spaced places on rays: place k of a ray lies at `start` [R] + k `step` along its unit
    `directions` [R, 3] from its `origins` [R, 3], for whole k from 0 to `count` [R] (int32) - 1."""

    origins: Tensor
    directions: Tensor
    start: Tensor
    count: Tensor
    step: float
    max_count: int
    """No ray has more places, known without looking at `count`."""


@dataclass(frozen=True)
class Allotment:
    """How a budget of N samples is shared: ray r may turn `wanted` [R] entries into `kept` [R] samples, which
    take the slots from `end` - `kept` to `end` (all int64). Slots from `end[-1]` on are unused."""

    wanted: Tensor
    kept: Tensor
    end: Tensor
    budget: int

    def segments(self) -> Segments:
        """The used slots of every ray; unused slots count as the last ray's but belong to no segment."""
        slot = torch.arange(self.budget, device=self.end.device)
        ray_index = torch.searchsorted(self.end, slot, right=True).clamp_(max=self.end.shape[0] - 1)
        return Segments(ray_index, self.end - self.kept, self.end)


def max_places(num_samples: int) -> int:
    """The most lattice places on a ray through a cube whose edge has `num_samples` of them."""
    return math.floor(math.sqrt(3) * num_samples) + 2


def allot(wanted: Tensor, budget: int) -> Allotment:
    """Share `budget` samples among rays with `wanted` [R] entries; the budget is at least R.

    When they do not fit, a ray gets ceil(w / m) for one factor m >= 1: at most w / m + 1 each, so with
    m = sum(w) / (budget - rays with entries) the sum stays within the budget.
    """
    total, num_rays = wanted.sum(), (wanted > 0).sum()
    factor = total / (budget - num_rays).clamp(min=1).double()
    thinned = torch.ceil(wanted / factor.clamp(min=1)).to(torch.int64)
    kept = torch.where(total <= budget, wanted, thinned)
    return Allotment(wanted, kept, kept.cumsum(0), budget)


def run_bounds(allotment: Allotment, segments: Segments) -> tuple[Tensor, Tensor]:
    """First entry of each slot's run and the one after its last, int64 [N] each, counted along the ray."""
    ray = segments.ray_index
    number = torch.arange(allotment.budget, device=ray.device) - segments.start[ray]
    wanted, kept = allotment.wanted[ray], allotment.kept[ray].clamp(min=1)
    return number * wanted // kept, (number + 1) * wanted // kept


def middle(begin: Tensor, end: Tensor) -> Tensor:
    """The entry that stands for the run from `begin` to before `end`."""
    return begin + torch.div(end - begin - 1, 2, rounding_mode="floor")


def is_occupied(occupancy: OccupancyGrid, origins: Tensor, directions: Tensor, distances: Tensor) -> Tensor:
    """Whether the points at `distances` [r, K] on rays [r, 3] lie in occupied cells, bool [r, K]."""
    size = occupancy.resolution
    per_unit = size / (2 * occupancy.half_extent)
    start, slope = (origins + occupancy.half_extent) * per_unit, directions * per_unit
    flat: Tensor | None = None
    for axis in (2, 1, 0):  # cells are stored z, y, x
        cell = torch.addcmul(start[:, axis, None], slope[:, axis, None], distances).to(torch.int32)
        cell.clamp_(0, size - 1)
        flat = cell if flat is None else flat.mul_(size).add_(cell)
    assert flat is not None
    return occupancy.is_occupied.view(-1).index_select(0, flat.view(-1)).view(flat.shape)


def count_occupied(lattice: Lattice, occupancy: OccupancyGrid) -> Tensor:
    """Number of places in occupied cells on each ray, int64 [R]."""
    return torch.cat([flags.sum(dim=1) for _, flags in _occupied_in_chunks(lattice, occupancy)])


def occupied_places(lattice: Lattice, occupancy: OccupancyGrid, allotment: Allotment) -> Tensor:
    """The place that each slot's sample stands at, int64 [N]; entries are the occupied places in order.

    `allotment.wanted` is what `count_occupied` gave. Unused slots hold 0.
    """
    budget = allotment.budget
    places = torch.zeros(budget + 1, dtype=torch.int64, device=lattice.start.device)  # one to throw away
    for rays, flags in _occupied_in_chunks(lattice, occupancy):
        entry = flags.cumsum(dim=1) - 1
        wanted = allotment.wanted[rays, None].clamp(min=1)
        kept, end = allotment.kept[rays, None], allotment.end[rays, None]
        number = torch.div((entry + 1) * kept - 1, wanted, rounding_mode="floor")  # the run it lies in
        is_middle = entry == middle(
            number * wanted // kept.clamp(min=1), (number + 1) * wanted // kept.clamp(min=1)
        )
        slot = torch.where(flags & is_middle, end - kept + number, budget)
        place = torch.arange(lattice.max_count, device=slot.device).expand_as(slot)
        places.scatter_(0, slot.reshape(-1), place.reshape(-1))
    return places[:budget]


def _occupied_in_chunks(lattice: Lattice, occupancy: OccupancyGrid) -> list[tuple[slice, Tensor]]:
    """Some rays at a time, and which of their places are occupied, bool [r, K]."""
    num_rays, num_places = lattice.start.shape[0], lattice.max_count
    chunk = max(1, PLACES_PER_CHUNK // num_places)
    place = torch.arange(num_places, device=lattice.start.device)
    found = []
    for first in range(0, num_rays, chunk):
        rays = slice(first, first + chunk)
        distances = lattice.start[rays, None] + place * lattice.step
        flags = is_occupied(occupancy, lattice.origins[rays], lattice.directions[rays], distances)
        found.append((rays, flags & (place < lattice.count[rays, None])))
    return found


def absorb(optical_depth: Tensor, segments: Segments, stop_transmittance: float) -> tuple[Tensor, Tensor]:
    """How many of each ray's first samples get more than `stop_transmittance` of the light, int64 [R], and
    the opacity of the ray through each sample, float32 [N] (of no meaning for a sample of no segment).

    From optical depths [N] >= 0.
    """
    before = exclusive_sum(optical_depth, segments)
    is_lit = torch.exp(-before) > stop_transmittance  # and so are all samples before it
    through = torch.nn.functional.pad(is_lit.cumsum(0), (1, 0))
    return through[segments.end] - through[segments.start], -torch.expm1(-(before + optical_depth))
