"""Sharing of work: no job twice, none lost with a process that dies, failed ones kept until asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from uni3d.benchmark.work_list import RECORD, WorkList, claim
from uni3d.errors import UsageError

RECORDED = {"error": None}


def work_list(folder: Path) -> WorkList:
    return WorkList(folder, ["sds", "vsd"], ["a red car", "a blue car"], [0, 1], ["passes"])


def test_every_combination_is_a_job_of_its_own_folder(tmp_path: Path) -> None:
    work = work_list(tmp_path)
    assert len(work.jobs) == 8 == len({work.path(job) for job in work.jobs})
    # All methods take a prompt before the next one comes.
    assert [job.method for job in work.jobs[:2]] == ["sds", "vsd"]
    assert len({job.prompt for job in work.jobs[:2]}) == 1


def test_two_workers_share_the_jobs_and_do_none_twice(tmp_path: Path) -> None:
    first, second = work_list(tmp_path), work_list(tmp_path)
    done = []
    while True:
        with first.claimed(1) as mine, second.claimed(1) as others:
            assert not set(mine) & set(others)
            if not mine and not others:
                break
            for work, jobs in ((first, mine), (second, others)):
                for job in jobs:
                    work.finish(job, RECORDED)
                    done.append(job)
    assert sorted(done, key=str) == sorted(first.jobs, key=str) and first.is_complete()


def test_a_batch_is_of_one_method_and_budget(tmp_path: Path) -> None:
    work = work_list(tmp_path)
    with work.claimed(3) as jobs:
        assert len(jobs) == 3 and len({(job.method, job.budget) for job in jobs}) == 1


def test_a_run_waits_for_the_one_that_says_how_long_it_may_be(tmp_path: Path) -> None:
    methods, prompts = ["field", "stages"], ["a red car", "a blue car"]
    work, other = (
        WorkList(tmp_path, methods, prompts, [0], ["seconds"], reference="stages") for _ in range(2)
    )
    with work.claimed(1) as mine, other.claimed(1) as theirs:
        jobs = [*mine, *theirs]
        assert [job.method for job in jobs] == ["stages", "stages"]
        with other.claimed(1) as nothing:
            assert not nothing
        work.finish(theirs[0], RECORDED)
        with other.claimed(5) as ready:
            assert [(job.method, job.prompt) for job in ready] == [("field", "a blue car")]
            assert work.reference_of(ready[0]) == theirs[0] and work.reference_of(theirs[0]) is None


def test_an_unfinished_job_is_free_again(tmp_path: Path) -> None:
    work = work_list(tmp_path)
    with work.claimed(1) as jobs:
        taken = jobs[0]
    with work.claimed(1) as jobs:
        assert jobs == [taken]


def test_the_claim_of_a_killed_process_is_free(tmp_path: Path) -> None:
    # The lock itself, without the seconds that importing torch takes.
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "claim")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with claim(tmp_path) as is_mine:
        assert not is_mine
    holder.kill()
    holder.wait()
    with claim(tmp_path) as is_mine:
        assert is_mine


def test_failed_jobs_stay_done_until_asked_for(tmp_path: Path) -> None:
    work = work_list(tmp_path)
    for index, job in enumerate(work.jobs):
        work.finish(job, {"error": "no surface" if index == 3 else None})
    assert work.is_complete() and work.forget_failed() == 1 and not work.is_complete()
    with work.claimed(5) as jobs:
        assert jobs == [work.jobs[3]]
    assert (work.path(work.jobs[0]) / RECORD).is_file()


def test_only_whole_prompts_are_summarised_early(tmp_path: Path) -> None:
    work = work_list(tmp_path)
    for job in work.jobs[:5]:
        work.finish(job, RECORDED)
    work.keep_complete_prompts()
    assert {job.prompt for job in work.jobs} == {"a red car"} and len(work.jobs) == 4 and work.is_complete()


def test_prompts_that_differ_in_nothing_visible_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="written alike"):
        WorkList(tmp_path, ["sds"], ["a red car", "a red  car"], [0], ["steps"])
