"""Two processes that distil together over gloo: the same student as one process at the same batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distillation_fixtures import distill_config, save_teacher, teacher_config
from torch import Tensor

from uni3d.distillation.settings import DistillConfig
from uni3d.distillation.student_training import distill
from uni3d.distillation.teacher_training import train_teacher
from uni3d.training.checkpoint import CheckpointStore

PROGRAM = """
import os, sys, torch
sys.path.insert(0, sys.argv[3])
torch.set_num_threads(1)
import test_distill_processes as here
ports = os.environ["PORTS"].split()
for method in here.METHODS:
    os.environ["MASTER_PORT"] = ports.pop()
    result = here.distill(here.config_of(sys.argv[2], method), f"{sys.argv[1]}/{method}", quiet=True)
os.environ["MASTER_PORT"] = ports.pop()
result = here.train_teacher(here.teacher_config(optimiser=here.SMOOTH), f"{sys.argv[1]}/teacher", quiet=True)
print(result.is_finished, result.step)
"""
METHODS = ("uni-instruct", "f-distill")
# Steps in proportion to the gradients: Adam's own epsilon makes steps of the rounding errors of small ones.
SMOOTH = {"epsilon": 1e-2}


def config_of(teacher: str, method: str) -> DistillConfig:
    """Forward KL with a normalised ratio, and a weight over its mean: both share means among processes."""
    divergence = "forward_kl" if method == "uni-instruct" else "js"
    return distill_config(
        teacher, method={"method": method, "divergence": divergence}, optimiser=SMOOTH, companions=SMOOTH
    )


def free_ports(num: int) -> list[int]:
    """One for each run: a port is not free at once when a group of processes has left it."""
    sockets = [socket.socket() for _ in range(num)]
    for opened in sockets:
        opened.bind(("127.0.0.1", 0))
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def start(rank: int, ports: list[int], words: list[str]) -> subprocess.Popen[str]:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    place |= {"MASTER_ADDR": "127.0.0.1", "PORTS": " ".join(map(str, ports))}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words, str(Path(__file__).parent)],
        env=os.environ | place, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def flat(state: Any, place: str = "") -> dict[str, Tensor]:
    if isinstance(state, Tensor):
        return {place: state}
    found: dict[str, Tensor] = {}
    if isinstance(state, dict):
        for key, value in state.items():
            found |= flat(value, f"{place}/{key}")
    return found


def state_of(folder: Path) -> dict[str, Tensor]:
    checkpoint = CheckpointStore(folder / "checkpoints").load_latest()
    assert checkpoint is not None and checkpoint.step == 3
    return flat(checkpoint.state["program"])


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "given")
    ports = free_ports(len(METHODS) + 1)
    both = [start(rank, ports, [str(tmp_path / "two"), str(teacher)]) for rank in range(2)]
    outputs = [process.communicate(timeout=100) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs[0][1] + outputs[1][1]
    assert [output[0].split() for output in outputs] == [["True", "3"]] * 2
    for method in METHODS:
        distill(config_of(str(teacher), method), tmp_path / "one" / method, quiet=True)
    train_teacher(teacher_config(optimiser=SMOOTH), tmp_path / "one" / "teacher", quiet=True)
    for name in (*METHODS, "teacher"):
        one, two = state_of(tmp_path / "one" / name), state_of(tmp_path / "two" / name)
        assert one.keys() == two.keys() and len(one) > 50
        for key, tensor in one.items():
            # Relative to the whole tensor, which may begin near zero.
            difference = (tensor - two[key]).norm() / tensor.norm().clamp_min(1e-8)
            assert difference < 1e-3, (name, key, float(difference))
