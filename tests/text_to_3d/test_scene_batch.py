"""Scenes optimised together: each goes where it goes alone, and a bad one spoils no other."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from uni3d.config.text_to_3d import (
    DiscriminatorConfig,
    FakeScoreConfig,
    FieldConfig,
    GuidanceConfig,
    RendererConfig,
    TextTo3DConfig,
)
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.scene.camera import ring_cameras
from uni3d.scene.renderer import render
from uni3d.text_to_3d.scene_batch import SceneBatch
from uni3d.text_to_3d.scene_optimiser import SceneOptimiser
from uni3d.text_to_3d.scene_requests import SceneRequest

SCENES = (SceneRequest("a red chair", 3), SceneRequest("a blue vase", 4))


def batch_config(**changes: Any) -> TextTo3DConfig:
    config = TextTo3DConfig(
        steps=8,
        field=FieldConfig(resolutions=(8, 16)),
        guidance=GuidanceConfig(views_per_step=2),
        renderer=RendererConfig(resolution=((0.0, 16.0),), samples_per_ray=16, occupancy_interval=2),
        fake_score=FakeScoreConfig(lora_rank=2, warmup_steps=1, updates_per_step=2),
        # More samples than one pass draws, so that passes are joined.
        discriminator=DiscriminatorConfig(num_real_samples=10, sampling_steps=2),
    )
    return dataclasses.replace(config, **changes)


def run_batch(
    config: TextTo3DConfig, folder: Path, scenes: Sequence[SceneRequest] = SCENES, *, num_steps: int = 3
) -> tuple[SceneBatch, list[dict[str, Tensor]]]:
    batch = SceneBatch(config, scenes, LatentDiffusionTeacher.from_pretrained(folder))
    batch.prepare()
    reports = [batch.step() for _ in range(num_steps)]
    assert all(all(report.finite) for report in reports)
    return batch, [report.values for report in reports]


def run_alone(
    config: TextTo3DConfig, scene: SceneRequest, folder: Path, *, num_steps: int = 3
) -> tuple[SceneOptimiser, list[dict[str, float]]]:
    own = dataclasses.replace(config, prompt=scene.prompt, seed=scene.seed)
    optimiser = SceneOptimiser(own, LatentDiffusionTeacher.from_pretrained(folder))
    optimiser.prepare()
    return optimiser, [optimiser.step().values for _ in range(num_steps)]


def assert_same_numbers(batch: dict[str, Tensor], scene: int, alone: dict[str, float]) -> None:
    assert batch.keys() == alone.keys()
    for name, value in alone.items():
        assert float(batch[name][scene]) == pytest.approx(value, rel=2e-3, abs=1e-5), name


def picture(state: dict[str, Any], field: Any) -> Tensor:
    """What the field of a state looks like. Not its voxels: where a gradient is nearly nothing, Adam makes
    whole steps of its rounding errors."""
    field.load_state_dict(state["field"])
    with torch.no_grad():
        return render(field, ring_cameras(3), 16, 16, 0.5, num_samples=32).image


@pytest.mark.parametrize("method", ["uni-instruct", "sds"])
def test_a_scene_of_a_batch_goes_where_it_goes_alone(method: str, tiny_teacher_folder: Path) -> None:
    config = batch_config(method=method)
    batch, reports = run_batch(config, tiny_teacher_folder)
    for scene, request in enumerate(SCENES):
        optimiser, alone = run_alone(config, request, tiny_teacher_folder)
        for together, own in zip(reports, alone, strict=True):
            assert_same_numbers(together, scene, own)
        state, own_state = batch.state_dict(scene), optimiser.state_dict()
        assert state.keys() == own_state.keys()
        assert torch.equal(state["generator"], own_state["generator"])
        like = batch.fields.field(scene)
        torch.testing.assert_close(picture(state, like), picture(own_state, like), atol=2e-3, rtol=0)
        for name, tensor in own_state.get("fake_score", {}).items():
            error = (tensor - state["fake_score"][name]).norm() / tensor.norm().clamp_min(1e-6)
            assert error < 0.02, name


def test_a_run_can_leave_its_batch_and_go_on_alone(tiny_teacher_folder: Path) -> None:
    """From the state of a scene, `SceneOptimiser` takes the step that the batch takes."""
    config = batch_config()
    batch, _ = run_batch(config, tiny_teacher_folder)
    own = dataclasses.replace(config, prompt=SCENES[1].prompt, seed=SCENES[1].seed)
    optimiser = SceneOptimiser(own, LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder))
    optimiser.load_state_dict(copy.deepcopy(batch.state_dict(1)))
    assert_same_numbers(batch.step().values, 1, optimiser.step().values)
    assert_same_numbers(batch.step().values, 1, optimiser.step().values)


def test_a_batch_goes_on_from_its_states(tiny_teacher_folder: Path) -> None:
    config = batch_config()
    batch, _ = run_batch(config, tiny_teacher_folder)
    states = [batch.state_dict(scene) for scene in range(2)]
    again = SceneBatch(config, SCENES, LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder))
    again.load_state_dicts(states)
    wanted, got = batch.step(), again.step()
    for name, value in wanted.values.items():
        assert torch.equal(value, got.values[name]), name


def test_a_scene_that_is_not_finite_stays_and_spoils_no_other(
    tiny_teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = batch_config()
    good, _ = run_batch(config, tiny_teacher_folder, num_steps=3)
    encode = LatentDiffusionTeacher.encode_images

    def poisoned(self: LatentDiffusionTeacher, images: Tensor) -> Tensor:
        latents = encode(self, images)
        factor = torch.ones(latents.shape[0], 1, 1, 1)
        factor[: len(factor) // 2] = torch.nan
        return latents * factor

    batch, _ = run_batch(config, tiny_teacher_folder, num_steps=2)
    before = {name: value.clone() for name, value in batch.state_dict(0)["fake_score"].items()}
    field = [value.clone() for value in batch.state_dict(0)["field"].values()]
    monkeypatch.setattr(LatentDiffusionTeacher, "encode_images", poisoned)
    assert batch.step().finite == [False, True]
    for name, value in batch.state_dict(0)["fake_score"].items():
        assert torch.equal(value, before[name]), name
    for value, kept in zip(batch.state_dict(0)["field"].values(), field, strict=True):
        assert torch.equal(value, kept)
    for name, value in good.state_dict(1)["field"].items():
        torch.testing.assert_close(batch.state_dict(1)["field"][name], value)
    monkeypatch.undo()
    rest = batch.without(0)
    assert rest.scenes == [SCENES[1]] and rest.step_index == 3
    assert rest.step().finite == [True]
