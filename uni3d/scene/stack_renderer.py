"""Volume rendering of several scenes in one pass: each ray belongs to a scene, all rays share every kernel.

`render_stack` gives the pictures that `renderer.render` gives scene by scene (its lattice, its two pruning
passes, its compositing), and `OccupancyStack` the cells that `OccupancyGrid` would find.
Legend: S scenes, B cameras, H W pixels, R = B H W rays, K lattice places on a ray, N packed samples.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from uni3d.device_draws import to_device
from uni3d.random_streams import Streams, uniform
from uni3d.scene.camera import Cameras
from uni3d.scene.field_stack import FieldStack
from uni3d.scene.marching import along, box_interval
from uni3d.scene.occupancy import OccupancyGrid
from uni3d.scene.packed import Segments, compositing_weights, exclusive_sum, weighted_ray_sum
from uni3d.scene.renderer import RaySamples, RenderOutput, _background_image

CANDIDATES_PER_CHUNK = 2**22  # about 160 MB of temporaries in the passes without gradient


class OccupancyStack:
    """Occupied cells [S, Z, Y, X] of S scenes; see `OccupancyGrid`, whose settings and state it shares."""

    def __init__(self, num_scenes: int, like: OccupancyGrid) -> None:
        self._like = like
        self.density = like.density.repeat(num_scenes, 1, 1, 1)
        self.is_occupied = like.is_occupied.repeat(num_scenes, 1, 1, 1)
        self.bounds = like.bounds.repeat(num_scenes, 1, 1)

    @property
    def resolution(self) -> int:
        return self._like.resolution

    @property
    def half_extent(self) -> float:
        return self._like.half_extent

    @torch.no_grad()
    def update(self, fields: FieldStack, *, streams: Streams) -> None:
        """Probe every field once in every cell, at a random place; as `OccupancyGrid.update`."""
        num_scenes, size, device = fields.num_scenes, self.resolution, self.density.device
        ticks = torch.arange(size, device=device, dtype=torch.float32)
        z, y, x = torch.meshgrid(ticks, ticks, ticks, indexing="ij")
        cells = torch.stack([x, y, z], dim=-1).view(1, -1, 3)
        within = to_device(uniform((num_scenes * size**3, 3), streams), device).view(num_scenes, -1, 3)
        cell_size = 2 * self.half_extent / size
        points = (cells + within) * cell_size - self.half_extent
        scene = torch.arange(num_scenes, device=device).repeat_interleave(size**3)
        probed = fields.density(points.view(-1, 3), scene).view(self.density.shape)
        density = torch.maximum(self.density * self._like.decay, probed)
        threshold = density.flatten(1).mean(dim=1).clamp(max=self._like.threshold)
        has_matter = density >= threshold[:, None, None, None]
        # A field that is not finite has none: keep its last good cells, the step will report it.
        is_good = has_matter.flatten(1).any(dim=1)[:, None, None, None]
        self.density = torch.where(is_good, density, self.density)
        width = 2 * self._like.dilation + 1
        dilated = torch.nn.functional.max_pool3d(
            has_matter[:, None].float(), width, stride=1, padding=self._like.dilation
        )
        self.is_occupied = torch.where(is_good, dilated[:, 0] > 0.5, self.is_occupied)
        self._update_bounds(cell_size)

    def _update_bounds(self, cell_size: float) -> None:
        for axis, others in enumerate([(1, 2), (1, 3), (2, 3)]):  # the grid's axes are z, y, x
            filled = self.is_occupied.any(dim=others[1]).any(dim=others[0]).int()
            first = filled.argmax(dim=1)
            last = filled.shape[1] - filled.flip(1).argmax(dim=1)
            self.bounds[:, 0, axis] = first.double() * cell_size - self.half_extent
            self.bounds[:, 1, axis] = last.double() * cell_size - self.half_extent

    def grid(self, scene: int) -> OccupancyGrid:
        """A copy of one scene's grid."""
        like = self._like
        grid = OccupancyGrid(
            resolution=like.resolution,
            half_extent=like.half_extent,
            threshold=like.threshold,
            decay=like.decay,
            dilation=like.dilation,
        ).to(self.density.device)
        grid.load_state_dict(self.state_dict(scene))
        return grid

    def state_dict(self, scene: int) -> dict[str, Tensor]:
        """What `OccupancyGrid.state_dict` gives for one scene."""
        return {
            "density": self.density[scene],
            "is_occupied": self.is_occupied[scene],
            "bounds": self.bounds[scene],
        }

    def load_state_dict(self, scene: int, state: Mapping[str, Tensor]) -> None:
        """Overwrite one scene with what `OccupancyGrid.state_dict` gave."""
        for name, own in (
            ("density", self.density),
            ("is_occupied", self.is_occupied),
            ("bounds", self.bounds),
        ):
            own[scene] = state[name].to(own.device)


def render_stack(
    fields: FieldStack,
    scene: Tensor,
    cameras: Cameras,
    height: int,
    width: int,
    background: Tensor | float,
    *,
    num_samples: int,
    occupancy: OccupancyStack,
    streams: Streams,
    stop_transmittance: float = 1e-3,
) -> RenderOutput:
    """Render the scenes `scene` int64 [B] of `fields` from `cameras` [B]; arguments as `renderer.render`.

    `streams` shift each ray's lattice: one generator, or one for each run of cameras of equal length.
    """
    origins, directions = (rays.reshape(-1, 3) for rays in cameras.rays(height, width))
    ray_scene = scene.repeat_interleave(height * width)
    step = 2 * fields.half_extent / num_samples
    with torch.no_grad():
        shift = to_device(uniform((origins.shape[0],), streams), origins.device)
        bounds = occupancy.bounds[ray_scene].transpose(0, 1)
        entry, leave = box_interval(origins, directions, bounds)
        first = torch.ceil(entry / step - shift)
        count = (torch.floor(leave / step - shift) - first + 1).clamp(min=0)
        lattice = _Lattice(origins, directions, ray_scene, (first + shift) * step, count, step)
        ray_index, distances = _live_samples(fields, lattice, occupancy, stop_transmittance)
        points = along(origins, directions, ray_index, distances)
    segments = Segments.from_ray_index(ray_index, origins.shape[0])
    density, colour = fields(points, ray_scene[ray_index])
    weights = compositing_weights(density * step, segments)
    columns = torch.cat([colour, torch.ones_like(distances)[:, None], distances[:, None]], dim=1)
    sums = weighted_ray_sum(weights, columns, segments)
    maps = sums.view(len(cameras), height, width, -1).permute(0, 3, 1, 2)
    opacity = maps[:, 3:4]
    return RenderOutput(
        image=maps[:, :3] + (1 - opacity) * _background_image(background, maps),
        opacity=opacity,
        depth=maps[:, 4:5] / opacity.clamp(min=1e-6),
        samples=RaySamples(segments, weights, distances, points, directions, step),
    )


def through_images(loss: Tensor, images: Tensor, num_scenes: int) -> Tensor:
    """[S] whose gradient is that of `loss` (one number, or [S]) by the images [B, 3, H, W] of each scene; NaN
    for a scene where that is not finite.

    The renderer sums over the rays of all scenes at once, so what is not finite must not go back through it.
    """
    (gradient,) = torch.autograd.grad(loss.sum(), images)
    by_scene = gradient.reshape(num_scenes, -1)
    is_good = torch.isfinite(by_scene).all(dim=1) & torch.isfinite(loss.detach())
    kept = torch.where(is_good[:, None], by_scene, torch.zeros_like(by_scene))
    value = (kept * images.reshape(kept.shape)).sum(dim=1)
    return value + torch.where(is_good, 0.0, torch.nan)


class _Lattice:
    """Where samples may lie: `count` [R] places on each ray, `step` apart, the first at distance `start`."""

    def __init__(
        self, origins: Tensor, directions: Tensor, scene: Tensor, start: Tensor, count: Tensor, step: float
    ) -> None:
        self.origins, self.directions, self.scene = origins, directions, scene
        self.start, self.count, self.step = start, count, step


def _live_samples(
    fields: FieldStack, lattice: _Lattice, occupancy: OccupancyStack, stop_transmittance: float
) -> tuple[Tensor, Tensor]:
    """Ray index int64 [N], ascending, and distance [N] of the samples worth evaluating."""
    rays = torch.nonzero(lattice.count)[:, 0]
    if rays.numel() == 0:
        return rays, lattice.start.new_zeros(0)
    longest = int(lattice.count.max())
    found = [
        _live_samples_of_chunk(fields, lattice, part, longest, occupancy, stop_transmittance)
        for part in rays.split(max(1, CANDIDATES_PER_CHUNK // longest))
    ]
    return torch.cat([ray for ray, _ in found]), torch.cat([distance for _, distance in found])


def _live_samples_of_chunk(
    fields: FieldStack,
    lattice: _Lattice,
    rays: Tensor,
    longest: int,
    occupancy: OccupancyStack,
    stop_transmittance: float,
) -> tuple[Tensor, Tensor]:
    start = lattice.start[rays]
    places = torch.arange(longest, device=rays.device, dtype=start.dtype)
    distances = start[:, None] + places * lattice.step
    is_live = places < lattice.count[rays, None]
    is_live &= _is_occupied(occupancy, lattice, rays, distances)
    row, place = torch.nonzero(is_live, as_tuple=True)
    ray_index, distances = rays[row], start[row] + place * lattice.step
    points = along(lattice.origins, lattice.directions, ray_index, distances)
    density = fields.density(points, lattice.scene[ray_index])
    before = exclusive_sum(density * lattice.step, Segments.from_ray_index(row, rays.shape[0]))
    is_lit = torch.exp(-before) > stop_transmittance
    return ray_index[is_lit], distances[is_lit]


def _is_occupied(occupancy: OccupancyStack, lattice: _Lattice, rays: Tensor, distances: Tensor) -> Tensor:
    """Whether the points at `distances` [r, K] on `rays` [r] lie in occupied cells of their scenes."""
    size = occupancy.resolution
    per_unit = size / (2 * occupancy.half_extent)
    start = (lattice.origins[rays] + occupancy.half_extent) * per_unit
    slope = lattice.directions[rays] * per_unit
    flat = lattice.scene[rays, None].to(torch.int32).expand(distances.shape)
    for axis in (2, 1, 0):  # cells are stored scene, z, y, x
        cell = torch.addcmul(start[:, axis, None], slope[:, axis, None], distances).to(torch.int32)
        flat = flat * size + cell.clamp_(0, size - 1)
    return occupancy.is_occupied.view(-1).index_select(0, flat.view(-1)).view(flat.shape)
