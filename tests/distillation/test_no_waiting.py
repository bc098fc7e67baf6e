"""A step asks the device for no value: nothing is read back and no shape depends on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distillation_fixtures import distill_config, random_network, teacher_config
from no_waiting import Watch
from torch import Tensor

from uni3d.distillation.image_batches import open_source
from uni3d.distillation.student_training import StudentTraining
from uni3d.distillation.teacher_training import TeacherTraining
from uni3d.training.processes import Processes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_hot_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch checks the classes on a CPU alone."""

    def one_hot(labels: Tensor, num_classes: int) -> Tensor:
        return (labels[:, None] == torch.arange(num_classes)).long()

    monkeypatch.setattr(torch.nn.functional, "one_hot", one_hot)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"divergence": "forward_kl"}, "optimiser": {"gradient_clip": 1.0}},
        {"method": {"method": "f-distill", "discriminator": "teacher"}, "dropout": 0.1},
        {"method": {"method": "dmd"}},
        {"method": {"weighting": "expansion"}, "noise": {"companions": "mixture"}},
    ],
    ids=str,
)
def test_a_distillation_step_waits_for_nothing(changes: dict[str, Any]) -> None:
    config = distill_config(None, **changes)
    program = StudentTraining(
        config, random_network(), open_source(config.data), device=CPU, processes=Processes()
    )
    program.step(0)
    with Watch():
        program.step(1)
    assert program.take_statistics()["skipped"] == 0
    program.close()


def test_a_teachers_step_waits_for_nothing() -> None:
    config = teacher_config(network={"dropout": 0.1, "label_dropout": 0.1})
    images = open_source(config.data)
    network = config.network.edm_config(resolution=8, image_channels=3, label_dim=4)
    program = TeacherTraining(config, network, images, device=CPU, processes=Processes())
    program.step(0)
    with Watch():
        program.step(1)
    program.close()


def test_the_watch_can_fail() -> None:
    values = torch.ones(3)
    for waits in (lambda: float(values.sum()), lambda: values[values > 0], lambda: bool(values.any())):
        with pytest.raises(AssertionError), Watch():
            waits()
