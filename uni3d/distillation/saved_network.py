"""A network's folder as something that makes images: the network, how it is sampled, and what it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uni3d.data.image_dataset import ImageDataset
from uni3d.diffusion import edm
from uni3d.distillation.sampling import SIGMA_INIT, SamplerSettings, sampled_dataset, settings_for
from uni3d.errors import UsageError


@dataclass(frozen=True)
class SavedNetwork:
    """A teacher or a student that was read from a folder, in eval mode."""

    folder: Path
    net: edm.EDMDenoiser
    settings: SamplerSettings
    source: dict[str, Any]
    """What its `config.json` says of where it comes from."""
    device: torch.device

    @property
    def ema(self) -> str | None:
        """Which average of the weights it is, if its folder says so."""
        value = self.source.get("ema")
        return value if isinstance(value, str) else None

    def images(
        self,
        seeds: Sequence[int],
        *,
        class_index: int | None = None,
        batch_size: int = 64,
        progress: Callable[[int], object] | None = None,
    ) -> ImageDataset:
        """The images of `seeds`, see `sampled_dataset`; UsageError for what no image file can hold."""
        channels = self.net.config.image_channels
        if channels not in (1, 3):
            raise UsageError(
                f"'{self.folder}' makes images of {channels} channels; pass a network of grey or colour "
                f"images"
            )
        return sampled_dataset(
            self.net,
            seeds,
            name=self.folder.resolve().name or "network",
            settings=self.settings,
            class_index=class_index,
            device=self.device,
            batch_size=batch_size,
            progress=progress,
        )

    def record(self) -> dict[str, Any]:
        """For reports."""
        body = str(self.net.body_dtype).removeprefix("torch.")
        return {
            "network": str(self.folder),
            **self.settings.record(),
            "precision": body,
            "device": self.device.type,
            "source": self.source,
        }


def open_network(
    folder: Path,
    *,
    num_steps: int | None = None,
    is_one_step: bool = False,
    sigma_init: float | None = None,
    device: torch.device | str = "cpu",
    body_dtype: torch.dtype = torch.float32,
) -> SavedNetwork:
    """Read a network and settle how it is sampled: in one step if its folder or the caller says so.

    `sigma_init` replaces the folder's value, and 2.5 where there is none. Raises UsageError for a folder that
    holds no network, options that contradict each other or the folder, and damaged files.
    """
    if not is_network(folder):
        raise UsageError(
            f"'{folder}' is no folder of a network (it has no {edm.CONFIG_NAME}); pass one that "
            f"`uni3d import-edm` or a training run wrote"
        )
    if is_one_step and num_steps is not None:
        raise UsageError("--one-step and --steps contradict each other; leave one out")
    _, source = edm.read_description(folder)
    settings = (
        SamplerSettings(num_steps=None, sigma_init=SIGMA_INIT)
        if is_one_step and "student" not in source
        else settings_for(source, num_steps=num_steps)
    )
    if sigma_init is not None:
        if settings.num_steps is not None:
            raise UsageError("--sigma-init is for one-step students; leave it out or pass --one-step")
        settings = SamplerSettings(num_steps=None, sigma_init=sigma_init)
    net = edm.load(folder, device=device, body_dtype=body_dtype)
    return SavedNetwork(folder, net, settings, source, torch.device(device))


def is_network(folder: Path) -> bool:
    """Whether `folder` looks like one that holds a network; its files may still be damaged."""
    return folder.is_dir() and (folder / edm.CONFIG_NAME).is_file()
