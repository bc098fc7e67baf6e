"""What a benchmark has to make, and how any number of processes share it.

Each job has a folder of its own. A process that wants a job locks its file `claim` with `flock`: the lock
goes with the process, however that ends, so no job is lost to a crash and none is made twice at a time. A
job is done when its `record.json` is there, written in one piece. Nothing else is shared, so processes may
come and go; on several machines the folder must be on a file system that locks across them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uni3d.errors import UsageError
from uni3d.prompts import prompt_slug
from uni3d.training.checkpoint import atomic_write_json

RECORD = "record.json"


@dataclass(frozen=True)
class Job:
    """One result to make."""

    method: str
    prompt: str
    seed: int
    budget: str

    @property
    def folder_name(self) -> str:
        """Where it is made, below the benchmark's folder `runs`."""
        return f"{self.budget}/{self.method}/{prompt_slug(self.prompt)}-{self.seed}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


class WorkList:
    """The jobs of a benchmark in `folder`, shared with other processes.

    All methods and seeds take a prompt before the next prompt comes, so that a benchmark which is not over
    can be summarised over the prompts that are.
    """

    def __init__(
        self,
        folder: Path,
        methods: Sequence[str],
        prompts: Sequence[str],
        seeds: Sequence[int],
        budgets: Sequence[str],
        *,
        reference: str | None = None,
    ) -> None:
        """`reference`: the method that the others wait for, prompt by prompt, under the budget of seconds."""
        self.folder = folder
        self.reference = reference
        self.jobs = [
            Job(method, prompt, seed, budget)
            for prompt in prompts
            for seed in seeds
            for budget in budgets
            for method in methods
        ]
        names = {job.folder_name for job in self.jobs}
        if len(names) < len(self.jobs):
            raise UsageError("two prompts of the benchmark are written alike; keep one of them")

    def path(self, job: Job) -> Path:
        """The job's folder."""
        return self.folder / "runs" / job.folder_name

    def record(self, job: Job) -> dict[str, Any] | None:
        """What was written when the job was done, None if it is not done."""
        file = self.path(job) / RECORD
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def reference_of(self, job: Job) -> Job | None:
        """The job whose costs say how long `job` gets; None where that hangs on no other."""
        if job.budget != "seconds" or self.reference is None or job.method == self.reference:
            return None
        return dataclasses.replace(job, method=self.reference)

    def _waits(self, job: Job) -> bool:
        reference = self.reference_of(job)
        return reference is not None and not (self.path(reference) / RECORD).is_file()

    def finish(self, job: Job, record: dict[str, Any]) -> None:
        """Write down that the job is done; of a job that failed, too."""
        self.path(job).mkdir(parents=True, exist_ok=True)
        atomic_write_json(self.path(job) / RECORD, record)

    def is_complete(self) -> bool:
        """Whether every job is done."""
        return all((self.path(job) / RECORD).is_file() for job in self.jobs)

    def keep_complete_prompts(self) -> None:
        """Forget the jobs of prompts that are not done with every method, seed and budget."""
        open_prompts = {job.prompt for job in self.jobs if not (self.path(job) / RECORD).is_file()}
        self.jobs = [job for job in self.jobs if job.prompt not in open_prompts]

    def forget_failed(self) -> int:
        """Take the records of failed jobs away, so that they are made again; returns how many."""
        failed = [job for job in self.jobs if (record := self.record(job)) and record["error"] is not None]
        for job in failed:
            (self.path(job) / RECORD).unlink()
        return len(failed)

    @contextlib.contextmanager
    def claimed(self, most: int) -> Iterator[list[Job]]:
        """Up to `most` jobs of one method and budget that no one has done or is doing and that wait for no
        other; empty if none is left. They are this process's until the block ends.
        """
        with contextlib.ExitStack() as locks:
            taken: list[Job] = []
            for job in self.jobs:
                if len(taken) == most:
                    break
                if taken and (job.method, job.budget) != (taken[0].method, taken[0].budget):
                    continue
                if self._waits(job) or (self.path(job) / RECORD).is_file():
                    continue
                if not locks.enter_context(claim(self.path(job))):
                    continue
                # Another process may have finished it between the look and the lock.
                if not (self.path(job) / RECORD).is_file():
                    taken.append(job)
            yield taken


@contextlib.contextmanager
def claim(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Lock `folder` (made if need be) against other processes; yields False if another holds it.

    With `wait`, waits until it is free, so always yields True.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "claim").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
