"""The worker process under its supervisor: order, cancelling, failing jobs, and SIGKILL at any moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from web_fixtures import ALICE, BOB, STUB_WORKER, place, settings_in, wait_for

from uni3d.web.job_queue import JobQueue
from uni3d.web.jobs import Job, JobStore
from uni3d.web.progress import JobProgress
from uni3d.web.settings import WebSettings
from uni3d.web.supervisor import Supervisor
from uni3d.web.worker import Worker, _sentence


def _get(store: JobStore, job: Job) -> Job:
    found = store.find(job.id, job.visitor)
    assert found is not None
    return found


def _all_finished(store: JobStore, jobs: list[Job]) -> bool:
    return all(_get(store, job).is_finished for job in jobs)


def test_jobs_are_made_in_order_and_a_failing_one_is_a_sentence(tmp_path: Path) -> None:
    store = JobStore(settings_in(tmp_path / "web"))
    queue = JobQueue(store.settings.folder)
    jobs = [place(store, queue, prompt) for prompt in ("a", "fail", "fault", "b")]
    with Supervisor(store, STUB_WORKER) as supervisor:
        wait_for(lambda: _all_finished(store, jobs))
        assert supervisor.num_starts == 1
    states = [_get(store, job).state for job in jobs]
    assert states == ["done", "failed", "failed", "done"]
    made = (store.settings.folder / "made.txt").read_text().split()
    assert made == [jobs[0].id, jobs[3].id]
    failed, fault = (_get(store, job).message for job in jobs[1:3])
    assert failed == "the teacher 'the server's folder/x' is damaged; replace it"
    assert (
        fault == "this job met a fault of uni3d (RuntimeError: CUDA error: out of thin air); the others go on"
    )
    folder = store.folder(jobs[0].id)
    assert folder.stat().st_mode & 0o777 == 0o700 and not store.folder(jobs[1].id).exists()


def test_cancelling_takes_two_steps_at_most(tmp_path: Path) -> None:
    store = JobStore(settings_in(tmp_path, max_steps=100))
    queue = JobQueue(store.settings.folder)
    job, later, last = (place(store, queue, text) for text in ("slow one", "slow two", "three"))
    with Supervisor(store, STUB_WORKER):
        wait_for(lambda: _get(store, job).step >= 2)
        seen = _get(store, job).step
        store.cancel(later.id, ALICE)
        store.cancel(job.id, ALICE)
        asked = time.monotonic()
        wait_for(lambda: _get(store, job).is_finished)
        assert time.monotonic() - asked < 1.0
        wait_for(lambda: _get(store, last).is_finished)
    assert [_get(store, each).state for each in (job, later, last)] == ["cancelled", "cancelled", "done"]
    assert _get(store, job).step <= seen + 7, "reports come every half second"


def test_a_job_that_takes_the_worker_down_fails_and_the_next_one_runs(tmp_path: Path) -> None:
    store = JobStore(settings_in(tmp_path, max_fruitless_starts=2))
    queue = JobQueue(store.settings.folder)
    jobs = [place(store, queue, "die"), place(store, queue, "a vase")]
    with Supervisor(store, STUB_WORKER) as supervisor:
        wait_for(lambda: _all_finished(store, jobs))
        assert supervisor.num_starts >= 3
    assert [_get(store, job).state for job in jobs] == ["failed", "done"]


def test_a_silent_worker_is_replaced(tmp_path: Path) -> None:
    store = JobStore(settings_in(tmp_path, max_silent_s=2.0, max_steps=5))
    job = place(store, JobQueue(store.settings.folder))
    with Supervisor(store, STUB_WORKER) as supervisor:
        worker = wait_for(lambda: supervisor.process)
        wait_for(lambda: _get(store, job).state == "running" or _get(store, job).is_finished)
        os.kill(worker.pid, signal.SIGSTOP)
        if _get(store, job).is_finished:
            os.kill(worker.pid, signal.SIGCONT)
            pytest.skip("the job was faster than the signal")
        wait_for(lambda: _get(store, job).is_finished)
        assert supervisor.num_starts == 2
    assert _get(store, job).state == "done"


def test_the_worker_leaves_when_its_server_is_gone_and_the_job_goes_on_later(tmp_path: Path) -> None:
    store = JobStore(settings_in(tmp_path, max_steps=60))
    job = place(store, JobQueue(store.settings.folder), "slow")
    worker = subprocess.Popen([*STUB_WORKER, store.settings.to_json()], stdin=subprocess.PIPE)
    try:
        wait_for(lambda: _get(store, job).step >= 3)
        assert worker.stdin is not None
        worker.stdin.close()
        assert worker.wait(10) == 0
    finally:
        worker.kill()
    left = _get(store, job)
    assert left.state == "queued" and left.step >= 3
    assert int((store.folder(job.id) / "checkpoint").read_text()) >= 3, "its checkpoint is kept"
    with Supervisor(store, STUB_WORKER):
        wait_for(lambda: _get(store, job).is_finished)
    assert _get(store, job).state == "done" and _get(store, job).num_starts == 2


def kill_at_random_moments(folder: Path, *, num_jobs: int, num_kills: int, seed: int) -> tuple[JobStore, int]:
    """Submit jobs while the worker is killed again and again; returns the store and the number of kills."""
    store = JobStore(settings_in(folder, max_fruitless_starts=50))
    queue = JobQueue(store.settings.folder)
    chance = random.Random(seed)
    kills = 0
    jobs: list[Job] = []
    with Supervisor(store, STUB_WORKER) as supervisor:
        while kills < num_kills or len(jobs) < num_jobs:
            if len(jobs) < num_jobs:
                jobs.append(place(store, queue, f"job {len(jobs)}", chance.choice((ALICE, BOB))))
            time.sleep(chance.uniform(0.0, 1.2))
            process = supervisor.process
            if kills < num_kills and process is not None and process.poll() is None:
                process.kill()
                process.wait()
                kills += 1
        wait_for(lambda: _all_finished(store, jobs), timeout_s=120)
    return store, kills


def test_sigkill_loses_and_doubles_nothing(tmp_path: Path) -> None:
    store, kills = kill_at_random_moments(tmp_path, num_jobs=12, num_kills=8, seed=3)
    jobs = store.jobs_of(ALICE) + store.jobs_of(BOB)
    assert kills == 8 and Counter(job.state for job in jobs) == {"done": 12}
    assert {job.prompt for job in jobs} == {f"job {index}" for index in range(12)}
    made = (store.settings.folder / "made.txt").read_text().split()
    assert set(made) == {job.id for job in jobs}


def test_a_message_that_was_lost_or_came_twice_changes_nothing(tmp_path: Path) -> None:
    store = JobStore(settings_in(tmp_path))
    queue = JobQueue(store.settings.folder)
    twice = place(store, queue)
    queue.add(twice.id)
    lost = store.submit(place(store, queue).order, ALICE)  # the server died before it could say so
    with Supervisor(store, STUB_WORKER):
        wait_for(lambda: _all_finished(store, [twice, lost]))
    made = (store.settings.folder / "made.txt").read_text().split()
    assert len(made) == len(set(made)) == 3


def test_a_job_that_never_came_into_the_queue_is_found(tmp_path: Path) -> None:
    store = JobStore(settings_in(tmp_path))
    with Supervisor(store, STUB_WORKER):
        first = place(store, JobQueue(store.settings.folder))
        wait_for(lambda: _get(store, first).is_finished)
        job = store.submit(first.order, ALICE)  # the queue was locked for too long, say
        wait_for(lambda: _get(store, job).is_finished)
    assert _get(store, job).state == "done"


def test_the_machine_is_measured_while_nobody_waits(tmp_path: Path) -> None:
    store = JobStore(settings_in(tmp_path))
    tried: list[str] = []

    def trial(settings: WebSettings, leave_if_asked: Callable[[], object]) -> None:
        tried.append("begun")
        if len(tried) == 1:
            place(store, JobQueue(store.settings.folder))
        leave_if_asked()
        tried.append("ended")
        stopping.set()

    stopping = threading.Event()
    Worker(store.settings, lambda job, *rest: tried.append(job.prompt), stopping, trial).work()
    assert tried == ["begun", "a red chair", "begun", "ended"]


def test_the_time_of_a_job_holds_what_comes_after_its_steps(tmp_path: Path) -> None:
    store = JobStore(settings_in(tmp_path))

    def make(job: Job, settings: WebSettings, folder: Path, progress: JobProgress) -> None:
        progress.step(job.num_steps, 0.0)
        time.sleep(0.3)
        stopping.set()

    stopping = threading.Event()
    job = place(store, JobQueue(store.settings.folder))
    Worker(store.settings, make, stopping).work()
    assert _get(store, job).state == "done" and _get(store, job).seconds_worked >= 0.3


def test_a_job_over_its_time_fails(tmp_path: Path) -> None:
    store = JobStore(settings_in(tmp_path, max_minutes=0.002, max_steps=1000))
    job = place(store, JobQueue(store.settings.folder))
    with Supervisor(store, STUB_WORKER):
        wait_for(lambda: _get(store, job).is_finished)
    assert _get(store, job).state == "failed"
    assert "took longer than the 0.002 minutes that this server allows" in _get(store, job).message


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_want_of_memory_is_told_in_one_sentence(error: Exception) -> None:
    assert _sentence(error) == "there was not enough memory for this job; choose the draft quality"
