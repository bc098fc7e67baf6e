"""Finished results that the page shows at once: one folder for each below assets/examples.

    assets/examples/01-red-chair/example.json    the order as JSON, see `Order`
    assets/examples/01-red-chair/mesh.glb, preview.png, turntable.mp4

`python -m uni3d.web.examples FOLDER` makes those that are missing from the prompts of the benchmark.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from uni3d.errors import Uni3DError
from uni3d.prompts import prompt_slug
from uni3d.resources import resource_path
from uni3d.web.orders import Order, run_config
from uni3d.web.settings import WebSettings

EXAMPLE_FILES = ("mesh.glb", "preview.png", "turntable.mp4")
NUM_EXAMPLES = 12


@dataclass(frozen=True)
class Example:
    """A finished result and what was ordered."""

    order: Order
    folder: Path


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
        if (file.parent / "mesh.glb").is_file() and (file.parent / "preview.png").is_file():
            found.append(Example(Order(**json.loads(file.read_text(encoding="utf-8"))), file.parent))
    return found


def example_prompts() -> list[str]:
    """Prompts to offer: objects that the embedded teacher knows."""
    lines = resource_path("assets/prompts/text_to_3d.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")][:NUM_EXAMPLES]


def make_examples(folder: Path, quality: str = "default") -> None:
    """Make what is missing below `folder`, one after the other."""
    from uni3d.text_to_3d import generate

    for number, prompt in enumerate(example_prompts(), start=1):
        target = folder / f"{number:02d}-{prompt_slug(prompt)}"
        if (target / "example.json").is_file():
            continue
        order = Order(prompt=prompt, quality=quality)
        with tempfile.TemporaryDirectory() as runs:
            settings = WebSettings(folder=Path(runs))
            result = generate(run_config(order, settings, runs_folder=Path(runs)))
            target.mkdir(parents=True, exist_ok=True)
            for name in EXAMPLE_FILES:
                shutil.copyfile(result.run_directory / name, target / name)
        (target / "example.json").write_text(json.dumps(dataclasses.asdict(order), indent=2) + "\n")


if __name__ == "__main__":
    make_examples(Path(sys.argv[1]))
