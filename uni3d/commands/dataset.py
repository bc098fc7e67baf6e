"""The command `dataset`: check a data set of images, and write it as an EDM zip."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from uni3d.cli import results_only
from uni3d.commands.parsing import parse_flags
from uni3d.config.values import check_range
from uni3d.errors import UsageError
from uni3d.outputs import check_output_file


@dataclass(frozen=True)
class DatasetOptions:
    """Read every image of a data set, say what it holds, and with --output write it as an EDM zip.

    Reads an EDM zip, a folder of images (one subfolder a class, or with dataset.json), CIFAR-10 as it is
    distributed (folder or .tar.gz, python or binary version), and .npz files of images or encoded pictures.
    """

    source: tyro.conf.Positional[Path]
    """The .zip, folder, .tar.gz or .npz."""
    output: Path | None = None
    """Where the EDM zip goes; without it the data set is only checked."""
    split: Literal["train", "test"] = "train"
    """Which part of CIFAR-10."""
    labels: Literal["auto", "none"] = "auto"
    """auto takes the labels that are there, none leaves them out."""
    rgb: bool = False
    """Read grey, palette and CMYK pictures as RGB."""
    limit: int | None = None
    """Take the first images only."""
    compress_level: int = 0
    """Of the PNGs, 0 (fastest to read, as EDM writes them) to 9."""
    workers: int = 1
    """Threads that decode."""
    overwrite: bool = False
    """Replace a file that exists."""
    json: bool = False
    """Print the facts as JSON."""


def dataset(arguments: Sequence[str]) -> int:
    """`uni3d dataset`."""
    options = parse_flags(DatasetOptions, arguments, command="dataset")
    check_range("--compress-level", options.compress_level, 0, 9)
    check_range("--workers", options.workers, 1, 256)
    if options.limit is not None:
        check_range("--limit", options.limit, 1, 10**9)
    if options.output is not None:
        check_output_file(options.output, overwrite=options.overwrite, suffixes=(".zip",))
        if options.output.exists() and options.source.exists() and options.output.samefile(options.source):
            raise UsageError(f"output '{options.output}' is the data set itself; choose another name")
    with results_only() as stdout:
        facts = _convert(options)
        stdout.write(f"{json.dumps(facts) if options.json else _sentence(facts)}\n")
    return 0


def _convert(options: DatasetOptions) -> dict[str, Any]:
    from uni3d.data.edm_zip import write_edm_zip
    from uni3d.data.image_readers import open_images

    images = open_images(options.source, split=options.split, labels=options.labels, as_rgb=options.rgb)
    if options.limit is not None and options.limit < len(images):
        images = images.select(range(options.limit))
    if options.output is not None:
        write_edm_zip(
            images, options.output, compress_level=options.compress_level, num_workers=options.workers
        )
    else:
        for _ in images.batches(num_workers=options.workers):
            pass
    return {
        "name": images.name,
        "num_images": len(images),
        "resolution": images.resolution,
        "num_channels": images.num_channels,
        "num_classes": images.num_classes,
        "output": None if options.output is None else str(options.output),
    }


def _sentence(facts: dict[str, Any]) -> str:
    colour = "grey" if facts["num_channels"] == 1 else "RGB"
    classes = f"{facts['num_classes']} classes" if facts["num_classes"] else "no labels"
    side = facts["resolution"]
    written = "" if facts["output"] is None else f"; written to {facts['output']}"
    return f"{facts['name']}: {facts['num_images']} images, {side}x{side} {colour}, {classes}{written}"
