"""Which noise leads to a given picture: DDIM run backwards, from the clean sample up the noise levels.

In x = x0 + sigma eps the probability-flow ODE is dx / dsigma = (x - D(x, sigma)) / sigma; one DDIM step from
sigma_s to sigma_t keeps D fixed: x_t = D_s + (sigma_t / sigma_s) (x_s - D_s) (Song et al. 2021, eq. 13).
Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Inversion(NamedTuple):
    """`x` [B, ...] at the last noise level, and D of the level before it, which the last step kept fixed."""

    x: Tensor
    previous_x0: Tensor


@torch.no_grad()
def ddim_inversion(predict_x0: Callable[[Tensor, Tensor], Tensor], x0: Tensor, sigmas: Tensor) -> Inversion:
    """Carry clean samples `x0` [B, ...] along the rising levels `sigmas` [N, B], N >= 2.

    The first level should be small: it is reached by scaling nothing, x = x0, as published inversions do.
    `predict_x0(x, sigma)` takes [B, ...] and [B]; it is called N - 1 times. No gradient flows.
    """
    if len(sigmas) < 2:
        raise ValueError(f"got {len(sigmas)} noise levels; an inversion needs at least two")
    x = x0.detach()
    prediction = x
    shape = (-1, *(1,) * (x0.ndim - 1))
    for current, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        prediction = predict_x0(x, current)
        x = prediction + (following / current).reshape(shape) * (x - prediction)
    return Inversion(x, prediction)
