"""The queue between server and worker: huey on an SQLite file, each message the id of one job as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from uni3d.errors import MissingPackageError

try:
    from huey import SqliteHuey
    from huey.registry import Message
    from huey.serializer import Serializer
except ImportError as error:
    raise MissingPackageError('the web page needs huey: pip install "uni3d[demo]"') from error


class _JsonSerializer(Serializer):
    """Messages as JSON text, since huey's own serialiser would run what a forged message says."""

    def _serialize(self, data: Any) -> bytes:
        return json.dumps(data).encode()

    def _deserialize(self, data: bytes) -> Any:
        value = json.loads(bytes(data))
        return Message(*value) if isinstance(value, list) else value


class JobQueue:
    """Ids of jobs, first come, first served. `run` is what the worker does with one."""

    def __init__(self, folder: Path, run: Callable[[str], object] | None = None) -> None:
        path = folder / "queue.sqlite3"
        self._huey = SqliteHuey(
            "jobs",
            filename=str(path),
            results=False,
            serializer=_JsonSerializer(),
            strict_fifo=True,
            timeout=30,
        )
        path.chmod(0o600)

        def run_job(job_id: str) -> None:
            assert run is not None, "only a worker runs jobs"
            run(job_id)

        self._add: Callable[[str], object] = self._huey.task(name="run_job")(run_job)

    def add(self, job_id: str) -> None:
        """Put a job at the end."""
        self._add(job_id)

    def replace(self, job_ids: Iterable[str]) -> None:
        """Empty the queue and fill it anew."""
        self._huey.storage.flush_queue()
        for job_id in job_ids:
            self.add(job_id)

    def run_next(self) -> bool:
        """Take the first message and run its job; False if there is none."""
        task = self._huey.dequeue()
        if task is None:
            return False
        self._huey.execute(task)
        return True
