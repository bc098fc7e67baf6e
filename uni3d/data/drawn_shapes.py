"""Coloured shapes drawn from a seed: a data set of images that needs no files, for tests and first runs.

A picture is one soft-edged shape on a plain ground. The class is the kind of shape; colours, size and place
vary, so that a generator has something to get wrong. `shapes:N` or `shapes:N:SIZE` names one in settings.
"""

from __future__ import annotations

import numpy as np

from uni3d.data.image_dataset import ImageDataset, dataset_of_array
from uni3d.errors import UsageError

KINDS = ("disc", "square", "diamond", "ring")
PREFIX = "shapes:"
DEFAULT_SIZE = 16
_MAX_NUM = 1_000_000
_MAX_SIZE = 256


def draw_shapes(num: int, *, size: int = DEFAULT_SIZE, seed: int = 0) -> ImageDataset:
    """`num` sRGB images of `size` pixels, labelled by their kind; equal arguments give equal images."""
    if not 1 <= num <= _MAX_NUM or not 4 <= size <= _MAX_SIZE:
        raise UsageError(
            f"got {num} shapes of {size} pixels; expected 1 to {_MAX_NUM} shapes of 4 to {_MAX_SIZE} pixels"
        )
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(KINDS), size=num)
    centre = rng.uniform(0.4, 0.6, (num, 2, 1, 1)) * size
    radius = rng.uniform(0.22, 0.34, (num, 1, 1)) * size
    ground, paint = _colours(rng, num)
    axis = np.arange(size) + 0.5
    dy, dx = np.abs(axis[:, None] - centre[:, 0]), np.abs(axis[None, :] - centre[:, 1])
    round_ = np.hypot(dx, dy)
    distances = (
        round_ - radius,
        np.maximum(dx, dy) - 0.9 * radius,
        (dx + dy - 1.3 * radius) / np.sqrt(2),
        np.abs(round_ - 0.75 * radius) - 0.3 * radius,
    )
    distance = np.choose(labels[:, None, None], distances)
    cover = np.clip(0.5 - distance, 0, 1)[:, None]  # a pixel's share inside, by its distance from the edge
    pixels = ground[:, :, None, None] * (1 - cover) + paint[:, :, None, None] * cover
    return dataset_of_array(
        np.round(pixels * 255).astype(np.uint8),
        labels,
        name=f"shapes-{num}-{size}",
        where=f"{PREFIX}{num}:{size}",
        num_classes=len(KINDS),
    )


def _colours(rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Dark grounds and bright, saturated paints, sRGB in [0, 1], two times [num, 3]."""
    ground = rng.uniform(0.05, 0.3, (num, 3))
    paint = rng.uniform(0.1, 0.5, (num, 3))
    paint[np.arange(num), rng.integers(3, size=num)] = rng.uniform(0.8, 1.0, num)
    return ground, paint


def parse_shapes(source: str) -> tuple[int, int]:
    """(number, size) of "shapes:N" or "shapes:N:SIZE"; UsageError for anything else."""
    words = source.removeprefix(PREFIX).split(":")
    if source.startswith(PREFIX) and len(words) <= 2 and all(word.isdecimal() for word in words):
        if all(len(word) < 10 for word in words):
            return int(words[0]), int(words[1]) if len(words) == 2 else DEFAULT_SIZE
    raise UsageError(f"got the data set {source[:80]!r}; write shapes:N or shapes:N:SIZE")
