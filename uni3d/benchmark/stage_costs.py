"""What each stage of a run costs: field, geometry, texture, and the export of the mesh.

Also how long a run of the field alone may be that takes the same time: what is compared then is what the time
is spent on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

from uni3d.benchmark.machine import peak_since_reset, reset_peak
from uni3d.config.text_to_3d import TextTo3DConfig

EXPORT = "export"
# A run is cut into so many parts, and of each the slowest step is left out of what a step costs.
_NUM_PARTS = 10


class StageCosts:
    """Seconds and peak memory of each stage inside a `with` block around one run, in `stages`.

    Called after every step with its index, as a callback of `TextTo3DPipeline`. What comes before the first
    step belongs to the first stage, the hand-over to the stage that follows, and what comes after the last
    step to the export.
    """

    def __init__(self, config: TextTo3DConfig, device: torch.device) -> None:
        lengths = {
            "field": config.steps,
            "geometry": config.stages.geometry.steps,
            "texture": config.stages.texture.steps,
        }
        self._lengths = [(name, steps) for name, steps in lengths.items() if steps > 0]
        self._device = device
        self._step_seconds: list[float] = []
        self.stages: dict[str, dict[str, float]] = {}
        self.peak_bytes = 0

    def __enter__(self) -> StageCosts:
        self._begun = self._stepped = time.monotonic()
        reset_peak(self._device)
        return self

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """`step` steps are done in all stages, and the device has come to rest for `values`."""
        now = time.monotonic()
        self._step_seconds.append(now - self._stepped)
        self._stepped = now
        name, length = self._lengths[len(self.stages)]
        if step == sum(steps for _, steps in self._lengths[: len(self.stages) + 1]):
            self._end(name, {"steps": length, "step_seconds": seconds_of_a_step(self._step_seconds)})
            self._step_seconds = []

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end(EXPORT, {})

    def _end(self, name: str, figures: Mapping[str, float]) -> None:
        now, peak = time.monotonic(), peak_since_reset(self._device)
        self.peak_bytes = max(self.peak_bytes, peak)
        self.stages[name] = {"seconds": now - self._begun, "peak_memory_bytes": peak, **figures}
        self._begun = now
        reset_peak(self._device)


def seconds_of_a_step(seconds: Sequence[float]) -> float:
    """Mean of the steps of a stage without the slowest of each tenth of it: the first step at a new image
    size warms caches up, and the first of all contains the teacher's samples."""
    size = max(-(-len(seconds) // _NUM_PARTS), 2)
    parts = [sorted(seconds[start : start + size]) for start in range(0, len(seconds), size)]
    kept = [value for part in parts for value in (part[:-1] if len(part) > 1 else part)]
    return sum(kept) / len(kept)


def steps_as_long_as(stages: Mapping[str, Mapping[str, Any]]) -> int:
    """Steps of the field alone that take as long as all the `stages` of a run, the export left out.

    What the field stage of that run took beyond its steps (samples, warming up) is taken once.
    """
    field = stages["field"]
    total = sum(stage["seconds"] for name, stage in stages.items() if name != EXPORT)
    beside = max(field["seconds"] - field["steps"] * field["step_seconds"], 0.0)
    return max(round((total - beside) / field["step_seconds"]), 1)
