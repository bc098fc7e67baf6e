"""PROGRAM 4: many prompts become many meshes, a group of scenes at a time.

    uni3d generate --prompts prompts.txt --output-dir outputs/set

A group is optimised together (`SceneBatch`), then its meshes are made by processes of their own while the
next group is optimised. Each scene has the run directory of a single run, with its checkpoints: a scene that
is finished is never made again, and whatever fails stays within its scene.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import uni3d
from uni3d.config.loader import config_to_yaml
from uni3d.config.text_to_3d import TextTo3DConfig
from uni3d.data.captions import read_vocabulary, unknown_prompt_warning
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.errors import Interrupted, TrainingDiverged, Uni3DError
from uni3d.evaluation.contact_sheet import SheetRow, write_contact_sheet
from uni3d.mesh.turntable import render_mesh
from uni3d.resources import weights_folder
from uni3d.scene.camera import ring_cameras
from uni3d.text_to_3d.memory import fitted, free_memory
from uni3d.text_to_3d.pipeline import EMBEDDED, _fingerprint, choose_device, load_run_teacher
from uni3d.text_to_3d.scene_batch import BatchReport, SceneBatch
from uni3d.text_to_3d.scene_meshes import make_mesh, mesh_makers
from uni3d.text_to_3d.scene_optimiser import resolve_recipe
from uni3d.text_to_3d.scene_requests import PLAN_FILE, SHEET_FILE, SUMMARY_FILE, ScenePlan, SceneRequest
from uni3d.training.checkpoint import Checkpoint, CheckpointStore, DamagedFile, atomic_write_json
from uni3d.training.processes import Processes, joined_processes
from uni3d.training.run_log import NonFiniteGuard, Progress, RunDirectory
from uni3d.training.stop import StopFlag

logger = logging.getLogger(__name__)

FAILURE_FILE = "failure.json"
VOCABULARY = "vocabulary.json"
SHEET_VIEWS, SHEET_SIZE = 6, 96
STEPS_PER_FLUSH = 20
# The last step that all scenes of a group have is then always there, however a kill falls.
MIN_CHECKPOINTS_KEPT = 2


@dataclass(frozen=True)
class ManyResult:
    """Where `generate_many` put things; `failures` holds a sentence for each scene that has no mesh."""

    folder: Path
    summary: dict[str, Any]
    failures: dict[str, str]
    is_main: bool = True


@dataclass
class SceneRun:
    """One scene on its way: its run directory, checkpoints and alarms."""

    name: str
    request: SceneRequest
    config: TextTo3DConfig
    run: RunDirectory
    guard: NonFiniteGuard = field(default_factory=NonFiniteGuard)

    @property
    def store(self) -> CheckpointStore:
        keep = max(MIN_CHECKPOINTS_KEPT, self.config.checkpoints.keep)
        return CheckpointStore(self.run.checkpoints_path, keep=keep, fingerprint=_fingerprint(self.config))

    @property
    def is_open(self) -> bool:
        """Whether there is something left to do."""
        return not (self.run.path / "metrics.json").is_file() and self.failure is None

    @property
    def failure(self) -> str | None:
        """Why the scene could not be made, if that is so."""
        file = self.run.path / FAILURE_FILE
        return str(json.loads(file.read_text(encoding="utf-8"))["error"]) if file.is_file() else None

    def fail(self, reason: str) -> None:
        """Give the scene up."""
        logger.warning("%s failed: %s", self.name, reason)
        atomic_write_json(self.run.path / FAILURE_FILE, {"error": reason})


def generate_many(config: TextTo3DConfig, plan: ScenePlan) -> ManyResult:
    """Make every scene of `plan`; with `config.resume`, those that are left.

    Started by `torchrun`, each process makes its share of the scenes. Raises UsageError for bad input before
    anything is written, and Interrupted after a signal once the state is saved.
    """
    resolve_recipe(config)
    config = fitted(config)
    device, reason = choose_device(config.device)
    started = time.monotonic()
    with joined_processes(uses_cuda=torch.device(device).type == "cuda") as processes:
        place = processes.device(torch.device(device))
        teacher, _ = load_run_teacher(config, str(place))
        if config.resume is None and processes.is_main:
            _begin_folder(config, plan)
        processes.wait()
        runs = _open_runs(config, plan)
        logger.info("device: %s (%s); %d scenes, %d at once", place, reason, len(runs), plan.at_once)
        if processes.is_main:
            _warn_of_unknown_words(config, runs)
        with StopFlag() as stop:
            _make_scenes(config, plan, runs[processes.rank :: processes.num], teacher, stop, processes)
        processes.wait()
        summary = _summary(runs, str(place), time.monotonic() - started)
        if processes.is_main:
            _write_overview(plan, runs, summary)
        failures = {run.name: run.failure for run in runs if run.failure is not None}
        return ManyResult(plan.folder, summary, failures, processes.is_main)


def _begin_folder(config: TextTo3DConfig, plan: ScenePlan) -> None:
    """Everything that tells what is to be made, before anything is made; scenes.json last."""
    plan.check_folder(overwrite=config.overwrite)
    plan.folder.mkdir(parents=True, exist_ok=True)
    if config.overwrite:
        plan.clear_folder()
    RunDirectory(plan.folder).write_config(config_to_yaml(config))
    for name, request in plan.scenes.items():
        run = RunDirectory.create(plan.folder, name)
        run.write_config(config_to_yaml(_scene_config(config, request)))
    atomic_write_json(plan.folder / PLAN_FILE, plan.as_dict())


def _scene_config(config: TextTo3DConfig, request: SceneRequest) -> TextTo3DConfig:
    return dataclasses.replace(config, prompt=request.prompt, seed=request.seed, resume=None, overwrite=False)


def _open_runs(config: TextTo3DConfig, plan: ScenePlan) -> list[SceneRun]:
    return [
        SceneRun(name, request, _scene_config(config, request), RunDirectory.open(plan.folder / name))
        for name, request in plan.scenes.items()
    ]


def _warn_of_unknown_words(config: TextTo3DConfig, runs: Sequence[SceneRun]) -> None:
    file = (weights_folder("teacher") if config.teacher == EMBEDDED else Path(config.teacher)) / VOCABULARY
    if not file.is_file():
        return
    vocabulary = read_vocabulary(file)
    for prompt in dict.fromkeys(run.request.prompt for run in runs):
        if warning := unknown_prompt_warning(prompt, vocabulary):
            logger.warning("%s", warning)


# ---------------------------------------------------------------------- group after group


def _make_scenes(
    config: TextTo3DConfig,
    plan: ScenePlan,
    runs: Sequence[SceneRun],
    teacher: LatentDiffusionTeacher,
    stop: StopFlag,
    processes: Processes,
) -> None:
    groups = [runs[start : start + plan.at_once] for start in range(0, len(runs), plan.at_once)]
    num_workers = min(plan.at_once, max(1, (os.cpu_count() or 1) // processes.num))
    with mesh_makers(num_workers) as makers:
        meshes: list[tuple[SceneRun, Future[str | None]]] = []
        for number, group in enumerate(groups, start=1):
            left = [run for run in group if run.is_open]
            if not left:
                continue
            label = "optimise" if len(groups) == 1 else f"group {number} of {len(groups)}"
            survivors = _optimise_within_memory(config, left, teacher, stop, label)
            _leave_if_asked(stop, plan)
            meshes += [(run, makers.submit(make_mesh, run.config, run.run.path)) for run in survivors]
        with Progress(len(meshes), label="mesh", quiet=config.quiet) as progress:
            for run, mesh in meshes:
                reason = _wait_for(mesh, stop, plan)
                _leave_if_asked(stop, plan)
                if reason is not None:
                    run.fail(reason)
                progress.update()


def _wait_for(mesh: Future[str | None], stop: StopFlag, plan: ScenePlan) -> str | None:
    """Why a mesh could not be made; returns early when a signal asks."""
    while not stop.is_set:
        try:
            return mesh.result(timeout=0.5)
        except TimeoutError:
            continue
        except BrokenExecutor as error:
            raise Uni3DError(
                f"a process that makes meshes was killed, perhaps for lack of memory. Go on with: "
                f"{_resume_line(plan)}"
            ) from error
    return None


def _resume_line(plan: ScenePlan) -> str:
    return f"uni3d generate --resume {shlex.quote(str(plan.folder))}"


def _leave_if_asked(stop: StopFlag, plan: ScenePlan) -> None:
    if stop.is_set:
        raise stop.interruption(f"stopped; everything is saved. Go on with: {_resume_line(plan)}")


def _optimise_within_memory(
    config: TextTo3DConfig,
    runs: Sequence[SceneRun],
    teacher: LatentDiffusionTeacher,
    stop: StopFlag,
    label: str,
) -> list[SceneRun]:
    """`_optimise_group`; where memory runs out, in halves that go on from the last state saved."""
    try:
        return _optimise_group(config, runs, teacher, stop, label)
    except torch.OutOfMemoryError:
        if len(runs) == 1:
            runs[0].fail("out of memory with a single scene; use --vram, or lower --renderer.resolution")
            return []
    free_memory()
    half = (len(runs) + 1) // 2
    logger.warning("out of memory with %d scenes at once; going on with %d", len(runs), half)
    first = _optimise_within_memory(config, runs[:half], teacher, stop, label)
    if stop.is_set:
        return first
    return first + _optimise_within_memory(config, runs[half:], teacher, stop, label)


def _optimise_group(
    config: TextTo3DConfig,
    runs: Sequence[SceneRun],
    teacher: LatentDiffusionTeacher,
    stop: StopFlag,
    label: str,
) -> list[SceneRun]:
    """Take the steps that are left and save the last state; returns the scenes that came through."""
    states = _common_states(runs)
    if states is not None and states[0].step >= config.steps:
        return list(runs)
    batch = SceneBatch(config, [run.request for run in runs], teacher)
    if states is not None:
        batch.load_state_dicts([state.state for state in states])
    else:

        def before_step() -> None:
            if stop.is_set:
                raise stop.interruption("stopped before the first step")

        with contextlib.suppress(Interrupted):
            batch.prepare(before_step=before_step)
        if stop.is_set:
            return []
    for run in runs:
        run.run.truncate_metrics(batch.step_index)
    return _Group(batch, list(runs), config).optimise(stop, label)


def _common_states(runs: Sequence[SceneRun]) -> list[Checkpoint] | None:
    """The newest checkpoints of one and the same step; None where the group has to begin anew."""
    found = [{int(path.stem.partition("_")[2]): path for path in run.store.paths()} for run in runs]
    for step in sorted(set.intersection(*(set(paths) for paths in found)), reverse=True):
        try:
            return [run.store.load(paths[step]) for run, paths in zip(runs, found, strict=True)]
        except DamagedFile as error:
            logger.warning("%s; going back to the checkpoint before", error)
    return None


class _Group:
    """The loop around one `SceneBatch`: metrics, checkpoints, scenes that leave."""

    def __init__(self, batch: SceneBatch, runs: list[SceneRun], config: TextTo3DConfig) -> None:
        self.batch = batch
        self.runs = runs
        self.config = config
        self._unwritten: list[tuple[int, list[str], Tensor, float]] = []

    def optimise(self, stop: StopFlag, label: str) -> list[SceneRun]:
        if self.batch.step_index == 0:
            self._save()
        saved_at = time.monotonic()
        with Progress(
            self.config.steps, start=self.batch.step_index, label=label, quiet=self.config.quiet
        ) as progress:
            while self.runs and self.batch.step_index < self.config.steps and not stop.is_set:
                began = time.monotonic()
                report = self.batch.step()
                self._note(report, time.monotonic() - began)
                is_whole = self._judge(report.finite)
                progress.update(scenes=str(len(self.runs)))
                if is_whole and time.monotonic() - saved_at >= self.config.checkpoints.interval_s:
                    self._save()
                    saved_at = time.monotonic()
        if self.runs:
            self._save()
        return self.runs

    def _judge(self, finite: Sequence[bool]) -> bool:
        """Put back or give up scenes that were not finite; whether all were."""
        lost: list[int] = []
        for scene, (run, is_finite) in enumerate(zip(self.runs, finite, strict=True)):
            try:
                verdict = run.guard.check(
                    self.batch.step_index, {f"a gradient of {run.name}": None if is_finite else float("nan")}
                )
            except TrainingDiverged as error:
                run.fail(str(error))
                lost.append(scene)
                continue
            if verdict == "rollback":
                kept = run.store.load_latest()
                assert kept is not None, "a state is saved before the first step"
                seed = run.request.seed + 1_000_003 * run.guard.num_rollbacks
                self.batch.set_back(scene, kept.state, seed=seed)
        if lost:
            self._write_metrics()
            self._drop(lost)
        return all(finite)

    def _drop(self, lost: Sequence[int]) -> None:
        for scene in sorted(lost, reverse=True):
            del self.runs[scene]
            if self.runs:
                self.batch = self.batch.without(scene)

    def _save(self) -> None:
        self._write_metrics()
        for scene, run in enumerate(self.runs):
            run.store.save(self.batch.step_index, self.batch.state_dict(scene))

    def _note(self, report: BatchReport, seconds: float) -> None:
        """Keep the step's numbers on the device; they are fetched a few steps at a time."""
        values = torch.stack(list(report.values.values()))
        self._unwritten.append((self.batch.step_index, list(report.values), values, seconds))
        if len(self._unwritten) >= STEPS_PER_FLUSH:
            self._write_metrics()

    def _write_metrics(self) -> None:
        for step, names, values, seconds in self._unwritten:
            for run, column in zip(self.runs, values.T.tolist(), strict=True):
                row: Mapping[str, float] = dict(zip(names, column, strict=True))
                run.run.log_metrics(step, {**row, "seconds": round(seconds / len(self.runs), 4)})
        self._unwritten.clear()


# ---------------------------------------------------------------------- all together


def _summary(runs: Sequence[SceneRun], device: str, seconds: float) -> dict[str, Any]:
    scenes = []
    for run in runs:
        entry: dict[str, Any] = {"directory": run.name, **dataclasses.asdict(run.request)}
        if run.failure is not None:
            scenes.append({**entry, "status": "failed", "error": run.failure})
            continue
        figures = json.loads((run.run.path / "metrics.json").read_text(encoding="utf-8"))
        kept = {name: figures[name] for name in ("field_match", "fog", "seconds") if name in figures}
        scenes.append({**entry, "status": "finished", **kept})
    num_failed = sum(scene["status"] == "failed" for scene in scenes)
    return {
        "num_finished": len(scenes) - num_failed,
        "num_failed": num_failed,
        "seconds": round(seconds, 1),
        "device": device,
        "uni3d": uni3d.__version__,
        "scenes": scenes,
    }


def _write_overview(plan: ScenePlan, runs: Sequence[SceneRun], summary: dict[str, Any]) -> None:
    cameras = ring_cameras(SHEET_VIEWS)
    rows = []
    for run in runs:
        images = None
        if run.failure is None:
            file = run.run.path / f"mesh.{run.config.mesh.formats[0]}"
            pictures, _ = render_mesh(file, cameras, SHEET_SIZE, background=0.9)
            images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        rows.append(SheetRow(f"{run.request.prompt} ({run.request.seed})", images))
    write_contact_sheet(rows, plan.folder / SHEET_FILE, views_per_row=SHEET_VIEWS, size=SHEET_SIZE)
    atomic_write_json(plan.folder / SUMMARY_FILE, summary)
