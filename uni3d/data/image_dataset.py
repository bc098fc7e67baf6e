"""Data sets of small square images: one interface, whether the pixels lie in memory or are decoded on demand.

`uni3d.data.image_readers.open_images` makes one from files; `uni3d.data.sample_order` says which images a
training step sees. Legend: N images, B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from uni3d.data.image_decoding import decode_image
from uni3d.errors import UsageError

_CHUNK = 256


class ImageSource(Protocol):
    """Where pixels come from: an array, or files that are decoded."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray, *, num_workers: int = 1) -> np.ndarray:
        """uint8 [B, C, H, W] of `indices` int64 [B] in [0, N)."""
        ...


class EncodedFiles(Protocol):
    """The encoded pictures of a data set: members of an archive, files of a folder, slices of a blob."""

    def __len__(self) -> int: ...

    def encoded(self, index: int) -> bytes:
        """The bytes of one picture; UsageError if they cannot be read."""
        ...

    def title(self, index: int) -> str:
        """How messages name it."""
        ...


@dataclass(frozen=True)
class ArraySource:
    """Pixels in memory (or in a memory map): uint8 [N, C, H, W]."""

    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, indices: np.ndarray, *, num_workers: int = 1) -> np.ndarray:
        return self.pixels[indices]


@dataclass(frozen=True)
class DecodedSource:
    """Files decoded whenever they are asked for; every image must have the shape (C, H, W) of the first."""

    files: EncodedFiles
    shape: tuple[int, int, int]
    as_rgb: bool = False

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: np.ndarray, *, num_workers: int = 1) -> np.ndarray:
        pixels = np.empty((len(indices), *self.shape), np.uint8)
        if num_workers > 1 and len(indices) > 1:
            with ThreadPoolExecutor(max_workers=num_workers) as pool:
                for row, image in enumerate(pool.map(self._decode, indices.tolist())):
                    pixels[row] = image
            return pixels
        for row, index in enumerate(indices.tolist()):
            pixels[row] = self._decode(index)
        return pixels

    def _decode(self, index: int) -> np.ndarray:
        image = decode_image(self.files.encoded(index), title=self.files.title(index), as_rgb=self.as_rgb)
        if image.shape != self.shape:
            raise UsageError(
                f"{self.files.title(index)} is {describe_shape(image.shape)} and "
                f"{self.files.title(0)} {describe_shape(self.shape)}; {_remedy(image.shape, self.shape)}"
            )
        return image


def _remedy(shape: Sequence[int], expected: Sequence[int]) -> str:
    if shape[1:] != expected[1:]:
        return "bring all images to one square size"
    return "make all grey or all colour, or ask for RGB (--rgb, as_rgb=True)"


def describe_shape(shape: Sequence[int]) -> str:
    """ "32x48 grey" for (1, 48, 32)."""
    colour = {1: "grey", 3: "RGB"}.get(shape[0], f"with {shape[0]} channels")
    return f"{shape[2]}x{shape[1]} {colour}"


@dataclass(frozen=True)
class ImageDataset:
    """N square images of one size, with or without classes."""

    name: str
    """For reports, such as "cifar10-train"."""
    source: ImageSource
    labels: np.ndarray | None
    """int64 [N] in [0, num_classes), or None."""
    num_classes: int
    """0 without labels."""
    num_channels: int
    """1 (grey) or 3 (sRGB)."""
    resolution: int
    """Side in pixels."""

    def __len__(self) -> int:
        return len(self.source)

    def images(
        self, indices: Sequence[int] | np.ndarray | None = None, *, num_workers: int = 1
    ) -> np.ndarray:
        """uint8 [B, C, H, W] of `indices` in [0, N), or of all; `num_workers` threads decode.

        Raises UsageError for a file that is damaged or unlike the others, IndexError for other indices.
        """
        wanted = np.arange(len(self)) if indices is None else np.asarray(indices, dtype=np.int64)
        if wanted.ndim != 1 or (wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self)):
            raise IndexError(f"indices must be a list of numbers from 0 to {len(self) - 1}")
        return self.source.read(wanted, num_workers=num_workers)

    def batches(self, size: int = _CHUNK, *, num_workers: int = 1) -> Iterator[np.ndarray]:
        """All images in order, as uint8 [B, C, H, W] with B = `size` but for the last."""
        for start in range(0, len(self), size):
            yield self.images(np.arange(start, min(start + size, len(self))), num_workers=num_workers)

    def in_memory(self, *, num_workers: int = 1) -> ImageDataset:
        """The same data set decoded once, N C H W bytes; UsageError as `images`."""
        if isinstance(self.source, ArraySource):
            return self
        pixels = np.empty((len(self), self.num_channels, self.resolution, self.resolution), np.uint8)
        start = 0
        for batch in self.batches(num_workers=num_workers):
            pixels[start : start + len(batch)] = batch
            start += len(batch)
        return replace(self, source=ArraySource(pixels))

    def select(self, indices: Sequence[int] | np.ndarray) -> ImageDataset:
        """The images of `indices` only, in that order; classes keep their numbers."""
        chosen = np.asarray(indices, dtype=np.int64)
        if chosen.size == 0:
            raise UsageError(f"no image of '{self.name}' is left; choose at least one")
        if not 0 <= chosen.min() <= chosen.max() < len(self):
            raise UsageError(f"'{self.name}' has {len(self)} images; choose among 0 to {len(self) - 1}")
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, source=_Selection(self.source, chosen), labels=labels)


@dataclass(frozen=True)
class _Selection:
    source: ImageSource
    chosen: np.ndarray

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, indices: np.ndarray, *, num_workers: int = 1) -> np.ndarray:
        return self.source.read(self.chosen[indices], num_workers=num_workers)


def dataset_of_array(
    pixels: np.ndarray, labels: np.ndarray | None, *, name: str, where: str, num_classes: int | None = None
) -> ImageDataset:
    """A data set of uint8 [N, C, H, W] in memory; `where` names its file in messages.

    Raises UsageError for another shape or dtype, labels of another length, and labels out of range.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 4:
        raise UsageError(
            f"{where} holds images of {pixels.dtype} {list(pixels.shape)}; expected uint8 [N, C, H, W]"
        )
    check_image_shape(pixels.shape[1:], where)
    if len(pixels) == 0:
        raise UsageError(f"{where} holds no images; pass a file with at least one")
    labels, num_classes = checked_labels(labels, len(pixels), where=where, num_classes=num_classes)
    return ImageDataset(name, ArraySource(pixels), labels, num_classes, pixels.shape[1], pixels.shape[2])


def dataset_of_files(
    files: EncodedFiles,
    labels: np.ndarray | None,
    *,
    name: str,
    where: str,
    num_classes: int | None = None,
    as_rgb: bool = False,
) -> ImageDataset:
    """A data set of encoded files, decoded on demand; only the first is looked at here.

    Raises UsageError for no files, a first one that is damaged or not square, and bad labels.
    """
    if len(files) == 0:
        raise UsageError(f"{where} holds no images; pass a file with at least one")
    first = decode_image(files.encoded(0), title=files.title(0), as_rgb=as_rgb)
    check_image_shape(first.shape, files.title(0))
    labels, num_classes = checked_labels(labels, len(files), where=where, num_classes=num_classes)
    source = DecodedSource(files, (first.shape[0], first.shape[1], first.shape[2]), as_rgb)
    return ImageDataset(name, source, labels, num_classes, first.shape[0], first.shape[1])


def check_image_shape(shape: Sequence[int], title: str) -> None:
    """UsageError unless (C, H, W) is square, not empty, and grey or colour."""
    channels, height, width = shape
    if height != width or height < 1:
        raise UsageError(f"{title} has {width}x{height} pixels; crop all images to squares of one size")
    if channels not in (1, 3):
        raise UsageError(f"{title} has {channels} channels; convert all images to grey (1) or RGB (3)")


def checked_labels(
    labels: np.ndarray | None, num_images: int, *, where: str, num_classes: int | None
) -> tuple[np.ndarray | None, int]:
    """Labels int64 [N] and the number of classes, the largest label plus one unless `num_classes` is given.

    Raises UsageError for labels of another length, that are no whole numbers, or out of range.
    """
    if labels is None:
        if num_classes:
            raise UsageError(
                f"{where} has no labels where {num_classes} classes are expected; add labels to it"
            )
        return None, 0
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(f"the labels of {where} are not whole numbers, one an image; write them as such")
    if len(labels) != num_images:
        raise UsageError(f"{where} has {num_images} images and {len(labels)} labels; label every image once")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        expected = "0 or more" if num_classes is None else f"0 to {num_classes - 1}"
        raise UsageError(
            f"{where} has the label {low if low < 0 else high}; expected {expected}: correct the labels"
        )
    if high >= 2**31:
        raise UsageError(f"{where} has the label {high}; number the classes from 0 on")
    return labels.astype(np.int64), high + 1 if num_classes is None else num_classes
