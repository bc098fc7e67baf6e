"""Field, geometry and texture as one run on a tiny random teacher: hand-over, state, results."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from uni3d.config.stages import GeometryConfig, StageGuidanceConfig, StagesConfig, TextureConfig
from uni3d.config.text_to_3d import (
    CheckpointsConfig,
    DiscriminatorConfig,
    FakeScoreConfig,
    FieldConfig,
    MeshConfig,
    RendererConfig,
    TextTo3DConfig,
)
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.mesh.extraction import EmptySurfaceError
from uni3d.mesh.report import mesh_report
from uni3d.scene.radiance_field import RadianceField
from uni3d.text_to_3d.mesh_optimiser import FieldColour
from uni3d.text_to_3d.pipeline import build_mesh, generate
from uni3d.text_to_3d.stages import StagedOptimiser, make_optimiser
from uni3d.training.checkpoint import CheckpointStore

SMALL = StageGuidanceConfig(resolution=((0.0, 16.0),))


@pytest.fixture
def teacher(tiny_teacher_folder: Path) -> LatentDiffusionTeacher:
    return LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder)


def _config(**changes: Any) -> TextTo3DConfig:
    config = TextTo3DConfig(
        prompt="a red chair",
        steps=2,
        field=FieldConfig(resolutions=(8, 16)),
        renderer=RendererConfig(resolution=((0.0, 16.0),), samples_per_ray=16),
        fake_score=FakeScoreConfig(lora_rank=2, warmup_steps=1),
        discriminator=DiscriminatorConfig(num_real_samples=2, sampling_steps=2),
        stages=StagesConfig(
            geometry=GeometryConfig(steps=3, resolution=8, views=("normals", "shaded"), guidance=SMALL),
            texture=TextureConfig(steps=2, guidance=SMALL),
        ),
        mesh=MeshConfig(resolution=24, max_triangles=400, texture_size=64, turntable_frames=0),
        quiet=True,
    )
    return dataclasses.replace(config, **changes)


def _leaves(value: Any, place: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in _leaves(item, f"{place}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, item in enumerate(value) for k, v in _leaves(item, f"{place}/{i}").items()}
    return {place: value}


def _assert_same(left: Any, right: Any) -> None:
    left, right = _leaves(left), _leaves(right)
    assert left.keys() == right.keys()
    for place, value in left.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, right[place]), place
        else:
            assert value == right[place], place


def _with_other_texture_method(config: TextTo3DConfig) -> TextTo3DConfig:
    guidance = dataclasses.replace(SMALL, method="vsd")
    stages = dataclasses.replace(config.stages, texture=TextureConfig(steps=2, guidance=guidance))
    return dataclasses.replace(config, stages=stages)


def test_a_run_resumed_in_every_stage_ends_in_the_same_state(
    tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    config = _with_other_texture_method(_config())

    def run(*stops: int) -> dict[str, Any]:
        optimiser = make_optimiser(config, LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder))
        optimiser.prepare()
        while optimiser.step_index < optimiser.num_steps:
            if optimiser.step_index in stops:
                stops = stops[1:]
                store = CheckpointStore(tmp_path)
                store.save(optimiser.step_index, optimiser.state_dict())
                optimiser = make_optimiser(
                    config, LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder)
                )
                saved = store.load_latest()
                assert saved is not None
                optimiser.load_state_dict(saved.state)
            assert optimiser.step().finite
        return optimiser.state_dict()

    # within the field, at the border to the geometry, within it and within the texture
    _assert_same(run(), run(1, 2, 4, 6))


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_colours_lie_where_their_field_does(device: str) -> None:
    field = RadianceField(resolutions=(8,)).to(device)
    points = torch.zeros(4, 3, device=device)
    colour = FieldColour(field)(points, torch.zeros(4, device=device), points)
    assert colour.device.type == device and colour.shape == (4, 3)


@pytest.mark.gpu
def test_all_stages_run_on_a_gpu(tiny_teacher_folder: Path) -> None:
    config = _with_other_texture_method(_config())
    optimiser = StagedOptimiser(
        config, LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder, device="cuda")
    )
    optimiser.prepare()
    while optimiser.step_index < optimiser.num_steps:
        assert optimiser.step().finite
    mesh, _, _ = build_mesh(optimiser)
    assert len(mesh.faces) > 0


def test_stages_hand_over_in_memory(teacher: LatentDiffusionTeacher) -> None:
    optimiser = StagedOptimiser(_config(), teacher)
    optimiser.prepare()
    seen: list[str] = []
    distillers = set()
    while optimiser.step_index < optimiser.num_steps:
        colours = [grid.detach().clone() for grid in optimiser.field.colour_grids]
        before = optimiser.stage
        optimiser.step()
        seen.append(optimiser.stage)
        distillers.add(id(optimiser.current.distiller))
        if optimiser.stage == "geometry":
            pairs = zip(colours, optimiser.field.colour_grids, strict=True)
            assert all(torch.equal(*pair) for pair in pairs), "the geometry stage leaves the colours alone"
        if (before, optimiser.stage) == ("texture", "texture"):
            pairs = zip(colours, optimiser.field.colour_grids, strict=True)
            assert not all(torch.equal(*pair) for pair in pairs)
    optimiser.close()
    assert seen == ["field"] * 2 + ["geometry"] * 3 + ["texture"] * 2
    assert len(distillers) == 1, "one recipe needs one set of networks"


def test_only_a_field_can_be_foggy(teacher: LatentDiffusionTeacher) -> None:
    optimiser = StagedOptimiser(_config(), teacher)
    optimiser.prepare()
    assert 0 <= build_mesh(optimiser)[1]["fog"] <= 1
    while optimiser.stage == "field":
        optimiser.step()
    assert "fog" not in build_mesh(optimiser)[1]
    optimiser.close()


def test_another_recipe_gets_networks_of_its_own(teacher: LatentDiffusionTeacher) -> None:
    optimiser = StagedOptimiser(_with_other_texture_method(_config()), teacher)
    optimiser.prepare()
    for _ in range(6):
        optimiser.step()
    assert optimiser.current.distiller.recipe.name.startswith("vsd")
    names = [name for name, _ in teacher.network.named_parameters() if "lora" in name.lower()]
    assert len(names) == len(set(names)) and names
    optimiser.close()
    assert not [name for name, _ in teacher.network.named_parameters() if "lora" in name.lower()]


def test_generate_runs_all_stages_and_writes_a_closed_mesh(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    config = _config(
        teacher=str(tiny_teacher_folder),
        runs_folder=tmp_path / "runs",
        output=tmp_path / "chair.glb",
        checkpoints=CheckpointsConfig(interval_s=0.0),
    )
    result = generate(config)
    report = mesh_report(result.output)
    assert report["closed"] and report["outward"] and report["triangles"] <= 400
    assert result.report["field_match"]["silhouette_iou"] > 0.94
    assert result.report["field_match"]["psnr_db"] > 25.0
    lines = (result.run_directory / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 7 and '"stage": "texture"' in lines[-1]


def test_a_field_of_fog_still_hands_over_a_surface(
    teacher: LatentDiffusionTeacher, caplog: pytest.LogCaptureFixture
) -> None:
    optimiser = StagedOptimiser(_config(method="sds", steps=1), teacher)
    optimiser.prepare()
    optimiser.step()
    with torch.no_grad():
        optimiser.field.density_grids[0].sub_(8.0)
    with pytest.raises(EmptySurfaceError, match="no surface"):
        optimiser.surface()
    optimiser.step()
    assert optimiser.stage == "geometry" and optimiser.surface().report["closed"]
    assert "densest part" in caplog.text
    optimiser.close()


def test_without_steps_there_are_no_stages(teacher: LatentDiffusionTeacher) -> None:
    config = _config(stages=StagesConfig())
    optimiser = make_optimiser(config, teacher)
    assert not isinstance(optimiser, StagedOptimiser)
    assert optimiser.num_steps == config.steps
    optimiser.close()
