"""Filters that take detail out of images while their shapes stay: what lossy generators do to a picture.

All are tensor operations with a strength per sample; a strength of zero changes nothing.
Legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

_BLUR_MARGIN = 8
_GUIDE_RADIUS = 3
_STRESS_RADIUS = 4
_STRESS_SIGMA = 1.5
_STRESS_RINGING = 0.3


def gaussian_blur(images: Tensor, sigma: Tensor, *, ringing: Tensor | None = None) -> Tensor:
    """Blur images [B, C, H, W] by `sigma` [B] pixels, as a product of spectra: any sigma costs the same.

    `ringing` [B] adds that much of the difference to a blur 2 pixels wider: halos on both sides of an edge
    above zero, a glow below. Values may then leave [0, 1].
    """
    height, width = images.shape[-2:]
    padded = functional.pad(images, (_BLUR_MARGIN,) * 4, mode="replicate")
    size = (height + 2 * _BLUR_MARGIN, width + 2 * _BLUR_MARGIN)
    response = _gaussian_response(sigma, size)
    if ringing is not None:
        response = response + ringing[:, None, None, None] * (response - _gaussian_response(sigma + 2, size))
    blurred = torch.fft.irfft2(torch.fft.rfft2(padded) * response, s=size)
    return blurred[..., _BLUR_MARGIN : _BLUR_MARGIN + height, _BLUR_MARGIN : _BLUR_MARGIN + width]


def _gaussian_response(sigma: Tensor, size: tuple[int, int]) -> Tensor:
    """The spectrum [B, 1, h, w // 2 + 1] of Gaussians of `sigma` [B] pixels on images of `size` h x w."""
    down = torch.fft.fftfreq(size[0], device=sigma.device)[:, None]
    across = torch.fft.rfftfreq(size[1], device=sigma.device)[None, :]
    scale = -2 * (math.pi * sigma[:, None, None, None]).square()
    return torch.exp(scale * (down.square() + across.square()))


def edge_preserving_blur(images: Tensor, contrast: Tensor) -> Tensor:
    """Smooth away what varies by less than about `contrast` [B] around a pixel; stronger edges stay sharp.

    The guided filter of He et al. (2010) of images [B, C, H, W] guided by themselves, its coefficients found
    at half the size.
    """
    half = functional.avg_pool2d(images, 2)
    mean = _box_mean(half)
    variance = (_box_mean(half.square()) - mean.square()).clamp_min(0)
    noise = contrast[:, None, None, None].square()
    gain = (variance + 1e-8) / (variance + noise + 1e-8)
    coefficients = torch.cat([gain, (1 - gain) * mean], dim=1)
    coefficients = functional.interpolate(
        _box_mean(coefficients), images.shape[-2:], mode="bilinear", align_corners=False
    )
    gain, offset = coefficients.chunk(2, dim=1)
    return gain * images + offset


def _box_mean(x: Tensor) -> Tensor:
    """Mean over a square of 2 _GUIDE_RADIUS + 1 pixels, one axis after the other."""
    side = 2 * _GUIDE_RADIUS + 1
    padded = functional.pad(x, (_GUIDE_RADIUS,) * 4, mode="replicate")
    return functional.avg_pool2d(functional.avg_pool2d(padded, (1, side), stride=1), (side, 1), stride=1)


def calm_quadrant(images: Tensor, radius: int) -> Tensor:
    """Images [B, C, H, W] with each pixel the mean of the calmest of the four squares it is a corner of.

    The filter of Kuwahara (1976): texture and thin parts go, edges stay sharp, corners grow round.
    """
    height, width = images.shape[-2:]
    padded = functional.pad(images, (radius,) * 4, mode="replicate")
    mean = functional.avg_pool2d(padded, radius + 1, stride=1)
    square = functional.avg_pool2d(padded.square(), radius + 1, stride=1)
    variance = (square - mean.square()).sum(dim=1, keepdim=True)
    corners = [(down, across) for down in (0, radius) for across in (0, radius)]
    means = torch.stack([mean[..., y : y + height, x : x + width] for y, x in corners])
    variances = torch.stack([variance[..., y : y + height, x : x + width] for y, x in corners])
    calmest = variances.argmin(dim=0, keepdim=True).expand(1, *images.shape)
    return means.gather(0, calmest)[0]


def lossy_generator(images: Tensor) -> Tensor:
    """The same fixed loss of detail for all images [B, 3, H, W] in [0, 1]: a stand-in for a generator's.

    `calm_quadrant` over 4 pixels (of 128), twice, takes away texture and thin parts and rounds the corners;
    a blur of 1.5 pixels with a slight halo softens what is left. Nothing in it is random, learnt or taken
    from a teacher, and the first filter is no part of the training's augmentation: it stays a test.
    """
    scale = images.shape[-1] / 128
    radius = max(1, round(_STRESS_RADIUS * scale))
    calm = calm_quadrant(calm_quadrant(images, radius), radius)
    sigma = torch.full((len(images),), _STRESS_SIGMA * scale, device=images.device)
    return gaussian_blur(calm, sigma, ringing=torch.full_like(sigma, _STRESS_RINGING)).clamp(0, 1)
