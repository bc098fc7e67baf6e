"""Which parts of the cube may hold matter: a coarse grid that lets the renderer skip the rest."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from uni3d.device_draws import uniform


class DensityField(Protocol):
    """What a renderer needs to know of a field for skipping empty space."""

    half_extent: float

    def density(self, points: Tensor) -> Tensor:
        """Extinction [P] at points [P, 3]."""
        ...


class OccupancyGrid(nn.Module):
    """Occupied cells of a `resolution`^3 grid over the cube, found from the field's density without gradient.

    Everything is occupied until the first `update`. A cell keeps the largest density seen, fading by `decay`
    an update, so that a thin part missed by one random probe is not lost (as in Instant NGP, Mueller et al.
    2022). Cells within `dilation` cells of matter stay occupied, so that surfaces can grow. All state is in
    buffers: a checkpoint of the module restores it exactly.

    Args:
        threshold: density per scene unit above which a cell counts; 0.05 hides at most 3 % of opacity per
            half unit.
    """

    density: Tensor
    is_occupied: Tensor
    bounds: Tensor

    def __init__(
        self,
        *,
        resolution: int = 48,
        half_extent: float = 0.6,
        threshold: float = 0.05,
        decay: float = 0.8,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.resolution = resolution
        self.half_extent = half_extent
        self.threshold = threshold
        self.decay = decay
        self.dilation = dilation
        shape = (resolution, resolution, resolution)
        self.register_buffer("density", torch.zeros(shape))
        self.register_buffer("is_occupied", torch.ones(shape, dtype=torch.bool))
        self.register_buffer("bounds", torch.tensor([[-half_extent] * 3, [half_extent] * 3]))

    @torch.no_grad()
    def update(self, field: DensityField, *, generator: torch.Generator | None = None) -> None:
        """Probe the field once in every cell, at a random place with a generator, else at the centre.

        The threshold drops to the mean density when that is lower, so the grid never becomes empty.
        """
        device = self.density.device
        ticks = torch.arange(self.resolution, device=device, dtype=torch.float32)
        z, y, x = torch.meshgrid(ticks, ticks, ticks, indexing="ij")
        cells = torch.stack([x, y, z], dim=-1).view(-1, 3)
        if generator is None:
            within = torch.full_like(cells, 0.5)
        else:
            within = uniform(*cells.shape, generator=generator, device=device)
        cell_size = 2 * self.half_extent / self.resolution
        probed = field.density((cells + within) * cell_size - self.half_extent).view(self.density.shape)
        density = torch.maximum(self.density * self.decay, probed)
        threshold = density.mean().clamp(max=self.threshold)
        has_matter = (density >= threshold)[None, None].float()
        width = 2 * self.dilation + 1
        dilated = nn.functional.max_pool3d(has_matter, width, stride=1, padding=self.dilation)[0, 0] > 0.5
        # A non-finite field has no matter: keep the last good state, the training step will report it.
        is_good = has_matter.any()
        self.density.copy_(torch.where(is_good, density, self.density))
        self.is_occupied.copy_(torch.where(is_good, dilated, self.is_occupied))
        self.bounds.copy_(torch.where(is_good, self._box(cell_size), self.bounds))

    def occupied_fraction(self) -> float:
        """Share of occupied cells, in [0, 1]."""
        return float(self.is_occupied.float().mean())

    def _box(self, cell_size: float) -> Tensor:
        """Box float64 [2, 3] around the occupied cells, in scene units (x, y, z)."""
        ends = []
        for others in ((0, 1), (0, 2), (1, 2)):  # the grid's axes are z, y, x
            filled = self.is_occupied.any(dim=others[1]).any(dim=others[0]).to(torch.int32)
            ends.append(torch.stack([filled.argmax(), self.resolution - filled.flip(0).argmax()]))
        return torch.stack(ends, dim=1).double() * cell_size - self.half_extent
