"""Which images a training step sees: a pure function of the seed and the step, on any number of ranks.

Nothing is drawn from a running generator, so a run that resumes at step k replays nothing, and two runs that
differ only in their number of ranks see the same images in every global batch. Randomness is splitmix64
(Steele, Lea and Flood 2014) of a counter, written here so that no library version can change it.
Legend: N images, B global batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from uni3d.data.image_dataset import ImageDataset
from uni3d.errors import UsageError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_ORDER_STREAM = 1
_MIRROR_STREAM = 2


def counter_hash(seed: int, stream: int, counters: np.ndarray) -> np.ndarray:
    """uint64 hashes of int64 `counters` [K]; equal seed, stream and counter give equal hashes."""
    # Arrays of one element, not scalars: numpy warns when a scalar overflows.
    key = _mix(np.array([seed % 2**64], np.uint64) + _GOLDEN)
    key = _mix(key + np.array([stream], np.uint64) * _GOLDEN)
    return _mix(key + (counters.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * _FACTORS[0]
    value = (value ^ (value >> np.uint64(27))) * _FACTORS[1]
    return value ^ (value >> np.uint64(31))


@dataclass(frozen=True)
class Draws:
    """What one rank (or all of them together) reads in one step."""

    indices: np.ndarray
    """int64 [B], images of the data set."""
    is_mirrored: np.ndarray
    """bool [B], flipped left to right."""

    def __len__(self) -> int:
        return len(self.indices)


@dataclass
class SampleOrder:
    """Endless passes over N images, each in its own random order.

    Step s reads the places s B to (s + 1) B of the passes laid end to end; a batch may span two passes. Rank
    r of W takes the r-th of W equal slices of it.

    Args:
        num_images: N.
        seed: any integer.
        is_mirroring: flip every draw left to right with probability one half.
        is_shuffled: False reads the images in their own order.
    """

    num_images: int
    seed: int = 0
    is_mirroring: bool = False
    is_shuffled: bool = True
    _passes: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise UsageError(f"got {self.num_images} images to order; expected at least one")

    def draws(self, step: int, *, batch: int, rank: int = 0, world_size: int = 1) -> Draws:
        """The share of `rank` in the global batch of `batch` draws at `step`, counted from 0.

        Raises UsageError for a negative step, a rank outside the world, and a batch that the ranks cannot
        share equally.
        """
        if step < 0 or batch < 1:
            raise UsageError(
                f"got step {step} and batch {batch}; expected step 0 or later and batch 1 or more"
            )
        if not 0 <= rank < world_size:
            raise UsageError(f"got rank {rank} of {world_size}; expected a rank from 0 to {world_size - 1}")
        if batch % world_size:
            raise UsageError(
                f"a global batch of {batch} cannot be shared by {world_size} ranks; choose a multiple of "
                f"{world_size}"
            )
        share = batch // world_size
        first = step * batch + rank * share
        places = np.arange(first, first + share, dtype=np.int64)
        return Draws(self._images_at(places), self._is_mirrored(places))

    def _images_at(self, places: np.ndarray) -> np.ndarray:
        passes, offsets = np.divmod(places, self.num_images)
        indices = np.empty(len(places), np.int64)
        wanted = range(int(passes[0]), int(passes[-1]) + 1)
        for number in wanted:
            chosen = passes == number
            indices[chosen] = self._order_of(number)[offsets[chosen]]
        self._passes = {number: order for number, order in self._passes.items() if number == wanted[-1]}
        return indices

    def _order_of(self, number: int) -> np.ndarray:
        """The permutation int64 [N] of one pass: the images sorted by their hashes, ties by their numbers."""
        if number not in self._passes:
            images = np.arange(self.num_images, dtype=np.int64)
            if self.is_shuffled:
                hashes = counter_hash(self.seed, _ORDER_STREAM, images + number * self.num_images)
                images = np.argsort(hashes, kind="stable")
            self._passes[number] = images
        return self._passes[number]

    def _is_mirrored(self, places: np.ndarray) -> np.ndarray:
        if not self.is_mirroring:
            return np.zeros(len(places), bool)
        return counter_hash(self.seed, _MIRROR_STREAM, places) >> np.uint64(63) == 1


@dataclass(frozen=True)
class ImageBatch:
    """Images uint8 [B, C, H, W] and labels int64 [B], or None for a data set without classes."""

    images: np.ndarray
    labels: np.ndarray | None


def read_draws(dataset: ImageDataset, draws: Draws, *, num_workers: int = 1) -> ImageBatch:
    """The images that `draws` names, mirrored where it says so; UsageError for a damaged file."""
    images = dataset.images(draws.indices, num_workers=num_workers)
    mirrored = draws.is_mirrored[:, None, None, None]
    images = np.where(mirrored, images[..., ::-1], images) if draws.is_mirrored.any() else images
    return ImageBatch(images, None if dataset.labels is None else dataset.labels[draws.indices])
