"""The comparison of the methods: figures per prompt, intervals over prompts, differences to the baseline.

The unit of every interval and test is the prompt: seeds and views of one prompt are averaged before, or
measured together. The summary follows `assets/benchmark_summary.schema.json`.
Legend: K teacher samples, V views, E features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import uni3d
from uni3d.benchmark.plan import settings_of
from uni3d.benchmark.scores import (
    EVALUATOR,
    Judges,
    Space,
    group_figures,
    read_embeddings,
    run_figures,
)
from uni3d.benchmark.settings import BenchmarkConfig
from uni3d.benchmark.teacher_samples import TeacherSamples
from uni3d.benchmark.work_list import Job, WorkList
from uni3d.evaluation.pooled_distance import pooled_frechet
from uni3d.evaluation.statistics import bootstrap_rate, paired_difference

FORMAT = "uni3d-benchmark-summary-1"
# What is better, for readers and for the plots; figures that are neither are costs or plain facts.
HIGHER_IS_BETTER = (
    "alignment", "worst_view", "r_precision", "views_first", "right_object", "right_colour", "right_view",
    "precision", "recall", "vendi", "pair_distance", "closed", "one_piece", "as_field", "worst_view_object",
    "psnr_db",
    "t3bench_best", "t3bench_mean", "t3bench_worst",
)  # fmt: skip
LOWER_IS_BETTER = (
    "janus",
    "foggy",
    "failed",
    "kernel_distance",
    "frechet_distance",
    "seconds",
    "passes",
    "peak_gib",
)

PromptFigures = dict[str, float]


@dataclass(frozen=True)
class _Run:
    job: Job
    record: dict[str, Any]
    embeddings: dict[str, Tensor]


def summarise(
    config: BenchmarkConfig,
    work: WorkList,
    judges: Judges,
    samples: TeacherSamples,
    candidates: Sequence[str],
) -> dict[str, Any]:
    """Compare the methods of a complete work list; `candidates` are the prompts of the retrieval."""
    runs = [_read(work, job) for job in work.jobs]
    spaces = [Space.of(judge, candidates, judges.view_size) for judge in judges.all_embeddings]
    prompts = list(dict.fromkeys(job.prompt for job in work.jobs))
    teacher = _teacher_embeddings(samples, judges, prompts)
    worst = _worst_similarities(runs, spaces, candidates)
    by_row: dict[tuple[str, str], dict[str, list[_Run]]] = {}
    for run in runs:
        by_row.setdefault((run.job.budget, run.job.method), {}).setdefault(run.job.prompt, []).append(run)
    figures = {
        key: {
            prompt: _prompt_figures(group, spaces, candidates, worst, teacher.get(prompt), judges)
            for prompt, group in groups.items()
        }
        for key, groups in by_row.items()
    }
    rows = []
    for (budget, method), per_prompt in figures.items():
        baseline = figures[budget, config.baseline] if method != config.baseline else None
        groups = by_row[budget, method]
        rows.append(
            {
                "budget": budget,
                "method": method,
                "num_runs": sum(map(len, groups.values())),
                "num_failed": sum(
                    run.record["error"] is not None for group in groups.values() for run in group
                ),
                "figures": _row_figures(per_prompt, baseline, config.num_bootstrap)
                | _frechet(groups, teacher, spaces[0], config.num_bootstrap),
            }
        )
    return {
        "format": FORMAT,
        "uni3d": uni3d.__version__,
        "scene": config.scene,
        "feature_space": f"{EVALUATOR} embedding, {spaces[0].prompts.shape[1]} dimensions",
        "judges": [space.name for space in spaces],
        "baseline": config.baseline,
        "prompts": prompts,
        "num_candidates": len(candidates),
        "seeds": list(config.seeds),
        "views": len(judges.cameras),
        "rows": rows,
        "teacher": _teacher_row(teacher, spaces[0], candidates, config.num_bootstrap),
        "failures": [
            {**run.job.as_dict(), "error": run.record["error"]} for run in runs if run.record["error"]
        ],
        "machines": _distinct(run.record["machine"] for run in runs),
        "settings": settings_of(config),
        "variants": _variant_settings(runs),
    }


def _read(work: WorkList, job: Job) -> _Run:
    record = work.record(job)
    assert record is not None, "the work list is complete"
    return _Run(job, record, read_embeddings(work.path(job)))


def _worst_similarities(
    runs: Sequence[_Run], spaces: Sequence[Space], candidates: Sequence[str]
) -> dict[tuple[str, str], dict[str, float]]:
    """By judge and prompt, what a failed run gets: the worst that any result got, or a blank picture."""
    worst: dict[tuple[str, str], dict[str, float]] = {}
    for space in spaces:
        for run in runs:
            asked = candidates.index(run.job.prompt)
            key = (space.name, run.job.prompt)
            if key not in worst:
                blank = float(space.blank @ space.prompts[asked])
                worst[key] = {"alignment": blank, "worst_view": blank, "r_precision": 0.0, "views_first": 0.0}
            if space.name in run.embeddings:
                found = space.similarities(run.embeddings[space.name], asked)
                for name in ("alignment", "worst_view"):
                    worst[key][name] = min(worst[key][name], found[name])
    return worst


def _prompt_figures(
    group: Sequence[_Run],
    spaces: Sequence[Space],
    candidates: Sequence[str],
    worst: Mapping[tuple[str, str], dict[str, float]],
    teacher: Tensor | None,
    judges: Judges,
) -> PromptFigures:
    """All figures of the runs of one method with one prompt: means over seeds, and those of all together."""
    asked = candidates.index(group[0].job.prompt)
    rows: list[dict[str, float]] = []
    for run in group:
        row = run_figures(run.record, shows_meshes=judges.shows_meshes)
        for space in spaces:
            embedding = run.embeddings.get(space.name)
            found = (
                worst[space.name, run.job.prompt]
                if embedding is None
                else space.similarities(embedding, asked)
            )
            prefix = "" if space is spaces[0] else f"{space.name}."
            row |= {f"{prefix}{name}": value for name, value in found.items()}
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    means = {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}
    views = [run.embeddings.get(EVALUATOR) for run in group]
    return means | group_figures(views, teacher, spaces[0].blank)


def _row_figures(
    per_prompt: Mapping[str, PromptFigures],
    baseline: Mapping[str, PromptFigures] | None,
    num_bootstrap: int,
) -> dict[str, Any]:
    names = list(dict.fromkeys(name for figures in per_prompt.values() for name in figures))
    row: dict[str, Any] = {}
    for name in names:
        values = {prompt: figures[name] for prompt, figures in per_prompt.items() if name in figures}
        rate = bootstrap_rate(list(values.values()), num_resamples=num_bootstrap)
        assert rate is not None, "a name comes from a value"
        row[name] = {**rate.as_dict(), "versus_baseline": _versus(name, values, baseline, num_bootstrap)}
    return row


def _versus(
    name: str,
    values: Mapping[str, float],
    baseline: Mapping[str, PromptFigures] | None,
    num_bootstrap: int,
) -> dict[str, float] | None:
    if baseline is None:
        return None
    shared = [prompt for prompt in values if name in baseline.get(prompt, {})]
    difference = paired_difference(
        [values[prompt] for prompt in shared],
        [baseline[prompt][name] for prompt in shared],
        num_resamples=num_bootstrap,
    )
    if difference is None:
        return None
    return {
        "mean": difference.mean,
        "low": difference.low,
        "high": difference.high,
        "p_value": difference.p_value,
        "num": difference.num,
    }


def _frechet(
    groups: Mapping[str, Sequence[_Run]], teacher: Mapping[str, Tensor], space: Space, num_bootstrap: int
) -> dict[str, Any]:
    if not teacher:
        return {}
    made, references = [], []
    for prompt, group in groups.items():
        num_views = teacher[prompt].shape[1]
        blank = space.blank.expand(num_views, -1)
        made.append(torch.cat([run.embeddings.get(EVALUATOR, blank) for run in group]))
        references.append(teacher[prompt].flatten(0, 1))
    rate = pooled_frechet(made, references, num_resamples=min(num_bootstrap, 100))
    if rate is None:
        return {}
    return {"frechet_distance": {**rate.as_dict(), "versus_baseline": None}}


def _teacher_embeddings(samples: TeacherSamples, judges: Judges, prompts: Sequence[str]) -> dict[str, Tensor]:
    """By prompt, the evaluator's embeddings [K, V, E] of the teacher's samples; {} where none are drawn."""
    if samples.settings.teacher_samples_per_view == 0:
        return {}
    found: dict[str, Tensor] = {}
    for prompt in prompts:
        pictures = samples.read(prompt)
        embedding = judges.evaluator.encode(pictures.flatten(0, 1)).embedding
        found[prompt] = embedding.unflatten(0, pictures.shape[:2])
    return found


def _teacher_row(
    teacher: Mapping[str, Tensor], space: Space, candidates: Sequence[str], num_bootstrap: int
) -> dict[str, Any] | None:
    """The teacher's own samples measured as if they were results: how far a method could get."""
    if not teacher:
        return None
    per_prompt: dict[str, PromptFigures] = {}
    for prompt, embeddings in teacher.items():
        rows = [space.similarities(sample, candidates.index(prompt)) for sample in embeddings]
        means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        per_prompt[prompt] = means | group_figures(list(embeddings), None, space.blank)
    return _row_figures(per_prompt, None, num_bootstrap)


def _distinct(items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for item in items:
        if item not in found:
            found.append(item)
    return found


def _variant_settings(runs: Sequence[_Run]) -> dict[str, Any]:
    """The settings of each budget and method, without what differs between its runs."""
    found: dict[str, Any] = {}
    for run in runs:
        own = {key: value for key, value in run.record["settings"].items() if key not in _PER_RUN}
        found.setdefault(run.job.budget, {}).setdefault(run.job.method, own)
    return found


_PER_RUN = ("prompt", "seed", "output", "runs_folder", "resume", "overwrite", "quiet", "json")
