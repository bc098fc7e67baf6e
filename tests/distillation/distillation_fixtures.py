"""Tiny networks, images and settings, with which a distillation takes a second."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from uni3d.diffusion import edm
from uni3d.diffusion.edm_config import EDMConfig
from uni3d.distillation.settings import (
    AverageConfig,
    CompanionsConfig,
    DistillConfig,
    ImageDataConfig,
    MethodConfig,
    NetworkConfig,
    OptimiserConfig,
    RunConfig,
    TeacherTrainingConfig,
)

SIZE = 8
NUM_CLASSES = 4


def tiny_network(**changes: Any) -> EDMConfig:
    settings: dict[str, Any] = {
        "body": "ddpm++", "resolution": SIZE, "label_dim": NUM_CLASSES, "model_channels": 8,
        "channel_mult": (1, 1), "num_blocks": 1, "attention_resolutions": (), "dropout": 0.0,
    }  # fmt: skip
    return EDMConfig(**{**settings, **changes})


def random_network(seed: int = 0, **changes: Any) -> edm.EDMDenoiser:
    """Random weights without the zero-like last layers, so that every layer has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    network = edm.EDMDenoiser(tiny_network(**changes), generator=generator)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "conv1" in name or "aux_conv" in name or name.endswith("bias"):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=0.05)
    return network


def save_teacher(folder: Path, **changes: Any) -> Path:
    return edm.save(random_network(**changes), folder)


def distill_config(teacher: Path | str | None, **groups: Any) -> DistillConfig:
    """Three steps of eight images on a CPU; `groups` hold changes by group, such as method={...}."""
    method: dict[str, Any] = {"score_warmup_images": 0, "plain_warmup_images": 0}
    method |= {"regression_pairs": 8, "regression_steps": 2}
    base = DistillConfig(
        teacher=None if teacher is None else str(teacher),
        data=ImageDataConfig(source=f"shapes:40:{SIZE}", mirror=True, num_workers=1),
        method=MethodConfig(**method | groups.pop("method", {})),
        optimiser=OptimiserConfig(learning_rate=1e-3, beta1=0.0),
        companions=CompanionsConfig(learning_rate=1e-3, head_learning_rate=1e-2, head_channels=8),
        average=AverageConfig(half_life_images=16, ramp_up=0.5),
        run=RunConfig(device="cpu", batch=8, total_images=24, log_every_s=0, grid_every_minutes=0),
    )
    return changed(base, groups)


def teacher_config(**groups: Any) -> TeacherTrainingConfig:
    network = NetworkConfig(
        model_channels=8, channel_mult=(1, 1), num_blocks=1, attention_resolutions=(0,), dropout=0.0
    )
    base = TeacherTrainingConfig(
        data=ImageDataConfig(source=f"shapes:40:{SIZE}", mirror=True, num_workers=1),
        network=network,
        optimiser=OptimiserConfig(learning_rate=1e-3),
        average=AverageConfig(half_life_images=16, ramp_up=0.5),
        run=RunConfig(device="cpu", batch=8, total_images=24, log_every_s=0, grid_every_minutes=0),
    )
    return changed(base, groups)


def changed(config: Any, groups: dict[str, Any]) -> Any:
    changes = {
        name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in groups.items()
    }
    return dataclasses.replace(config, **changes)
