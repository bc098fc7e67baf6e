"""The losses of one distillation step: noise and images in, losses per sample out; nothing is optimised here.

    z -> student -> x0 -> x_t = x0 + sigma eps -> teacher D_q, fake score D_p, discriminator's logit
      -> uni3d.losses -> a loss for the student, one for its two companions

Only what the recipe gives a weight is evaluated, and only what it differentiates carries gradients; nothing
waits for the device. Legend: B samples, C H W image axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from uni3d.distillation.sigma_laws import SigmaLaw, time_weight_for
from uni3d.losses import noise_schedule, recipes
from uni3d.losses.discriminator import RatioNormaliser, discriminator_loss, log_ratio_from_logits
from uni3d.losses.fake_score import denoising_loss
from uni3d.losses.per_sample import mean_per_sample, over_elements
from uni3d.losses.recipe import Recipe
from uni3d.training.processes import Processes

Placement = Literal["fake_score", "teacher"]
Need = Literal["nothing", "value", "gradient"]
Network = Callable[..., Any]


@dataclass(frozen=True)
class Draw:
    """What is random in one update, a row for each sample."""

    latent: Tensor
    """z, standard normal [B, C, H, W]."""
    sigma: Tensor
    """Noise levels [B]."""
    eps: Tensor
    """Noise on what the student makes, standard normal [B, C, H, W]."""
    labels: Tensor | None = None
    """Class indices int64 [B]; None for an unconditional network."""
    real_eps: Tensor | None = None
    """Noise on the real images, standard normal [B, C, H, W]."""
    reference: Tensor | None = None
    """Rows of the noise-image pairs for a regression term, int64 [B]."""

    def rows(self, part: slice) -> Draw:
        """The samples of `part`."""
        return Draw(
            self.latent[part],
            self.sigma[part],
            self.eps[part],
            *(None if t is None else t[part] for t in (self.labels, self.real_eps, self.reference)),
        )


@dataclass(frozen=True)
class StudentView:
    """The networks as the student's loss sees them: all but the student frozen, in eval mode.

    Each denoiser is called as an EDMDenoiser; `head` maps (features, sigma) to a map of logits.
    """

    student: Network
    teacher: Network
    fake: Network
    head: Network | None = None


@dataclass(frozen=True)
class CompanionView:
    """The networks as the companions' loss sees them: student (and teacher) frozen, in eval mode."""

    student: Network
    fake: Network
    head: Network | None = None
    teacher: Network | None = None
    """Whose features the head reads with the placement "teacher"."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """What all updates of a run share."""

    sigma_init: float = 2.5
    sigma_data: float = 0.5
    placement: Placement = "fake_score"
    max_log_ratio: float = 5.0
    discriminator_weight: float = 0.05
    expansion_power: float | None = None
    """Weight the loss exactly for lambda(sigma) = sigma^power; None leaves the weight to the recipe."""


def generate(student: Network, latent: Tensor, labels: Tensor | None, sigma_init: float) -> Tensor:
    """The student's images [B, C, H, W] for z = `latent`: one evaluation at the level `sigma_init`."""
    sigma = latent.new_full((1,), sigma_init)
    return student(sigma_init * latent, sigma, labels)


def companion_losses(
    view: CompanionView, draw: Draw, settings: ObjectiveSettings, real: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Denoising loss of the fake score plus, with `view.head`, the discriminator's loss: [B], and statistics.

    `real` [B, C, H, W] are images of the data set with the classes of `draw.labels`, needed with a head.
    """
    with torch.no_grad():
        x0 = generate(view.student, draw.latent, draw.labels, settings.sigma_init)
        x_t = x0 + over_elements(draw.sigma, x0) * draw.eps
    features = None
    if view.head is None:
        prediction = view.fake(x_t, draw.sigma, draw.labels)
    else:
        prediction, features = _companion_predictions(view, draw, x_t, real, settings.placement)
    error = denoising_loss(
        prediction, x0, draw.sigma, weighting="edm", sigma_data=settings.sigma_data, reduction="sum"
    )
    elements = x0[0].numel()
    statistics = {"fake_score_loss": error.detach() / elements}
    if view.head is None or features is None:
        return error, statistics
    fake_logits, real_logits = view.head(features, torch.cat([draw.sigma, draw.sigma])).chunk(2)
    critic = discriminator_loss(real_logits, fake_logits)
    statistics["discriminator_loss"] = critic.detach()
    statistics["real_logit"] = mean_per_sample(real_logits.detach())
    statistics["fake_logit"] = mean_per_sample(fake_logits.detach())
    return error + settings.discriminator_weight * elements * critic, statistics


def _companion_predictions(
    view: CompanionView, draw: Draw, x_t: Tensor, real: Tensor | None, placement: Placement
) -> tuple[Tensor, Tensor]:
    """(the fake score's x0-prediction at x_t [B, C, H, W], what the head reads of x_t and then of the noisy
    real images [2 B, F, h, w]). One encoder pass sees both halves."""
    if real is None or draw.real_eps is None:
        raise ValueError("the discriminator needs real images and noise on them: pass real and draw.real_eps")
    both = torch.cat([x_t, real + over_elements(draw.sigma, real) * draw.real_eps])
    sigma = torch.cat([draw.sigma, draw.sigma])
    labels = None if draw.labels is None else torch.cat([draw.labels, draw.labels])
    if placement == "fake_score":
        return view.fake(both, sigma, labels, output="both", num_decoded=x_t.shape[0])
    assert view.teacher is not None
    with torch.no_grad():
        features = view.teacher(both, sigma, labels, output="features")
    return view.fake(x_t, draw.sigma, draw.labels), features


def student_losses(
    view: StudentView,
    recipe: Recipe,
    draw: Draw,
    settings: ObjectiveSettings,
    *,
    law: SigmaLaw | None = None,
    normaliser: RatioNormaliser | None = None,
    regression: Callable[[], Tensor] | None = None,
    processes: Processes | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The student's loss under `recipe`, [B], and statistics; gradients flow to `view.student` alone.

    Args:
        law: where draw.sigma comes from, for an exact weight (`settings.expansion_power`).
        normaliser: of the ratio, in eval mode; counts the samples of all processes first.
        regression: the loss per sample of a regression term, called if the recipe has one.
        processes: share the means over the batch that a recipe takes.
    """
    processes = processes or Processes()
    x0 = generate(view.student, draw.latent, draw.labels, settings.sigma_init)
    attaches = recipe.needs_teacher_jacobian or recipe.needs_fake_jacobian
    attaches_logits = recipe.needs_ratio_gradient or recipe.adversarial_weight > 0
    has_gradient = attaches or attaches_logits
    x_t = (x0 if has_gradient else x0.detach()) + over_elements(draw.sigma, x0) * draw.eps
    features_need: Need = "nothing"
    if recipe.needs_discriminator:
        features_need = "gradient" if attaches_logits else "value"
    by_teacher = settings.placement == "teacher"
    teacher_need: Need = "gradient" if recipe.needs_teacher_jacobian else "value"
    fake_need: Need = "gradient" if recipe.needs_fake_jacobian else "value"
    teacher_x0, teacher_features = _predict(
        view.teacher, x_t, draw, x0=teacher_need, features=features_need if by_teacher else "nothing"
    )
    fake_x0, fake_features = _predict(
        view.fake, x_t, draw, x0=fake_need, features="nothing" if by_teacher else features_need
    )
    assert teacher_x0 is not None and fake_x0 is not None
    gap = mean_per_sample((teacher_x0 - fake_x0).detach().square())
    statistics = {"score_gap": gap}
    logits, log_ratio = None, None
    features = teacher_features if by_teacher else fake_features
    if recipe.needs_discriminator:
        assert view.head is not None and features is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and attaches_logits):
            logits = view.head(features, draw.sigma)
            log_ratio = log_ratio_from_logits(logits, max_abs=settings.max_log_ratio)
            if normaliser is not None and recipe.normalise_ratio:
                log_ratio = _normalised(normaliser, log_ratio, draw.sigma, processes)
        statistics["log_ratio"] = log_ratio.detach()
    recipe, weight = _weighted(recipe, draw.sigma, log_ratio, settings, law, processes)
    losses = recipes.generator_loss(
        recipe,
        x0=x0,
        sigma=draw.sigma,
        teacher_x0=teacher_x0,
        fake_x0=fake_x0,
        log_ratio=log_ratio,
        adversarial_logits=logits,
        time_weight=weight,
        regression=None if regression is None else (lambda _: regression()),
    )
    statistics["student_loss"] = losses.detach() / x0[0].numel()
    return losses, statistics


def _predict(
    network: Network, x_t: Tensor, draw: Draw, *, x0: Need, features: Need
) -> tuple[Tensor | None, Tensor | None]:
    """(x0-prediction, encoder's output) at x_t from one pass, each as far as it is needed."""
    arguments = (x_t, draw.sigma, draw.labels)
    if "gradient" not in (x0, features):
        with torch.no_grad():
            return _outputs(network, arguments, x0 != "nothing", features != "nothing", False)
    return _outputs(network, arguments, x0 != "nothing", features != "nothing", x0 == "value")


def _outputs(
    network: Network, arguments: tuple[Any, ...], has_x0: bool, has_features: bool, detach_x0: bool
) -> tuple[Tensor | None, Tensor | None]:
    if has_x0 and has_features:
        return network(*arguments, output="both", detach_x0=detach_x0)
    if has_x0:
        return network(*arguments), None
    if has_features:
        return None, network(*arguments, output="features")
    return None, None


def _normalised(
    normaliser: RatioNormaliser, log_ratio: Tensor, sigma: Tensor, processes: Processes
) -> Tensor:
    """log(r / E_p[r]), the samples of all processes counted."""
    num = log_ratio.shape[0] * processes.num
    normaliser.update(processes.join_rows(log_ratio.detach(), num), processes.join_rows(sigma, num))
    return normaliser(log_ratio, sigma)


def _weighted(
    recipe: Recipe,
    sigma: Tensor,
    log_ratio: Tensor | None,
    settings: ObjectiveSettings,
    law: SigmaLaw | None,
    processes: Processes,
) -> tuple[Recipe, Tensor | None]:
    """The recipe, and the time weight that takes the place of its own (None leaves it).

    A recipe that divides by its mean weight over the batch does so here over the batches of all processes.
    """
    weight = None
    if settings.expansion_power is not None:
        if law is None:
            raise ValueError("an exact weight needs the law of the noise levels: pass law")
        weight = time_weight_for(
            law, sigma, power=settings.expansion_power, is_integral=recipe.form == "score_difference"
        )
    if recipe.self_normalise and log_ratio is not None and processes.num > 1:
        if weight is None:
            weight = noise_schedule.time_weight(recipe.time_weighting, sigma)
        psi = recipe.divergence.score_weight(log_ratio.detach())
        mean = processes.join_rows(psi, psi.shape[0] * processes.num).mean()
        weight = weight / mean.clamp(min=torch.finfo(psi.dtype).tiny)
        recipe = replace(recipe, self_normalise=False)
    return recipe, weight
