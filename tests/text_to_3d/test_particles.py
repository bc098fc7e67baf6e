"""Several fields for one prompt under one fake score: who moves, who is kept, what is left behind."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trimesh

from uni3d.config.text_to_3d import (
    DiscriminatorConfig,
    FakeScoreConfig,
    FieldConfig,
    MeshConfig,
    RendererConfig,
    TextTo3DConfig,
)
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.errors import ConfigError, UsageError
from uni3d.text_to_3d.particles import ParticleOptimiser
from uni3d.text_to_3d.pipeline import generate


def particles_config(**changes: Any) -> TextTo3DConfig:
    config = TextTo3DConfig(
        prompt="a red chair",
        particles=3,
        steps=6,
        device="cpu",
        quiet=True,
        field=FieldConfig(resolutions=(8, 16)),
        renderer=RendererConfig(resolution=((0.0, 16.0),), samples_per_ray=16, occupancy_interval=2),
        fake_score=FakeScoreConfig(lora_rank=2, warmup_steps=0),
        discriminator=DiscriminatorConfig(num_real_samples=4, sampling_steps=2),
        mesh=MeshConfig(resolution=24, max_triangles=400, texture_size=64, turntable_frames=0),
    )
    return dataclasses.replace(config, **changes)


def prepared(config: TextTo3DConfig, folder: Path) -> ParticleOptimiser:
    optimiser = ParticleOptimiser(config, LatentDiffusionTeacher.from_pretrained(folder))
    optimiser.prepare()
    return optimiser


def has_moved(optimiser: ParticleOptimiser, before: list[dict[str, torch.Tensor]]) -> list[bool]:
    return [
        any(not torch.equal(value, old[name]) for name, value in optimiser.fields.state_dict(index).items())
        for index, old in enumerate(before)
    ]


@pytest.mark.parametrize(("which", "num_moved"), [("all", 3), ("one", 1)])
def test_all_particles_move_in_a_step_or_one(which: Any, num_moved: int, tiny_teacher_folder: Path) -> None:
    optimiser = prepared(particles_config(particles_per_step=which), tiny_teacher_folder)
    fields = [copy.deepcopy(optimiser.fields.state_dict(index)) for index in range(3)]
    states = [copy.deepcopy(optimiser.field_optimiser.state_dict(index)["state"]) for index in range(3)]
    assert states == [{}] * 3
    assert optimiser.step().finite
    assert sum(has_moved(optimiser, fields)) == num_moved
    moments = [len(optimiser.field_optimiser.state_dict(index)["state"]) > 0 for index in range(3)]
    assert moments == has_moved(optimiser, fields)


def test_particles_start_apart(tiny_teacher_folder: Path) -> None:
    optimiser = prepared(particles_config(method="vsd"), tiny_teacher_folder)
    first, second = (optimiser.fields.state_dict(index)["density_grids.0"] for index in (0, 1))
    assert not torch.equal(first, second)


def test_a_resumed_run_goes_on_the_same(tiny_teacher_folder: Path) -> None:
    config = particles_config(particles_per_step="one")
    optimiser = prepared(config, tiny_teacher_folder)
    for _ in range(2):
        optimiser.step()
    again = ParticleOptimiser(config, LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder))
    again.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for _ in range(2):
        assert optimiser.step().values == again.step().values


def test_what_is_not_finite_moves_no_particle(
    tiny_teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimiser = prepared(particles_config(method="sds"), tiny_teacher_folder)
    encode = optimiser.teacher.encode_images
    optimiser.teacher.encode_images = lambda images: encode(images) * torch.nan  # type: ignore[method-assign]
    fields = [copy.deepcopy(optimiser.fields.state_dict(index)) for index in range(3)]
    assert not optimiser.step().finite
    assert has_moved(optimiser, fields) == [False] * 3


@pytest.mark.slow
def test_each_particle_becomes_a_mesh(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    config = particles_config(
        particles=2, method="sds", steps=2, teacher=str(tiny_teacher_folder),
        runs_folder=tmp_path / "runs", output=tmp_path / "chair.glb",
    )  # fmt: skip
    result = generate(config)
    assert result.output == tmp_path / "chair_0.glb"
    for index in range(2):
        for file in (tmp_path / f"chair_{index}.glb", result.run_directory / f"mesh_{index}.glb"):
            assert len(trimesh.load(file, force="mesh").faces) > 0
        assert (result.run_directory / f"preview_{index}.png").is_file()
    assert len(json.loads((result.run_directory / "metrics.json").read_text())["particles"]) == 2
    with pytest.raises(UsageError, match=r"chair_0\.glb.*--overwrite"):
        generate(config)


def test_particles_are_counted() -> None:
    with pytest.raises(ConfigError, match="particles"):
        particles_config(particles=0)
