"""What the person who runs the web page decides: where jobs are kept, who may queue how much, what with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uni3d.config.values import check_range
from uni3d.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class WebSettings:
    """Limits and places of one server; server and worker process share them.

    Attributes:
        folder: holds everything that outlives a restart; private to this user.
        teachers: the teachers that a visitor may choose from, by the name that the page shows.
        max_steps: cap on the steps of a job; none leaves the presets as they are.
        max_fruitless_starts: a job that took the worker down this often without getting further has failed;
            many, since whoever ends the worker by hand does not mean the job.
        max_silent_s: a worker that says nothing for this long about its job is replaced.
    """

    folder: Path
    teachers: Mapping[str, str] = field(default_factory=lambda: {"embedded": "embedded"})
    device: str = "auto"
    max_steps: int | None = None
    max_queue: int = 20
    max_unfinished_per_visitor: int = 6
    max_per_hour: int = 30
    max_minutes: float = 240.0
    max_fruitless_starts: int = 25
    max_silent_s: float = 1800.0
    keep_days: float = 7.0
    max_gigabytes: float = 5.0
    checkpoint_interval_s: float = 20.0

    def __post_init__(self) -> None:
        if not self.teachers:
            raise UsageError("there is no teacher to choose from; name one as NAME=FOLDER")
        if self.max_steps is not None:
            check_range("max_steps", self.max_steps, 1, 10_000_000)
        check_range("max_queue", self.max_queue, 1, 100_000)
        check_range("max_unfinished_per_visitor", self.max_unfinished_per_visitor, 1, 100_000)
        check_range("max_per_hour", self.max_per_hour, 1, 1_000_000)
        check_range("max_minutes", self.max_minutes, 0.0, 1e6)
        check_range("keep_days", self.keep_days, 0.0, 1e5)
        check_range("max_gigabytes", self.max_gigabytes, 0.0, 1e6)

    @property
    def jobs_folder(self) -> Path:
        """Where each job has a folder of its own, named by its id."""
        return self.folder / "jobs"

    def to_json(self) -> str:
        """One line for the command of the worker process."""
        return json.dumps({**dataclasses.asdict(self), "folder": str(self.folder)})

    @classmethod
    def from_json(cls, text: str) -> WebSettings:
        """What `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        return cls(**{**values, "folder": Path(values["folder"])})


def make_private_folder(folder: Path) -> Path:
    """`folder` for this user alone (mode 0700), made if need be; UsageError where that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except OSError as error:
        raise UsageError(
            f"the folder '{folder}' cannot be made private ({error.strerror}); choose another"
        ) from error
    return folder.resolve()
