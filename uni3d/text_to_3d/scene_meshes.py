"""Meshes of finished runs, made side by side: what a run directory holds is all that is needed for its mesh.

Extraction, unwrapping, painting and films keep one CPU core busy for seconds, while the next scenes are
optimised elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from uni3d.config.text_to_3d import TextTo3DConfig
from uni3d.errors import Uni3DError
from uni3d.text_to_3d.pipeline import _write_results, build_mesh
from uni3d.text_to_3d.scene_batch import FinishedScene
from uni3d.training.checkpoint import CheckpointStore
from uni3d.training.run_log import RunDirectory

logger = logging.getLogger(__name__)


def make_mesh(config: TextTo3DConfig, path: Path) -> str | None:
    """Make mesh, pictures and figures of the run in `path` from its last checkpoint.

    Returns why that could not be done, in a sentence: it runs in a process of its own.
    """
    run = RunDirectory(path)
    try:
        checkpoint = CheckpointStore(run.checkpoints_path).load_latest()
        assert checkpoint is not None, "the last step is saved"
        with run:
            mesh, figures, seconds = build_mesh(FinishedScene(config, checkpoint.state))
            _write_results(run, config, mesh, figures, seconds)
    except Uni3DError as error:
        return str(error)
    except Exception as error:  # a fault in one scene stops no other
        logger.debug("the mesh in %s failed", path, exc_info=True)
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


class _AtOnce(Executor):
    """Makes a mesh here and now, where a process of its own would gain nothing."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


@contextlib.contextmanager
def mesh_makers(num: int) -> Iterator[Executor]:
    """Who runs `make_mesh`: so many processes, or for one, this process itself."""
    if num == 1:
        yield _AtOnce()
        return
    makers = ProcessPoolExecutor(
        num, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_mesh_maker
    )
    try:
        yield makers
    finally:
        makers.shutdown(wait=True, cancel_futures=True)


def _begin_mesh_maker() -> None:
    """Signals are the main process's to answer, and the cores are shared by process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
