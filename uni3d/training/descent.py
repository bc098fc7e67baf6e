"""One optimiser step, made only when everything about it is finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def descend(
    loss: Tensor, optimiser: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], max_norm: float
) -> bool:
    """Step `optimiser` on the scalar `loss`, the gradient's norm over `parameters` bounded by `max_norm`.

    A `max_norm` of 0 bounds nothing. When the loss or a gradient is not finite nothing moves. Returns whether
    the loss was finite and, if it has a gradient, the step was made.
    """
    optimiser.zero_grad(set_to_none=True)
    if not loss.requires_grad:
        return bool(torch.isfinite(loss))
    loss.backward()
    limit = max_norm if max_norm > 0 else float("inf")
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    if not bool(torch.isfinite(loss.detach()) & torch.isfinite(norm)):
        optimiser.zero_grad(set_to_none=True)
        return False
    optimiser.step()
    return True
