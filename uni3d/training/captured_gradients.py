"""The gradients of a training step as one CUDA graph.

A step of a small network is thousands of short kernels, and a host that needs 30 microseconds to launch one
keeps the device waiting for half of the time. Recorded once and replayed, they need one launch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from uni3d.diffusion.graphed_pass import CUDAGraphRecorder, Recorder
from uni3d.errors import Interrupted

logger = logging.getLogger(__name__)

LossFunction = Callable[..., Tensor]


class CapturedGradients:
    """Computes a loss and its gradients: plainly, or by replaying a graph recorded at the first call.

    Args:
        loss_of: tensors to a scalar loss. It must draw nothing random and never wait for the device: what it
            depends on is in its arguments and in the parameters, whose storage stays where it is.
        parameters: whose gradients are wanted.
        is_enabled: record graphs; for parameters on a CUDA device only. A graph is kept for every combination
            of shapes. When recording fails a warning says why, and steps run plainly from then on.
        recorder: makes what records one combination.
    """

    def __init__(
        self,
        loss_of: LossFunction,
        parameters: Sequence[nn.Parameter],
        *,
        is_enabled: bool,
        recorder: Callable[[], Recorder] = CUDAGraphRecorder,
    ) -> None:
        self.loss_of = loss_of
        self.parameters = list(parameters)
        self.is_enabled = is_enabled
        self._recorder = recorder
        self._recordings: dict[tuple[torch.Size, ...], _Recording] = {}

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The loss, detached; its gradients are added to `.grad` of the parameters.

        Where there was none before, `.grad` is the graph's own memory: use it before the next call.
        """
        if self.is_enabled:
            try:
                return self._replayed(tensors)
            except (torch.OutOfMemoryError, Interrupted):
                raise
            except Exception as error:  # drivers and compilers raise what they like
                line = (str(error).strip().splitlines() or [""])[0][:200]
                logger.warning("no CUDA graph of the step (%s: %s)", type(error).__name__, line)
                self.is_enabled = False
                self._recordings.clear()
        loss, gradients = _loss_and_gradients(self.loss_of, self.parameters, tensors)
        self._hand_over(gradients)
        return loss

    def _replayed(self, tensors: Sequence[Tensor]) -> Tensor:
        key = tuple(tensor.shape for tensor in tensors)
        recording = self._recordings.get(key)
        if recording is None:
            recording = _Recording(self.loss_of, self.parameters, tensors, self._recorder())
            self._recordings[key] = recording
        loss, gradients = recording.replay(tensors)
        self._hand_over(gradients)
        return loss

    def _hand_over(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


class _Recording:
    """One graph over its own copies of the arguments."""

    def __init__(
        self,
        loss_of: LossFunction,
        parameters: Sequence[nn.Parameter],
        tensors: Sequence[Tensor],
        recorder: Recorder,
    ) -> None:
        self._inputs = [tensor.detach().clone() for tensor in tensors]
        self._is_reached: list[bool] = []

        def work() -> list[Tensor]:
            loss, gradients = _loss_and_gradients(loss_of, parameters, self._inputs)
            self._is_reached = [gradient is not None for gradient in gradients]
            return [loss, *(gradient for gradient in gradients if gradient is not None)]

        recorder.warm_up(work)
        self._results, self._replay = recorder.record(work)

    def replay(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor | None]]:
        for own, given in zip(self._inputs, tensors, strict=True):
            own.copy_(given)
        self._replay()
        loss, *gradients = self._results
        found = iter(gradients)
        # The next replay writes into the graph's own memory again, and losses are summed up over steps.
        return loss.clone(), [next(found) if reached else None for reached in self._is_reached]


def _loss_and_gradients(
    loss_of: LossFunction, parameters: Sequence[nn.Parameter], tensors: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor | None]]:
    loss = loss_of(*tensors)
    return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)
