"""Where sampled images go: one grid, a folder of PNGs with their classes, or an EDM zip.

Legend: N images, C channels, H W pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from uni3d.data.edm_zip import write_edm_zip
from uni3d.data.image_dataset import ImageDataset
from uni3d.data.image_readers import LABEL_FILE
from uni3d.errors import UsageError
from uni3d.training.checkpoint import atomic_write, atomic_write_text

MAX_GRID_IMAGES = 4096


def write_images(
    images: ImageDataset, seeds: Sequence[int], path: Path, *, num_columns: int | None = None
) -> Path:
    """Write what `path` asks for: a grid (.png), an EDM zip (.zip), or a folder with an image for each seed.

    Grid and zip are written atomically. Raises UsageError for too many images for a grid.
    """
    match path.suffix.lower():
        case ".png":
            return write_grid(images, path, num_columns=num_columns)
        case ".zip":
            return write_edm_zip(images, path)
        case _:
            return write_folder(images, seeds, path)


def write_grid(images: ImageDataset, path: Path, *, num_columns: int | None = None) -> Path:
    """One PNG with the images row by row, nearly square unless `num_columns` is given."""
    if len(images) > MAX_GRID_IMAGES:
        raise UsageError(
            f"a grid of {len(images)} images is too large; take at most {MAX_GRID_IMAGES}, or write a .zip"
        )
    pixels = np.concatenate(list(images.batches()))
    grid = grid_of(pixels, num_columns=num_columns)
    return atomic_write(path, lambda target: _picture(grid).save(target, "PNG"))


def grid_of(pixels: np.ndarray, *, num_columns: int | None = None) -> np.ndarray:
    """uint8 [N, C, H, W] -> [C, rows * H, columns * W], black where the last row is not full."""
    num, channels, height, width = pixels.shape
    columns = min(num_columns or math.ceil(math.sqrt(num)), num)
    rows = -(-num // columns)
    cells = np.zeros((rows * columns, channels, height, width), np.uint8)
    cells[:num] = pixels
    cells = cells.reshape(rows, columns, channels, height, width)
    return cells.transpose(2, 0, 3, 1, 4).reshape(channels, rows * height, columns * width)


def write_folder(images: ImageDataset, seeds: Sequence[int], folder: Path) -> Path:
    """`seed00000012.png` for seed 12, and dataset.json with the classes where there are any."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"seed{seed:08d}.png" for seed in seeds]
    index = 0
    for batch in images.batches():
        for pixels in batch:
            picture = _picture(pixels)
            atomic_write(folder / names[index], lambda target, shown=picture: shown.save(target, "PNG"))
            index += 1
    labels = None
    if images.labels is not None:
        labels = [[name, int(label)] for name, label in zip(names, images.labels, strict=True)]
    atomic_write_text(folder / LABEL_FILE, json.dumps({"labels": labels}))
    return folder


def _picture(pixels: np.ndarray) -> Image.Image:
    """uint8 [C, H, W] as a picture, C = 1 or 3."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
