"""One prompt on several GPUs: processes of `torchrun` that share the views of every step.

    torchrun --nproc-per-node 2 --module uni3d generate "a red chair" --guidance.views-per-step 2

Each process renders and scores its views and steps on the mean gradient, so all hold the same field, and the
result is that of one process with as many views. The first one writes the run directory and makes the mesh.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

import torch

from uni3d.config.text_to_3d import TextTo3DConfig
from uni3d.errors import UsageError
from uni3d.text_to_3d.network_setup import load_fake_base
from uni3d.text_to_3d.pipeline import (
    GenerateResult,
    _checked,
    _fingerprint,
    _open_run,
    _write_results,
    build_mesh,
    choose_device,
    interruption,
    load_run_teacher,
)
from uni3d.text_to_3d.scene_optimiser import SceneOptimiser
from uni3d.text_to_3d.step_loop import MemoryStore, StateStore, take_steps
from uni3d.training.checkpoint import CheckpointStore
from uni3d.training.processes import Processes, joined_processes
from uni3d.training.run_log import Progress, RunDirectory
from uni3d.training.stop import StopFlag

logger = logging.getLogger(__name__)


def generate_shared(config: TextTo3DConfig) -> GenerateResult | None:
    """As `text_to_3d.generate`, together with the other processes; None in all but the first.

    Raises UsageError also for views that cannot be shared out, and for particles and mesh stages, which are
    not shared.
    """
    if config.particles > 1 or config.stages.geometry.steps + config.stages.texture.steps > 0:
        raise UsageError("particles and mesh stages are made by one process; start uni3d without torchrun")
    config = _checked(config)
    device, reason = choose_device(config.device)
    seconds: dict[str, float] = {}
    started = time.monotonic()
    with joined_processes(uses_cuda=torch.device(device).type == "cuda") as processes:
        place = processes.device(torch.device(device))
        teacher, warning = load_run_teacher(config, str(place))
        fake_base = load_fake_base(config, str(place))
        optimiser = SceneOptimiser(config, teacher, fake_base=fake_base, processes=processes)
        with StopFlag() as stop:
            if not processes.is_main:
                _optimise(optimiser, config, stop, processes, None)
                return None
            with _open_run(config) as run:
                logger.info("device: %s (%s), %d processes", place, reason, processes.num)
                if warning:
                    logger.warning("%s", warning)
                _optimise(optimiser, config, stop, processes, run)
                seconds["optimise"] = time.monotonic() - started
                mesh, figures, mesh_seconds = build_mesh(optimiser)
                return _write_results(run, config, mesh, figures, seconds | mesh_seconds)


def _optimise(
    optimiser: SceneOptimiser,
    config: TextTo3DConfig,
    stop: StopFlag,
    processes: Processes,
    run: RunDirectory | None,
) -> None:
    """The steps that are left. Every process keeps the state; the first, which has the run, on the disk."""
    folder = run.checkpoints_path if run is not None else None
    if config.resume is not None:
        folder = RunDirectory.open(config.resume).checkpoints_path
    kept = None
    if folder is not None:
        files = CheckpointStore(folder, keep=config.checkpoints.keep, fingerprint=_fingerprint(config))
        kept = None if config.resume is None else files.load_latest()
    processes.wait()  # until all have read what the first one may prune
    store: StateStore = files if run is not None else MemoryStore()  # pyright: ignore[reportPossiblyUnbound]
    if kept is not None:
        optimiser.load_state_dict(kept.state)
    else:
        optimiser.prepare()
    store.save(optimiser.step_index, optimiser.state_dict())
    if run is not None:
        run.truncate_metrics(optimiser.step_index)
    is_quiet = config.quiet or run is None
    with Progress(config.steps, start=optimiser.step_index, label="optimise", quiet=is_quiet) as progress:

        def on_step(step: int, values: Mapping[str, float]) -> bool:
            if run is not None:
                run.log_metrics(step, values)
            progress.update(loss=values.get("student_loss", 0.0))
            return not agree(stop.is_set)

        def on_rollback(step: int) -> None:
            if run is not None:
                run.truncate_metrics(step)

        def agree(value: bool) -> bool:
            return bool(processes.as_main_says(float(value))[0])

        take_steps(optimiser, store, on_step=on_step, on_rollback=on_rollback, agree=agree)
    store.save(optimiser.step_index, optimiser.state_dict())
    if optimiser.step_index < config.steps:
        shown = run if run is not None else RunDirectory(config.runs_folder)
        raise interruption(stop, shown, optimiser.step_index, config.steps)
