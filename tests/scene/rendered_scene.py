"""The scene that renderers are compared on, and what is compared: maps and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from uni3d.scene.camera import Cameras, sample_orbit_cameras
from uni3d.scene.radiance_field import RadianceField
from uni3d.scene.renderer import RenderOutput


def bumpy_ball(seed: int = 0) -> RadianceField:
    """A ball with bumps and colours, opaque inside and empty outside."""
    field = RadianceField(resolutions=(9, 21))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        distance = field.vertex_positions(21).norm(dim=1).view(1, 21, 21, 21)
        field.density_grids[0].zero_()
        field.density_grids[1].copy_((30 * (0.4 - distance)).clamp(-12, 5))
        field.density_grids[1].add_(0.3 * torch.randn(1, 21, 21, 21, generator=generator))
        field.colour_grids[0].normal_(generator=generator)
    return field


def two_cameras() -> Cameras:
    return sample_orbit_cameras(2, generator=torch.Generator().manual_seed(7))


def maps_of(output: RenderOutput) -> Tensor:
    """Image, opacity and depth as one [B, 5, H, W]."""
    return torch.cat([output.image, output.opacity, output.depth], dim=1)


def gradients_of(field: RadianceField, maps: Tensor) -> list[Tensor]:
    """Of a random sum of image and opacity, for each of the field's parameters."""
    cotangent = torch.randn(maps.shape, generator=torch.Generator().manual_seed(3)).to(maps.device)
    return list(torch.autograd.grad((maps * cotangent)[:, :4].sum(), list(field.parameters())))
