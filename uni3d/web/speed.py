"""How long a job takes on this machine: by the jobs that were made here, before them by a few trial steps.

The worker takes the trial steps while nobody waits, once for a folder, and leaves the figures in speed.json.
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from uni3d.config.presets import PRESET_FILES
from uni3d.web.jobs import Job, JobStore
from uni3d.web.orders import Order, num_steps, run_config
from uni3d.web.settings import WebSettings

_TRIAL_STEPS = 4
# Surface, texture, pictures and video take about as long as so many steps.
_MESH_IN_STEPS = 15


class Estimates:
    """What the page says about time; None where nothing is known yet."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    def seconds(self, quality: str, method: str, teacher: str | None = None) -> float | None:
        """Seconds of one job, by the last ones of its method, else of its quality, else by trial steps."""
        settings = self._store.settings
        order = Order(
            prompt="a chair", quality=quality, method=method, teacher=teacher or next(iter(settings.teachers))
        )
        steps = num_steps(order, settings)
        return (
            self._store.usual_seconds(quality, steps, method)
            or self._store.usual_seconds(quality, steps)
            or read_trial(settings).get(quality)
        )

    def wait(self, before: list[Job]) -> float | None:
        """Seconds until the jobs `before` another are made."""
        seconds = functools.cache(self.seconds)  # many jobs wait, of few kinds
        total = 0.0
        for job in before:
            usual = seconds(job.quality, job.method)
            if usual is None:
                return None
            total += max(usual - job.seconds_worked, job.seconds_left or 0.0, 0.0)
        return total


def read_trial(settings: WebSettings) -> Mapping[str, float]:
    """Seconds of a job by quality as the trial found them; empty without one for these settings."""
    try:
        trial = json.loads(_trial_file(settings).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return trial["seconds"] if trial.get("of") == _trial_of(settings) else {}


class _Enough(Exception):
    """The trial steps are taken."""


def try_steps(settings: WebSettings, leave_if_asked: Callable[[], object]) -> None:
    """Time a few steps of each quality by the default method and keep what they say of a whole job.

    `leave_if_asked` is called at every step and may raise to leave. Raises what a run raises.
    """
    from uni3d.training.checkpoint import atomic_write_json

    seconds = {quality: _seconds_of_a_job(quality, settings, leave_if_asked) for quality in PRESET_FILES}
    atomic_write_json(_trial_file(settings), {"of": _trial_of(settings), "seconds": seconds})


def _seconds_of_a_job(quality: str, settings: WebSettings, leave_if_asked: Callable[[], object]) -> float:
    from uni3d.text_to_3d import pipeline

    ends: list[float] = []

    class Watch(pipeline.RunWatch):
        def before_denoising(self) -> None:
            leave_if_asked()

        def after_step(self, optimiser: Any, values: Mapping[str, float]) -> None:
            leave_if_asked()
            ends.append(time.monotonic())
            if len(ends) > _TRIAL_STEPS:
                raise _Enough

    order = Order(prompt="a red chair", quality=quality, teacher=next(iter(settings.teachers)))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=settings.jobs_folder) as runs:
        try:
            pipeline.generate(run_config(order, settings, runs_folder=Path(runs)), watch=Watch())
        except _Enough:
            pass
    if len(ends) < 2:  # a server that allows a step or two
        return time.monotonic() - started
    step = median(later - earlier for earlier, later in zip(ends, ends[1:], strict=False))
    return ends[0] - started + step * (num_steps(order, settings) - 1 + _MESH_IN_STEPS)


def _trial_file(settings: WebSettings) -> Path:
    return settings.folder / "speed.json"


def _trial_of(settings: WebSettings) -> dict[str, Any]:
    """What the figures hold for."""
    teacher = next(iter(settings.teachers.values()))
    return {"device": settings.device, "teacher": teacher, "max_steps": settings.max_steps}
