"""The timed training steps train, and the benchmark says what it should, at toy size on the CPU."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from uni3d.diffusion.edm import EDMDenoiser
from uni3d.diffusion.edm_unet import EDMBody
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
from uni3d.distillation.training_steps import ProjectStep, ReleasedStep, StepSetup
from uni3d.errors import UsageError

SMALL = BenchmarkSettings(
    network="toy",
    batch_size=4,
    micro_batch=2,
    compile=False,
    precision="fp32",
    device="cpu",
    num_warmup=0,
    num_repeats=1,
    matrix_size=32,
)


def setup(recipe: str = "uni_instruct", **changes: object) -> StepSetup:
    method, divergence = recipe_called(recipe)
    values = StepSetup(
        config=network_config("toy"),
        method=method,
        divergence=divergence,
        batch_size=4,
        device=torch.device("cpu"),
        precision="fp32",
        compile=False,
        micro_batch=2,
        learning_rate=1e-3,
    )
    return dataclasses.replace(values, **changes)


def networks(step: ProjectStep | ReleasedStep) -> dict[str, EDMDenoiser]:
    owner = step.training if isinstance(step, ProjectStep) else step
    return {name: getattr(owner, name) for name in ("student", "fake", "teacher")}


@pytest.mark.parametrize("build", [ProjectStep, ReleasedStep])
def test_a_step_moves_what_it_should(build: Callable[[StepSetup], ProjectStep | ReleasedStep]) -> None:
    step = build(setup())
    nets = networks(step)
    before = {name: [p.detach().clone() for p in net.parameters()] for name, net in nets.items()}
    for _ in range(2):
        step()
    for name, net in nets.items():
        moved = [not torch.equal(a, b) for a, b in zip(before[name], net.parameters(), strict=True)]
        assert any(moved) == (name != "teacher"), name
        assert all(parameter.isfinite().all() for parameter in net.parameters()), name


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_steps_past_its_warm_ups(name: str) -> None:
    step = ProjectStep(setup(name, batch_size=2))
    before = [parameter.detach().clone() for parameter in step.training.student.parameters()]
    step()
    after = list(step.training.student.parameters())
    assert all(parameter.isfinite().all() for parameter in after)
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    (stage,) = step.training.stages
    assert stage.recipe is not None and stage.recipe.divergence == setup(name).recipe.divergence


@pytest.mark.parametrize(
    "name", ["diff_instruct", "sid", "sida", "uni_instruct", "uni_instruct_integral", "dmd"]
)
def test_the_passes_are_those_that_a_step_makes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the encoder and the decoder of every network, forwards and, with a graph, backwards."""
    step = ProjectStep(setup(name))
    counted = {"encode": 0, "decode": 0}
    for part in counted:
        plain = getattr(EDMBody, part)

        def counting(self: EDMBody, *arguments: Any, _plain: Any = plain, _part: str = part) -> Any:
            size = arguments[0].shape[0] / 4
            is_trained = any(parameter.requires_grad for parameter in self.parameters())
            backwards = 2 if is_trained else int(arguments[0].requires_grad)
            counted[_part] += size * (1 + (backwards if torch.is_grad_enabled() else 0))
            return _plain(self, *arguments)

        monkeypatch.setattr(EDMBody, part, counting)
    step()
    passes = step_passes(setup(name).recipe)
    assert counted["decode"] == passes.full
    assert counted["encode"] == passes.full + passes.encoder


def test_the_cost_of_known_recipes() -> None:
    expected = {"diff_instruct": "9F", "sid": "11F", "sida": "11F + 3E", "uni_instruct": "11F + 3E"}
    for name, cost in expected.items():
        assert str(step_passes(setup(name).recipe)) == cost
    full, encoder = forward_flops(network_config("cifar10-32x32-uncond-vp"))
    assert full / 1e9 == pytest.approx(42.4, abs=0.1) and encoder / 1e9 == pytest.approx(13.8, abs=0.1)
    assert step_passes(setup("sida").recipe).flops(full, encoder) / 1e9 == pytest.approx(507, abs=2)


def test_the_report_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.json"
    words = ["--network", "toy", "--batch", "4", "--released-batch", "2", "--device", "cpu"]
    words += ["--no-compile", "--warmup", "0", "--repeats", "1", "--matrix-size", "32"]
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


def test_a_row_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(setup: StepSetup) -> Any:
        raise RuntimeError("no room")

    monkeypatch.setattr(training_steps, "broken", broken, raising=False)
    monkeypatch.setattr(training_steps, "idle", lambda setup: lambda: None, raising=False)
    names = tuple(f"uni3d.distillation.training_steps:{name}" for name in ("broken", "idle"))
    lines: list[str] = []
    kept: list[list[str]] = []
    result = run_benchmark(
        dataclasses.replace(SMALL, builds=names),
        report=lines.append,
        keep=lambda result: kept.append(list(result["builds"])),
    )
    assert result["builds"][names[0]]["error"] == "no room" and result["builds"][names[1]]["median_ms"] > 0
    assert any("left out" in line for line in lines) and kept[:2] == [[names[0]], list(names)]


def test_slow_rows_end_early() -> None:
    calls: list[int] = []
    timing = benchmark_step.time_build(
        lambda setup: lambda: calls.append(1), setup(), num_warmup=9, num_repeats=9, seconds=0.0
    )
    assert timing.num_repeats == 3 and len(calls) == 2 + 3


@pytest.mark.gpu
def test_the_project_step_never_waits() -> None:
    device = torch.device("cuda")
    fast = ProjectStep(setup(device=device, precision="bf16"))
    slow = ReleasedStep(setup(device=device))
    for step in (fast, slow):
        step()
    assert count_host_waits(fast) == 0 < count_host_waits(slow)
    timing = benchmark_step.time_build(ProjectStep, setup(device=device), num_warmup=1, num_repeats=2)
    assert timing.peak_memory_gib > 0 and timing.host_waits == 0
