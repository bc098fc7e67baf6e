"""A box with a colour on each side and a ball on top, ray-traced exactly: the truth for fitting tests."""

from __future__ import annotations

import torch
from torch import Tensor

from uni3d.scene.camera import Cameras

BOX_CENTRE = torch.tensor([0.0, -0.15, 0.0])
BOX_HALF = torch.tensor([0.32, 0.2, 0.24])
BALL_CENTRE = torch.tensor([0.12, 0.2, 0.05])
BALL_RADIUS = 0.17
BALL_COLOUR = torch.tensor([0.8, 0.3, 0.8])
# [axis, low or high side]: the front (+Z) is red, the back green, +X blue, -X yellow.
SIDE_COLOURS = torch.tensor(
    [
        [[0.9, 0.85, 0.1], [0.1, 0.2, 0.9]],
        [[0.3, 0.3, 0.3], [0.9, 0.6, 0.3]],
        [[0.1, 0.7, 0.2], [0.9, 0.1, 0.1]],
    ]
)


def paint(cameras: Cameras, size: int, background: float) -> tuple[Tensor, Tensor]:
    """Image [B, 3, size, size] and mask [B, 1, size, size] (0 or 1), one ray a pixel."""
    origins, directions = (rays.reshape(-1, 3) for rays in cameras.rays(size, size))
    infinity = torch.full((origins.shape[0],), torch.inf)

    to_low = (BOX_CENTRE - BOX_HALF - origins) / directions
    to_high = (BOX_CENTRE + BOX_HALF - origins) / directions
    entries = torch.minimum(to_low, to_high)
    entry, axis = entries.max(dim=-1)
    meets_box = entry < torch.maximum(to_low, to_high).amin(dim=-1)
    box_distance = torch.where(meets_box, entry, infinity)
    is_high_side = (directions.gather(1, axis[:, None])[:, 0] < 0).long()
    box_colour = SIDE_COLOURS[axis, is_high_side]

    to_centre = BALL_CENTRE - origins
    along = (to_centre * directions).sum(dim=1)
    squared_miss = to_centre.square().sum(dim=1) - along.square()
    half_chord = (BALL_RADIUS**2 - squared_miss).clamp(min=0).sqrt()
    ball_distance = torch.where(squared_miss < BALL_RADIUS**2, along - half_chord, infinity)

    colour = torch.where((ball_distance < box_distance)[:, None], BALL_COLOUR, box_colour)
    mask = torch.isfinite(torch.minimum(ball_distance, box_distance))
    image = torch.where(mask[:, None], colour, torch.full_like(colour, background))
    shape = (len(cameras), size, size, -1)
    return image.view(shape).permute(0, 3, 1, 2), mask[:, None].float().view(shape).permute(0, 3, 1, 2)
