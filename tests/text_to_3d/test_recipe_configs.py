"""Every recipe of configs/ takes steps on a tiny teacher of the real classes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from uni3d.config.loader import load_config
from uni3d.config.text_to_3d import TextTo3DConfig
from uni3d.config.values import value_at
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.errors import ConfigError
from uni3d.resources import resource_path
from uni3d.text_to_3d.pipeline import TextTo3DPipeline
from uni3d.text_to_3d.scene_optimiser import SceneOptimiser, resolve_recipe

RECIPES = ("sds_dreamfusion", "vsd_threestudio", "vsd_prolificdreamer", "csd", "uni_instruct_forward_kl",
           "uni_instruct_reverse_kl", "uni_instruct_jeffreys")  # fmt: skip


def recipe(name: str) -> TextTo3DConfig:
    return load_config(resource_path(f"configs/{name}.yaml"), TextTo3DConfig())


def made_small(config: TextTo3DConfig) -> TextTo3DConfig:
    """The recipe at the sizes of a tiny teacher."""
    return dataclasses.replace(
        config,
        prompt="a red chair",
        steps=3,
        field=dataclasses.replace(config.field, encoding="dense", resolutions=(8,)),
        renderer=dataclasses.replace(config.renderer, resolution=((0.0, 16.0),), samples_per_ray=8),
        fake_score=dataclasses.replace(config.fake_score, base=None, warmup_steps=0),
        discriminator=dataclasses.replace(config.discriminator, num_real_samples=2, sampling_steps=1),
        mesh=dataclasses.replace(config.mesh, resolution=16, texture_size=64, max_triangles=200),
    )


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_finite_steps(name: str, tiny_teacher_folder: Path) -> None:
    config = made_small(recipe(name))
    teacher = LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder)
    # Also on another copy of the weights, as the recipes with a fake score of another model have it.
    base = (
        LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder) if recipe(name).fake_score.base else None
    )
    optimiser = SceneOptimiser(config, teacher, fake_base=base)
    optimiser.prepare()
    before = [parameter.detach().clone() for parameter in optimiser.field.parameters()]
    reports = [optimiser.step() for _ in range(2)]
    optimiser.close()
    assert all(report.finite for report in reports)
    pairs = zip(before, optimiser.field.parameters(), strict=True)
    assert any(not torch.equal(old, new) for old, new in pairs)
    assert ("fake_score_loss" in reports[0].values) == resolve_recipe(config).needs_fake_score


def test_a_recipe_becomes_a_mesh(tiny_teacher_folder: Path) -> None:
    pipeline = TextTo3DPipeline(LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder))
    result = pipeline("a red chair", config=made_small(recipe("csd")))
    assert len(result.mesh.faces) > 0


@pytest.mark.parametrize("name", RECIPES)
def test_a_hash_grid_has_no_voxel_terms(name: str) -> None:
    config = recipe(name)
    terms = (config.regularisers.smoothness, config.regularisers.colour_smoothness)
    assert config.field.encoding == "dense" or all(value == 0 for term in terms for _, value in term)


def test_what_the_recipes_say() -> None:
    prolific, studio = recipe("vsd_prolificdreamer"), recipe("vsd_threestudio")
    for config in (prolific, studio):
        assert value_at(config.guidance.noise_max, 0.19) == 0.98
        assert value_at(config.guidance.noise_max, 0.21) == 0.5
    # 500 steps of linear warm-up.
    assert value_at(prolific.fake_score.learning_rate, 250 / prolific.steps) == pytest.approx(5e-5)
    assert value_at(studio.renderer.resolution, 4999 / 25000) == 64
    assert value_at(studio.renderer.resolution, 5001 / 25000) == 512
    for name, divergence in (("forward_kl", "forward_kl"), ("reverse_kl", "reverse_kl")):
        chosen = resolve_recipe(recipe(f"uni_instruct_{name}"))
        assert chosen.divergence.name == divergence and chosen.needs_teacher_jacobian
        assert chosen.needs_discriminator


def test_views_come_in_whole_groups(tiny_teacher_folder: Path) -> None:
    teacher = LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder)
    teacher.views_per_group = 4
    with pytest.raises(ConfigError, match="guidance.views_per_step is 1, but the teacher sees 4 views"):
        SceneOptimiser(made_small(recipe("csd")), teacher)
