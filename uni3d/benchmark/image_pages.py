"""What a comparison of image methods found: summary.json, a table in Markdown, and a sheet of images."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uni3d.benchmark.image_students import (
    FRECHET,
    KERNEL,
    PRECISION,
    RECALL,
    STUDENTS,
    Comparison,
    Run,
)
from uni3d.distillation.benchmark_step import step_passes
from uni3d.distillation.saved_network import open_network
from uni3d.evaluation.contact_sheet import SheetRow, write_contact_sheet
from uni3d.evaluation.fidelity import metric_name
from uni3d.evaluation.report import markdown_table
from uni3d.training.checkpoint import atomic_write_json, atomic_write_text

FORMAT = "uni3d-image-methods-1"
# Title, figure, factor and decimals of each column.
_COLUMNS = (
    ("FD", FRECHET, 1, 3),
    ("KID x 1000", KERNEL, 1000, 3),
    ("precision, %", PRECISION, 100, 1),
    ("recall, %", RECALL, 100, 1),
    ("training images/s", "images_per_s", 1, 0),
)
_FIGURES = (FRECHET, KERNEL, PRECISION, RECALL)
_SHEET_IMAGES = 16
_SHEET_SIZE = 64


def write_student_pages(comparison: Comparison) -> dict[str, Any]:
    """Write summary.json, summary.md and sheet.png of what is there, and return the summary."""
    output = comparison.settings.output
    summary = summarise_students(comparison)
    atomic_write_json(output / "summary.json", summary)
    atomic_write_text(output / "summary.md", "\n".join(summary_lines(summary)) + "\n")
    if summary["rows"]:
        _write_sheet(comparison, summary, output / "sheet.png")
    return summary


def summarise_students(comparison: Comparison) -> dict[str, Any]:
    """Figures of all that was measured, by row of the table; what is missing and what failed, by run."""
    settings = comparison.settings
    runs = [*comparison.teacher_runs, *comparison.first_runs, *comparison.extra_runs]
    measured = [run for run in runs if comparison.figures(run) is not None]
    # The teacher with different steps is a row each, a student's seeds share one.
    titles = list(dict.fromkeys(_row_name(run) for run in measured))
    rows = [_row(comparison, title, [run for run in measured if _row_name(run) == title]) for title in titles]
    rows.sort(key=lambda row: (row["student"] is not None, row[FRECHET]["mean"]))
    return {
        "format": FORMAT,
        "feature_net": settings.net,
        "num_samples": settings.num_samples,
        "images_of_each_student": comparison.base.run.total_images,
        "trained_at_once": settings.at_once,
        "config": settings.config.name,
        "teacher": str(settings.teacher),
        "device": torch.cuda.get_device_name() if settings.device.startswith("cuda") else settings.device,
        "torch": torch.__version__,
        "rows": rows,
        "goal": _goal(rows),
        "missing": {
            run.name: comparison.progress(run)[0]
            for run in runs
            if run not in measured and run.name not in comparison.failures
        },
        "failed": dict(comparison.failures),
    }


def _row_name(run: Run) -> str:
    return run.name if run.student is None else run.student


def _row(comparison: Comparison, title: str, runs: Sequence[Run]) -> dict[str, Any]:
    """One line of the table: a student over its seeds, or the teacher."""
    net = comparison.settings.net
    found = [comparison.figures(run) or {} for run in runs]
    row: dict[str, Any] = {
        "name": title,
        "student": runs[0].student,
        "num_evaluations": found[0]["images"]["num_evaluations"],
        "runs": [run.name for run in runs],
    }
    for figure in _FIGURES:
        row[figure] = spread([figures["metrics"].get(metric_name(figure, net)) for figures in found])
    if runs[0].student is not None:
        recipe = comparison.recipes[runs[0].student]
        row |= {
            "method": recipe.name,
            "divergence": recipe.divergence.name,
            "passes": str(step_passes(recipe)),
        }
        trainings = [comparison.trained(run) or {} for run in runs]
        row["images_per_s"] = spread([training.get("images_per_s") for training in trainings])
    return row


def spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean, standard deviation (None for a single value) and the values; None where one is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    std = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "std": std, "values": known}


def _goal(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The best student of Uni-Instruct, of the other methods, and the teacher with most evaluations."""
    students = [row for row in rows if row["student"] is not None]
    ours = [row for row in students if STUDENTS[row["student"]].method == "uni-instruct"]
    others = [row for row in students if row not in ours]
    teachers = [row for row in rows if row["student"] is None]
    if not (ours and others and teachers):
        return None
    best, other = (min(group, key=lambda row: row[FRECHET]["mean"]) for group in (ours, others))
    teacher = max(teachers, key=lambda row: row["num_evaluations"])
    distance = best[FRECHET]["mean"]
    return {
        "best_uni_instruct": best["name"],
        "best_other": other["name"],
        "teacher": teacher["name"],
        "relative_to_other": distance / other[FRECHET]["mean"] - 1,
        "relative_to_teacher": distance / teacher[FRECHET]["mean"] - 1,
    }


# ---- pages


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """The summary in Markdown."""
    distance = metric_name(FRECHET, summary["feature_net"])
    header = ["network", "evaluations", "seeds", *(title for title, *_ in _COLUMNS), "passes a step"]
    cells = [
        [
            row["name"],
            str(row["num_evaluations"]),
            "-" if row["student"] is None else str(len(row["runs"])),
            *(_cell(row.get(key), factor, digits) for _, key, factor, digits in _COLUMNS),
            row.get("passes", "-"),
        ]
        for row in summary["rows"]
    ]
    lines = [
        f"FD is {distance} of {summary['num_samples']} images to the real ones; compare it only with figures "
        f"of the same images and network of features. Each student made "
        f"{summary['images_of_each_student']} images in training, {summary['trained_at_once']} students at a "
        f"time on {summary['device']}. Mean and standard deviation over seeds; F is one pass of the network "
        f"for an image, E one of its encoder.",
        "",
        *markdown_table(header, cells),
    ]
    if summary["goal"] is not None:
        lines += ["", _goal_line(summary["goal"])]
    for run, images in summary["missing"].items():
        lines += ["", f"Missing: {run}" + (f", which has made {images} images so far." if images else ".")]
    for run, reason in summary["failed"].items():
        lines += ["", f"Failed: {run}: {reason}"]
    return lines


def _cell(value: Mapping[str, Any] | None, factor: float, digits: int) -> str:
    if value is None:
        return "-"
    text = f"{factor * value['mean']:.{digits}f}"
    return text if value["std"] is None else f"{text} ± {factor * value['std']:.{digits}f}"


def _goal_line(goal: Mapping[str, Any]) -> str:
    def against(name: str, difference: float) -> str:
        return f"{abs(difference):.1%} {'above' if difference > 0 else 'below'} {name}"

    return (
        f"The FD of the best Uni-Instruct student, {goal['best_uni_instruct']}, is "
        f"{against(goal['best_other'], goal['relative_to_other'])}, the best of the other methods, and "
        f"{against(goal['teacher'], goal['relative_to_teacher'])}."
    )


def _write_sheet(comparison: Comparison, summary: Mapping[str, Any], path: Path) -> None:
    """A row of images for each row of the table (a student's first seed), of the same noise and classes."""
    runs = {run.name: run for run in (*comparison.teacher_runs, *comparison.first_runs)}
    rows = []
    for row in summary["rows"]:
        run = runs.get(row["runs"][0])
        if run is not None:
            label = f"{row['name']}, evaluations: {row['num_evaluations']}, FD {row[FRECHET]['mean']:.3f}"
            rows.append(SheetRow(label, _images_of(comparison, run)))
    write_contact_sheet(rows, path, views_per_row=_SHEET_IMAGES, size=_SHEET_SIZE, rows_per_column=len(rows))


def _images_of(comparison: Comparison, run: Run) -> torch.Tensor:
    """[N, 3, H, W] in [0, 1]."""
    steps = run.number if run.student is None else None
    network = open_network(comparison.network(run), num_steps=steps, device=comparison.settings.device)
    pixels = np.concatenate(list(network.images(range(_SHEET_IMAGES)).batches()))
    return torch.from_numpy(pixels).float().expand(-1, 3, -1, -1) / 255
