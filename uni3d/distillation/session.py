"""How both image programs begin: device, number format, folder, and what a resumed run is compared with."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from uni3d.diffusion import edm
from uni3d.diffusion.edm import EDMDenoiser
from uni3d.diffusion.edm_config import EDMConfig
from uni3d.distillation.settings import SESSION_KEYS, AverageConfig, RunConfig
from uni3d.distillation.weights import TrainedWeights
from uni3d.errors import UsageError
from uni3d.training.processes import Processes


def prepare_device(device: torch.device) -> None:
    """The number formats that float32 work may use."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True


def body_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """What the bodies of networks compute in."""
    is_bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if is_bf16 else torch.float32


def placed(network: nn.Module, device: torch.device) -> None:
    """Move `network` to `device` in the memory format that convolutions are fastest in there."""
    network.to(device)
    if device.type == "cuda":
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def check_batch(config: RunConfig, processes: Processes) -> None:
    """Raise UsageError for a batch that processes and parts cannot share equally."""
    parts = config.accumulate * processes.num
    if config.batch % parts:
        raise UsageError(
            f"run.batch is {config.batch}; expected a multiple of {parts} (run.accumulate "
            f"{config.accumulate} in each of {processes.num} processes)"
        )


def parts_of(config: RunConfig, processes: Processes) -> list[slice]:
    """The rows of this process's share of a batch, part by part."""
    size = config.batch // (config.accumulate * processes.num)
    return [slice(part * size, (part + 1) * size) for part in range(config.accumulate)]


def fingerprint(config: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What must stay the same between the sessions of a run: its settings but for those of a session, and
    `facts` about what it reads."""
    settings = dataclasses.asdict(config)
    for group, keys in SESSION_KEYS.items():
        for key in keys:
            settings[group].pop(key, None)
    if settings["optimiser"]["final_fraction"] == 1.0:
        settings["run"].pop("total_images")  # with a constant learning rate it is only where the run ends
    for name in ("teacher", "initial_student"):  # by their contents, among the facts
        settings.pop(name, None)
    return {**settings, **facts}


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_network(folder: str | Path, *, title: str) -> tuple[EDMConfig, EDMDenoiser, str]:
    """(configuration, network on the CPU, digest of its weights) of `folder`, called `title` in messages.

    Raises as `edm.load`, and UsageError if there is no such folder.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UsageError(
            f"the {title} '{path}' is not a folder; pass one that train-teacher or import-edm wrote"
        )
    network = edm.load(path)
    return network.config, network, file_digest(path / edm.WEIGHTS_NAME)


def average_facts(config: AverageConfig, images: int) -> dict[str, Any]:
    """What a published network says of its average."""
    return {
        "ema": f"half-life {config.half_life_images:g} images, ramp-up {config.ramp_up:g}",
        "images_seen": images,
        "ema_half_life_images": config.half_life_images,
        "ema_ramp_up": config.ramp_up,
    }


def publish_average(
    weights: TrainedWeights, network: EDMDenoiser, folder: Path, source: Mapping[str, Any]
) -> Path:
    """Write the averaged weights of `network` as a network of their own."""
    tensors = {**network.state_dict(), **weights.average}
    return edm.save_tensors(network.config, tensors, folder, overwrite=True, source=source)
