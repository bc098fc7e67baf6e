"""Which device a training runs on."""

from __future__ import annotations

import torch

from uni3d.errors import UsageError


def choose_device(name: str) -> torch.device:
    """The device called `name`, or for "auto" a GPU if there is one; UsageError if there is none such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name!r} was asked for, but torch sees no CUDA device; use --device cpu")
    return device
