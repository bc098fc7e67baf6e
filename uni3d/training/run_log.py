"""What a run leaves behind and says while it runs: its directory, metrics, log, progress and alarms."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

from tqdm import tqdm

from uni3d.errors import TrainingDiverged, UsageError
from uni3d.training.checkpoint import atomic_write_text

logger = logging.getLogger(__name__)

_MAX_DIRECTORIES = 10_000


class RunDirectory:
    """The directory of one run: `config.yaml`, `metrics.jsonl`, `log.txt`, `checkpoints/` and its results.

    `command` is the one that goes on with it. Use as a context manager: inside, everything that the package
    logs also goes to `log.txt`.
    """

    def __init__(self, path: str | os.PathLike[str], *, command: str = "generate") -> None:
        self.path = Path(path)
        self.command = command
        self.config_path = self.path / "config.yaml"
        self.metrics_path = self.path / "metrics.jsonl"
        self.log_path = self.path / "log.txt"
        self.checkpoints_path = self.path / "checkpoints"
        self._handler: logging.Handler | None = None

    @classmethod
    def create(cls, root: str | os.PathLike[str], name: str, *, command: str = "generate") -> RunDirectory:
        """Make a new directory `root/name`, or `root/name-2`, `-3`... if that exists, and its parents."""
        for number in range(1, _MAX_DIRECTORIES):
            path = Path(root) / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                if Path(root).exists() and not Path(root).is_dir():
                    break
                continue
            except OSError as error:
                raise UsageError(
                    f"the run directory '{path}' cannot be made ({error.strerror}); choose another folder"
                ) from error
            return cls(path, command=command)
        raise UsageError(f"no run directory '{name}' can be made in '{root}'; choose another folder")

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, command: str = "generate") -> RunDirectory:
        """An existing run directory, to go on with; UsageError if it holds no run."""
        run = cls(path, command=command)
        if not run.config_path.is_file():
            raise UsageError(
                f"'{run.path}' is not the directory of a run (it has no config.yaml); "
                f"pass the directory that the interrupted run named"
            )
        return run

    def __enter__(self) -> RunDirectory:
        self._handler = logging.FileHandler(self.log_path, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._handler.setLevel(logging.INFO)
        package_logger = logging.getLogger("uni3d")
        package_logger.addHandler(self._handler)
        if package_logger.getEffectiveLevel() > logging.INFO:
            package_logger.setLevel(logging.INFO)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._handler is not None:
            logging.getLogger("uni3d").removeHandler(self._handler)
            self._handler.close()
            self._handler = None

    def write_config(self, text: str) -> None:
        """Write the resolved configuration."""
        atomic_write_text(self.config_path, text)

    def log_metrics(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Append one line to `metrics.jsonl`; numbers that are not finite are written as null."""
        row = {"step": step, **{name: _json_number(value) for name, value in values.items()}}
        with self.metrics_path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def truncate_metrics(self, step: int) -> None:
        """Forget the lines after `step`, which a resumed run writes again, and a line cut off by a kill."""
        if not self.metrics_path.is_file():
            return
        kept: list[str] = []
        for line in self.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
                kept.append(line)
        atomic_write_text(self.metrics_path, "".join(f"{line}\n" for line in kept))


class Progress:
    """Steps done, speed and time left on stderr: a bar on a terminal, else a plain line now and then.

    Use as a context manager. `quiet` says nothing at all. `start` is where a resumed run goes on.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        label: str = "",
        quiet: bool = False,
        stream: TextIO | None = None,
        line_interval_s: float = 10.0,
    ) -> None:
        self.total = total
        self.done = start
        self._start = start
        self._label = label
        self._quiet = quiet
        self._stream = stream or sys.stderr
        self._line_interval_s = line_interval_s
        self._started = self._last_line = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if not quiet and self._stream.isatty():
            self._bar = tqdm(total=total, initial=start, desc=label, file=self._stream, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def update(self, num: int = 1, **fields: float | str) -> None:
        """Count `num` more steps and show `fields`, such as loss=0.5, beside them."""
        self.done += num
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.set_postfix({name: _short(value) for name, value in fields.items()}, refresh=False)
            self._bar.update(num)
            return
        now = time.monotonic()
        if self.done < self.total and now - self._last_line < self._line_interval_s:
            return
        self._last_line = now
        shown = "".join(f", {name} {_short(value)}" for name, value in fields.items())
        head = f"{self._label}: " if self._label else ""
        self._stream.write(
            f"{head}step {self.done}/{self.total}, {_clock(now - self._started)} elapsed, "
            f"{_clock(self.remaining_s)} left{shown}\n"
        )
        self._stream.flush()

    @property
    def remaining_s(self) -> float:
        """Seconds left at the mean speed so far; NaN before the first step."""
        done_here = self.done - self._start
        if done_here <= 0:
            return math.nan
        return (time.monotonic() - self._started) / done_here * (self.total - self.done)


class NonFiniteGuard:
    """Decides what becomes of a step whose numbers are not finite: skip it, roll back, or give up.

    `check` returns "ok", "skip" for a non-finite step, or "rollback" for the `patience`-th in a row; the loop
    then loads its last checkpoint. After `max_rollbacks` of those it raises TrainingDiverged. Every event is
    logged with the step and the name of the first value that was not finite.
    """

    def __init__(self, *, patience: int = 3, max_rollbacks: int = 3) -> None:
        self.patience = patience
        self.max_rollbacks = max_rollbacks
        self.num_in_a_row = 0
        self.num_skipped = 0
        self.num_rollbacks = 0

    def check(self, step: int, values: Mapping[str, Any]) -> Literal["ok", "skip", "rollback"]:
        """Judge the named numbers or tensors of one step; None values are passed over."""
        name = next((name for name, value in values.items() if not _is_finite(value)), None)
        if name is None:
            self.num_in_a_row = 0
            return "ok"
        self.num_in_a_row += 1
        self.num_skipped += 1
        if self.num_in_a_row < self.patience:
            logger.warning("step %d skipped: %s is not finite", step, name)
            return "skip"
        self.num_in_a_row = 0
        self.num_rollbacks += 1
        if self.num_rollbacks > self.max_rollbacks:
            raise TrainingDiverged(
                f"{name} was not finite in {self.patience} steps in a row up to step {step}, even after "
                f"{self.max_rollbacks} rollbacks; lower the learning rates or the guidance scale"
            )
        logger.warning(
            "%s was not finite in %d steps in a row up to step %d: rolling back", name, self.patience, step
        )
        return "rollback"


def _is_finite(value: Any) -> bool:
    if value is None:
        return True
    if hasattr(value, "isfinite"):
        return bool(value.isfinite().all())
    return math.isfinite(value)


def _json_number(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
