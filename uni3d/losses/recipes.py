"""The methods by name, and the student's loss under one of them.

`get` names a configuration, `generator_loss` evaluates one, `method_table` lists them. Work whose weight is
zero is not done: its inputs may be None, and callables handed in for it are not called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from uni3d.losses import discriminator, generator, noise_schedule
from uni3d.losses import divergence as divergences
from uni3d.losses.divergence import Divergence
from uni3d.losses.names import canonical, unknown_name
from uni3d.losses.per_sample import at_least_float32, per_sample
from uni3d.losses.published_methods import published_methods
from uni3d.losses.recipe import Recipe

__all__ = ["MethodRow", "Prediction", "Recipe", "Term", "generator_loss", "get", "method_table", "names"]

Prediction = Tensor | Callable[[], Tensor]
"""A tensor, or a function without arguments that makes it, called at most once and only if it is needed."""
Term = Tensor | Callable[[Tensor], Tensor]
"""A loss per sample [B], or a function of x0 [B, ...] that returns one."""

_RECIPES = {recipe.name: recipe for recipe in published_methods()}


def names() -> list[str]:
    """The names that `get` knows; variants of Uni-Instruct are called uni_instruct_<variant>."""
    return list(_RECIPES)


def get(name: str, divergence: str | Divergence | None = None, **overrides: Any) -> Recipe:
    """The recipe called `name` (dashes and underscores are one).

    `divergence` (a name, a mixture, or a Divergence) where the method leaves the choice
    (`Recipe.accepts_divergence`); naming a fixed method's own divergence is accepted too. `overrides` replace
    fields of `Recipe`, for example reward_weight=0, form="score_difference" or alpha=0.5; `variant` = exact,
    integral, four_term, detached or released is short for the name uni_instruct_<variant>.
    Raises ValueError for an unknown name or field, a divergence that is not the method's, or values that do
    not fit together.
    """
    key = canonical(name)
    variant = overrides.pop("variant", None)
    if variant is not None and key == "uni_instruct" and canonical(variant) != "exact":
        key = f"uni_instruct_{canonical(variant)}"
        name = key
    recipe = _RECIPES.get(key)
    if recipe is None:
        raise unknown_name("method", name, names())
    settings = [field.name for field in fields(Recipe) if field.name not in ("name", "divergence")]
    for setting in overrides:
        if setting not in settings:
            raise unknown_name(f"setting of the method {recipe.name}", setting, settings)
    if divergence is not None:
        chosen = divergences.get(divergence)
        if chosen.name != recipe.divergence.name and not recipe.accepts_divergence:
            free = ", ".join(other.name for other in _RECIPES.values() if other.accepts_divergence)
            raise ValueError(
                f"{recipe.name} minimises {recipe.divergence.name} by definition, not {chosen.name}: "
                f"leave the divergence out, or choose one of {free}"
            )
        overrides["divergence"] = chosen
    return replace(recipe, **overrides)


def generator_loss(
    recipe: Recipe,
    *,
    x0: Tensor,
    sigma: Tensor | float,
    teacher_x0: Prediction | None = None,
    fake_x0: Prediction | None = None,
    log_ratio: Prediction | None = None,
    adversarial_logits: Prediction | None = None,
    time_weight: Tensor | float | None = None,
    regression: Term | None = None,
    data_fidelity: Term | None = None,
    reward: Term | None = None,
    source_x0: Tensor | None = None,
    source_teacher_x0: Prediction | None = None,
) -> Tensor:
    """The student's loss under `recipe`, per sample, [B]; float32 or better.

    x0 [B, ...] attached to the student; sigma float or [B]; teacher_x0 (guided already), fake_x0 [B, ...] and
    log_ratio [B] at x_t = x0 + sigma eps; adversarial_logits [B, ...] of x_t; `regression`, `data_fidelity`
    (losses) and `reward` (the more the better) [B] or functions of x0; `source_x0` and `source_teacher_x0`,
    the source image and the teacher's prediction of it under its own prompt with the same noise (DDS). For
    CSD fake_x0 is the teacher's prediction without the prompt. Each
    prediction may be a function without arguments: it is called only if the recipe needs it, and under
    `torch.no_grad` if no gradient flows through it.

    `time_weight` (float or [B]) replaces the recipe's `time_weighting` at sigma; the L1 normaliser applies to
    both. Raises ValueError if something that the recipe needs is None.
    """
    teacher, normaliser = None, None
    normalises = recipe.normalisation == "l1"
    if recipe.score_weight > 0 or (
        normalises and recipe.normalise_adversarial and recipe.adversarial_weight > 0
    ):
        teacher = _evaluate(recipe, "teacher_x0", teacher_x0, differentiable=recipe.needs_teacher_jacobian)
        normaliser = generator.l1_normaliser(x0, teacher) if normalises else None

    loss = per_sample(0.0, x0, "loss")
    if recipe.score_weight > 0 and teacher is not None:
        if time_weight is None:
            time_weight = noise_schedule.time_weight(recipe.time_weighting, per_sample(sigma, x0, "sigma"))
        weight = per_sample(time_weight, x0, "time_weight")
        if normaliser is not None:
            weight = weight * normaliser
        fake = _student_prediction(recipe, x0, fake_x0, source_x0, source_teacher_x0)
        ratio = None
        if recipe.needs_ratio:
            ratio = _evaluate(recipe, "log_ratio", log_ratio, differentiable=recipe.needs_ratio_gradient)
        loss = loss + recipe.score_weight * _core(recipe, x0, sigma, teacher, fake, ratio, weight)

    elements = x0[0].numel() if len(x0) else 1
    if recipe.adversarial_weight > 0:
        logits = _evaluate(recipe, "adversarial_logits", adversarial_logits, differentiable=True)
        term = discriminator.adversarial_loss(logits, kind=recipe.adversarial_kind)
        if recipe.normalise_adversarial and normaliser is not None:
            term = term * normaliser
        loss = loss + recipe.adversarial_weight * elements * term
    for name, weight, term in (
        ("regression", recipe.regression_weight * elements, regression),
        ("data_fidelity", recipe.data_fidelity_weight, data_fidelity),
        ("reward", -recipe.reward_weight, reward),
    ):
        if weight != 0:
            loss = loss + weight * _evaluate_term(recipe, name, term, x0)
    return loss


def _core(
    recipe: Recipe,
    x0: Tensor,
    sigma: Tensor | float,
    teacher: Tensor,
    fake: Tensor,
    log_ratio: Tensor | None,
    weight: Tensor,
) -> Tensor:
    f = recipe.divergence
    if recipe.self_normalise and log_ratio is not None:
        psi = f.score_weight(per_sample(log_ratio, x0, "log_ratio").detach())
        weight = weight / psi.mean().clamp(min=torch.finfo(psi.dtype).tiny)
    match recipe.form:
        case "score_difference":
            return generator.score_difference_loss(x0, teacher, fake, log_ratio, f, weight)
        case "sid":
            return generator.sid_loss(x0, teacher, fake, weight, alpha=recipe.alpha)
        case "sim":
            distance = generator.PseudoHuber(recipe.huber_constant)
            return generator.score_implicit_loss(x0, teacher, fake, weight, distance=distance)
        case "uni_instruct":
            ratio = None if recipe.ratio == "one" else recipe.ratio
            if recipe.ratio == "one":
                log_ratio = per_sample(0.0, x0, "log_ratio")
            form = recipe.ui_form
            return generator.uni_instruct_loss(
                x0, sigma, teacher, fake, log_ratio, f, weight, form=form, ratio=ratio
            )


def _student_prediction(
    recipe: Recipe,
    x0: Tensor,
    fake_x0: Prediction | None,
    source_x0: Tensor | None,
    source_teacher_x0: Prediction | None,
) -> Tensor:
    """D_p: the fake score's prediction, or what takes its place where none is trained."""
    if recipe.student in ("trained", "classifier", "interval"):
        return _evaluate(recipe, "fake_x0", fake_x0, differentiable=recipe.needs_fake_jacobian)
    dirac = at_least_float32(x0.detach())
    if recipe.student == "dirac":
        return dirac
    source = _evaluate(recipe, "source_x0", source_x0, differentiable=False)
    # Delta = (D_q(x_t) - x0) - (D_q(source_t) - source): the teacher's own error is taken off.
    return dirac + _evaluate(recipe, "source_teacher_x0", source_teacher_x0, differentiable=False) - source


def _evaluate(recipe: Recipe, name: str, value: Prediction | None, *, differentiable: bool) -> Tensor:
    if value is None:
        raise ValueError(
            f"{recipe.name} with the divergence {recipe.divergence.name} needs {name}, which is None: pass it"
        )
    if isinstance(value, Tensor):
        return value
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        return value()


def _evaluate_term(recipe: Recipe, name: str, term: Term | None, x0: Tensor) -> Tensor:
    if term is None:
        raise ValueError(
            f"{recipe.name} has a {name} term, but {name} is None: pass [B] or a function of x0, "
            f"or set {name}_weight=0"
        )
    return per_sample(term if isinstance(term, Tensor) else term(x0), x0, name)


class MethodRow(NamedTuple):
    """One line of `uni3d methods`."""

    method: str
    divergence: str
    terms: str
    cost: str


def method_table() -> list[MethodRow]:
    """Every recipe with its defaults; cost is what one step evaluates of the denoising networks."""
    return [
        MethodRow(recipe.name.replace("_", "-"), _divergence_cell(recipe), recipe.terms, _cost_cell(recipe))
        for recipe in _RECIPES.values()
    ]


def _divergence_cell(recipe: Recipe) -> str:
    return f"any ({recipe.divergence.name})" if recipe.accepts_divergence else recipe.divergence.name


def _cost_cell(recipe: Recipe) -> str:
    passes = recipe.network_passes
    student = f"{passes.student_forward} forward, {passes.student_backward} backward"
    if passes.companions_forward == 0:
        return student
    return f"{student}; companions {passes.companions_forward} forward, {passes.companions_backward} backward"
