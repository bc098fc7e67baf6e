"""Random variations of rendered views, on the training device: the evaluator must read imperfect images too.

Renders come as RGBA cut-outs. They are recoloured, turned, stretched and gently warped, put on a background,
blurred, relit and made noisy: generated images are softer and less regular than renders.
Legend: B batch, H W pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

_WARP_CELLS = 5


def on_background(rgba: Tensor, background: Tensor) -> Tensor:
    """Straight-alpha RGBA [B, 4, H, W] over `background` ([B, 3, 1, 1] or [B, 3, H, W]); all in [0, 1]."""
    alpha = rgba[:, 3:]
    return rgba[:, :3] * alpha + background * (1 - alpha)


def random_uniform(num: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Uniform numbers [num] on the generator's device."""
    return low + (high - low) * torch.rand(num, generator=generator, device=generator.device)


def random_warp(
    rgba: Tensor,
    generator: torch.Generator,
    *,
    max_turn_deg: float = 10.0,
    zoom_range: tuple[float, float] = (0.65, 1.4),
    max_stretch: float = 0.15,
    max_shift: float = 0.15,
    max_bend: float = 0.035,
) -> Tensor:
    """Mirror, turn, zoom, stretch, shift and bend premultiplied RGBA [B, 4, H, W]; outside is transparent.

    Shift and bend are in halves of the image side. View words survive all of it.
    """
    num = len(rgba)
    device = rgba.device
    turn = random_uniform(num, -math.radians(max_turn_deg), math.radians(max_turn_deg), generator)
    zoom = torch.exp(random_uniform(num, math.log(zoom_range[0]), math.log(zoom_range[1]), generator))
    stretch = torch.exp(random_uniform(num, -max_stretch, max_stretch, generator))
    mirror = torch.where(torch.rand(num, generator=generator, device=device) < 0.5, -1.0, 1.0)
    cos, sin = turn.cos(), turn.sin()
    # Rows of the inverse map: where in the source each output pixel looks.
    matrix = torch.stack(
        [
            torch.stack([mirror * cos / (zoom * stretch), -mirror * sin / (zoom * stretch)], dim=-1),
            torch.stack([sin * stretch / zoom, cos * stretch / zoom], dim=-1),
        ],
        dim=1,
    )
    shift = torch.rand(num, 2, 1, generator=generator, device=device).sub(0.5).mul(2 * max_shift)
    grid = functional.affine_grid(torch.cat([matrix, shift], dim=2), list(rgba.shape), align_corners=False)
    bend = torch.randn(num, 2, _WARP_CELLS, _WARP_CELLS, generator=generator, device=device)
    strength = random_uniform(num, 0, max_bend, generator)[:, None, None, None]
    bend = functional.interpolate(bend * strength, rgba.shape[-2:], mode="bicubic", align_corners=True)
    return functional.grid_sample(
        rgba, grid + bend.permute(0, 2, 3, 1), mode="bilinear", padding_mode="zeros", align_corners=False
    )


def random_backgrounds(num: int, size: int, generator: torch.Generator) -> Tensor:
    """Backgrounds [num, 3, size, size]: greys, plain colours, and gradients between two of them."""
    device = generator.device
    ends = torch.rand(num, 2, 3, generator=generator, device=device)
    grey = torch.rand(num, 2, 1, generator=generator, device=device).expand(-1, -1, 3)
    light = 0.75 + 0.25 * torch.rand(num, 2, 1, generator=generator, device=device).expand(-1, -1, 3)
    kind = torch.rand(num, 1, 1, generator=generator, device=device)
    ends = torch.where(kind < 0.35, light, torch.where(kind < 0.7, grey, ends))
    is_plain = torch.rand(num, 1, generator=generator, device=device) < 0.6
    first = ends[:, 0]
    last = torch.where(is_plain, first, ends[:, 1])
    angle = random_uniform(num, 0, 2 * math.pi, generator)[:, None, None]
    axis = torch.linspace(-0.5, 0.5, size, device=device)
    along = (angle.cos() * axis[None, None, :] + angle.sin() * axis[None, :, None] + 0.5).clamp(0, 1)
    return torch.lerp(first[:, :, None, None], last[:, :, None, None], along[:, None])


def random_degradation(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, relight, tint and add noise to images [B, 3, H, W] in [0, 1]; each sample by its own amount."""
    num, _, height, width = images.shape
    device = images.device

    def amount(low: float, high: float) -> Tensor:
        return random_uniform(num, low, high, generator)[:, None, None, None]

    for factor, probability in ((2, 0.5), (4, 0.2)):
        coarse = functional.interpolate(images, scale_factor=1 / factor, mode="area")
        coarse = functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
        weight = amount(0, 1) * (amount(0, 1) < probability)
        images = torch.lerp(images, coarse, weight)
    contrast, brightness = amount(0.85, 1.12), amount(0.9, 1.1)
    tint = 1 + 0.03 * torch.randn(num, 3, 1, 1, generator=generator, device=device)
    images = ((images - 0.5) * contrast + 0.5) * brightness * tint
    noise = torch.randn(images.shape, generator=generator, device=device)
    return (images + noise * amount(0, 0.03) * amount(0, 1)).clamp(0, 1)


def augment(rgba: Tensor, generator: torch.Generator) -> Tensor:
    """Straight-alpha RGBA [B, 4, H, W] in [0, 1] to training images [B, 3, H, W] in [0, 1]."""
    premultiplied = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)
    warped = random_warp(premultiplied, generator)
    background = random_backgrounds(len(rgba), rgba.shape[-1], generator)
    return random_degradation((warped[:, :3] + background * (1 - warped[:, 3:])).clamp(0, 1), generator)
