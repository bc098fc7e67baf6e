"""Finished results that the page shows at once: one folder for each below assets/examples.

    assets/examples/01-red-chair/example.json    the order as JSON, see `Order`
    assets/examples/01-red-chair/mesh.glb, turntable.mp4, preview.jpg (the sheet of views), front.jpg,
                                 report.json (the mesh report)

`python -m uni3d.web.examples FOLDER` makes those that are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uni3d.errors import Uni3DError
from uni3d.prompts import prompt_slug
from uni3d.resources import resource_path
from uni3d.web.orders import Order, run_config
from uni3d.web.settings import WebSettings

EXAMPLE_FILES = {
    "mesh.glb": "model/gltf-binary",
    "turntable.mp4": "video/mp4",
    "preview.jpg": "image/jpeg",
    "front.jpg": "image/jpeg",
}
# Objects that the embedded teacher draws well.
EXAMPLE_PROMPTS = (
    "a yellow lamp",
    "a blue ceramic vase",
    "a red wooden chair",
    "a purple potion bottle",
    "a green palm tree",
    "a yellow car",
    "a brown wooden barrel",
    "a blue armchair",
    "a pink potted plant",
    "a green sofa",
    "a brown wooden table",
    "a purple crystal",
)
_RECORDS = ("example.json", "report.json")
_JPEG_QUALITY = 85


@dataclass(frozen=True)
class Example:
    """A finished result, what was ordered, and the figures of its mesh."""

    order: Order
    folder: Path
    report: Mapping[str, Any]


def examples_folder() -> Path | None:
    """Where the examples are, None if this installation has none."""
    try:
        return resource_path("assets/examples")
    except Uni3DError:
        return None


def load_examples(folder: Path | None) -> list[Example]:
    """The examples that are complete, in the order of their folders' names."""
    if folder is None:
        return []
    found = []
    for file in sorted(folder.glob("*/example.json")):
        if all((file.parent / name).is_file() for name in (*EXAMPLE_FILES, *_RECORDS)):
            order, report = (json.loads((file.parent / name).read_text("utf-8")) for name in _RECORDS)
            found.append(Example(Order(**order), file.parent, report))
    return found


def make_examples(folder: Path, quality: str = "default") -> None:
    """Make what is missing below `folder`, one after the other."""
    from uni3d.text_to_3d.pipeline import generate

    for number, prompt in enumerate(EXAMPLE_PROMPTS, start=1):
        target = folder / f"{number:02d}-{prompt_slug(prompt)}"
        if (target / "example.json").is_file():
            continue
        order = Order(prompt=prompt, quality=quality)
        with tempfile.TemporaryDirectory() as runs:
            settings = WebSettings(folder=Path(runs))
            result = generate(run_config(order, settings, runs_folder=Path(runs)))
            keep_example(result.run_directory, target, order, result.report["mesh"])


def keep_example(run: Path, target: Path, order: Order, mesh_figures: Mapping[str, Any]) -> None:
    """Put what the page shows of a finished run into `target`; pictures become JPEG, which is smaller."""
    from PIL import Image

    from uni3d.mesh.gltf_validator import validate_glb

    target.mkdir(parents=True, exist_ok=True)
    for name in ("mesh.glb", "turntable.mp4"):
        shutil.copyfile(run / name, target / name)
    with Image.open(run / "preview.png") as picture:
        sheet = picture.convert("RGB")
    sheet.save(target / "preview.jpg", quality=_JPEG_QUALITY)
    side = sheet.height // 2  # two rows of views, the first one from the front
    sheet.crop((0, 0, side, side)).save(target / "front.jpg", quality=_JPEG_QUALITY)
    figures = {name: value for name, value in mesh_figures.items() if name not in ("path", "extras")}
    figures["gltf_validator"] = validate_glb(target / "mesh.glb")
    for name, record in zip(_RECORDS, (dataclasses.asdict(order), figures), strict=True):
        (target / name).write_text(json.dumps(record, indent=2, default=float) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m uni3d.web.examples FOLDER`."""
    parser = argparse.ArgumentParser(prog="python -m uni3d.web.examples", description=make_examples.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quality", default="default", choices=["default", "draft"])
    given = parser.parse_args(arguments)
    make_examples(given.folder, given.quality)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
