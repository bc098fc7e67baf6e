"""Recolouring of rendered views during training, so that every colour word meets every noun.

Works on whole batches in torch, on any device. Legend: B views, H W pixels.
"""

from __future__ import annotations

from torch import Tensor

# Below this luminance the main colour carries no shading to keep (black leather, dark iron).
MIN_MAIN_LUMINANCE = 0.10
MAX_SHADE = 1.5

_LUMA = (0.299, 0.587, 0.114)


def luminance(rgb: Tensor) -> Tensor:
    """Luma of display values (BT.601): [B, 3, ...] -> [B, 1, ...]."""
    # Plain numbers: a weight tensor would be copied to the device anew, and waited for, in every batch.
    red, green, blue = _LUMA
    return red * rgb[:, 0:1] + green * rgb[:, 1:2] + blue * rgb[:, 2:3]


def can_recolour(main_colour: Tensor) -> Tensor:
    """Boolean [B]: is the main colour [B, 3] bright enough for its shading to be told from its hue?"""
    return luminance(main_colour)[:, 0] >= MIN_MAIN_LUMINANCE


def recolour(rgb: Tensor, mask: Tensor, main_colour: Tensor, target: Tensor) -> Tensor:
    """Give the masked part of each view a new colour and keep its shading and texture.

    rgb [B, 3, H, W] and mask [B, 1, H, W] in [0, 1]; main_colour and target [B, 3] sRGB base colours. A pixel
    becomes target x luminance(pixel) / luminance(main_colour), clipped to [0, 1]: the ratio holds the light
    and the texture, both of which multiply the base colour. Views whose main colour is too dark come back
    unchanged, see `can_recolour`.
    """
    main = luminance(main_colour)[:, :, None, None]
    shade = (luminance(rgb) / main.clamp_min(MIN_MAIN_LUMINANCE)).clamp(max=MAX_SHADE)
    painted = (target[:, :, None, None] * shade).clamp(0, 1)
    amount = mask * can_recolour(main_colour).to(mask.dtype)[:, None, None, None]
    return rgb + amount * (painted - rgb)
