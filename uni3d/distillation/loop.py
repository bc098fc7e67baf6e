"""What both image programs do around their steps: resume, save, draw, report, stop.

A run's folder holds config.yaml, metrics.jsonl, log.txt, checkpoints/, grids/, tensorboard/ where that is
installed, and the network it is about (teacher/ or student/), written anew at every checkpoint. The state is
a function of the number of steps alone, so it does not matter when a run was saved.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from uni3d.distillation.sample_grid import write_grid
from uni3d.distillation.settings import RunConfig
from uni3d.errors import ConfigError, TrainingDiverged, UsageError
from uni3d.training.checkpoint import Checkpoint, CheckpointStore
from uni3d.training.processes import Processes
from uni3d.training.run_log import Progress, RunDirectory
from uni3d.training.stop import StopFlag

logger = logging.getLogger(__name__)

# So many steps without effect, one after the other, end the run.
_HOPELESS_STEPS = 20


class Program(Protocol):
    """A training: its state, and a step that leaves its statistics on the device."""

    command: str
    """The words that start it, such as "distill"."""

    def step(self, index: int) -> None:
        """Do step `index`, counted from 0, without waiting for the device."""
        ...

    def take_statistics(self) -> dict[str, float]:
        """Means by name since the last call, and "skipped", the number of steps without effect."""
        ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...

    def draw_grid(self) -> Tensor:
        """uint8 [C, H, W], what the averaged network makes."""
        ...

    def publish(self, folder: Path, *, images: int) -> Path:
        """Write the averaged network into the run's folder."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class TrainingResult:
    """Where a session ended."""

    is_finished: bool
    """False when the session's time was up first."""
    step: int
    images: int
    network: Path
    """Folder of the published network."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, checked before anything is made in it."""

    path: Path
    is_resumed: bool
    accepts_changes: bool = False

    def check(self) -> None:
        """Raise UsageError for an earlier run that is not to go on, or one to go on that is not there."""
        run = RunDirectory(self.path)
        if self.is_resumed:
            RunDirectory.open(self.path)
        elif run.config_path.exists() or any(run.checkpoints_path.glob("step_*")):
            raise UsageError(f"'{self.path}' holds a run already; pass --resume to go on, or another folder")

    def load(self, fingerprint: Mapping[str, Any], keep: int) -> tuple[CheckpointStore, Checkpoint | None]:
        """The store of checkpoints, and the newest one if the run goes on.

        Raises ConfigError, with the differences, for a run of other settings unless changes are accepted.
        """
        folder = RunDirectory(self.path).checkpoints_path
        store = CheckpointStore(folder, keep=keep, fingerprint=fingerprint)
        if not self.is_resumed:
            return store, None
        try:
            return store, store.load_latest()
        except ConfigError as error:
            if not self.accepts_changes:
                raise ConfigError(f"{error}, or pass --accept-changes") from None
            logger.warning("going on all the same: %s", error)
            return store, CheckpointStore(folder, keep=keep).load_latest()


class TensorBoardLog:
    """Scalars and grids for TensorBoard; without the package, nothing."""

    def __init__(self, folder: Path) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._writer = SummaryWriter(str(folder))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def grid(self, step: int, grid: Tensor) -> None:
        if self._writer is not None:
            self._writer.add_image("samples", grid, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def run_training(
    program: Program,
    config: RunConfig,
    folder: RunFolder,
    *,
    store: CheckpointStore,
    checkpoint: Checkpoint | None,
    config_text: str,
    network_name: str,
    processes: Processes,
    started_s: float,
    quiet: bool = False,
) -> TrainingResult:
    """Train to the end of the run or of the session, and close `program`; see the module for what is left.

    Raises Interrupted after saving when a signal arrived, and TrainingDiverged when no step has an effect.
    """
    with StopFlag() as stop, contextlib.closing(program):
        step, elapsed_s = 0, 0.0
        if checkpoint is not None:
            program.load_state(checkpoint.state["program"])
            step, elapsed_s = checkpoint.step, float(checkpoint.state["elapsed_s"])
            logger.info("going on after step %d of %d", step, config.num_steps)
        if not processes.is_main:
            return _follow(program, config, step, processes, folder.path / network_name)
        folder.path.mkdir(parents=True, exist_ok=True)
        with RunDirectory(folder.path) as run:
            run.write_config(config_text)
            run.truncate_metrics(step)
            session = _Session(program, config, run, store, network_name, elapsed_s)
            deadline_s = None if config.max_minutes is None else started_s + 60 * config.max_minutes
            try:
                with Progress(config.num_steps, start=step, label=program.command, quiet=quiet) as progress:
                    return session.train(step, processes, stop, deadline_s, progress)
            finally:
                session.board.close()


def _follow(
    program: Program, config: RunConfig, step: int, processes: Processes, network: Path
) -> TrainingResult:
    """The steps of a process that is not the first: it leaves when the first one says so."""
    while step < config.num_steps:
        program.step(step)
        step += 1
        if processes.as_main_says(0.0)[0]:
            break
    return TrainingResult(step >= config.num_steps, step, step * config.batch, network)


class _Session:
    """The first process's side of a session."""

    def __init__(
        self,
        program: Program,
        config: RunConfig,
        run: RunDirectory,
        store: CheckpointStore,
        network_name: str,
        elapsed_s: float,
    ) -> None:
        self.program, self.config, self.run, self.store = program, config, run, store
        self.network = run.path / network_name
        self.board = TensorBoardLog(run.path / "tensorboard")
        self._earlier_s = elapsed_s
        self._begun_s = self._reported_s = time.monotonic()
        self._reported_step = 0
        self._paused_s = 0.0
        self._num_hopeless = 0
        self._shown: dict[str, float] = {}

    @property
    def elapsed_s(self) -> float:
        return self._earlier_s + time.monotonic() - self._begun_s

    def train(
        self,
        first_step: int,
        processes: Processes,
        stop: StopFlag,
        deadline_s: float | None,
        progress: Progress,
    ) -> TrainingResult:
        config, step = self.config, first_step
        saved_s = drawn_s = time.monotonic()
        saved_step = -1
        self._reported_step = first_step
        while step < config.num_steps:
            self.program.step(step)
            step += 1
            now_s = time.monotonic()
            is_leaving = stop.is_set or (deadline_s is not None and now_s >= deadline_s)
            is_leaving = bool(processes.as_main_says(float(is_leaving))[0])
            if now_s - self._reported_s >= config.log_every_s or step == config.num_steps or is_leaving:
                self._report(step)
            progress.update(1, **self._shown)
            if is_leaving and step < config.num_steps:
                break
            if now_s - saved_s > 60 * config.checkpoint_every_minutes:
                self._save(step)
                saved_s, saved_step = time.monotonic(), step
            if 0 < 60 * config.grid_every_minutes < now_s - drawn_s:
                self._draw(step)
                drawn_s = time.monotonic()
        if step != saved_step:
            self._save(step)
        if stop.is_set and step < config.num_steps:
            raise stop.interruption(
                f"stopped after step {step} of {config.num_steps}; everything is saved. "
                f"Go on with: {resume_line(self.program.command, self.run.path)}"
            )
        self._draw(step)
        return TrainingResult(step >= config.num_steps, step, step * config.batch, self.network)

    def _report(self, step: int) -> None:
        """One line of metrics; the only place that waits for the device."""
        num = step - self._reported_step
        if num == 0:
            return
        values = self.program.take_statistics()
        # What was saved and drawn in between waited for the device too, and is no training.
        seconds = max(1e-9, time.monotonic() - self._reported_s - self._paused_s)
        skipped = values.get("skipped", 0.0)
        speed = num * self.config.batch / seconds
        row = {"images": step * self.config.batch, **values, "images_per_s": round(speed, 1)}
        row["elapsed_s"] = round(self.elapsed_s, 1)
        self.run.log_metrics(step, row)
        self.board.scalars(step, values)
        if skipped:
            logger.warning(
                "%d of the %d updates up to step %d were skipped: their gradients were not finite",
                round(skipped), round(values.get("updates", num)), step,
            )  # fmt: skip
        self._num_hopeless = self._num_hopeless + num if skipped >= values.get("updates", num) else 0
        if self._num_hopeless >= _HOPELESS_STEPS:
            raise TrainingDiverged(
                f"no gradient was finite in the {self._num_hopeless} steps up to step {step}; resume with "
                f"lower learning rates (--accept-changes)"
            )
        losses = {name: value for name, value in values.items() if name.endswith("loss")}
        self._shown = {**losses, "images/s": speed}
        self._reported_s, self._reported_step, self._paused_s = time.monotonic(), step, 0.0

    def _save(self, step: int) -> None:
        begun_s = time.monotonic()
        state = {"program": self.program.state(), "elapsed_s": round(self.elapsed_s, 3)}
        self.store.save(step, state)
        self.program.publish(self.network, images=step * self.config.batch)
        self._paused_s += time.monotonic() - begun_s

    def _draw(self, step: int) -> None:
        begun_s = time.monotonic()
        grid = self.program.draw_grid()
        path = write_grid(grid, self.run.path / "grids" / f"step_{step:08d}.png")
        self.board.grid(step, grid)
        logger.info("sample grid %s", path)
        self._paused_s += time.monotonic() - begun_s


def resume_line(command: str, folder: Path) -> str:
    """The line that goes on with a run."""
    return f"uni3d {command} --output {shlex.quote(str(folder))} --resume"
