"""Keeps one worker process alive beside the server: starts it, and starts it again when it has died."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import uni3d
from uni3d.web.jobs import JobStore

logger = logging.getLogger(__name__)

WORKER_COMMAND = (sys.executable, "-m", "uni3d.web.worker")
_LOOK_INTERVAL_S = 0.25
_MAX_PAUSE_S = 4.0
_QUICK_DEATH_S = 5.0
_STOP_WITHIN_S = 10.0


class Supervisor:
    """Watches the worker from a thread; use as a context manager around serving."""

    def __init__(self, store: JobStore, command: Sequence[str] = WORKER_COMMAND) -> None:
        self._store = store
        self._command = [*command, store.settings.to_json()]
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.process: subprocess.Popen[bytes] | None = None
        self.num_starts = 0

    def __enter__(self) -> Supervisor:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _watch(self) -> None:
        pause = 0.0
        while not self._stopping.wait(pause):
            started, started_at = time.monotonic(), time.time()
            self.process = self._start()
            while self.process.poll() is None and not self._stopping.wait(_LOOK_INTERVAL_S):
                self._end_if_silent(self.process, started_at)
            if self._stopping.is_set():
                break
            logger.warning("the worker ended with code %s; starting another", self.process.returncode)
            _close_input(self.process)
            # One that cannot even start, say for a missing package, is not tried in a frenzy.
            died_quickly = time.monotonic() - started < _QUICK_DEATH_S
            pause = min(2 * pause + 0.1, _MAX_PAUSE_S) if died_quickly else 0.0
        if self.process is not None:
            self._stop(self.process)

    def _start(self) -> subprocess.Popen[bytes]:
        self.num_starts += 1
        package = str(Path(uni3d.__file__).resolve().parents[1])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        # A session of its own: Ctrl-C in the terminal is for the server, which tells the worker.
        return subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )

    def _end_if_silent(self, process: subprocess.Popen[bytes], started_at: float) -> None:
        job = self._store.running()
        if job is None or job.heard_at is None:
            return
        if time.time() - max(job.heard_at, started_at) > self._store.settings.max_silent_s:
            logger.warning("the worker says nothing about job %s; ending it", job.id)
            process.kill()
            process.wait()

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        _close_input(process)
        try:
            process.wait(_STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _close_input(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
