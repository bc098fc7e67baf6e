"""A field starts in the colour that the teacher's samples show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from uni3d.config.text_to_3d import (
    DiscriminatorConfig,
    FakeScoreConfig,
    FieldConfig,
    RendererConfig,
    TextTo3DConfig,
)
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.text_to_3d.particles import ParticleOptimiser
from uni3d.text_to_3d.scene_batch import SceneBatch
from uni3d.text_to_3d.scene_optimiser import SceneOptimiser
from uni3d.text_to_3d.scene_requests import SceneRequest

RED = torch.tensor([0.9, 0.1, 0.2])
POINTS = torch.tensor([[0.0, 0.0, 0.0], [0.3, -0.2, 0.5]])


def _config(
    method: str = "sds", *, colour: str = "samples", encoding: str = "dense", particles: int = 1
) -> TextTo3DConfig:
    return TextTo3DConfig(
        prompt="a red chair",
        method=method,
        steps=8,
        particles=particles,
        field=FieldConfig(encoding=encoding, resolutions=(8, 16), initial_colour=colour),  # type: ignore[arg-type]
        renderer=RendererConfig(resolution=((0.0, 16.0),), samples_per_ray=16),
        fake_score=FakeScoreConfig(lora_rank=2),
        discriminator=DiscriminatorConfig(num_real_samples=3, sampling_steps=2),
    )


def _teacher(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, has_object: bool = True
) -> LatentDiffusionTeacher:
    """One whose samples show a red square before grey, or grey alone."""
    teacher = LatentDiffusionTeacher.from_pretrained(folder)

    def decode(latents: Tensor) -> Tensor:
        pictures = torch.full((len(latents), 3, 16, 16), 0.6)
        if has_object:
            pictures[:, :, 5:11, 5:11] = RED[:, None, None]
        return pictures

    monkeypatch.setattr(teacher, "decode_latents", decode)
    return teacher


@pytest.mark.parametrize(
    ("method", "encoding"), [("sds", "dense"), ("sds", "hash"), ("uni-instruct", "dense")]
)
def test_a_field_starts_in_the_colour_of_the_samples(
    method: str, encoding: str, tiny_teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimiser = SceneOptimiser(_config(method, encoding=encoding), _teacher(tiny_teacher_folder, monkeypatch))
    assert (optimiser.field.colour(POINTS) - RED).abs().max() > 0.2
    optimiser.prepare()
    torch.testing.assert_close(optimiser.field.colour(POINTS), RED.expand(2, 3), atol=0.02, rtol=0)


def test_what_shows_no_object_leaves_it_grey(
    tiny_teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for colour, has_object in (("samples", False), ("grey", True)):
        teacher = _teacher(tiny_teacher_folder, monkeypatch, has_object=has_object)
        optimiser = SceneOptimiser(_config(colour=colour), teacher)
        optimiser.prepare()
        torch.testing.assert_close(optimiser.field.colour(POINTS), torch.full((2, 3), 0.5))


def test_all_particles_and_all_scenes_take_it(
    tiny_teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    particles = ParticleOptimiser(_config("vsd", particles=2), _teacher(tiny_teacher_folder, monkeypatch))
    particles.prepare()
    scenes = [SceneRequest("a red chair", 3), SceneRequest("a blue vase", 4)]
    batch = SceneBatch(_config("vsd"), scenes, _teacher(tiny_teacher_folder, monkeypatch))
    batch.prepare()
    for fields, tolerance in ((particles.fields, 0.1), (batch.fields, 0.02)):
        for index in range(2):
            found = fields.field(index).colour(POINTS)
            torch.testing.assert_close(found, RED.expand(2, 3), atol=tolerance, rtol=0)
    # Particles differ, or they would stay one.
    assert not torch.equal(particles.fields.field(0).colour(POINTS), particles.fields.field(1).colour(POINTS))


def test_looking_takes_nothing_from_the_run_s_random_numbers(
    tiny_teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    for colour in ("samples", "grey"):
        optimiser = SceneOptimiser(_config(colour=colour), _teacher(tiny_teacher_folder, monkeypatch))
        optimiser.prepare()
        states.append(optimiser.generator.get_state())
    assert torch.equal(*states)
