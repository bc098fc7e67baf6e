"""The stages of a distillation: warm-ups, then one recipe or two, each until so many images were seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from uni3d.distillation.settings import MethodConfig
from uni3d.errors import ConfigError
from uni3d.losses import recipes
from uni3d.losses.recipe import Recipe


@dataclass(frozen=True)
class Stage:
    """What the student does until `end` images have been seen."""

    name: str
    recipe: Recipe | None
    """None: the student rests while fake score and discriminator learn."""
    end: float


def stages_of(config: MethodConfig) -> tuple[Stage, ...]:
    """The stages of `config` in order; the last one has no end.

    Raises ConfigError for settings that do not belong to the method.
    """
    main = recipe_of(config, config.divergence)
    stages: list[Stage] = []
    end = float(config.score_warmup_images)
    if end > 0:
        stages.append(Stage("score warm-up", None, end))
    if main.needs_discriminator and config.plain_warmup_images > 0:
        end += config.plain_warmup_images
        stages.append(Stage("plain warm-up", plain_recipe(config, main), end))
    if config.first_stage_divergence is not None:
        if config.first_stage_images <= end:
            raise ConfigError(
                f"method.first_stage_images is {config.first_stage_images}; expected more than the "
                f"{end:.0f} images of the warm-ups"
            )
        first = recipe_of(config, config.first_stage_divergence)
        stages.append(Stage(first.divergence.name, first, float(config.first_stage_images)))
    stages.append(Stage(main.divergence.name, main, math.inf))
    return tuple(stages)


def stage_at(stages: Sequence[Stage], images: int) -> Stage:
    """The stage in which a step begins before which `images` were seen."""
    return next(stage for stage in stages if images < stage.end)


def recipe_of(config: MethodConfig, divergence: str | None) -> Recipe:
    """The recipe of `config` with `divergence`, weighted as `config.weighting` says."""
    changes: dict[str, Any] = {}
    name = config.method.strip().lower().replace("_", "-")
    for key, owners in (("ratio", ("uni-instruct",)), ("alpha", ("sid", "sida"))):
        value = getattr(config, key)
        if value is None:
            continue
        if name not in owners:
            raise ConfigError(f"method.{key} belongs to {' and '.join(owners)}; leave it out for {name}")
        changes[key] = value
    if config.adversarial_weight is not None:
        changes["adversarial_weight"] = config.adversarial_weight
    if config.fake_steps is not None:
        changes["fake_steps"] = config.fake_steps
    try:
        recipe = recipes.get(name, divergence, **changes)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    # Image teachers are not guided by a prompt.
    return _weighted(config, replace(recipe, guidance_scale=1.0))


def plain_recipe(config: MethodConfig, main: Recipe) -> Recipe:
    """The warm-up before `main`: reverse KL in the same form, without ratio and GAN term."""
    name = "diff_instruct" if main.form == "score_difference" else "sid"
    recipe = recipes.get(name, fake_steps=main.fake_steps, guidance_scale=1.0)
    return _weighted(config, recipe)


def _weighted(config: MethodConfig, recipe: Recipe) -> Recipe:
    match config.weighting:
        case "recipe":
            return recipe
        case "expansion":  # the step passes its own time weight
            return replace(recipe, normalisation="none", normalise_adversarial=False)
        case "l1" if recipe.normalisation == "l1":
            return recipe
        case "l1":
            # The GAN term keeps its published proportion to the score term.
            return replace(recipe, time_weighting="uniform", normalisation="l1", normalise_adversarial=True)
