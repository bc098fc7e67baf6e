"""PROGRAM 3, from settings to summary. Any number of processes may run it on one folder at once.

python -m uni3d benchmark --config configs/benchmark.yaml --output bench      # once, twice, on each GPU
torchrun --nproc-per-node 8 -m uni3d benchmark --config configs/benchmark.yaml --output bench
"""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from uni3d.benchmark.backends import Backend, FieldBackend, PictureBackend, Product
from uni3d.benchmark.budgets import shared_step_cost
from uni3d.benchmark.machine import describe_machine
from uni3d.benchmark.pages import write_pages
from uni3d.benchmark.plan import (
    all_prompts,
    candidate_settings,
    chosen_variants,
    hold_settings,
    made_prompts,
    tuned_yaml,
)
from uni3d.benchmark.scores import Judges, judge_product
from uni3d.benchmark.settings import BenchmarkConfig
from uni3d.benchmark.stage_costs import steps_as_long_as
from uni3d.benchmark.summary import summarise
from uni3d.benchmark.teacher_samples import TeacherSamples
from uni3d.benchmark.work_list import Job, WorkList
from uni3d.config.loader import config_to_dict
from uni3d.config.stages import StagesConfig
from uni3d.config.text_to_3d import TextTo3DConfig
from uni3d.errors import UsageError
from uni3d.evaluation.evaluator import Evaluator
from uni3d.evaluation.image_reward import ImageReward
from uni3d.evaluation.retrieval import ClipEmbedding
from uni3d.evaluation.settings import MeshQualitySettings
from uni3d.scene.camera import Cameras
from uni3d.text_to_3d.network_setup import load_teacher
from uni3d.text_to_3d.pipeline import choose_device
from uni3d.training.checkpoint import atomic_write_json, atomic_write_text
from uni3d.training.stop import StopFlag

logger = logging.getLogger(__name__)

RECORD_FORMAT = "uni3d-benchmark-run-1"
_WARM_UP_STEPS = 20


def benchmark(config: BenchmarkConfig) -> dict[str, Any] | None:
    """Make what is missing and return the summary, or None if other processes are still at it.

    Raises Interrupted after a signal once the current run is done, and ConfigError or UsageError before any
    work.
    """
    variants = chosen_variants(config)
    if config.tune:
        return _tune(config, variants)
    hold_settings(config.output, config)
    session = _Session(config, config.output, variants)
    return session.run()


def _tune(config: BenchmarkConfig, variants: Mapping[str, TextTo3DConfig]) -> dict[str, Any] | None:
    """Make every candidate on the tuning prompts; keep for each variant the one that matches them best."""
    candidates = candidate_settings(config, variants)
    flat = {name: settings for group in candidates.values() for name, settings in group.items()}
    folder = config.output / "tuning"
    hold_settings(folder, config)
    baseline = next(iter(candidates[config.baseline]))
    session = _Session(dataclasses.replace(config, baseline=baseline, turntables=False), folder, flat)
    summary = session.run()
    if summary is None:
        return None
    chosen: dict[str, TextTo3DConfig] = {}
    remarks: dict[str, str] = {}
    for name, group in candidates.items():
        merit = {
            candidate: sum(
                row["figures"]["alignment"]["mean"] for row in summary["rows"] if row["method"] == candidate
            )
            / len(config.budget.kinds)
            for candidate in group
        }
        best = max(merit, key=lambda candidate: merit[candidate])
        chosen[name] = group[best]
        remarks[name] = f"{best}, of {len(group)}: alignment {merit[best]:.4f}"
    atomic_write_text(config.output / "tuned.yaml", tuned_yaml(chosen, remarks))
    logger.info("the chosen settings are in %s", config.output / "tuned.yaml")
    return summary


class _Session:
    """This process's part in one benchmark."""

    def __init__(self, config: BenchmarkConfig, folder: Path, variants: Mapping[str, TextTo3DConfig]) -> None:
        self.config, self.folder, self.variants = config, folder, dict(variants)
        self.prompts = made_prompts(config)
        self.work = WorkList(
            folder,
            list(variants),
            self.prompts,
            config.seeds,
            config.budget.kinds,
            reference=config.budget.reference,
        )
        self.device = _own_device(config.run.device)
        teacher = load_teacher(config.run, self.device)
        self.judges = _judges(config, self.device)
        self.backend: Backend = (
            FieldBackend(teacher, turntables=config.turntables)
            if config.scene == "field"
            else PictureBackend(teacher, self.judges.cameras)
        )
        self.samples = TeacherSamples(folder, teacher, self.judges.cameras, config.views)
        self.machine = describe_machine(torch.device(self.device))

    def run(self) -> dict[str, Any] | None:
        if self.config.retry_failed:
            logger.info("%d failed runs are made again", self.work.forget_failed())
        with StopFlag() as stop:
            if self.config.only_summary:
                self.work.keep_complete_prompts()
            else:
                self._make_all(stop)
            if not self.work.is_complete():
                logger.info("nothing is left for this process; the one that ends last writes the summary")
                return None
            prompts = list(dict.fromkeys(job.prompt for job in self.work.jobs))
            if not prompts:
                raise UsageError(f"'{self.folder}' has no prompt yet that every method and seed is done with")
            for prompt in prompts:
                self.samples.draw(prompt, wait=True)
                _leave_if_asked(stop)
        summary = summarise(self.config, self.work, self.judges, self.samples, all_prompts(self.config))
        atomic_write_json(self.folder / "summary.json", summary)
        write_pages(summary, self.folder, self.work, prompts)
        return summary

    def _make_all(self, stop: StopFlag) -> None:
        num_made = 0
        if not self.work.is_complete():
            self._warm_up()
        while True:
            with self.work.claimed(self.backend.max_jobs) as jobs:
                if not jobs:
                    return
                self.samples.draw(jobs[0].prompt, wait=False)
                self._make(jobs)
                num_made += len(jobs)
            if not self.config.quiet:
                logger.info(
                    "%d runs made here, the last by %s: '%s'", num_made, jobs[-1].method, jobs[-1].prompt
                )
            _leave_if_asked(stop)

    def _make(self, jobs: list[Job]) -> None:
        settings = [self._settings(job) for job in jobs]
        runs = [(each, self.work.path(job)) for job, each in zip(jobs, settings, strict=True)]
        for job, each, outcome in zip(jobs, settings, self.backend.make(runs), strict=True):
            self.work.finish(job, self._record(job, each, outcome))

    def _settings(self, job: Job) -> TextTo3DConfig:
        """The job's own settings; the steps are what its budget allows."""
        settings = dataclasses.replace(self.variants[job.method], prompt=job.prompt, seed=job.seed)
        if job.budget == "steps":
            return settings
        if job.budget == "seconds" and self.config.budget.reference is not None:
            return self._as_long_as_its_reference(job, settings)
        # Every process must find the same cost, so the pilot's prompt is no job's own.
        pilot = dataclasses.replace(settings, prompt=self.prompts[0], seed=0)
        cost = shared_step_cost(self.folder, job.method, self.backend, pilot)
        limit = self.config.budget.passes if job.budget == "passes" else self.config.budget.seconds
        return dataclasses.replace(settings, steps=cost.steps_within(job.budget, limit))

    def _as_long_as_its_reference(self, job: Job, settings: TextTo3DConfig) -> TextTo3DConfig:
        reference = self.work.reference_of(job)
        record = None if reference is None else self.work.record(reference)
        if record is None or not record["costs"]:  # it is the reference, or that failed
            return settings
        return dataclasses.replace(settings, steps=steps_as_long_as(record["costs"]["stages"]))

    def _warm_up(self) -> None:
        """A run that is thrown away: what a GPU does once in a process would count as its first run's."""
        reference = self.config.budget.reference
        if reference is None or torch.device(self.device).type != "cuda":
            return
        settings = self.variants[reference]
        geometry, texture = settings.stages.geometry, settings.stages.texture
        short = StagesConfig(
            geometry=dataclasses.replace(geometry, steps=min(geometry.steps, _WARM_UP_STEPS)),
            texture=dataclasses.replace(texture, steps=min(texture.steps, _WARM_UP_STEPS)),
        )
        settings = dataclasses.replace(settings, prompt=self.prompts[0], steps=_WARM_UP_STEPS, stages=short)
        with tempfile.TemporaryDirectory(prefix="uni3d-warm-up-") as folder:
            self.backend.make([(settings, Path(folder))])  # so short a field may have no surface

    def _record(self, job: Job, settings: TextTo3DConfig, outcome: Product | Exception) -> dict[str, Any]:
        folder = self.work.path(job)
        is_failure = isinstance(outcome, Exception)
        # What could not be made cannot be seen either, so it gets the verdict of a file that is not there.
        product = Product(folder / "nothing.glb", {}, {}) if isinstance(outcome, Exception) else outcome
        verdict = judge_product(product, job.prompt, job.seed, self.judges, self.backend, folder)
        error = verdict["error"] or ("the result is empty" if verdict["is_empty"] else None)
        if is_failure:
            error = f"{type(outcome).__name__}: {outcome}"[:500]
        return {
            "format": RECORD_FORMAT,
            **job.as_dict(),
            "error": error,
            "costs": product.costs,
            "figures": _plain(product.figures),
            "verdict": _plain(verdict),
            "settings": config_to_dict(settings),
            "machine": self.machine,
        }


def _leave_if_asked(stop: StopFlag) -> None:
    if stop.is_set:
        raise stop.interruption("stopped; every finished run is kept. The same command goes on")


def _plain(value: Any) -> Any:
    """JSON values: numbers of numpy become Python's, those that are not finite null, paths their names."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return value.name
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    return value


def _own_device(name: str) -> str:
    """The device of this process: under `torchrun`, each takes a GPU of its own in turn."""
    device, reason = choose_device(name)
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    logger.info("device: %s (%s)", device, reason)
    return device


def _judges(config: BenchmarkConfig, device: str) -> Judges:
    views = config.views
    settings = MeshQualitySettings()
    cameras = Cameras.from_lists(
        list(views.azimuths_deg) * len(views.elevations_deg),
        [elevation for elevation in views.elevations_deg for _ in views.azimuths_deg],
        radius=settings.radius,
        fov_y_deg=settings.fov_y_deg,
    )
    named = {"clip": config.judges.clip, "hpsv2": config.judges.hpsv2}
    folder = config.judges.image_reward
    rewarder = None if folder is None else ImageReward(folder, device=device)
    return Judges(
        Evaluator.load(config.evaluator, device=device),
        [
            ClipEmbedding(name, title=title, device=device)
            for title, name in named.items()
            if name is not None
        ],
        cameras,
        settings,
        shows_meshes=config.scene == "field",
        reward=None if rewarder is None else rewarder.score,
    )
