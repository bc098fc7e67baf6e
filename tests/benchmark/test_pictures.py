"""The 2-D mode, step by step: every method moves the pictures, at the cost that is counted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from uni3d.benchmark.budgets import PassCounter, Passes, StepCost, measure_step_cost
from uni3d.benchmark.pictures import PictureOptimiser
from uni3d.config.text_to_3d import DiscriminatorConfig, FakeScoreConfig, GuidanceConfig, TextTo3DConfig
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.errors import UsageError
from uni3d.losses import recipes
from uni3d.scene.camera import Cameras

CAMERAS = Cameras.from_lists([0.0, 90.0], [15.0, 15.0])
# One step with one view: what a guided teacher, fake score, real samples and gradients cost.
COST = {
    "sds": Passes(forward=2),
    "vsd": Passes(forward=3, backward=1),
    "ism": Passes(forward=6),
    "sdi": Passes(forward=22),
    "adv-sd": Passes(encoder=3, encoder_backward=1),
    "jsd": Passes(forward=3, encoder=1, backward=1),
    "sim": Passes(forward=3, backward=4),
}


@pytest.fixture(scope="module")
def teacher(tiny_teacher_folder: Path) -> LatentDiffusionTeacher:
    return LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder)


def config(method: str, steps: int = 40, **guidance: object) -> TextTo3DConfig:
    return TextTo3DConfig(
        prompt="a red chair",
        method=method,
        steps=steps,
        guidance=GuidanceConfig(guidance_scale=((0.0, 5.0),), **guidance),  # type: ignore[arg-type]
        fake_score=FakeScoreConfig(warmup_steps=0),
        discriminator=DiscriminatorConfig(num_real_samples=2, sampling_steps=1),
    )


@pytest.mark.parametrize("method", sorted(COST))
def test_a_step_moves_the_picture_it_looks_at_and_is_counted(
    teacher: LatentDiffusionTeacher, method: str
) -> None:
    optimiser = PictureOptimiser(config(method), teacher, CAMERAS)
    try:
        optimiser.prepare()
        for _ in range(2):  # a new discriminator's logit is zero everywhere, so it has no opinion at first
            optimiser.step()
        before = optimiser.latents
        with PassCounter(teacher) as counter:
            report = optimiser.step()
    finally:
        optimiser.close()
    moved = (optimiser.latents - before).abs().amax(dim=(1, 2, 3))
    assert report.finite and moved[0] > 0 and moved[1] == 0
    assert counter.passes == COST[method]


def test_counted_passes_agree_with_the_recipes_where_passes_are_not_shared() -> None:
    for method in ("sds", "ism", "sdi"):
        assert recipes.get(method).network_passes.total == COST[method].total


def test_the_same_seed_makes_the_same_picture(teacher: LatentDiffusionTeacher) -> None:
    made = []
    for seed in (3, 3, 4):
        optimiser = PictureOptimiser(dataclasses.replace(config("vsd"), seed=seed), teacher, CAMERAS)
        try:
            optimiser.prepare()
            for _ in range(3):
                optimiser.step()
            made.append(optimiser.pictures())
        finally:
            optimiser.close()
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert made[0].shape == (2, 3, 16, 16) and 0 <= made[0].min() and made[0].max() <= 1


def test_a_run_of_two_stages_changes_its_divergence(teacher: LatentDiffusionTeacher) -> None:
    settings = dataclasses.replace(
        config("uni-instruct", steps=4, first_stage_divergence="forward_kl"), divergence="reverse_kl"
    )
    optimiser = PictureOptimiser(settings, teacher, CAMERAS)
    names = []
    try:
        optimiser.prepare()
        # The first stage weighs by a ratio, so its discriminator is there although the last needs none.
        assert optimiser.distiller.discriminator is not None
        for _ in range(4):
            optimiser.step()
            guidance = optimiser.distiller._guidance
            assert guidance is not None
            names.append(guidance.recipe.divergence.name)
        with pytest.raises(ValueError, match="needs a fake score, which|needs a discriminator, which"):
            PictureOptimiser(config("sds"), teacher, CAMERAS).distiller.follow(recipes.get("vsd"))
    finally:
        optimiser.close()
    assert names == ["forward_kl", "forward_kl", "reverse_kl", "reverse_kl"]


def test_the_pilot_finds_what_steps_cost(teacher: LatentDiffusionTeacher) -> None:
    class Backend:
        def __init__(self) -> None:
            self.teacher = teacher

        def optimiser(self, config: TextTo3DConfig) -> PictureOptimiser:
            return PictureOptimiser(config, teacher, CAMERAS)

    cost = measure_step_cost(Backend(), config("jsd"))
    assert cost.step_passes == COST["jsd"].total == 4.5
    # Two samples of one guided step each.
    assert cost.prepare_passes == 4 and cost.step_seconds > 0


def test_steps_within_a_budget() -> None:
    cost = StepCost(prepare_passes=10, prepare_seconds=2.0, step_passes=4.0, step_seconds=0.5)
    assert cost.steps_within("passes", 50) == 10 and cost.steps_within("passes", 53.9) == 10
    assert cost.steps_within("seconds", 3.6) == 3
    with pytest.raises(UsageError, match="13 passes do not cover one step: 10 go into teacher samples"):
        cost.steps_within("passes", 13)
