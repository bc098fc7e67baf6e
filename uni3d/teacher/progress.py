"""How far one phase of training has come: its clock, its progress lines and its limits."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from uni3d.errors import TrainingDiverged

logger = logging.getLogger(__name__)


class PhaseClock:
    """Time and steps of a phase over all the sessions it is spread over.

    Args:
        planned_minutes: length of the phase; None counts `planned_steps` instead.
        planned_steps: used when `planned_minutes` is None.
        elapsed_s: training seconds of earlier sessions.
        deadline_s: time.monotonic() at which this session has to end, or None.
    """

    def __init__(
        self,
        *,
        planned_minutes: float | None,
        planned_steps: int,
        elapsed_s: float = 0.0,
        deadline_s: float | None = None,
    ) -> None:
        self.planned_minutes = planned_minutes
        self.planned_steps = planned_steps
        self.deadline_s = deadline_s
        self._earlier_s = elapsed_s
        self._start_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Training seconds so far, earlier sessions included."""
        return self._earlier_s + time.monotonic() - self._start_s

    def restart(self) -> None:
        """Forget this session's seconds so far: compiling and filling buffers are no training."""
        self._start_s = time.monotonic()

    def progress(self, step: int) -> float:
        """Share of the phase that is done before `step`, at least 0; 1 or more ends it."""
        if self.planned_minutes is None:
            return step / max(1, self.planned_steps)
        return self.elapsed_s / max(1e-9, self.planned_minutes * 60)

    @property
    def is_out_of_time(self) -> bool:
        """Whether this session's deadline has passed."""
        return self.deadline_s is not None and time.monotonic() >= self.deadline_s


class LossLog:
    """Mean loss and speed of a phase, read from the device only every so many seconds.

    Each report goes to the log and, as a JSON line, to `metrics_path`; without one it goes nowhere.
    """

    def __init__(self, phase: str, *, batch_size: int, every_s: float, metrics_path: Path | None) -> None:
        self.phase = phase
        self.batch_size = batch_size
        self.every_s = every_s
        self.metrics_path = metrics_path
        self.last_loss: float | None = None
        self._total: Tensor | None = None
        self._restart()

    def add(self, loss: Tensor) -> None:
        """Count one step's loss without waiting for it."""
        value = loss.detach().float()
        self._total = value.clone() if self._total is None else self._total + value
        self._num += 1

    @property
    def is_due(self) -> bool:
        return self._num > 0 and time.monotonic() - self._since_s >= self.every_s

    def report(self, *, step: int, elapsed_s: float, progress: float, learning_rate: float) -> None:
        """Write one line. Raises TrainingDiverged when the mean loss is not finite."""
        if self._total is None or self._num == 0:
            return
        loss = float(self._total) / self._num
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"the {self.phase} loss became {loss} before step {step}; resume from the last "
                "checkpoint with a lower learning_rate"
            )
        seconds = max(1e-9, time.monotonic() - self._since_s)
        speed = self._num * self.batch_size / seconds
        self.last_loss = loss
        if self.metrics_path is None:
            self._restart()
            return
        logger.info(
            "%s step %d  loss %.4f  %.0f images/s  lr %.2e  %.1f min  %.0f %%",
            self.phase, step, loss, speed, learning_rate, elapsed_s / 60, 100 * min(1.0, progress),
        )  # fmt: skip
        record = {
            "phase": self.phase,
            "step": step,
            "loss": loss,
            "images_per_s": round(speed, 1),
            "learning_rate": learning_rate,
            "elapsed_s": round(elapsed_s, 1),
        }
        with self.metrics_path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
        self._restart()

    def pause(self) -> None:
        """Leave out of the speed what was no training (a checkpoint, a sample grid)."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._restart()

    def _restart(self) -> None:
        self._total, self._num = None, 0
        self._since_s = time.monotonic()
