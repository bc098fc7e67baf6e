"""Where a run was made: code, packages, device, and how much memory it took."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import uni3d

_KIB = 1024
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy", "scipy")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Versions, commit and hardware, JSON-able."""
    is_cuda = device.type == "cuda"
    return {
        "uni3d": uni3d.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "system": platform.platform(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
        "cuda": torch.version.cuda if is_cuda else None,
    }


def _commit() -> str | None:
    """The checkout's commit, "-dirty" appended if files of it are changed; None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = Path(uni3d.__file__).parent
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


class PeakMemory:
    """The largest amount of memory in use inside a `with` block, in bytes: `peak_bytes`.

    Of the GPU where the run is on one; otherwise the resident memory of the whole process, which on Linux is
    measured afresh and elsewhere since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak_bytes = 0

    def __enter__(self) -> PeakMemory:
        reset_peak(self._device)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.peak_bytes = peak_since_reset(self._device)


def reset_peak(device: torch.device) -> None:
    """Measure the peak of `device` afresh from here on, as `PeakMemory` does."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size
    except OSError:
        return


def peak_since_reset(device: torch.device) -> int:
    """Bytes in use at most since `reset_peak`, as `PeakMemory` counts them."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * _KIB for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * _KIB
