"""What stands behind the object while training: a changing background leaves fog nothing to imitate."""

from __future__ import annotations

import torch
from torch import Tensor

EVALUATION_GREY = 0.95  # near white; pure white would hide clipped highlights


def random_backgrounds(num: int, *, generator: torch.Generator | None = None, light: float = 0.6) -> Tensor:
    """Plain sRGB colours [num, 3], mostly light.

    With probability `light` a near-white grey in [0.85, 1], which is what diffusion teachers know behind
    single objects; else any colour, uniform in [0, 1].
    """
    grey = 0.85 + 0.15 * torch.rand(num, 1, generator=generator)
    colour = torch.rand(num, 3, generator=generator)
    is_light = torch.rand(num, 1, generator=generator) < light
    return torch.where(is_light, grey.expand(num, 3), colour)


def random_greys(num: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Plain greys [num, 3] in [0.45, 1]: what a teacher knows that never saw a coloured background."""
    return (0.45 + 0.55 * torch.rand(num, 1, generator=generator)).expand(num, 3)


def random_gradients(
    num: int, height: int, width: int, *, generator: torch.Generator | None = None
) -> Tensor:
    """Images [num, 3, height, width]: gradients between two `random_backgrounds` in random directions."""
    first = random_backgrounds(num, generator=generator)[:, :, None, None]
    second = random_backgrounds(num, generator=generator)[:, :, None, None]
    angle = 2 * torch.pi * torch.rand(num, 1, 1, 1, generator=generator)
    y = torch.linspace(-1, 1, height)[:, None]
    x = torch.linspace(-1, 1, width)[None, :]
    along = (angle.cos() * x + angle.sin() * y) / 2**0.5 / 2 + 0.5
    return torch.lerp(first, second, along)
