"""How long a piece of work takes by the device's own clock, and how often it makes the host wait."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch

Work = Callable[[], object]


def cuda_clock(work: Work, num: int) -> list[float]:
    """Milliseconds between events around each of `num` goes; the host waits only at the end."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num + 1)]
    events[0].record()
    for index in range(num):
        work()
        events[index + 1].record()
    torch.cuda.synchronize()
    return [first.elapsed_time(second) for first, second in zip(events, events[1:], strict=False)]


def cpu_clock(work: Work, num: int) -> list[float]:
    """Milliseconds of each of `num` goes."""
    times = []
    for _ in range(num):
        started = time.perf_counter()
        work()
        times.append((time.perf_counter() - started) * 1e3)
    return times


def host_waits(work: Work) -> list[str]:
    """Where one go makes the host wait for the CUDA device, as far as torch can tell: "file:line" for each
    time."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [
        f"{warning.filename}:{warning.lineno}"
        for warning in caught
        if "synchronizing" in str(warning.message)
    ]


def count_host_waits(work: Work) -> int:
    """How often one go makes the host wait for the CUDA device."""
    return len(host_waits(work))
