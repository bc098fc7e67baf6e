"""A folder of jobs, orders, and a supervised stub worker: what the tests of the web page share."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("huey", reason="the demo extra is not installed")

from uni3d.web.job_queue import JobQueue  # noqa: E402
from uni3d.web.jobs import Job, JobStore  # noqa: E402
from uni3d.web.orders import Order  # noqa: E402
from uni3d.web.settings import WebSettings  # noqa: E402

STUB_WORKER = (sys.executable, str(Path(__file__).with_name("stub_worker.py")))
ALICE, BOB = "a" * 64, "b" * 64


def settings_in(folder: Path, **changes: Any) -> WebSettings:
    values: dict[str, Any] = {"max_steps": 5, "max_queue": 200, "max_unfinished_per_visitor": 200}
    return WebSettings(folder=folder, **{**values, "max_per_hour": 1000, **changes})


def order(prompt: str = "a red chair", **changes: Any) -> Order:
    return dataclasses.replace(Order(prompt=prompt), **changes)


def place(store: JobStore, queue: JobQueue, prompt: str = "a red chair", visitor: str = ALICE) -> Job:
    """Submit as the server does: into the store, then into the queue."""
    job = store.submit(order(prompt), visitor)
    queue.add(job.id)
    return job


def wait_for(condition: Callable[[], Any], *, timeout_s: float = 60.0) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"nothing after {timeout_s} s")
