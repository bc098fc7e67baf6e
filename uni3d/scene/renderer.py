"""Volume rendering of a field from orbit cameras: image, opacity and depth, differentiable in the field
alone.

Rays meet the cube (or the box around the occupied cells) at a lattice of equal steps. Two passes without
gradient thin the lattice out: cells known to be empty, then samples behind opaque matter. Only what is left
is evaluated with gradient, packed ray after ray, and composited exactly. On a CPU the same generator state
gives bitwise the same image and gradient; on a GPU scatter-adds may differ in the last bits.
Legend: B cameras, H W pixels, R = B H W rays, K lattice places on a ray, N packed samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from uni3d.errors import UsageError
from uni3d.random_streams import SharedStream
from uni3d.scene.camera import Cameras
from uni3d.scene.marching import along, is_occupied, lattice_shift, places_inside, scene_bounds
from uni3d.scene.occupancy import OccupancyGrid
from uni3d.scene.packed import Segments, composite, exclusive_sum

CANDIDATES_PER_CHUNK = 2**21  # about 80 MB of temporaries in the passes without gradient


class Field(Protocol):
    """What the renderer asks of a scene; `RadianceField` is one."""

    half_extent: float

    def density(self, points: Tensor) -> Tensor:
        """Extinction per scene unit [P] at points [P, 3]."""
        ...

    def normals(self, points: Tensor) -> Tensor:
        """Unit normals [P, 3]; asked for only with `with_normals`."""
        ...

    def __call__(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Density [P] and sRGB colour [P, 3]."""
        ...


@dataclass(frozen=True)
class RaySamples:
    """The packed samples behind an image, for regularisers that look along rays.

    `weights` [N] carry gradient; `distances` [N] (scene units from the camera), `points` [N, 3] and
    `directions` [R, 3] do not; `normals` [N, 3] are there only when asked for.
    """

    segments: Segments
    weights: Tensor
    distances: Tensor
    points: Tensor
    directions: Tensor
    step: float
    normals: Tensor | None = None


@dataclass(frozen=True)
class RenderOutput:
    """What `render` returns, all float32.

    `image` [B, 3, H, W] in [0, 1] over the background, `opacity` [B, 1, H, W] in [0, 1], `depth` [B, 1, H,
    W]: opacity-weighted mean distance from the camera, 0 where nothing was met. `normals` [B, 3, H, W]:
    weighted sum of unit normals in world axes, or None. `samples`: see `RaySamples`.
    """

    image: Tensor
    opacity: Tensor
    depth: Tensor
    samples: RaySamples
    normals: Tensor | None = None


class Renderer(Protocol):
    """What every renderer takes and gives: `render`, and the others that `backends.choose_renderer` knows."""

    def __call__(
        self,
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
    ) -> RenderOutput: ...


def render(
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
) -> RenderOutput:
    """Render `field` from `cameras`.

    Args:
        background: a grey level, a colour [3], colours [B, 3] or images [B, 3, H, W], sRGB in [0, 1].
        num_samples: lattice places along one edge of the cube; a ray through opposite corners has 1.7 times
            as many.
        generator: shifts each ray's lattice by a random part of a step; without it the lattice is centred.
        occupancy: cells to skip; without it every place inside the cube is visited.
        stop_transmittance: samples that get less than this share of the light are dropped (0 keeps all).
        max_samples: at most this many samples get gradient, on a random set of whole rays (evenly strided
            without a generator). The image stays exact; the gradient is that of the chosen rays, not
            rescaled. None: no limit.
        with_normals: also evaluate normals at the samples (four more density look-ups each).

    Raises UsageError for a background of another shape.
    """
    origins, directions = (rays.reshape(-1, 3) for rays in cameras.rays(height, width))
    step = 2 * field.half_extent / num_samples
    with torch.no_grad():
        shift = lattice_shift(origins, generator)
        ray_index, distances = _live_samples(
            field,
            origins,
            directions,
            shift,
            step,
            occupancy=occupancy,
            stop_transmittance=stop_transmittance,
        )
        points = along(origins, directions, ray_index, distances)
    segments = Segments.from_ray_index(ray_index, origins.shape[0])
    density, colour = evaluate_within_budget(field, points, segments, max_samples, generator)
    normals = field.normals(points) if with_normals else None
    features = colour if normals is None else torch.cat([colour, normals], dim=1)
    weights, sums = composite(density * step, features, distances, segments)
    samples = RaySamples(segments, weights, distances, points, directions, step, normals)
    return picture(sums.view(len(cameras), height, width, -1), background, samples)


def picture(sums: Tensor, background: Tensor | float, samples: RaySamples) -> RenderOutput:
    """The output from sums over rays [B, H, W, C + 2] as `packed.composite` gives them: features are colours
    and, if the samples have normals, normals. Raises UsageError for a background of another shape."""
    maps = sums.permute(0, 3, 1, 2)
    opacity, distance = maps[:, -2:-1], maps[:, -1:]
    return RenderOutput(
        image=maps[:, :3] + (1 - opacity) * _background_image(background, maps),
        opacity=opacity,
        depth=distance / opacity.clamp(min=1e-6),
        normals=None if samples.normals is None else maps[:, 3:6],
        samples=samples,
    )


def _live_samples(
    field: Field,
    origins: Tensor,
    directions: Tensor,
    shift: Tensor,
    step: float,
    *,
    occupancy: OccupancyGrid | None,
    stop_transmittance: float,
) -> tuple[Tensor, Tensor]:
    """Ray index int64 [N], ascending, and distance [N], ascending on each ray, of the samples worth
    evaluating."""
    bounds = scene_bounds(field.half_extent, occupancy, origins)
    first, count = places_inside(origins, directions, bounds, shift, step)
    rays = torch.nonzero(count)[:, 0]
    found: list[tuple[Tensor, Tensor]] = []
    if rays.numel() > 0:
        chunk = max(1, CANDIDATES_PER_CHUNK // int(count.max()))
        for part in rays.split(chunk):
            start = (first[part] + shift[part]) * step
            found.append(
                _live_samples_of_chunk(
                    field, part, origins, directions, start, count[part], step, occupancy, stop_transmittance
                )
            )
    if not found:
        return rays, origins.new_zeros(0)
    return torch.cat([ray for ray, _ in found]), torch.cat([distance for _, distance in found])


def _live_samples_of_chunk(
    field: Field,
    rays: Tensor,
    origins: Tensor,
    directions: Tensor,
    start: Tensor,
    count: Tensor,
    step: float,
    occupancy: OccupancyGrid | None,
    stop_transmittance: float,
) -> tuple[Tensor, Tensor]:
    """`_live_samples` for some rays (int64 [r]) whose lattice begins at `start` [r] and has `count` [r]
    places.
    """
    places = torch.arange(int(count.max()), device=rays.device, dtype=start.dtype)
    is_live = places < count[:, None]
    if occupancy is not None:
        distances = start[:, None] + places * step
        is_live &= is_occupied(occupancy, origins[rays], directions[rays], distances)
    row, place = torch.nonzero(is_live, as_tuple=True)
    ray_index, distances = rays[row], start[row] + place * step
    if stop_transmittance <= 0:
        return ray_index, distances
    density = field.density(along(origins, directions, ray_index, distances))
    before = exclusive_sum(density * step, Segments.from_ray_index(row, rays.shape[0]))
    is_lit = torch.exp(-before) > stop_transmittance
    return ray_index[is_lit], distances[is_lit]


def evaluate_within_budget(
    field: Field,
    points: Tensor,
    segments: Segments,
    max_samples: int | None,
    generator: torch.Generator | SharedStream | None,
) -> tuple[Tensor, Tensor]:
    """Density [N] and colour [N, 3] at `points` [N, 3], with gradient for at most `max_samples` of them."""
    num_points = points.shape[0]
    if max_samples is None or num_points <= max_samples or not torch.is_grad_enabled():
        return field(points)
    has_gradient = _rays_within_budget(segments, max_samples, generator)[segments.ray_index]
    chosen, others = torch.nonzero(has_gradient)[:, 0], torch.nonzero(~has_gradient)[:, 0]
    with torch.no_grad():
        parts = [field(part) for part in points[others].split(max(1, max_samples))]
    density, colour = field(points[chosen])
    to_place = torch.empty_like(segments.ray_index)
    to_place[torch.cat([chosen, others])] = torch.arange(num_points, device=points.device)
    all_density = torch.cat([density, *(part[0] for part in parts)])
    all_colour = torch.cat([colour, *(part[1] for part in parts)])
    return all_density[to_place], all_colour[to_place]


def _rays_within_budget(
    segments: Segments, max_samples: int, generator: torch.Generator | SharedStream | None
) -> Tensor:
    """Which rays get gradient, bool [R]: as many of a shuffled order as fit into `max_samples`."""
    num_rays, device = segments.num_rays, segments.start.device
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    if isinstance(generator, SharedStream):
        generator = generator.generator
    order = torch.randperm(num_rays, generator=generator, device=generator.device).to(device)
    counts = (segments.end - segments.start)[order]
    fits = torch.zeros(num_rays, dtype=torch.bool, device=device)
    fits[order] = counts.cumsum(0) <= max_samples
    return fits


def _background_image(background: Tensor | float, maps: Tensor) -> Tensor:
    """The background as a tensor that broadcasts over [B, 3, H, W]."""
    num, _, height, width = maps.shape
    if not isinstance(background, Tensor):
        return torch.full((1, 3, 1, 1), float(background), device=maps.device)
    if background.shape in ((3,), (num, 3)):
        return background.view(-1, 3, 1, 1)
    if background.shape == (num, 3, height, width):
        return background
    raise UsageError(
        f"background has shape {tuple(background.shape)}; give a number, [3], [{num}, 3] or "
        f"[{num}, 3, {height}, {width}]"
    )
