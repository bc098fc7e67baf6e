"""Writes a data set as an EDM zip: PNGs in numbered folders and dataset.json, byte for byte repeatable."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

from PIL import Image

from uni3d.data.image_dataset import ImageDataset
from uni3d.data.image_readers import LABEL_FILE
from uni3d.training.checkpoint import atomic_write

_IMAGES_PER_FOLDER = 1000
# The oldest date a zip can hold: the time of writing would make two equal data sets differ.
_DATE = (1980, 1, 1, 0, 0, 0)


def member_name(index: int) -> str:
    """ "00001/img00001234.png" for image 1234."""
    return f"{index // _IMAGES_PER_FOLDER:05d}/img{index:08d}.png"


def write_edm_zip(
    dataset: ImageDataset, path: str | Path, *, compress_level: int = 0, num_workers: int = 1
) -> Path:
    """Write all images of `dataset` losslessly, in order, with their labels (null without); atomically.

    `compress_level` 0 to 9 is that of the PNGs: 0, as EDM writes them, is fastest to read. Raises UsageError
    if an image cannot be read, and OSError from the file system.
    """

    def write(target: Path) -> None:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
            index = 0
            for batch in dataset.batches(num_workers=num_workers):
                for pixels in batch:
                    buffer = io.BytesIO()
                    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
                    image.save(buffer, "PNG", compress_level=compress_level)
                    archive.writestr(_entry(member_name(index)), buffer.getvalue())
                    index += 1
            labels = None
            if dataset.labels is not None:
                labels = [[member_name(i), int(label)] for i, label in enumerate(dataset.labels)]
            archive.writestr(_entry(LABEL_FILE), json.dumps({"labels": labels}))

    return atomic_write(path, write)


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _DATE)
    entry.external_attr = 0o644 << 16
    return entry
