"""The images of a run: opened, compared with the network that sees them, and served by the step.

Images stay on the device if there is room; what a step needs of them is prepared while the step before runs.
Legend: N images, B this process's share of a batch, C channels, H W pixels.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uni3d.data.drawn_shapes import PREFIX, draw_shapes, parse_shapes
from uni3d.data.image_dataset import ImageDataset
from uni3d.data.image_readers import open_images
from uni3d.data.sample_order import Draws, SampleOrder, read_draws
from uni3d.diffusion.edm_config import EDMConfig
from uni3d.distillation.settings import ImageDataConfig
from uni3d.errors import UsageError
from uni3d.training.processes import Processes

logger = logging.getLogger(__name__)


def open_source(config: ImageDataConfig, *, seed: int = 0) -> ImageDataset:
    """The data set that `config` names. Raises UsageError where there is none or it cannot be read."""
    if config.source is None:
        raise UsageError("no images were given; pass --data.source with a .zip, folder, .npz or shapes:N")
    if config.source.startswith(PREFIX):
        num, size = parse_shapes(config.source)
        shapes = draw_shapes(num, size=size, seed=seed)
        if config.labels == "auto":
            return shapes
        return ImageDataset(shapes.name, shapes.source, None, 0, shapes.num_channels, shapes.resolution)
    return open_images(config.source, split=config.split, labels=config.labels, as_rgb=config.as_rgb)


def check_images(dataset: ImageDataset, network: EDMConfig, *, title: str) -> None:
    """Raise UsageError unless `network`, called `title` in messages, can see images and classes of
    `dataset`."""
    if dataset.resolution != network.resolution:
        raise UsageError(
            f"'{dataset.name}' has images of {dataset.resolution}x{dataset.resolution} pixels, the {title} "
            f"makes {network.resolution}x{network.resolution}; pass images of that size"
        )
    if dataset.num_channels != network.image_channels:
        raise UsageError(
            f"'{dataset.name}' has {dataset.num_channels} channels, the {title} {network.image_channels}; "
            f"pass such images, or --data.as-rgb for grey ones"
        )
    if network.label_dim == 0:
        return
    if dataset.labels is None:
        raise UsageError(
            f"'{dataset.name}' has no labels, but the {title} knows {network.label_dim} classes; pass "
            f"labelled images"
        )
    if dataset.num_classes != network.label_dim:
        raise UsageError(
            f"'{dataset.name}' has {dataset.num_classes} classes, the {title} {network.label_dim}; pass the "
            f"images it was trained on"
        )


def facts_of(dataset: ImageDataset) -> dict[str, Any]:
    """What a run remembers of its data, to notice others."""
    return {
        "name": dataset.name,
        "num_images": len(dataset),
        "resolution": dataset.resolution,
        "num_channels": dataset.num_channels,
        "num_classes": dataset.num_classes,
    }


class ImageBatches:
    """`at(index)` is this process's share of the batch of that index, on the device; the next is prefetched.

    Args:
        batch: images in a batch of all processes together.
        seed: of the order and the mirroring.
        has_labels: also serve classes; the data set must have them.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        config: ImageDataConfig,
        *,
        batch: int,
        seed: int,
        device: torch.device,
        processes: Processes,
        has_labels: bool,
    ) -> None:
        self.batch = batch
        self._config = config
        self._device = device
        self._processes = processes
        self._order = SampleOrder(len(dataset), seed=seed, is_mirroring=config.mirror)
        num_bytes = len(dataset) * dataset.num_channels * dataset.resolution**2
        self._resident: Tensor | None = None
        if num_bytes <= config.max_resident_mib * 2**20:
            dataset = dataset.in_memory(num_workers=config.num_workers)
            self._resident = torch.from_numpy(np.ascontiguousarray(dataset.images())).to(device)
        self._dataset = dataset
        self._labels = dataset.labels if has_labels else None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="images")
        self._next: tuple[int, Future[tuple[Tensor, Tensor, Tensor | None]]] | None = None

    def at(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Images float32 [B, C, H, W] in [-1, 1] and classes int64 [B], or None."""
        if self._next is not None and self._next[0] == index:
            pixels, mirrored, labels = self._next[1].result()
        else:
            pixels, mirrored, labels = self._read(index)
        self._next = (index + 1, self._pool.submit(self._read, index + 1))
        pixels, mirrored = self._to_device(pixels), self._to_device(mirrored)
        if self._resident is not None:
            pixels = self._resident[pixels]
        images = pixels.float() / 127.5 - 1
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images, None if labels is None else self._to_device(labels)

    def close(self) -> None:
        """Let the reading thread go."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """(pixels, or image numbers where they are on the device; mirrored; classes), on the host."""
        draws = self._order.draws(
            index, batch=self.batch, rank=self._processes.rank, world_size=self._processes.num
        )
        labels = None if self._labels is None else torch.from_numpy(self._labels[draws.indices])
        mirrored = torch.from_numpy(draws.is_mirrored)
        if self._resident is not None:
            return torch.from_numpy(draws.indices), mirrored, labels
        unmirrored = Draws(draws.indices, np.zeros_like(draws.is_mirrored))
        batch = read_draws(self._dataset, unmirrored, num_workers=self._config.num_workers)
        return torch.from_numpy(batch.images), mirrored, labels

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)
