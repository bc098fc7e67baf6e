"""What people look at: the table in Markdown, contact sheets, plots of quality against time and diversity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from uni3d.benchmark.backends import read_views
from uni3d.benchmark.scatter import Point, Value, write_scatter
from uni3d.benchmark.summary import HIGHER_IS_BETTER, LOWER_IS_BETTER
from uni3d.benchmark.work_list import Job, WorkList
from uni3d.evaluation.contact_sheet import SheetRow, write_contact_sheet
from uni3d.evaluation.report import markdown_table
from uni3d.training.checkpoint import atomic_write_text

# Title, figure, factor and decimals of each column.
_QUALITY = (
    ("R-precision, %", "r_precision", 100, 0),
    ("alignment", "alignment", 1, 3),
    ("worst view", "worst_view", 1, 3),
    ("right object, %", "right_object", 100, 0),
    ("its probability in the worst view, %", "worst_view_object", 100, 0),
    ("right colour, %", "right_colour", 100, 0),
    ("Janus, %", "janus", 100, 0),
    ("T3Bench quality", "t3bench_best", 1, 1),
    ("its worst view", "t3bench_worst", 1, 1),
    ("KID", "kernel_distance", 1, 2),
    ("FD", "frechet_distance", 1, 3),
    ("recall, %", "recall", 100, 0),
    ("Vendi", "vendi", 1, 2),
    ("pair distance", "pair_distance", 1, 3),
)
_COSTS = (
    ("failed, %", "failed", 100, 0),
    ("closed, %", "closed", 100, 0),
    ("one piece, %", "one_piece", 100, 0),
    ("as the field, %", "as_field", 100, 0),
    ("PSNR to what was optimised, dB", "psnr_db", 1, 1),
    ("triangles", "triangles", 1, 0),
    ("steps", "steps", 1, 0),
    ("passes", "passes", 1, 0),
    ("seconds", "seconds", 1, 0),
    ("peak GiB", "peak_gib", 1, 1),
)
_STAGES = tuple(
    column
    for stage in ("field", "geometry", "texture", "export")
    for column in ((f"{stage}, s", f"{stage}_seconds", 1, 1), (f"{stage}, GiB", f"{stage}_gib", 1, 2))
)
_SHEET_SIZE = 96


def write_pages(summary: Mapping[str, Any], folder: Path, work: WorkList, prompts: Sequence[str]) -> None:
    """Write summary.md, sheet-BUDGET-SEED.png and the two plots into `folder`."""
    atomic_write_text(folder / "summary.md", summary_markdown(summary))
    methods = list(dict.fromkeys(row["method"] for row in summary["rows"]))
    for budget in dict.fromkeys(row["budget"] for row in summary["rows"]):
        for seed in summary["seeds"]:
            rows = [_sheet_row(work, prompt, methods, seed, budget) for prompt in prompts]
            write_contact_sheet(
                rows, folder / f"sheet-{budget}-{seed}.png", views_per_row=len(methods), size=_SHEET_SIZE
            )
    _write_plots(summary, folder)


def summary_markdown(summary: Mapping[str, Any]) -> str:
    """The tables of each budget: quality beside diversity, costs beside the state of the meshes, and costs by
    stage."""
    lines = [
        f"{len(summary['prompts'])} prompts x {len(summary['seeds'])} seeds, {summary['views']} views each; "
        f"retrieval among {summary['num_candidates']} prompts; features: {summary['feature_space']}. "
        f"Means with 95 % intervals over prompts; '+' and '-' mark what is better or worse than "
        f"{summary['baseline']}, prompt by prompt, with an interval that excludes zero. Failed runs count as "
        f"the worst."
    ]
    rows = summary["rows"]
    for budget in dict.fromkeys(row["budget"] for row in rows):
        chosen = [row for row in rows if row["budget"] == budget]
        lines += [
            "",
            f"**At equal {budget}**" if budget != "steps" else "**At the steps of the settings**",
            "",
        ]
        teacher = [("teacher's own samples", summary["teacher"])] if summary["teacher"] else []
        shown = [(row["method"], row["figures"]) for row in chosen]
        others = [
            column
            for judge in summary["judges"][1:]
            for column in (
                (f"{judge}, R-precision, %", f"{judge}.r_precision", 100, 0),
                (f"{judge}, cosine", f"{judge}.alignment", 1, 3),
            )
        ]
        lines += _table(shown + teacher, [*_QUALITY, *others], with_interval=True)
        lines += ["", *_table(shown, _COSTS, with_interval=False)]
        if any("export_seconds" in figures for _, figures in shown):
            lines += ["", *_table(shown, _STAGES, with_interval=False)]
    if summary["failures"]:
        lines += ["", f"{len(summary['failures'])} runs failed; summary.json says which and why."]
    return "\n".join(lines) + "\n"


def _table(
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    columns: Sequence[tuple[str, str, float, int]],
    *,
    with_interval: bool,
) -> list[str]:
    shown = [column for column in columns if any(column[1] in figures for _, figures in rows)]
    cells = [
        [
            name,
            *(
                _cell(figures.get(key), key, factor, digits, with_interval)
                for _, key, factor, digits in shown
            ),
        ]
        for name, figures in rows
    ]
    return markdown_table(["method", *(title for title, *_ in shown)], cells)


def _cell(figure: Mapping[str, Any] | None, key: str, factor: float, digits: int, with_interval: bool) -> str:
    if figure is None:
        return "-"
    mean, low, high = (f"{factor * figure[part]:.{digits}f}" for part in ("mean", "low", "high"))
    return f"{mean} ({low} to {high}){_mark(figure['versus_baseline'], key)}" if with_interval else mean


def _mark(versus: Mapping[str, float] | None, key: str) -> str:
    """' +' or ' -' where the difference to the baseline is on one side of zero."""
    if versus is None or versus["low"] <= 0 <= versus["high"]:
        return ""
    is_higher = versus["low"] > 0
    key = key.rpartition(".")[2]  # without the judge's name
    if key in HIGHER_IS_BETTER:
        return " +" if is_higher else " -"
    return (" -" if is_higher else " +") if key in LOWER_IS_BETTER else ""


def _sheet_row(work: WorkList, prompt: str, methods: Sequence[str], seed: int, budget: str) -> SheetRow:
    """One prompt, the first view by each method from left to right; black where there is none."""
    pictures = []
    for method in methods:
        file = work.path(Job(method, prompt, seed, budget)) / "views.npz"
        pictures.append(read_views(file)[0] if file.is_file() else None)
    known = next((picture for picture in pictures if picture is not None), None)
    label = f"{prompt}: {', '.join(methods)}"
    if known is None:
        return SheetRow(label, None)
    return SheetRow(label, torch.stack([torch.zeros_like(known) if p is None else p for p in pictures]))


def _write_plots(summary: Mapping[str, Any], folder: Path) -> None:
    budgets = list(dict.fromkeys(row["budget"] for row in summary["rows"]))
    for name, key, label in (
        ("time", "seconds", "seconds of guidance"),
        ("diversity", "vendi", "Vendi score over seeds"),
    ):
        points = [
            Point(row["method"], _value(row, key), _value(row, "r_precision"), budgets.index(row["budget"]))
            for row in summary["rows"]
            if key in row["figures"]
        ]
        if points:
            title = "markers by budget: " + ", ".join(
                f"{marker} {budget}"
                for marker, budget in zip(("disc", "square", "triangle"), budgets, strict=False)
            )
            write_scatter(
                points, folder / f"quality_{name}.png", title=title, x_label=label, y_label="R-precision"
            )


def _value(row: Mapping[str, Any], key: str) -> Value:
    figure = row["figures"][key]
    return Value(figure["mean"], figure["low"], figure["high"])
