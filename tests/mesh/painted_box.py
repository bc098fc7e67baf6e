"""The painted box that the tests of the mesh room share: field, colours, sizes."""

from __future__ import annotations

import torch
from torch import Tensor

HALF_SIZES = torch.tensor([0.45, 0.32, 0.22])
CENTRE = torch.tensor([0.15, -0.1, 0.05])
# one colour per side, in the order +X, -X, +Y, -Y, +Z, -Z
SIDE_COLOURS = torch.tensor(
    [[0.9, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.9], [0.9, 0.8, 0.1], [0.8, 0.1, 0.8], [0.1, 0.8, 0.8]]
)


def box_density(points: Tensor) -> Tensor:
    """A hard box off the centre of the scene, three different sides."""
    return 200.0 * ((points - CENTRE).abs() < HALF_SIZES).all(-1)


def side_colour(points: Tensor) -> Tensor:
    """The colour of the side of the box that a point of its surface lies on."""
    relative = (points - CENTRE) / HALF_SIZES
    axis = relative.abs().argmax(-1)
    is_negative = relative.gather(-1, axis[:, None])[:, 0] < 0
    return SIDE_COLOURS[2 * axis + is_negative.long()]
