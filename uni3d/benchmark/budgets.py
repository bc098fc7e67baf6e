"""How many steps a method gets: as many as equal network passes, or equal seconds, allow it.

A pilot takes a few steps of each method with the first prompt, at three points of the run (the resolution may
change on the way), and counts what they cost on this machine. The steps that follow from it are settings, so
every run of the method is the same whoever makes it.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from uni3d.benchmark.work_list import claim
from uni3d.config.text_to_3d import TextTo3DConfig
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.errors import UsageError
from uni3d.training.checkpoint import atomic_write_json

PILOT_STEPS = 400
_PILOT_POINTS = (0.3, 0.6, 0.9)
_STEPS_PER_POINT = 2


@dataclass
class Passes:
    """Passes of single samples through the teacher's network, whose LoRA is the fake score."""

    forward: int = 0
    encoder: int = 0
    """Forward passes that end after the middle block, as a discriminator needs them."""
    backward: int = 0
    encoder_backward: int = 0

    @property
    def total(self) -> float:
        """In forward passes of the whole network; a backward pass counts like its forward pass."""
        return self.forward + self.backward + 0.5 * (self.encoder + self.encoder_backward)

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {**asdict(self), "total": self.total}


class PassCounter:
    """Counts the passes through the network of `teacher` inside a `with` block: `counter.passes`."""

    def __init__(self, teacher: LatentDiffusionTeacher) -> None:
        self._teacher = teacher
        self._network_pass, self._middle_features = teacher.network_pass, teacher.middle_features
        self.passes = Passes()

    def __enter__(self) -> PassCounter:
        self._teacher.network_pass = self._whole
        self._teacher.middle_features = self._half  # type: ignore[method-assign]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._teacher.network_pass = self._network_pass
        del self._teacher.middle_features

    def _whole(
        self, x: Tensor, timestep: Tensor, context: Tensor, addition: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        output, middle = self._network_pass(x, timestep, context, addition)
        self._count("forward", "backward", output)
        return output, middle

    def _half(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        middle = self._middle_features(x, sigma, context)
        self._count("encoder", "encoder_backward", middle)
        return middle

    def _count(self, forward: str, backward: str, output: Tensor) -> None:
        num, passes = output.shape[0], self.passes
        setattr(passes, forward, getattr(passes, forward) + num)
        if output.requires_grad:
            output.register_hook(lambda _: setattr(passes, backward, getattr(passes, backward) + num))


@dataclass(frozen=True)
class StepCost:
    """What a method costs before its first step, and in each."""

    prepare_passes: float
    prepare_seconds: float
    step_passes: float
    step_seconds: float

    def steps_within(self, kind: str, limit: float) -> int:
        """Steps that fit into `limit` passes or seconds; UsageError if not even one does."""
        prepare, step = (
            (self.prepare_passes, self.step_passes)
            if kind == "passes"
            else (self.prepare_seconds, self.step_seconds)
        )
        steps = int((limit - prepare) / step)
        if steps < 1:
            raise UsageError(
                f"{limit:g} {kind} do not cover one step: {prepare:g} go into teacher samples and {step:g} "
                f"into each step; raise budget.{kind}, or lower run.discriminator.num_real_samples"
            )
        return steps


class Optimiser(Protocol):
    """What makes one result step by step: a `SceneOptimiser`, or the pictures of the 2-D mode."""

    step_index: int

    def prepare(self) -> None:
        """Once, before the first step."""
        ...

    def step(self) -> Any:
        """One step."""
        ...

    def close(self) -> None:
        """Leave the teacher as it was."""
        ...


class OptimiserFactory(Protocol):
    """What a pilot needs of a backend."""

    teacher: LatentDiffusionTeacher

    def optimiser(self, config: TextTo3DConfig) -> Optimiser: ...


def measure_step_cost(backend: OptimiserFactory, config: TextTo3DConfig) -> StepCost:
    """Take the pilot steps of `config`, whose prompt is set."""
    config = dataclasses.replace(config, steps=PILOT_STEPS)
    optimiser = backend.optimiser(config)
    try:
        with PassCounter(backend.teacher) as counter:
            prepare_seconds = _seconds(optimiser.prepare, backend.teacher.device)
        seconds: list[float] = []
        with PassCounter(backend.teacher) as steps:
            for point in _PILOT_POINTS:
                optimiser.step_index = round(point * PILOT_STEPS)
                taken = [_seconds(optimiser.step, backend.teacher.device) for _ in range(_STEPS_PER_POINT)]
                seconds += taken[1:]  # the first one at a new resolution warms caches up
    finally:
        optimiser.close()
    num_steps = len(_PILOT_POINTS) * _STEPS_PER_POINT
    return StepCost(
        counter.passes.total, prepare_seconds, steps.passes.total / num_steps, statistics.mean(seconds)
    )


def _seconds(action: Any, device: torch.device) -> float:
    started = time.monotonic()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic() - started


def shared_step_cost(
    folder: Path, method: str, backend: OptimiserFactory, config: TextTo3DConfig
) -> StepCost:
    """The cost of `method`, measured once by whichever process comes first and kept in `folder`/pilots."""
    place = folder / "pilots" / method
    with claim(place, wait=True):
        file = place / "cost.json"
        if file.is_file():
            return StepCost(**json.loads(file.read_text(encoding="utf-8")))
        cost = measure_step_cost(backend, config)
        atomic_write_json(file, asdict(cost))
        return cost
