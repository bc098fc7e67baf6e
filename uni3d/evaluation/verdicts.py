"""When an image counts as right: one rule per question, shared by the ceiling, the teacher and the meshes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from uni3d.evaluation.network import VIEW_WORDS

OVERHEAD = VIEW_WORDS.index("overhead")
FRONT = VIEW_WORDS.index("front")
NUM_QUADRANTS = 4


def right_view(view_probabilities: Tensor, view_words: Sequence[str], has_front: Sequence[bool]) -> Tensor:
    """Bool [B]: the view [B, 4] is the asked one.

    For an object with a front the most probable of the four words must be the asked one. The front, sides and
    back of other objects (a rock, a vase) cannot be told apart by anyone: for them it is only asked whether
    the view is from overhead or not.
    """
    asked = torch.tensor([VIEW_WORDS.index(word) for word in view_words], dtype=torch.long)
    strict = view_probabilities.argmax(dim=1) == asked
    coarse = (view_probabilities[:, OVERHEAD] > 0.5) == (asked == OVERHEAD)
    return torch.where(torch.tensor(list(has_front), dtype=torch.bool), strict, coarse)


def quadrant(azimuth_deg: float) -> int:
    """0 front, 1 +X side, 2 back, 3 -X side: the 90 degree sector around 0, 90, 180 and 270 degrees."""
    return int(((azimuth_deg + 45.0) % 360.0) // 90.0)


def front_quadrants(view_probabilities: Tensor, azimuths_deg: Sequence[float]) -> list[int]:
    """Quadrants in which the object seems to show its front: the mean probability of "front" over the
    quadrant's level views exceeds those of "side" and "back". Quadrants without a view are left out.
    """
    sectors = torch.tensor([quadrant(azimuth) for azimuth in azimuths_deg], dtype=torch.long)
    result = []
    for sector in range(NUM_QUADRANTS):
        chosen = view_probabilities[sectors == sector]
        if len(chosen) == 0:
            continue
        level = [index for index in range(len(VIEW_WORDS)) if index != OVERHEAD]
        mean = chosen[:, level].mean(dim=0)
        if level[int(mean.argmax())] == FRONT:
            result.append(sector)
    return result


def is_janus(view_probabilities: Tensor, azimuths_deg: Sequence[float], *, min_quadrants: int = 3) -> bool:
    """Whether a front is recognised in at least `min_quadrants` of the four quadrants."""
    return len(front_quadrants(view_probabilities, azimuths_deg)) >= min_quadrants
