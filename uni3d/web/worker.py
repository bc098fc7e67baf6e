"""The worker process of the web page: takes one job after the other and makes its mesh.

    python -m uni3d.web.worker SETTINGS_JSON

It holds a lock on the folder, so there is one worker however often servers start, and it leaves when its
standard input closes, which is what happens when the server dies. Everything heavy is imported here and
never in the server. A job leaves these files in its folder, and nothing else:

    mesh.glb, model.zip (OBJ, MTL, PNG), turntable.mp4, preview.png, config.yaml, report.json
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from uni3d.errors import Interrupted, Uni3DError
from uni3d.resources import weights_folder
from uni3d.web.job_queue import JobQueue
from uni3d.web.jobs import CANCELLED_BY_VISITOR, Job, JobStore, State
from uni3d.web.orders import reproducing_config, run_config
from uni3d.web.progress import JobCancelled, JobProgress, WorkerStopped
from uni3d.web.settings import WebSettings, make_private_folder
from uni3d.web.speed import read_trial, try_steps

logger = logging.getLogger(__name__)

Make = Callable[[Job, WebSettings, Path, JobProgress], None]
Trial = Callable[[WebSettings, Callable[[], object]], None]

_POLL_S = 0.2
_SWEEP_INTERVAL_S = 300.0
_LEAVE_WITHIN_S = 30.0
_PREVIEW_VIEWS = 4
_PREVIEW_SIZE = 128
_NICENESS = 10


def main(arguments: list[str] | None = None, *, make: Make | None = None) -> int:
    """Work until standard input closes; returns the exit code."""
    (text,) = sys.argv[1:] if arguments is None else arguments
    settings = WebSettings.from_json(text)
    stopping = threading.Event()
    threading.Thread(target=_watch_server, args=(stopping,), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.set())
    os.nice(_NICENESS)  # the page answers first
    make_private_folder(settings.folder)
    logging.basicConfig(
        filename=settings.folder / "worker.log", format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("uni3d").setLevel(logging.INFO)
    with (settings.folder / "worker.lock").open("w") as lock:
        if not _lock(lock, stopping):
            return 0
        Worker(settings, make or make_mesh, stopping, try_steps if make is None else None).work()
    return 0


class Worker:
    """One job at a time from the queue, until `stopping` is set; `trial` measures the machine meanwhile."""

    def __init__(
        self, settings: WebSettings, make: Make, stopping: threading.Event, trial: Trial | None = None
    ) -> None:
        self.settings = settings
        self.store = JobStore(settings)
        self.queue = JobQueue(settings.folder, self.run)
        self._make = make
        self._stopping = stopping
        self._trial = None if read_trial(settings) else trial

    def work(self) -> None:
        """Recover what was left behind, then run jobs as they come."""
        self.store.recover()
        # A message may have gone with the worker that took it: the store knows what waits.
        self.queue.replace(job.id for job in self.store.waiting())
        swept_at = float("-inf")
        while not self._stopping.is_set():
            if time.monotonic() - swept_at > _SWEEP_INTERVAL_S:
                self.store.sweep()
                swept_at = time.monotonic()
            if self.queue.run_next():
                continue
            if waiting := self.store.waiting():  # whoever ordered could not add to the queue, or not yet
                self.queue.replace(job.id for job in waiting)
            elif self._trial is not None:
                self._measure(self._trial)
            else:
                self._stopping.wait(_POLL_S)

    def _measure(self, trial: Trial) -> None:
        """Take the trial steps, unless a job comes in between; then after it."""

        def leave_if_asked() -> None:
            if self._stopping.is_set() or self.store.waiting():
                raise WorkerStopped

        try:
            trial(self.settings, leave_if_asked)
        except WorkerStopped:
            return
        except Interrupted:
            self._stopping.set()
        except Exception:  # a teacher that cannot be loaded, say: the first job will tell
            logger.exception("the machine could not be measured")
        finally:
            free_memory()
        self._trial = None

    def run(self, job_id: str) -> None:
        """Run one job to its end, whatever that is; only leaving the worker puts it back into the queue."""
        job = self.store.claim(job_id)
        if job is None:  # cancelled, or a message that came twice
            return
        folder = make_private_folder(self.store.folder(job.id))
        progress = JobProgress(self.store, job, self._stopping.is_set)
        state, message = self._attempt(job, folder, progress)
        free_memory()
        if state is None:
            self.store.release(job.id)
            return
        if state != "done":
            shutil.rmtree(folder, ignore_errors=True)
        self.store.finish(job.id, state, message)
        logger.info("job %s: %s %s", job.id, state, message)

    def _attempt(self, job: Job, folder: Path, progress: JobProgress) -> tuple[State | None, str]:
        """(how it ended, what to say), None where the worker leaves before the job has ended."""
        try:
            progress.leave_if_asked()
            self._make(job, self.settings, folder, progress)
            progress.end()
        except JobCancelled:
            return "cancelled", CANCELLED_BY_VISITOR
        except (WorkerStopped, Interrupted):
            self._stopping.set()
            return None, ""
        except Uni3DError as error:
            return "failed", self._without_places(str(error))
        except Exception as error:
            logger.exception("job %s", job.id)
            return "failed", self._without_places(_sentence(error))
        return "done", ""

    def _without_places(self, message: str) -> str:
        """The message without the folders of this server, which are no business of a visitor."""
        places = {str(self.settings.folder): "the server's folder"}
        places |= {source: name for name, source in self.settings.teachers.items() if os.sep in source}
        for place, name in places.items():
            message = message.replace(place, name)
        return message


def _sentence(error: Exception) -> str:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "there was not enough memory for this job; choose the draft quality"
    reason = " ".join(str(error).split())[:300] or "no message"
    if "can't allocate memory" in reason or "not enough memory" in reason:
        return "there was not enough memory for this job; choose the draft quality"
    return f"this job met a fault of uni3d ({type(error).__name__}: {reason}); the others go on"


# ---------------------------------------------------------------------- making a mesh


def make_mesh(job: Job, settings: WebSettings, folder: Path, progress: JobProgress) -> None:
    """Run the order of `job`, from its checkpoint if there is one, and leave the results in `folder`."""
    if (folder / "report.json").is_file():  # a worker died after its last line of work
        _remove_runs(folder)
        return
    progress.enter("loading the teacher")
    from uni3d.text_to_3d import pipeline

    class Watch(pipeline.RunWatch):
        def before_denoising(self) -> None:
            progress.enter("asking the teacher for samples")

        def after_step(self, optimiser: Any, values: Mapping[str, float]) -> None:
            loss = values.get("student_loss", math.nan)  # there is none while the field waits
            progress.step(optimiser.step_index, loss, lambda: _draw_field(optimiser, folder))

    if (unknown := _unknown_to_teacher(job, settings)) is not None:
        progress.warn(unknown)
    config = run_config(job.order, settings, runs_folder=folder)
    runs = sorted(folder.glob("*/config.yaml"))
    if runs:
        config = dataclasses.replace(config, resume=runs[0].parent)
    result = pipeline.generate(config, watch=Watch())
    progress.leave_if_asked()  # to cancel is possible as long as there is nothing to show
    keep_results(result.run_directory, folder, job, settings, result.report["mesh"])


def _unknown_to_teacher(job: Job, settings: WebSettings) -> str | None:
    """A sentence about words of the prompt that the teacher was not trained on, if it says what it was."""
    from uni3d.data.captions import read_vocabulary, unknown_in_prompt

    source = settings.teachers[job.teacher]
    file = (weights_folder("teacher") if source == "embedded" else Path(source)) / "vocabulary.json"
    return unknown_in_prompt(job.prompt, read_vocabulary(file)) if file.is_file() else None


def _draw_field(optimiser: Any, folder: Path) -> None:
    """Write the field as it is from four sides as progress.png."""
    import torch
    from PIL import Image

    from uni3d.scene.camera import ring_cameras
    from uni3d.training.checkpoint import atomic_write

    with torch.no_grad():
        views = optimiser.render(ring_cameras(_PREVIEW_VIEWS), _PREVIEW_SIZE, 0.95).image
    row = torch.cat(list(views.clamp(0, 1)), dim=2).permute(1, 2, 0)
    sheet = Image.fromarray((255 * row).round().byte().cpu().numpy())
    atomic_write(folder / "progress.png", lambda temporary: sheet.save(temporary, format="PNG"))


def keep_results(
    run: Path, folder: Path, job: Job, settings: WebSettings, mesh_figures: Mapping[str, Any]
) -> None:
    """Move what a visitor may have from the run directory into `folder`, and remove the rest.

    report.json comes last: with it the results are complete.
    """
    from uni3d.mesh.gltf_validator import validate_glb
    from uni3d.training.checkpoint import atomic_write, atomic_write_json, atomic_write_text

    def write_zip(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("mesh.obj", "mesh.mtl", "mesh.png"):
                archive.write(run / name, name)

    atomic_write(folder / "model.zip", write_zip)
    for name in ("mesh.glb", "preview.png", "turntable.mp4"):
        if (source := run / name).is_file():
            atomic_write(folder / name, lambda temporary, source=source: shutil.copyfile(source, temporary))
    atomic_write_text(folder / "config.yaml", reproducing_config(job.order, settings))
    # Last, since a resumed job takes its presence for the end of the work.
    figures = {name: value for name, value in mesh_figures.items() if name not in ("path", "extras")}
    figures["gltf_validator"] = validate_glb(folder / "mesh.glb")
    atomic_write_json(folder / "report.json", json.loads(json.dumps(figures, default=float)))
    _remove_runs(folder)


def _remove_runs(folder: Path) -> None:
    """Remove the run directories with their checkpoints, and the last picture of the running job."""
    (folder / "progress.png").unlink(missing_ok=True)
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)


# ---------------------------------------------------------------------- the process


def free_memory() -> None:
    """Hand back what an ended job held: to the system, and to whoever else uses the GPU."""
    gc.collect()  # a field and its networks refer to each other
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of the GNU C library
    if trim is not None:
        trim(0)


def _watch_server(stopping: threading.Event) -> None:
    """Set `stopping` when standard input closes, and end the process if it has not left some time later."""
    while os.read(0, 4096):  # below sys.stdin, whose lock a thread must not hold at exit
        pass
    stopping.set()
    time.sleep(_LEAVE_WITHIN_S)
    os._exit(1)


def _lock(file: IO[str], stopping: threading.Event) -> bool:
    """Wait until this is the only worker of the folder; False if it should stop before that."""
    import fcntl

    while not stopping.is_set():
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            stopping.wait(_POLL_S)
    return False


if __name__ == "__main__":
    sys.exit(main())
