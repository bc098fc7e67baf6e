"""The process that unwraps stays off most of the cores."""

from __future__ import annotations

import os

import pytest

from uni3d.mesh import xatlas_process


@pytest.mark.parametrize(("num_cores", "expected"), [(1, 1), (2, 2), (32, 4)])
def test_neighbours_take_other_cores(num_cores: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = set(range(3, 3 + num_cores))
    taken: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: taken.append(set(cores)), raising=False)
    for process in range(100, 108):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        xatlas_process.use_few_cores()
    assert all(cores <= allowed and len(cores) == expected for cores in taken)
    assert set().union(*taken) == allowed


def test_without_affinity_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    xatlas_process.use_few_cores()
