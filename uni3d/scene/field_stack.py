"""The radiance fields of several scenes behind one look-up: voxel grids [S, C, G, G, G], points with a scene.

Thirty-two scenes of one view each cost as many kernel launches as one scene. Every number is that of the
single `RadianceField`, which stays the definition of what raw values mean.
Legend: S scenes, P points, C channels, G vertices along a grid's edge, V = G^3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from uni3d.errors import UsageError
from uni3d.parameter_stack import ParameterStack
from uni3d.scene.encoding import Corners, dense_corners
from uni3d.scene.radiance_field import RadianceField


class FieldStack:
    """S dense fields of equal settings; copies the values of `fields`.

    Raises UsageError for hash fields: their networks differ from scene to scene, so there is no one look-up.
    """

    def __init__(self, fields: Sequence[RadianceField]) -> None:
        if any(field.encoding != "dense" for field in fields):
            raise UsageError(
                "several scenes at once need dense fields; set field.encoding to dense, or make one at a time"
            )
        self._like = copy.deepcopy(fields[0]).requires_grad_(False)
        self.half_extent = self._like.half_extent
        self.resolutions = self._like.resolutions
        levels = range(len(self.resolutions))
        self.density_grids = [
            ParameterStack([field.density_grids[level] for field in fields]) for level in levels
        ]
        self.colour_grids = [
            ParameterStack([field.colour_grids[level] for field in fields]) for level in levels
        ]

    @property
    def num_scenes(self) -> int:
        return self.density_grids[0].num_scenes

    @property
    def parameter_groups(self) -> dict[str, list[ParameterStack]]:
        """Stacks by the names of `RadianceField.parameter_group_names`, in the order of its groups."""
        return {"density": self.density_grids, "colour": self.colour_grids}

    def density(self, points: Tensor, scene: Tensor) -> Tensor:
        """Extinction [P] at points [P, 3] of the scenes `scene` int64 [P]; see `RadianceField.density`."""
        return self._evaluate(points, scene, with_colour=False)[0]

    def __call__(self, points: Tensor, scene: Tensor) -> tuple[Tensor, Tensor]:
        """Density [P] and sRGB colour [P, 3]; differentiable in the parameters, not in the points."""
        density, colour = self._evaluate(points, scene, with_colour=True)
        assert colour is not None
        return density, colour

    def set_density_sharpness(self, sharpness: float) -> None:
        """As `RadianceField.set_density_sharpness`, for all scenes."""
        self._like.set_density_sharpness(sharpness)

    @torch.no_grad()
    def shift_colour(self, scene: int, logits: Tensor) -> None:
        """As `RadianceField.shift_colour`, for one scene."""
        self.colour_grids[0].tensor[scene].add_(logits.view(3, 1, 1, 1))

    def field(self, scene: int) -> RadianceField:
        """A copy of one scene's field."""
        field = copy.deepcopy(self._like)
        field.load_state_dict(self.state_dict(scene))
        return field

    def state_dict(self, scene: int) -> dict[str, Tensor]:
        """What `RadianceField.state_dict` gives for one scene; views of the stack."""
        return {
            f"{name}.{level}": stack.tensor.detach()[scene]
            for name, stacks in (("density_grids", self.density_grids), ("colour_grids", self.colour_grids))
            for level, stack in enumerate(stacks)
        }

    def load_state_dict(self, scene: int, state: Mapping[str, Tensor]) -> None:
        """Overwrite one scene with what `RadianceField.state_dict` gave."""
        for name, stacks in (("density_grids", self.density_grids), ("colour_grids", self.colour_grids)):
            for level, stack in enumerate(stacks):
                stack.set_row(scene, [state[f"{name}.{level}"]])

    def _evaluate(self, points: Tensor, scene: Tensor, *, with_colour: bool) -> tuple[Tensor, Tensor | None]:
        unit = points.detach() / (2 * self.half_extent) + 0.5
        is_inside = (points.detach().abs() <= self.half_extent).all(dim=-1)
        raw_density = unit.new_zeros(unit.shape[0], 1)
        raw_colour = unit.new_zeros(unit.shape[0], 3) if with_colour else None
        for level, resolution in enumerate(self.resolutions):
            look_up = self._look_up_at(unit, scene, resolution)
            raw_density = raw_density + look_up(self.density_grids[level].tensor)
            if raw_colour is not None:
                raw_colour = raw_colour + look_up(self.colour_grids[level].tensor)
        density = self._like._activate(raw_density[:, 0]) * is_inside
        return density, None if raw_colour is None else torch.sigmoid(raw_colour)

    def _look_up_at(self, unit: Tensor, scene: Tensor, resolution: int) -> Callable[[Tensor], Tensor]:
        """The function that reads grids of `resolution` [S, C, G, G, G] at points [P, 3] in [0, 1]^3."""
        if self._like.encoding_backend == "triton":
            from uni3d.scene import grid_kernels

            return lambda grids: grid_kernels.dense_look_up(unit, grids, scene)
        corners = dense_corners(unit, resolution)  # found once for density and colour
        return lambda grids: _look_up(grids, corners, scene)


class _LookUp(torch.autograd.Function):
    """grids [S, C, V], index [P, 8] counted from each scene's first number, weight [P, 8] -> [P, C].

    A channel begins V numbers after the one before, in every scene: the same index serves all channels, read
    from a later start. Otherwise as `encoding.weighted_corners`.
    """

    @staticmethod
    def forward(ctx: Any, grids: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(index, weight)
        ctx.shape = grids.shape
        flat = grids.reshape(-1)
        channels = [
            nn.functional.embedding_bag(
                index, flat[channel * grids.shape[2] :, None], mode="sum", per_sample_weights=weight
            )
            for channel in range(grids.shape[1])
        ]
        return channels[0] if len(channels) == 1 else torch.cat(channels, dim=1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad_values,) = grad_outputs
        index, weight = ctx.saved_tensors
        _, num_channels, num_vertices = ctx.shape
        grad_flat = grad_values.new_zeros(ctx.shape).view(-1)
        flat_index = index.reshape(-1)
        for channel in range(num_channels):
            share = (weight * grad_values[:, channel, None]).reshape(-1)
            grad_flat[channel * num_vertices :].scatter_add_(0, flat_index, share)
        return grad_flat.view(ctx.shape), None, None


def _look_up(grids: Tensor, corners: Corners, scene: Tensor) -> Tensor:
    """Interpolated values [P, C] of grids [S, C, G, G, G] in the scenes `scene` [P]."""
    flat = grids.flatten(2)
    index = corners.index + (scene * flat[0].numel())[:, None]
    return _LookUp.apply(flat, index, corners.weight)  # type: ignore[return-value]


def total_variation_each(
    fields: FieldStack,
    *,
    density_weight: float,
    colour_weight: float,
    streams: torch.Generator | Sequence[torch.Generator],
    fraction: float = 0.25,
) -> Tensor:
    """`regularisers.total_variation` of every scene, [S]; each draws its slab from its own stream."""
    num_scenes = fields.num_scenes
    generators = [streams] * num_scenes if isinstance(streams, torch.Generator) else streams
    total = torch.zeros(num_scenes, device=fields.density_grids[0].tensor.device)
    for level, resolution in enumerate(fields.resolutions):
        thickness = min(max(2, round(fraction * resolution)), resolution)
        starts = [_slab_start(resolution, thickness, generator) for generator in generators]
        layers = torch.tensor(starts)[:, None] + torch.arange(thickness)
        for weight, stack in (
            (density_weight, fields.density_grids[level]),
            (colour_weight, fields.colour_grids[level]),
        ):
            if weight > 0:
                total = total + weight * _squared_differences(stack.tensor, layers)
    return total / len(fields.resolutions)


def _slab_start(resolution: int, thickness: int, generator: torch.Generator) -> int:
    if thickness >= resolution:
        return 0
    return int(torch.randint(resolution - thickness + 1, (1,), generator=generator, device=generator.device))


class _SquaredDifferences(torch.autograd.Function):
    """grids [S, C, G, G, G], rows int64 [S C T] among its S C G layers -> [S]: the sum over axes of the mean
    squared difference along the axis. Forms its gradient in the same pass."""

    @staticmethod
    def forward(ctx: Any, grids: Tensor, rows: Tensor, thickness: int) -> Tensor:
        num_scenes, num_channels, _, height, width = grids.shape
        slabs = grids.reshape(-1, height, width).index_select(0, rows)
        slabs = slabs.view(num_scenes, num_channels, thickness, height, width)
        total = grids.new_zeros(num_scenes)
        gradient = torch.zeros_like(slabs)
        for axis in (2, 3, 4):
            size = slabs.shape[axis]
            change = slabs.narrow(axis, 1, size - 1) - slabs.narrow(axis, 0, size - 1)
            total += change.square().flatten(1).mean(dim=1)
            scale = 2 / change[0].numel()
            gradient.narrow(axis, 1, size - 1).add_(change, alpha=scale)
            gradient.narrow(axis, 0, size - 1).sub_(change, alpha=scale)
        ctx.save_for_backward(gradient, rows)
        ctx.shape = grids.shape
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        gradient, rows = ctx.saved_tensors
        scaled = gradient * grad_outputs[0][:, None, None, None, None]
        whole = gradient.new_zeros(ctx.shape)
        whole.view(-1, *ctx.shape[3:]).index_copy_(0, rows, scaled.flatten(0, 2))
        return whole, None, None


def _squared_differences(grids: Tensor, layers: Tensor) -> Tensor:
    """`_SquaredDifferences` of the layers int64 [S, T] of grids [S, C, G, G, G]."""
    num_scenes, num_channels, resolution = grids.shape[:3]
    first = torch.arange(num_scenes * num_channels).view(num_scenes, num_channels, 1) * resolution
    rows = (first + layers[:, None, :]).reshape(-1).to(grids.device)
    return _SquaredDifferences.apply(grids, rows, layers.shape[1])  # type: ignore[return-value]
