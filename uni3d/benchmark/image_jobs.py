"""Runs of `uni3d` commands as processes of their own, several at once, spread over the GPUs.

A process that fails takes nothing with it but its own run, and a CUDA context costs it no more than its
start. Every process is told once, by SIGTERM, to save and leave; Ctrl-C on a terminal reaches only us.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from uni3d.errors import Uni3DError


class CommandFailed(Uni3DError):
    """A command of ours that ended with an error; the message is the last it said."""


class CommandStopped(Uni3DError):
    """A command that was told to stop, or was not begun because all are."""


class Crew:
    """Runs commands for the threads that ask; no more than `size` at once, each on one GPU.

    Args:
        size: commands at once.
        device: "cuda" shares the visible GPUs out among the commands; anything else sets nothing.
    """

    def __init__(self, size: int, *, device: str) -> None:
        self._places: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        gpus = visible_gpus() if device == "cuda" else []
        for index in range(size):
            self._places.put(gpus[index % len(gpus)] if gpus else None)
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._is_stopping = False

    def run(self, words: Sequence[object], *, log: Path) -> str:
        """What `python -m uni3d WORDS` prints; what it says on stderr is appended to `log`.

        Waits for a place first. Raises CommandFailed and CommandStopped.
        """
        place = self._places.get()
        try:
            return self._run_at(place, [str(word) for word in words], log)
        finally:
            self._places.put(place)

    def _run_at(self, place: str | None, words: list[str], log: Path) -> str:
        environment = dict(os.environ)
        if place is not None:
            environment["CUDA_VISIBLE_DEVICES"] = place
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as said:
            with self._lock:
                if self._is_stopping:
                    raise CommandStopped("not begun")
                process = subprocess.Popen(
                    [sys.executable, "-m", "uni3d", *words],
                    stdout=subprocess.PIPE,
                    stderr=said,
                    stdin=subprocess.DEVNULL,
                    text=True,
                    env=environment,
                    process_group=0,
                )
                self._running.add(process)
            try:
                printed, _ = process.communicate()
            finally:
                with self._lock:
                    self._running.discard(process)
        if process.returncode == 0:
            return printed
        if self._is_stopping:
            raise CommandStopped("stopped")
        raise CommandFailed(f"{last_words(log)} (exit code {process.returncode})")

    def stop(self) -> None:
        """Begin no more commands, and tell those that run to save and leave; without waiting for them."""
        with self._lock:
            if self._is_stopping:
                return
            self._is_stopping = True
            for process in self._running:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES says for each GPU that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(index) for index in range(torch.cuda.device_count())]


def last_words(log: Path) -> str:
    """The last line of a log that says something, without the name of the program."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    said = [line for line in lines if line]
    return said[-1].removeprefix("uni3d: ").removeprefix("error: ")[:300] if said else "nothing was said"
