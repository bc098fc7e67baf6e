"""Folders of tiny networks for the commands."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from uni3d.diffusion import edm
from uni3d.diffusion.edm import EDMDenoiser, preset

TINY = dataclasses.replace(
    preset("cifar10-32x32-cond-vp"),
    model_channels=16,
    channel_mult=(1, 2),
    resolution=8,
    num_blocks=1,
    attention_resolutions=(4,),
    label_dim=3,
)


def write_network(folder: Path, *, source: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A tiny untrained network, conditional on three classes unless `changes` of its EDMConfig say else."""
    net = EDMDenoiser(dataclasses.replace(TINY, **changes), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # a new network predicts nothing but x times a number
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return edm.save(net, folder, source=source)
