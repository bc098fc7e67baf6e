"""Mesh stages against the field alone at equal seconds: costs by stage, steps that take as long, failures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_evaluator import PlainEvaluator

from uni3d.benchmark import program, stage_costs
from uni3d.benchmark.backends import FieldBackend, Product
from uni3d.benchmark.pages import summary_markdown
from uni3d.benchmark.plan import chosen_variants
from uni3d.benchmark.settings import BenchmarkConfig, BudgetConfig, ViewsConfig
from uni3d.benchmark.stage_costs import StageCosts, seconds_of_a_step, steps_as_long_as
from uni3d.config.stages import GeometryConfig, StageGuidanceConfig, StagesConfig, TextureConfig
from uni3d.config.text_to_3d import (
    DiscriminatorConfig,
    FakeScoreConfig,
    FieldConfig,
    MeshConfig,
    RendererConfig,
    TextTo3DConfig,
)

PROMPTS = ("a red chair", "a blue vase")
FAILING = PROMPTS[1]


def test_costs_are_kept_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples belong to the field, a hand-over to what follows it, the rest to the export."""
    clock = iter([0.0, *(5.0, 6.0, 7.0, 8.0), 8.0, *(11.0, 12.0), 12.0, 20.0])
    monkeypatch.setattr(stage_costs.time, "monotonic", lambda: next(clock))
    config = TextTo3DConfig(prompt="a chair", steps=4, stages=StagesConfig(texture=TextureConfig(steps=2)))
    with StageCosts(config, torch.device("cpu")) as costs:
        for step in range(1, 7):
            costs(step, {})
    assert {name: stage["seconds"] for name, stage in costs.stages.items()} == {
        "field": 8.0,
        "texture": 4.0,
        "export": 8.0,
    }
    assert costs.stages["field"]["step_seconds"] == 1.0 and costs.stages["texture"]["steps"] == 2
    assert costs.peak_bytes == max(stage["peak_memory_bytes"] for stage in costs.stages.values()) > 0
    assert steps_as_long_as(costs.stages) == 8, "four more seconds, the samples drawn once"


def test_what_warms_up_is_no_part_of_a_step() -> None:
    seconds = [9.0, *[1.0] * 59, 7.0, *[2.0] * 39]
    assert seconds_of_a_step(seconds) == pytest.approx(1.4, abs=0.01)
    assert seconds_of_a_step([3.0]) == 3.0


def _settings(folder: Path, teacher: Path) -> BenchmarkConfig:
    prompts, variants = folder / "prompts.txt", folder / "variants.yaml"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    variants.write_text(
        "field: {steps: 3}\n"
        "stages: {steps: 2, stages: {geometry: {steps: 2, resolution: 8}, texture: {steps: 2}}}\n"
    )
    small = StageGuidanceConfig(resolution=((0.0, 16.0),))
    run = TextTo3DConfig(
        teacher=str(teacher),
        device="cpu",
        steps=2,
        field=FieldConfig(resolutions=(8, 16)),
        renderer=RendererConfig(resolution=((0.0, 16.0),), samples_per_ray=16),
        fake_score=FakeScoreConfig(lora_rank=2, warmup_steps=1),
        discriminator=DiscriminatorConfig(num_real_samples=2, sampling_steps=2),
        stages=StagesConfig(geometry=GeometryConfig(guidance=small), texture=TextureConfig(guidance=small)),
        mesh=MeshConfig(resolution=24, max_triangles=400, texture_size=64, turntable_frames=0),
    )
    return BenchmarkConfig(
        output=folder / "out",
        variants=str(variants),
        baseline="field",
        prompts=prompts,
        seeds=(0,),
        num_bootstrap=20,
        quiet=True,
        turntables=False,
        budget=BudgetConfig(kinds=("seconds",), reference="stages"),
        views=ViewsConfig(azimuths_deg=(0.0, 90.0), elevations_deg=(15.0,), teacher_samples_per_view=0),
        run=run,
    )


def test_a_gpu_warms_up_in_a_run_that_does_not_count(
    tmp_path: Path, tiny_teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "Evaluator", PlainEvaluator)
    settings = _settings(tmp_path, tiny_teacher_folder)
    session = program._Session(settings, settings.output, chosen_variants(settings))
    made: list[TextTo3DConfig] = []
    monkeypatch.setattr(session.backend, "make", lambda runs: made.extend(config for config, _ in runs))
    session._warm_up()
    assert not made, "on a CPU nothing is compiled"
    session.device = "cuda"
    session._warm_up()
    (config,) = made
    assert config.prompt == PROMPTS[0] and config.stages.geometry.steps == config.stages.texture.steps == 2


def test_the_field_alone_takes_as_long_as_the_stages(
    tmp_path: Path, tiny_teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = FieldBackend._make

    def failing(self: FieldBackend, config: TextTo3DConfig, folder: Path) -> Product:
        if config.prompt == FAILING and config.stages.texture.steps:
            raise RuntimeError("out of luck")
        return make(self, config, folder)

    monkeypatch.setattr(FieldBackend, "_make", failing)
    monkeypatch.setattr(program, "Evaluator", PlainEvaluator)
    settings = _settings(tmp_path, tiny_teacher_folder)
    summary = program.benchmark(settings)
    assert summary is not None

    def record(method: str, prompt: str) -> Any:
        folder = settings.output / "runs" / "seconds" / method / f"{prompt.replace(' ', '-')}-0"
        return json.loads((folder / "record.json").read_text())

    stages, alone = record("stages", PROMPTS[0]), record("field", PROMPTS[0])
    assert list(stages["costs"]["stages"]) == ["field", "geometry", "texture", "export"]
    assert list(alone["costs"]["stages"]) == ["field", "export"]
    assert alone["costs"]["steps"] == steps_as_long_as(stages["costs"]["stages"]) > 2
    assert record("field", FAILING)["costs"]["steps"] == 3, "there was nothing to be as long as"
    assert [entry["prompt"] for entry in summary["failures"]] == [FAILING]
    rows = {row["method"]: row["figures"] for row in summary["rows"]}
    assert rows["stages"]["worst_view"]["versus_baseline"]["num"] == len(PROMPTS)
    assert rows["stages"]["psnr_db"]["num"] == 1 and rows["stages"]["geometry_gib"]["mean"] > 0
    text = summary_markdown(summary)
    for name in (
        "At equal seconds",
        "PSNR to what was optimised",
        "geometry, s",
        "export, GiB",
        "1 runs failed",
    ):
        assert name in text
    monkeypatch.setattr(FieldBackend, "_make", lambda *_: pytest.fail("made again"))
    assert program.benchmark(dataclasses.replace(settings)) == summary
