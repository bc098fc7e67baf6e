"""Whole distillations on toy networks: every recipe moves the student and nothing else, and runs resume."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from distillation_fixtures import distill_config, random_network, save_teacher, teacher_config
from torch import Tensor

from uni3d.config.values import DIVERGENCE_NAMES
from uni3d.diffusion import edm
from uni3d.distillation.draws import Drawer
from uni3d.distillation.image_batches import open_source
from uni3d.distillation.saved_network import open_network
from uni3d.distillation.settings import IMAGE_METHODS, DistillConfig
from uni3d.distillation.student_training import StudentTraining, distill
from uni3d.distillation.teacher_training import TeacherTraining, train_teacher
from uni3d.errors import ConfigError, Interrupted, TrainingDiverged, UsageError
from uni3d.training.checkpoint import CheckpointStore
from uni3d.training.processes import Processes
from uni3d.training.stop import StopFlag

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teachers") / "teacher")


def training(config: DistillConfig, **network: Any) -> StudentTraining:
    teacher = random_network(**network)
    return StudentTraining(config, teacher, open_source(config.data), device=CPU, processes=Processes())


def copied(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def is_same(network: torch.nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def check_three_steps(config: DistillConfig) -> None:
    program = training(config)
    networks = (program.teacher, program.student, program.fake, program.averaged)
    before = [copied(network) for network in networks]
    for step in range(3):
        program.step(step)
    statistics = program.take_statistics()
    program.close()
    is_moved = [not is_same(network, state) for network, state in zip(networks, before, strict=True)]
    assert is_moved == [False, True, True, True]
    assert statistics["skipped"] == 0 and all(torch.isfinite(p).all() for p in program.student.parameters())


@pytest.mark.parametrize("method", IMAGE_METHODS)
def test_every_recipe_moves_the_student(method: str) -> None:
    check_three_steps(distill_config(None, method={"method": method}))


@pytest.mark.parametrize("divergence", [*DIVERGENCE_NAMES, "0.4*forward_kl + 0.6*reverse_kl"])
def test_every_divergence_moves_the_student(divergence: str) -> None:
    check_three_steps(distill_config(None, method={"divergence": divergence}))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"ratio": "detached"}},
        {"method": {"discriminator": "teacher"}},
        {"method": {"weighting": "expansion", "divergence": "js"}},
        {"method": {"weighting": "recipe", "method": "uni-instruct-integral"}},
        {"method": {"method": "sid", "alpha": 1.2}, "noise": {"law": "lognormal"}},
        {"noise": {"companions": "mixture"}, "run": {"accumulate": 2}, "dropout": 0.2},
        {"optimiser": {"gradient_clip": 0.1, "final_fraction": 0.5}, "data": {"max_resident_mib": 0}},
    ],
    ids=str,
)
def test_options_work(changes: dict[str, Any]) -> None:
    check_three_steps(distill_config(None, **changes))


def test_an_unconditional_teacher_of_an_imported_shape() -> None:
    config = distill_config(None)
    program = training(config, label_dim=0, augment_dim=9)
    program.step(0)
    assert program.take_statistics()["skipped"] == 0
    program.close()


def test_each_update_moves_its_own_networks_only() -> None:
    program = training(distill_config(None))
    recipe = program.stages[-1].recipe
    assert recipe is not None and program.head is not None
    names = ("teacher", "student", "averaged", "fake", "head")
    networks: list[torch.nn.Module] = [getattr(program, name) for name in names]
    program.step(0)
    for update, moved in (
        (lambda: program._update_companions(1, 1), {"fake", "head"}),
        (lambda: program._update_student(1, recipe), {"student", "averaged"}),
    ):
        before = [copied(network) for network in networks]
        update()
        changes = {
            name for name, net, state in zip(names, networks, before, strict=True) if not is_same(net, state)
        }
        assert changes == moved
    program.close()


def test_the_student_rests_while_its_companions_warm_up() -> None:
    method = {"score_warmup_images": 8, "plain_warmup_images": 8, "divergence": "forward_kl"}
    method |= {"first_stage_divergence": "reverse_kl", "first_stage_images": 24}
    program = training(distill_config(None, method=method, run={"total_images": 32}))
    student, fake = copied(program.student), copied(program.fake)
    seen = []
    for step in range(4):
        program.step(step)
        statistics = program.take_statistics()
        seen.append((program._stage_name, "student_loss" in statistics, "log_ratio" in statistics))
        if step == 0:
            assert is_same(program.student, student) and not is_same(program.fake, fake)
            assert is_same(program.averaged, student)
    assert seen == [
        ("score warm-up", False, False), ("plain warm-up", True, False), ("reverse_kl", True, True),
        ("forward_kl", True, True),
    ]  # fmt: skip
    program.close()


def test_a_step_that_is_not_finite_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    program = training(distill_config(None))
    program.step(0)
    program.take_statistics()
    weights = [copied(network) for network in (program.student, program.fake)]
    moments = program.student_weights.optimiser.state_dict()["state"][0]["exp_avg_sq"].clone()
    normal = Drawer._normal
    monkeypatch.setattr(Drawer, "_normal", lambda self: normal(self) * float("nan"))
    program.step(1)
    statistics = program.take_statistics()
    assert (statistics["skipped"], statistics["updates"]) == (2, 2)
    for network, state in zip((program.student, program.fake), weights, strict=True):
        assert is_same(network, state)
    state = program.student_weights.optimiser.state_dict()["state"][0]
    assert torch.equal(state["exp_avg_sq"], moments) and float(state["step"]) == 1
    monkeypatch.undo()
    program.step(2)
    assert program.take_statistics()["skipped"] == 0 and not is_same(program.student, weights[0])
    assert program.normaliser.mean_ratio.isfinite().all()
    program.close()


def test_a_run_without_any_finite_step_ends(tmp_path: Path, teacher_folder: Path, monkeypatch: Any) -> None:
    normal = Drawer._normal
    monkeypatch.setattr(Drawer, "_normal", lambda self: normal(self) * float("nan"))
    config = distill_config(teacher_folder, run={"total_images": 400})
    with pytest.raises(TrainingDiverged, match="no gradient was finite in the 20 steps"):
        distill(config, tmp_path / "run", quiet=True)


def test_a_run_leaves_its_files(tmp_path: Path, teacher_folder: Path) -> None:
    result = distill(distill_config(teacher_folder), tmp_path / "run", quiet=True)
    assert result.is_finished and (result.step, result.images) == (3, 24)
    config, source = edm.read_description(result.network)
    assert config == edm.read_description(teacher_folder)[0]
    assert source["images_seen"] == 24 and source["ema_half_life_images"] == 16
    student = {"sigma_init": 2.5, "method": "uni_instruct", "divergence": "forward_kl"}
    assert source["student"] == student and source["ema"] == "half-life 16 images, ramp-up 0.5"
    opened = open_network(result.network)
    assert opened.settings.sigma_init == 2.5 and opened.settings.num_steps is None
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[-1]["skipped"] == 0
    assert (tmp_path / "run" / "grids" / "step_00000003.png").is_file()
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "log.txt", "checkpoints", "student"} <= names
    average = CheckpointStore(tmp_path / "run" / "checkpoints").load_latest()
    assert average is not None
    saved = average.state["program"]["student"]["average"]
    student = edm.load(result.network)
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, saved[name])


def states(folder: Path) -> dict[str, Any]:
    checkpoint = CheckpointStore(folder / "checkpoints").load_latest()
    assert checkpoint is not None
    return checkpoint.state["program"]


def assert_equal(first: Any, second: Any, place: str = "") -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for key in first:
            assert_equal(first[key], second[key], f"{place}/{key}")
    elif isinstance(first, Tensor):
        assert torch.equal(first, second), place
    else:
        assert first == second, place


def stop_at(monkeypatch: pytest.MonkeyPatch, program: type, step: int) -> None:
    """A SIGTERM that arrives while step `step` is done."""
    flags: list[StopFlag] = []
    enter, inner = StopFlag.__enter__, program.step  # type: ignore[attr-defined]
    monkeypatch.setattr(StopFlag, "__enter__", lambda flag: flags.append(flag) or enter(flag))

    def stepping(self: Any, index: int) -> None:
        inner(self, index)
        if index + 1 == step:
            flags[-1].request(15)

    monkeypatch.setattr(program, "step", stepping)


def test_a_stopped_distillation_goes_on_exactly(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = distill_config(
        teacher_folder,
        dropout=0.1,
        method={"score_warmup_images": 8, "fake_steps": 2},
        run={"total_images": 40},
    )
    distill(config, tmp_path / "unbroken", quiet=True)
    with monkeypatch.context() as patch:
        stop_at(patch, StudentTraining, 3)
        with pytest.raises(Interrupted, match=r"step 3 of 5.*uni3d distill --output .* --resume") as stopped:
            distill(config, tmp_path / "run", quiet=True)
    assert stopped.value.exit_code == 143
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
    result = distill(config, tmp_path / "run", resume=True, quiet=True)
    assert result.is_finished and result.step == 5
    assert_equal(states(tmp_path / "unbroken"), states(tmp_path / "run"))
    lines = [
        json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines == [1, 2, 3, 4, 5]


def test_a_stopped_teacher_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = teacher_config(network={"dropout": 0.1, "label_dropout": 0.2}, run={"total_images": 40})
    train_teacher(config, tmp_path / "unbroken", quiet=True)
    with monkeypatch.context() as patch:
        stop_at(patch, TeacherTraining, 2)
        with pytest.raises(Interrupted, match="step 2 of 5"):
            train_teacher(config, tmp_path / "run", quiet=True)
    result = train_teacher(config, tmp_path / "run", resume=True, quiet=True)
    assert result.is_finished and result.network == tmp_path / "run" / "teacher"
    assert_equal(states(tmp_path / "unbroken"), states(tmp_path / "run"))
    assert edm.read_description(result.network)[1]["images_seen"] == 40


def test_a_changed_configuration_is_refused_unless_told(tmp_path: Path, teacher_folder: Path) -> None:
    run = tmp_path / "run"
    distill(distill_config(teacher_folder), run, quiet=True)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    other = distill_config(
        teacher_folder,
        optimiser={"learning_rate": 5e-4},
        method={"divergence": "js"},
        run={"total_images": 32},
    )
    with pytest.raises(
        ConfigError, match=r"learning_rate was 0.001, now 0.0005; .*--accept-changes"
    ) as error:
        distill(other, run, resume=True, quiet=True)
    assert 'method.divergence was null, now "js"' in str(error.value)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert distill(other, run, resume=True, accept_changes=True, quiet=True).step == 4
    # More images alone are no change while the learning rate is constant.
    longer = distill_config(
        teacher_folder,
        optimiser={"learning_rate": 5e-4},
        method={"divergence": "js"},
        run={"total_images": 40},
    )
    assert distill(longer, run, resume=True, quiet=True).step == 5


def test_another_teacher_is_a_change(tmp_path: Path, teacher_folder: Path) -> None:
    distill(distill_config(teacher_folder), tmp_path / "run", quiet=True)
    other = save_teacher(tmp_path / "other", seed=9)
    with pytest.raises(ConfigError, match="teacher_sha256 was"):
        distill(distill_config(other), tmp_path / "run", resume=True, quiet=True)


def test_time_is_up(tmp_path: Path, teacher_folder: Path) -> None:
    config = distill_config(teacher_folder, run={"max_minutes": 0.001, "total_images": 4000})
    result = distill(config, tmp_path / "run", quiet=True)
    assert not result.is_finished and result.step >= 1


def test_batches_that_do_not_divide(teacher_folder: Path) -> None:
    from uni3d.distillation.session import check_batch

    config = distill_config(teacher_folder).run
    check_batch(config, Processes(0, 2))
    with pytest.raises(UsageError, match="run.batch is 8; expected a multiple of 3"):
        check_batch(config, Processes(0, 3))


def test_the_images_of_a_batch_do_not_depend_on_where_they_lie() -> None:
    configs = [distill_config(None, data={"max_resident_mib": size}) for size in (0, 100)]
    programs = [training(config) for config in configs]
    for index in (0, 1, 7):
        first, second = (program.batches.at(index) for program in programs)  # type: ignore[union-attr]
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])  # type: ignore[arg-type]
    for program in programs:
        program.close()


def test_tensorboard_gets_the_metrics_where_it_is_installed(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path / "run" / "tensorboard")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, step))

        def add_image(self, name: str, image: Tensor, step: int) -> None:
            assert image.shape == (3, 64, 64) and image.dtype == torch.uint8
            written.append((name, step))

        def close(self) -> None:
            written.append(("closed", 0))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    distill(distill_config(teacher_folder), tmp_path / "run", quiet=True)
    assert {("student_loss", 1), ("fake_score_loss", 3), ("samples", 3)} <= set(written)
    assert written[-1] == ("closed", 0)


def test_a_method_without_a_discriminator_reads_no_images(tmp_path: Path, teacher_folder: Path) -> None:
    config = distill_config(
        teacher_folder, method={"method": "sid"}, data={"source": str(tmp_path / "missing.zip")}
    )
    assert distill(config, tmp_path / "run", quiet=True).is_finished


def test_the_parts_of_a_batch_change_nothing() -> None:
    """But for means over the samples that are seen at once; Adam's epsilon keeps rounding small here."""
    weights = []
    for parts in (1, 4):
        smooth = {"epsilon": 1e-2}
        config = distill_config(
            None,
            method={"divergence": "js"},
            run={"accumulate": parts},
            optimiser=smooth,
            companions=smooth,
        )
        program = training(config)
        for step in range(2):
            program.step(step)
        program.close()
        weights.append(torch.cat([p.detach().flatten() for p in program.student.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)
