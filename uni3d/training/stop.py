"""Stopping a run politely: the first Ctrl-C or SIGTERM raises a flag, the second leaves at once."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from uni3d.errors import Interrupted

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopFlag:
    """Used as `with StopFlag() as stop:` around a loop that asks `stop.is_set` after every step.

    The first signal sets the flag and says so on stderr; the loop then saves and raises
    `stop.interruption(...)`. The second ends the process with the signal's exit code, taking child processes
    along. The handlers that stood before come back on leaving. Outside the main thread, where Python delivers
    no signals, only `request` sets the flag: that is how a web page's cancel button uses it.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @property
    def is_set(self) -> bool:
        """Whether a signal arrived or `request` was called."""
        return self.signal_number is not None

    def request(self, signal_number: int = signal.SIGINT) -> None:
        """Set the flag as the first `signal_number` would."""
        if self.signal_number is None:
            self.signal_number = int(signal_number)

    def interruption(self, message: str) -> Interrupted:
        """The error to raise after saving; its exit code is 130 for Ctrl-C and 143 for SIGTERM."""
        return Interrupted(message, signal_number=self.signal_number or signal.SIGINT)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker: its parent does the saving
            os._exit(128 + number)
        if self.signal_number is None:
            self.signal_number = number
            _say("stopping after this step and saving; once more to leave at once without saving")
            return
        _say("leaving at once")
        for child in multiprocessing.active_children():
            child.kill()
        # Not sys.exit: a library's `except` clauses and exit handlers could hold it up for a long time.
        os._exit(128 + number)


def _say(message: str) -> None:
    """Write one line to stderr from a signal handler, where buffered streams may be in use."""
    try:
        os.write(sys.stderr.fileno(), f"\nuni3d: {message}\n".encode())
    except (OSError, ValueError, AttributeError):
        logger.debug("stderr cannot be written: %s", message)
