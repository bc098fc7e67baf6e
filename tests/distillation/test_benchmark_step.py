"""The timed training steps train, and the benchmark says what it should, at toy size on the CPU."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from uni3d.distillation import benchmark_step, training_steps
from uni3d.distillation.benchmark_step import (
    RECIPES,
    BenchmarkSettings,
    builder_called,
    count_host_waits,
    forward_flops,
    main,
    network_config,
    recipe_called,
    run_benchmark,
    step_passes,
)
from uni3d.distillation.training_steps import ProjectStep, ReleasedStep, StepSetup, frozen_view
from uni3d.errors import UsageError

SMALL = BenchmarkSettings(
    network="toy",
    batch_size=4,
    micro_batch=2,
    compile_mode=None,
    precision="float32",
    device="cpu",
    num_warmup=0,
    num_repeats=1,
    matrix_size=32,
)


def setup(recipe: str = "uni_instruct", **changes: object) -> StepSetup:
    values = StepSetup(
        config=network_config("toy"),
        recipe=recipe_called(recipe),
        batch_size=4,
        device=torch.device("cpu"),
        body_dtype=torch.float32,
        compile_mode=None,
        micro_batch=2,
        learning_rate=1e-3,
    )
    return dataclasses.replace(values, **changes)


@pytest.mark.parametrize("build", [ProjectStep, ReleasedStep])
def test_a_step_moves_what_it_should(build: Callable[[StepSetup], ProjectStep | ReleasedStep]) -> None:
    step = build(setup())
    nets = {"student": step.student, "fake": step.fake, "teacher": step.teacher}
    before = {name: [p.detach().clone() for p in net.parameters()] for name, net in nets.items()}
    for _ in range(2):
        step()
    for name, net in nets.items():
        moved = [not torch.equal(a, b) for a, b in zip(before[name], net.parameters(), strict=True)]
        assert any(moved) == (name != "teacher"), name
        assert all(parameter.isfinite().all() for parameter in net.parameters()), name


def test_frozen_views_follow_their_network() -> None:
    step = ProjectStep(setup())
    step()
    for net, view in ((step.student, step.student_view), (step.fake, step.fake_view)):
        assert net.training and not view.training
        for own, seen in zip(net.parameters(), view.parameters(), strict=True):
            assert torch.equal(own, seen) and not seen.requires_grad
    assert frozen_view(step.student).config == step.setup.config


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    step = ProjectStep(setup())
    before = [parameter.detach().clone() for parameter in step.fake_parameters]
    gradients = [torch.ones_like(parameter) for parameter in before]
    gradients[3][0] = torch.nan
    step._update(step.fake_optimiser, step.fake_parameters, tuple(gradients))
    assert step.num_skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, step.fake_parameters, strict=True))
    gradients[3][0] = 1.0
    step._update(step.fake_optimiser, step.fake_parameters, tuple(gradients))
    assert step.num_skipped == 1
    assert not torch.equal(before[0], step.fake_parameters[0])


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_steps(name: str) -> None:
    step = ProjectStep(setup(name, batch_size=2))
    step()
    assert all(parameter.isfinite().all() for parameter in step.student_parameters)


def test_the_cost_of_known_recipes() -> None:
    expected = {"diff_instruct": "9F", "sid": "11F", "sida": "11F + 3E", "uni_instruct": "11F + 3E"}
    for name, cost in expected.items():
        assert str(step_passes(recipe_called(name))) == cost
    full, encoder = forward_flops(network_config("cifar10-32x32-uncond-vp"))
    assert full / 1e9 == pytest.approx(42.4, abs=0.1) and encoder / 1e9 == pytest.approx(13.8, abs=0.1)
    assert step_passes(recipe_called("sida")).flops(full, encoder) / 1e9 == pytest.approx(507, abs=2)


def test_the_report_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.json"
    words = ["--network", "toy", "--batch", "4", "--released-batch", "2", "--device", "cpu"]
    words += ["--compile", "none", "--warmup", "0", "--repeats", "1", "--matrix-size", "32"]
    assert main([*words, "--recipes", "sid", "--output", str(out)]) == 0
    table = capsys.readouterr().out
    assert "project against released" in table
    result = json.loads(out.read_text())
    assert result["builds"].keys() == {"project", "released"} and result["speedup"] > 0
    for row in (*result["builds"].values(), result["recipes"]["sid"]):
        assert row["median_ms"] > 0 and row["images_per_s"] > 0 and 0 < row["share_of_matrix_rate"]
        assert row["host_waits"] is None and row["passes"]
    assert result["recipes"].keys() == RECIPES.keys()
    assert "median_ms" not in result["recipes"]["sida"] and result["recipes"]["sida"]["gflop_per_image"] > 0


def test_another_build_can_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(
        training_steps, "other", lambda setup: lambda: calls.append(setup.batch_size), raising=False
    )
    name = "uni3d.distillation.training_steps:other"
    result = run_benchmark(dataclasses.replace(SMALL, builds=(name,)))
    assert calls == [4] and "speedup" not in result
    for wrong in ("none", "uni3d.none:build", "uni3d.distillation.training_steps:nothing"):
        with pytest.raises(UsageError, match="unknown build"):
            builder_called(wrong)
    with pytest.raises(UsageError, match="unknown recipe"):
        recipe_called("none")


@pytest.mark.gpu
def test_the_project_step_never_waits() -> None:
    device = torch.device("cuda")
    fast = ProjectStep(setup(device=device, body_dtype=torch.bfloat16))
    slow = ReleasedStep(setup(device=device))
    for step in (fast, slow):
        step()
    assert count_host_waits(fast) == 0 < count_host_waits(slow)
    timing = benchmark_step.time_build(ProjectStep, setup(device=device), num_warmup=1, num_repeats=2)
    assert timing.peak_memory_gib > 0 and timing.host_waits == 0
