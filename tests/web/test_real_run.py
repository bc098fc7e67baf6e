"""The real worker on a tiny random teacher: killed in the middle, it goes on from its checkpoint."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import trimesh
from web_fixtures import ALICE, order, settings_in, wait_for

from uni3d.config.loader import load_config
from uni3d.config.presets import quality_preset
from uni3d.web.job_queue import JobQueue
from uni3d.web.jobs import Job, JobStore
from uni3d.web.supervisor import Supervisor


def _get(store: JobStore, job: Job) -> Job:
    found = store.find(job.id, ALICE)
    assert found is not None
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_run_goes_on_and_leaves_its_results_alone(tmp_path: Path, tiny_teacher_folder: Path) -> None:
    teachers = {"tiny": str(tiny_teacher_folder), "broken": str(tmp_path)}
    settings = settings_in(tmp_path / "web", teachers=teachers, max_steps=40, checkpoint_interval_s=0.0)
    store = JobStore(settings)
    queue = JobQueue(settings.folder)
    broken = store.submit(order(teacher="broken"), ALICE)
    job = store.submit(order(teacher="tiny", method="sds", seed=3), ALICE)
    dropped = store.submit(order(teacher="tiny", seed=4), ALICE)
    for each in (broken, job, dropped):
        queue.add(each.id)
    folder = store.folder(job.id)
    with Supervisor(store) as supervisor:
        wait_for(lambda: _get(store, job).step >= 3, timeout_s=180)
        assert supervisor.process is not None
        supervisor.process.kill()
        assert (folder / "progress.png").read_bytes().startswith(b"\x89PNG")
        # The second run does not begin again: its first report is of a later step.
        wait_for(lambda: _get(store, job).num_starts == 2, timeout_s=60)
        wait_for(lambda: _get(store, job).is_finished, timeout_s=180)
        wait_for(lambda: _get(store, dropped).step >= 1, timeout_s=180)
        store.cancel(dropped.id, ALICE)
        wait_for(lambda: _get(store, dropped).is_finished, timeout_s=20)
    failed = _get(store, broken)
    assert failed.state == "failed" and str(tmp_path) not in failed.message and failed.message
    assert (_get(store, job).state, _get(store, job).message) == ("done", "")
    assert _get(store, dropped).state == "cancelled" and not store.folder(dropped.id).exists()
    names = {path.name for path in folder.iterdir()}
    assert names == {"mesh.glb", "model.zip", "turntable.mp4", "preview.png", "config.yaml", "report.json"}
    assert len(trimesh.load(folder / "mesh.glb", force="mesh").faces) > 10  # pyright: ignore
    assert json.loads((folder / "report.json").read_text())["triangles"] > 10
    with zipfile.ZipFile(folder / "model.zip") as archive:
        archive.extractall(tmp_path / "model")
    assert len(trimesh.load(tmp_path / "model" / "mesh.obj", force="mesh").faces) > 10  # pyright: ignore
    config = load_config(folder / "config.yaml", quality_preset("draft"))
    assert (config.seed, config.method, config.steps, config.teacher) == (3, "sds", 40, "tiny")
    assert str(tmp_path) not in (folder / "config.yaml").read_text()
