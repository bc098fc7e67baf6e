"""How well `uni3d refine` repaints meshes: the colour that was asked for, and a silhouette that stays.

    python -m uni3d.text_to_3d.refine_benchmark assets/prompts/refine.txt --meshes meshes/ --output figures/

Refines every mesh of a list, one after the other, and judges what comes out. Each result is kept as soon as
it is there, so the same line again goes on after an interruption. Writes the meshes, `refine_quality.json`
and the contact sheet `refine_quality.png` (three views before, three after) into the output folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uni3d.config.loader import config_to_yaml, load_config
from uni3d.config.refine import RefineConfig
from uni3d.errors import UsageError
from uni3d.evaluation.benchmark_nouns import parse_prompt, read_prompts
from uni3d.evaluation.contact_sheet import SheetRow, write_contact_sheet
from uni3d.evaluation.evaluator import Evaluator
from uni3d.evaluation.mesh_quality import MeshItem, RenderedMesh, evaluation_cameras, judge_mesh
from uni3d.evaluation.report import format_rate
from uni3d.evaluation.settings import MeshQualitySettings
from uni3d.evaluation.statistics import bootstrap_rate
from uni3d.outputs import check_output_folder
from uni3d.prompts import check_prompt, prompt_slug
from uni3d.text_to_3d.pipeline import choose_device, load_run_teacher
from uni3d.text_to_3d.refine import refine_mesh
from uni3d.training.checkpoint import atomic_write_json, atomic_write_text

REPORT_FILE = "refine_quality.json"
SHEET_FILE = "refine_quality.png"
SETTINGS_FILE = "refine.yaml"
# What of the settings differs from mesh to mesh, or changes nothing of the result.
_OWN = {"source": None, "prompt": "", "output": None, "resume": None, "quiet": True, "json": False}


@dataclass(frozen=True)
class RefineTask:
    """One mesh, what it is to become, and the file that it becomes."""

    source: Path
    prompt: str
    result: Path


def read_tasks(file: Path, meshes: Path, output: Path) -> list[RefineTask]:
    """The tasks of a text file: one `mesh file | prompt` a line, files within the folder `meshes`.

    UsageError for a line of another form, a mesh that is not there, or a prompt that asks for no colour.
    """
    tasks: list[RefineTask] = []
    for number, line in enumerate(read_prompts(file)):
        name, bar, prompt = (part.strip() for part in line.partition("|"))
        source = meshes / name
        if not bar or not source.is_file():
            raise UsageError(
                f"'{file}' has the line '{line[:80]}' and there is no mesh '{source}'; expected "
                f"'mesh file | prompt', the file within the folder of --meshes"
            )
        if parse_prompt(check_prompt(prompt)).colour is None:
            raise UsageError(f"'{prompt}' in '{file}' asks for no colour that can be checked; name one")
        tasks.append(RefineTask(source, prompt, output / f"{number:02d}-{prompt_slug(prompt)}.glb"))
    return tasks


def refine_all(
    tasks: Sequence[RefineTask], config: RefineConfig, output: Path, say: Callable[[str], object]
) -> None:
    """Refine what has no result in `output` yet. UsageError if results of other settings are there."""
    settings = config_to_yaml(dataclasses.replace(config, **_OWN))
    file = output / SETTINGS_FILE
    if file.is_file() and file.read_text(encoding="utf-8") != settings:
        raise UsageError(f"'{output}' holds results of other settings, see '{file}'; choose another folder")
    if all(task.result.is_file() for task in tasks):
        return
    atomic_write_text(file, settings)
    device, _ = choose_device(config.device)
    teacher, _ = load_run_teacher(config.run_settings(), device)
    for task in tasks:
        if task.result.is_file():
            continue
        result = refine_mesh(task.source, dataclasses.replace(config, prompt=task.prompt), teacher)
        atomic_write_json(task.result.with_suffix(".json"), {"seconds": result.seconds} | result.report)
        result.save(task.result)
        say(f"{task.result.name}: {sum(result.seconds.values()):.0f} s")


def silhouette_iou(before: RenderedMesh, after: RenderedMesh) -> float:
    """Overlap in [0, 1] of the silhouettes of two meshes over all views; each is seen in its own unit box."""
    both = torch.minimum(before.coverage, after.coverage).sum()
    either = torch.maximum(before.coverage, after.coverage).sum()
    return float(both / either.clamp(min=1e-9))


def judge_all(tasks: Sequence[RefineTask], evaluator: Evaluator, output: Path) -> dict[str, Any]:
    """Figures about all results beside those of the meshes that they were, with 95 % intervals over the
    meshes; plain data for JSON. Writes the contact sheet."""
    settings = MeshQualitySettings()
    cameras, size = evaluation_cameras(settings), evaluator.network.config.image_size
    meshes: list[dict[str, Any]] = []
    rows: list[SheetRow] = []
    for task in tasks:
        before, after = (
            judge_mesh(MeshItem(path, task.prompt), evaluator, cameras, size, settings)
            for path in (task.source, task.result)
        )
        recorded = json.loads(task.result.with_suffix(".json").read_text(encoding="utf-8"))
        found = {
            "source": task.source.name,
            "prompt": task.prompt,
            "before": dataclasses.asdict(before.score),
            "after": dataclasses.asdict(after.score),
            "silhouette_iou": 0.0,
            "seconds": recorded["seconds"],
        }
        pictures = None
        if before.rendered is not None and after.rendered is not None:
            found["silhouette_iou"] = silhouette_iou(before.rendered, after.rendered)
            shown = [round(index * settings.num_azimuths / 3) for index in range(3)]
            pictures = torch.cat([before.rendered.images[shown], after.rendered.images[shown]])
        label = f"{task.prompt}: {before.score.seen_colour} -> {after.score.seen_colour}"
        rows.append(SheetRow(label, pictures, after.score.colour_right is True))
        meshes.append(found)
    write_contact_sheet(rows, output / SHEET_FILE)
    return {"rates": _rates(meshes, settings), "meshes": meshes}


def _rates(meshes: Sequence[dict[str, Any]], settings: MeshQualitySettings) -> dict[str, Any]:
    """Means over the meshes that a question applies to."""
    values = {"silhouette_iou": [mesh["silhouette_iou"] for mesh in meshes]}
    for name in ("colour_right", "noun_right"):
        for moment in ("before", "after"):
            verdicts = [mesh[moment][name] for mesh in meshes]
            values[f"{name}_{moment}"] = [float(verdict) for verdict in verdicts if verdict is not None]
    rates: dict[str, Any] = {}
    for name, numbers in values.items():
        rate = bootstrap_rate(numbers, num_resamples=settings.num_bootstrap)
        rates[name] = None if rate is None else rate.as_dict()
    return rates | {"lowest_silhouette_iou": min(values["silhouette_iou"])}


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m uni3d.text_to_3d.refine_benchmark`."""
    parser = argparse.ArgumentParser(
        prog="python -m uni3d.text_to_3d.refine_benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("list", type=Path, help="text file, one `mesh file | prompt` a line")
    parser.add_argument("--meshes", type=Path, default=Path(), help="folder that the mesh files are in")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--config", type=Path, help="YAML file of settings, such as configs/refine.yaml")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    config = RefineConfig() if given.config is None else load_config(given.config, RefineConfig())
    config = dataclasses.replace(config, seed=given.seed)
    check_output_folder(given.output)
    tasks = read_tasks(given.list, given.meshes, given.output)
    given.output.mkdir(parents=True, exist_ok=True)

    def say(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    refine_all(tasks, config, given.output, say)
    report = judge_all(tasks, Evaluator.load(), given.output)
    atomic_write_json(given.output / REPORT_FILE, report)
    for name in ("colour_right_before", "colour_right_after", "silhouette_iou"):
        say(f"{name.replace('_', ' ')}: {format_rate(report['rates'][name])}")
    say(f"lowest silhouette IoU: {report['rates']['lowest_silhouette_iou']:.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
