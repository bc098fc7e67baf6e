"""One optimiser step, made only when everything about it is finite, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from uni3d.training.processes import Processes


def descend(
    loss: Tensor,
    optimiser: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    max_norm: float,
    processes: Processes = Processes(),  # noqa: B008 - frozen
) -> Tensor:
    """Step `optimiser` on the scalar `loss`, the gradient's norm over `parameters` bounded by `max_norm`.

    A `max_norm` of 0 bounds nothing. When the loss or a gradient is not finite nothing moves. Returns whether
    the loss was finite and, if it has a gradient, the step was made: a bool scalar on the device. A fused
    optimiser decides by it without the host; with any other one the host waits for it. Several `processes`
    step on the mean of their gradients, and all of them or none.
    """
    optimiser.zero_grad(set_to_none=True)
    if not loss.requires_grad:
        return torch.isfinite(_average_over(processes, loss, []))
    loss.backward()
    is_finite = torch.isfinite(_average_over(processes, loss.detach(), parameters))
    limit = max_norm if max_norm > 0 else float("inf")
    is_finite = is_finite & torch.isfinite(nn.utils.clip_grad_norm_(parameters, limit))
    if optimiser.defaults.get("fused"):
        # What GradScaler hands a fused optimiser: at 1 it leaves weights, moments and counts alone.
        optimiser.found_inf = (~is_finite).float()  # pyright: ignore[reportAttributeAccessIssue]
        optimiser.step()
    elif bool(is_finite):
        optimiser.step()
    else:
        optimiser.zero_grad(set_to_none=True)
    return is_finite


def _average_over(processes: Processes, loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """The mean loss of all processes, whose gradients become their mean."""
    if processes.num == 1:
        return loss
    for parameter in parameters:
        if parameter.grad is None:  # of no use to this process's views; the others may have one
            parameter.grad = torch.zeros_like(parameter)
    total = loss.clone()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    processes.add_up_([total, *gradients])
    for tensor in (total, *gradients):
        tensor.div_(processes.num)
    return total
