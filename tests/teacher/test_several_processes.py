"""Two processes that train one teacher over gloo: the same weights as one process at the same batch."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from teacher_fixtures import tiny_config, toy_views

from uni3d.errors import UsageError
from uni3d.teacher.checkpoint_files import read_tensors
from uni3d.teacher.settings import TeacherConfig
from uni3d.teacher.training import train_teacher
from uni3d.training.processes import Processes

PROGRAM = """
import sys, torch
sys.path.insert(0, sys.argv[2])
torch.set_num_threads(1)
from teacher_fixtures import toy_views
from test_several_processes import config_of
from uni3d.teacher.training import train_teacher
result = train_teacher(config_of(1), None, sys.argv[1], views=toy_views())
print(result.is_finished, result.step, result.teacher_folder is not None)
"""


def config_of(accumulate_steps: int) -> TeacherConfig:
    config = tiny_config()
    # 3 fresh views a step: the two processes encode two and one of them.
    denoiser = dataclasses.replace(
        config.denoiser, accumulate_steps=accumulate_steps, batch_size=6, planned_steps=4
    )
    return dataclasses.replace(config, denoiser=denoiser)


def start(rank: int, port: int, output: Path) -> subprocess.Popen[str]:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = [sys.executable, "-c", PROGRAM, str(output), str(Path(__file__).parent)]
    return subprocess.Popen(
        words, env=os.environ | place, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [start(rank, port, tmp_path / "two") for rank in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs[0][1] + outputs[1][1]
    assert [output[0].split() for output in outputs] == [["True", "4", "True"], ["True", "4", "False"]]
    train_teacher(config_of(2), None, tmp_path / "one", views=toy_views())
    for folder in ("autoencoder", "checkpoints/denoiser"):
        same_tensors(*(read_tensors(tmp_path / name / folder) for name in ("one", "two")))


def same_tensors(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if name.endswith("k_proj.bias"):  # attention does not depend on it: its gradient is rounding alone
            continue
        # Relative to the whole tensor: AdamW turns rounding errors of near-zero gradients into steps.
        difference = (tensor - two[name]).norm() / tensor.norm().clamp_min(1e-8)
        assert difference < 1e-3, (name, float(difference))


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    odd = dataclasses.replace(
        config, denoiser=dataclasses.replace(config.denoiser, accumulate_steps=1, batch_size=7)
    )
    train_teacher(odd, None, tmp_path / "alone", views=toy_views(), publish=False)
    with pytest.raises(UsageError, match="accumulate_steps|multiple of"):
        dataclasses.replace(odd.denoiser, accumulate_steps=2)


def test_one_process_alone_does_as_it_is_told() -> None:
    alone = Processes()
    tensor = torch.ones(3)
    alone.add_up_([tensor])
    assert tensor.tolist() == [1, 1, 1] and alone.as_main_says(0.25, True) == (0.25, True)
    assert alone.share(5) == slice(0, 5) and alone.device(torch.device("cuda")) == torch.device("cuda")


def test_shares_cover_everything_once() -> None:
    for num_rows in (0, 1, 5, 8):
        for num in (1, 2, 3):
            rows = [
                row for rank in range(num) for row in range(num_rows)[Processes(rank, num).share(num_rows)]
            ]
            assert rows == list(range(num_rows))
    assert Processes(1, 2, 1).device(torch.device("cuda")) == torch.device("cuda", 1)
    assert Processes(1, 2, 1).device(torch.device("cuda", 0)) == torch.device("cuda", 0)
