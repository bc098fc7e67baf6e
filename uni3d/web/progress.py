"""How a running job says how far it is, and how it learns that it should leave."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from uni3d.errors import Uni3DError
from uni3d.web.jobs import Job, JobStore

_REPORT_INTERVAL_S = 0.5
# Pictures take at most this share of the time.
_PREVIEW_SHARE = 0.05
_MIN_PREVIEW_INTERVAL_S = 2.0


class JobCancelled(Exception):
    """The visitor no longer wants the job."""


class WorkerStopped(Exception):
    """The server is stopping; the job goes on when it is back."""


class JobProgress:
    """Reports one running job to the store; each call may raise JobCancelled, WorkerStopped or Uni3DError."""

    def __init__(self, store: JobStore, job: Job, is_stopping: Callable[[], bool] = lambda: False) -> None:
        self._store = store
        self._job = job
        self._is_stopping = is_stopping
        self._last_report = self._last_saved = time.monotonic()
        self._last_preview = -math.inf
        self._preview_cost_s = 0.0
        self._first: tuple[int, float] | None = None
        self._num_previews = job.num_previews
        self._limit_s = 60 * store.settings.max_minutes - job.seconds_worked
        self._started = time.monotonic()

    def leave_if_asked(self) -> None:
        """Raise if the visitor, the server or the clock wants the job to end."""
        if self._is_stopping():
            raise WorkerStopped
        if self._store.is_cancel_requested(self._job.id):
            raise JobCancelled
        if time.monotonic() - self._started > self._limit_s:
            raise Uni3DError(
                f"the job took longer than the {self._store.settings.max_minutes:g} minutes that this server "
                "allows; choose the draft quality"
            )

    def enter(self, phase: str) -> None:
        """Say what happens now."""
        self._say(phase=phase)
        self.leave_if_asked()

    def warn(self, message: str) -> None:
        """Say something that stays with the job whatever comes of it."""
        self._say(message=message)

    def end(self) -> None:
        """Count the time since the last step: that of making the mesh."""
        self._say()

    def step(self, step: int, loss: float, draw: Callable[[], object] | None = None) -> None:
        """Say that `step` is done; `draw` writes the picture progress.png when it is time for one."""
        now = time.monotonic()
        is_first, is_last = self._first is None, step >= self._job.num_steps
        if self._first is None:
            self._first = (step, now)
        self.leave_if_asked()
        if draw is not None and (is_first or is_last or self._is_preview_due(now)):
            self._draw(draw)
        if is_first or is_last or now - self._last_report >= _REPORT_INTERVAL_S:
            self._last_report = now
            self._say(
                phase="making the mesh" if is_last else "optimising",
                step=step,
                loss=loss if math.isfinite(loss) else None,
                seconds_left=self._seconds_left(step, now),
                num_previews=self._num_previews,
            )

    def _say(self, **values: object) -> None:
        now = time.monotonic()
        self._store.report(self._job.id, add_seconds=now - self._last_saved, **values)
        self._last_saved = now

    def _is_preview_due(self, now: float) -> bool:
        interval = max(_MIN_PREVIEW_INTERVAL_S, self._preview_cost_s / _PREVIEW_SHARE)
        return now - self._last_preview >= interval

    def _draw(self, draw: Callable[[], object]) -> None:
        started = time.monotonic()
        draw()
        self._last_preview = time.monotonic()
        self._preview_cost_s = self._last_preview - started
        self._num_previews += 1

    def _seconds_left(self, step: int, now: float) -> float | None:
        assert self._first is not None
        first_step, first_time = self._first
        if step <= first_step:
            return None
        return (now - first_time) / (step - first_step) * (self._job.num_steps - step)
