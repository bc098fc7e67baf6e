"""One picture of many results: a labelled row of views for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

from uni3d.training.checkpoint import atomic_write

_LABEL_HEIGHT = 15
_GOOD, _BAD, _PLAIN = (20, 120, 40), (190, 30, 30), (30, 30, 30)


@dataclass(frozen=True)
class SheetRow:
    """A label, views [V, 3, H, W] in [0, 1] or None for nothing to show, and the verdict if there is one."""

    label: str
    images: Tensor | None
    is_good: bool | None = None


def write_contact_sheet(
    rows: Sequence[SheetRow],
    path: str | Path,
    *,
    views_per_row: int = 6,
    size: int = 96,
    rows_per_column: int = 20,
) -> Path:
    """Write a PNG with a row per result, in as many columns as `rows_per_column` asks for.

    Labels are green, red or black after `is_good`; a result without views gets an empty row: failures show.
    """
    num_columns = max(1, -(-len(rows) // rows_per_column))
    row_height, column_width = size + _LABEL_HEIGHT, views_per_row * size + 8
    sheet = Image.new(
        "RGB", (num_columns * column_width, min(len(rows), rows_per_column) * row_height), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for index, row in enumerate(rows):
        left, top = index // rows_per_column * column_width, index % rows_per_column * row_height
        colour = _PLAIN if row.is_good is None else _GOOD if row.is_good else _BAD
        pen.text((left + 3, top + 1), row.label[: column_width // 6], fill=colour)
        if row.images is None:
            pen.rectangle(
                (left, top + _LABEL_HEIGHT, left + column_width - 9, top + row_height - 1), outline=_BAD
            )
            continue
        for column, picture in enumerate(_pictures(row.images[:views_per_row], size)):
            sheet.paste(Image.fromarray(picture), (left + column * size, top + _LABEL_HEIGHT))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    return atomic_write(target, lambda temporary: sheet.save(temporary))


def _pictures(images: Tensor, size: int) -> list[np.ndarray]:
    """Views [V, 3, H, W] to uint8 [size, size, 3] each; NaN shows as black."""
    clean = torch.nan_to_num(images.float(), nan=0.0).clamp(0, 1)
    resized = functional.interpolate(
        clean, (size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return list((resized.clamp(0, 1).permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy())
