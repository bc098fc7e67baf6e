"""The store of jobs: states, visitors, limits, and what is kept."""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path

import pytest
from web_fixtures import ALICE, BOB, order, settings_in

from uni3d.errors import UsageError
from uni3d.web.jobs import JobStore


def test_a_job_goes_from_queued_to_done(tmp_path: Path) -> None:
    store = JobStore(settings_in(tmp_path))
    job = store.submit(order(), ALICE)
    assert (job.state, job.num_steps, len(job.id)) == ("queued", 5, 32)
    running = store.claim(job.id)
    assert running is not None and running.state == "running"
    assert store.claim(job.id) is None, "claimed twice"
    store.report(job.id, step=3, loss=0.5, add_seconds=2.0)
    store.folder(job.id).mkdir()
    (store.folder(job.id) / "mesh.glb").write_bytes(b"12345")
    store.finish(job.id, "done")
    done = store.find(job.id, ALICE)
    assert done is not None and (done.state, done.step, done.num_bytes) == ("done", 3, 5)
    store.finish(job.id, "failed", "too late")
    assert store.find(job.id, ALICE) == done
    assert store.usual_seconds("draft", 5) == 2.0 and store.usual_seconds("default", 5) is None


def test_folders_are_private(tmp_path: Path) -> None:
    store = JobStore(settings_in(tmp_path / "web"))
    for path, mode in ((store.settings.folder, 0o700), (store.settings.jobs_folder, 0o700)):
        assert path.stat().st_mode & 0o777 == mode
    assert (store.settings.folder / "jobs.sqlite3").stat().st_mode & 0o777 == 0o600


def test_a_visitor_sees_and_cancels_only_their_own(tmp_path: Path) -> None:
    store = JobStore(settings_in(tmp_path))
    job = store.submit(order(), ALICE, pair="p")
    assert store.find(job.id, BOB) is None and not store.cancel(job.id, BOB)
    assert store.jobs_of(BOB) == [] and store.pair_of("p", BOB) == []
    assert [each.id for each in store.jobs_of(ALICE)] == [job.id]
    assert store.cancel(job.id, ALICE)
    cancelled = store.find(job.id, ALICE)
    assert cancelled is not None and cancelled.state == "cancelled"
    assert store.claim(job.id) is None


def test_limits_are_one_clear_sentence(tmp_path: Path) -> None:
    store = JobStore(settings_in(tmp_path / "1", max_unfinished_per_visitor=2, max_queue=3))
    store.submit(order(), ALICE)
    store.submit(order(), ALICE)
    with pytest.raises(UsageError, match="2 jobs of yours are waiting"):
        store.submit(order(), ALICE)
    store.submit(order(), BOB)
    with pytest.raises(UsageError, match="the queue is full"):
        store.submit(order(), "c" * 64)
    store = JobStore(settings_in(tmp_path / "2", max_per_hour=1))
    store.cancel(store.submit(order(), ALICE).id, ALICE)
    with pytest.raises(UsageError, match="1 jobs within an hour"):
        store.submit(order(), ALICE)


def test_who_drops_the_cookie_is_known_by_the_address(tmp_path: Path) -> None:
    store = JobStore(settings_in(tmp_path, max_unfinished_per_visitor=2))
    for number in range(6):
        store.submit(order(), str(number), address="there")
    with pytest.raises(UsageError, match="6 jobs from your address are waiting"):
        store.submit(order(), "another", address="there")
    store.submit(order(), "another", address="elsewhere")
    store.submit(order(), "another")


def test_a_folder_of_an_earlier_version_still_opens(tmp_path: Path) -> None:
    job = JobStore(settings_in(tmp_path)).submit(order(), ALICE)
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as database:
        database.execute("ALTER TABLE jobs DROP COLUMN address")
    assert JobStore(settings_in(tmp_path)).find(job.id, ALICE) == job


def test_the_queue_limit_holds_when_all_come_at_once(tmp_path: Path) -> None:
    store = JobStore(settings_in(tmp_path, max_queue=7))
    refused: list[UsageError] = []

    def submit() -> None:
        try:
            store.submit(order(), ALICE)
        except UsageError as error:
            refused.append(error)

    threads = [threading.Thread(target=submit) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.jobs_of(ALICE)) == 7 and len(refused) == 5


def test_positions_count_who_comes_before(tmp_path: Path) -> None:
    store = JobStore(settings_in(tmp_path))
    jobs = [store.submit(order(), ALICE) for _ in range(3)]
    assert [len(store.before(job)) for job in jobs] == [0, 1, 2]
    store.claim(jobs[0].id)
    store.finish(jobs[0].id, "done")
    assert [len(store.before(job)) for job in jobs[1:]] == [0, 1]


def test_recovery_requeues_cancels_and_gives_up(tmp_path: Path) -> None:
    store = JobStore(settings_in(tmp_path, max_fruitless_starts=2))
    job, other = store.submit(order(), ALICE), store.submit(order(), ALICE)
    for expected in (True, True, False):  # a start that got further is not held against the job
        store.claim(job.id)
        if expected and store.find(job.id, ALICE).step == 0:  # pyright: ignore[reportOptionalMemberAccess]
            store.report(job.id, step=2)
        assert (job.id in [each.id for each in store.recover()]) is expected
    failed = store.find(job.id, ALICE)
    assert failed is not None and failed.state == "failed" and "want of memory" in failed.message
    store.claim(other.id)
    store.cancel(other.id, ALICE)
    assert store.recover() == []
    assert store.find(other.id, ALICE).state == "cancelled"  # pyright: ignore[reportOptionalMemberAccess]


def test_a_job_that_took_down_a_worker_lets_the_others_go_first(tmp_path: Path) -> None:
    store = JobStore(settings_in(tmp_path))
    jobs = [store.submit(order(), ALICE) for _ in range(3)]
    store.claim(jobs[0].id)
    assert [job.id for job in store.recover()] == [jobs[1].id, jobs[2].id, jobs[0].id]
    first, second, third = (store.find(job.id, ALICE) for job in jobs)
    assert first is not None and second is not None and third is not None
    assert [len(store.before(job)) for job in (first, second, third)] == [2, 0, 1]


def test_the_oldest_finished_jobs_go_first(tmp_path: Path) -> None:
    store = JobStore(settings_in(tmp_path, max_gigabytes=2.5e-6, keep_days=1.0))
    jobs = [store.submit(order(), ALICE) for _ in range(4)]
    for job in jobs[:3]:
        store.claim(job.id)
        store.folder(job.id).mkdir()
        (store.folder(job.id) / "mesh.glb").write_bytes(bytes(1000))
        store.finish(job.id, "done")
        time.sleep(0.01)
    (store.settings.jobs_folder / "ownerless").mkdir()
    assert store.sweep() == 1
    assert {job.id for job in store.jobs_of(ALICE)} == {job.id for job in jobs[1:]}
    assert {path.name for path in store.settings.jobs_folder.iterdir()} == {job.id for job in jobs[1:3]}
    store = JobStore(settings_in(tmp_path, keep_days=0.0))
    assert store.sweep() == 2 and [job.id for job in store.jobs_of(ALICE)] == [jobs[3].id]
