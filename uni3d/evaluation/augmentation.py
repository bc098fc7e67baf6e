"""Random variations of rendered views, on the training device: the evaluator must read imperfect images too.

Renders come as RGBA cut-outs. They are turned, stretched and gently warped; two thirds of them lose detail,
in the object (texture, shading, sharp corners) and in the picture (edge-preserving and Gaussian blur); all
are put on a background, relit and made noisy. Generated images are smoother than renders, and what measures
them must not hang on fine texture. Legend: B batch, H W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from uni3d.evaluation.smoothing import edge_preserving_blur, gaussian_blur

CRISP_SHARE = 1 / 3
_WARP_CELLS = 5
_BLOTCH_CELLS = 6
_MIN_SILHOUETTE_LEFT = 0.7


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


def random_object_detail(rgba: Tensor, is_softened: Tensor, generator: torch.Generator) -> Tensor:
    """Vary texture, shading and silhouette of premultiplied RGBA [B, 4, H, W] where `is_softened` [B].

    Each change comes to some of the images with a random strength: colours move to their local or their
    overall mean, shading flattens, blotches and coloured grain appear, and the silhouette is rounded off.
    """
    draw = _Draws(len(rgba), generator, is_softened)
    alpha = rgba[:, 3:]
    wide = gaussian_blur(rgba, draw.amount(1.5, 6.0).flatten())
    local = wide[:, :3] / wide[:, 3:].clamp_min(1e-2)
    own = torch.where(alpha > 0.05, rgba[:, :3] / alpha.clamp_min(0.05), local)
    total = alpha.sum(dim=(2, 3), keepdim=True).clamp_min(1)
    mean = rgba[:, :3].sum(dim=(2, 3), keepdim=True) / total
    colour = torch.lerp(own, local, draw.sometimes(0.4, 0.3, 1.0))
    colour = torch.lerp(colour, mean, draw.sometimes(0.25, 0.2, 0.6))
    shade = (colour - mean).mean(dim=1, keepdim=True)
    colour = colour - shade * draw.sometimes(0.4, 0.2, 0.8)
    blotches = _noise(rgba, _BLOTCH_CELLS, generator)
    grain = torch.lerp(
        _noise(rgba, rgba.shape[-1] // 2, generator), _noise(rgba, rgba.shape[-1] // 5, generator),
        draw.amount(0, 1),
    )  # fmt: skip
    colour = colour * (1 + blotches[:, 3:] * draw.sometimes(0.4, 0.0, 0.25))
    colour = colour + blotches[:, :3] * draw.sometimes(0.4, 0.0, 0.08)
    colour = colour + grain[:, :3] * draw.sometimes(0.35, 0.0, 0.12)
    alpha = torch.lerp(alpha, _rounded(alpha, draw), draw.sometimes(0.4, 1.0, 1.0))
    return torch.cat([colour.clamp(0, 1) * alpha, alpha], dim=1)


def random_smoothing(images: Tensor, is_softened: Tensor, generator: torch.Generator) -> Tensor:
    """Blur images [B, 3, H, W] where `is_softened` [B]: between edges, across them, and by resampling."""
    draw = _Draws(len(images), generator, is_softened)
    smooth = edge_preserving_blur(images, draw.amount(0.03, 0.3).flatten())
    images = torch.lerp(images, smooth, draw.sometimes(0.6, 0.6, 1.0))
    sigma = draw.sometimes(0.5, 0.4, 2.5).flatten()
    images = gaussian_blur(images, sigma, ringing=draw.amount(-0.5, 0.8).flatten() * (sigma > 0))
    for factor, probability in ((2, 0.5), (4, 0.2)):
        coarse = functional.interpolate(images, scale_factor=1 / factor, mode="area")
        coarse = functional.interpolate(coarse, images.shape[-2:], mode="bilinear", align_corners=False)
        images = torch.lerp(images, coarse, draw.sometimes(probability, 0.0, 1.0))
    return images


class _Draws:
    """Random strengths [B, 1, 1, 1], none of which makes the device wait; `is_open` [B] bars `sometimes`."""

    def __init__(self, num: int, generator: torch.Generator, is_open: Tensor) -> None:
        self._num, self._generator, self._is_open = num, generator, is_open

    def amount(self, low: float, high: float) -> Tensor:
        """Uniform between `low` and `high`."""
        return random_uniform(self._num, low, high, self._generator)[:, None, None, None]

    def sometimes(self, probability: float, low: float, high: float) -> Tensor:
        """Uniform between `low` and `high` with the given probability where open, else 0."""
        chosen = (random_uniform(self._num, 0, 1, self._generator) < probability) & self._is_open
        return self.amount(low, high) * chosen[:, None, None, None]


def _noise(like: Tensor, cells: int, generator: torch.Generator) -> Tensor:
    """Smooth normal noise [B, 4, H, W] that changes sign over H / `cells` pixels."""
    grid = torch.randn(len(like), 4, cells, cells, generator=generator, device=like.device)
    return functional.interpolate(grid, like.shape[-2:], mode="bilinear", align_corners=False)


def _rounded(alpha: Tensor, draw: _Draws) -> Tensor:
    """A silhouette [B, 1, H, W] without sharp corners, up to 2 pixels wider or 1.5 narrower.

    A blurred straight edge has the value Phi(-d / sigma) at the distance d outside of it, so that threshold
    moves it there. Where too little would be left (thin objects) the silhouette stays as it is.
    """
    sigma, shift = draw.amount(0.8, 2.0), draw.amount(-1.5, 2.0)
    threshold = torch.special.ndtr(-shift / sigma)
    blurred = gaussian_blur(alpha, sigma.flatten())
    rounded = ((blurred - threshold) * (1.7 * sigma) + 0.5).clamp(0, 1)
    left = rounded.sum(dim=(2, 3), keepdim=True) / alpha.sum(dim=(2, 3), keepdim=True).clamp_min(1)
    return torch.where(left > _MIN_SILHOUETTE_LEFT, rounded, alpha)


def random_exposure(images: Tensor, generator: torch.Generator) -> Tensor:
    """Relight, tint and add fine noise to images [B, 3, H, W]; the result lies in [0, 1]."""
    num = len(images)
    draw = _Draws(num, generator, torch.ones(num, dtype=torch.bool, device=images.device))
    contrast, brightness = draw.amount(0.85, 1.12), draw.amount(0.9, 1.1)
    tint = 1 + 0.03 * torch.randn(num, 3, 1, 1, generator=generator, device=images.device)
    images = ((images - 0.5) * contrast + 0.5) * brightness * tint
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    return (images + noise * draw.amount(0, 0.03) * draw.amount(0, 1)).clamp(0, 1)


@dataclass(frozen=True)
class AugmentedImages:
    """Training images, and the same before they lost detail and were relit; [B, 3, H, W] in [0, 1]."""

    images: Tensor
    crisp: Tensor


def augment(rgba: Tensor, generator: torch.Generator) -> AugmentedImages:
    """Straight-alpha RGBA [B, 4, H, W] in [0, 1] to training images."""
    is_softened = random_uniform(len(rgba), 0, 1, generator) > CRISP_SHARE
    premultiplied = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)
    warped = random_warp(premultiplied, generator)
    object_rgba = random_object_detail(warped, is_softened, generator)
    background = random_backgrounds(len(rgba), rgba.shape[-1], generator)
    images, crisp = (
        (part[:, :3] + background * (1 - part[:, 3:])).clamp(0, 1) for part in (object_rgba, warped)
    )
    images = random_exposure(random_smoothing(images, is_softened, generator), generator)
    return AugmentedImages(images, crisp)
