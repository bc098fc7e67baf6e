"""Every method of the family as a small frozen configuration of the same blocks.

    core = time_weight * normaliser * (score difference | Uni-Instruct | SiD | SIM form of Delta)
    loss = score_weight * core + adversarial + regression + data fidelity - reward

`get` names a configuration, `generator_loss` evaluates one, `method_table` lists them. Work whose weight is
zero is not done: its inputs may be None, and callables handed in for it are not called.

Methods marked (from memory) in their note have values that could not be checked against the paper's text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from uni3d.losses import discriminator, generator, noise_schedule
from uni3d.losses import divergence as divergences
from uni3d.losses.divergence import Divergence
from uni3d.losses.names import canonical, unknown_name
from uni3d.losses.per_sample import at_least_float32, per_sample

CoreForm = Literal["score_difference", "uni_instruct", "sid", "sim"]
Student = Literal["trained", "dirac", "source"]

Prediction = Tensor | Callable[[], Tensor]
"""A tensor, or a function without arguments that makes it, called at most once and only if it is needed."""
Term = Tensor | Callable[[Tensor], Tensor]
"""A loss per sample [B], or a function of x0 [B, ...] that returns one."""


class NetworkPasses(NamedTuple):
    """Network evaluations in one step; a discriminator counts as one even if it shares features."""

    student_forward: int
    student_backward: int
    companions_forward: int
    """Training of fake score and discriminator, all their steps together."""
    companions_backward: int

    @property
    def total(self) -> int:
        return sum(self)


_WEIGHT_FIELDS = (
    "score_weight",
    "adversarial_weight",
    "regression_weight",
    "data_fidelity_weight",
    "reward_weight",
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What one method computes. Frozen; `dataclasses.replace` or the overrides of `get` make variants.

    Raises ValueError for values that contradict each other, such as a divergence that needs a density ratio
    together with a student that has none.
    """

    name: str
    title: str
    note: str = ""

    divergence: Divergence
    accepts_divergence: bool = False
    """Whether the divergence is the user's choice (Uni-Instruct, f-distill) or part of the definition."""
    form: CoreForm
    student: Student = "trained"
    """Whose density p is. "trained": a fake score's, trained on the student; "dirac": one image's, so that
    D_p(x_t) = sg(x0); "source": as dirac, less the teacher's error on a source image (DDS)."""

    ui_form: generator.Form = "exact"
    """Form of `generator.uni_instruct_loss`."""
    ratio: Literal["attached", "detached", "one"] | None = None
    """How the ratio enters it; None is the form's own way. "one" replaces r by 1, which is what the released
    program's formula evaluates to, to three digits, whatever the discriminator says."""
    alpha: float = 1.0
    """SiD's alpha."""
    huber_constant: float = 0.00054
    """SIM's pseudo-Huber distance: c = huber_constant * sqrt(number of elements)."""

    time_weighting: str = "vsd"
    """A name of `noise_schedule.time_weight`."""
    normalisation: Literal["none", "l1"] = "none"
    """"l1" multiplies the time weight by `generator.l1_normaliser`."""
    self_normalise: bool = False
    """Divide psi by its mean over the batch (f-distill)."""

    score_weight: float = 1.0
    adversarial_weight: float = 0.0
    """Relative to the *mean* over elements of the core, as the papers state it: multiplied by the elements of
    a sample."""
    adversarial_kind: str = "non_saturating"
    normalise_adversarial: bool = False
    """Multiply the adversarial term by the core's L1 normaliser (SiDA)."""
    regression_weight: float = 0.0
    """Relative to the mean over elements, like adversarial_weight."""
    data_fidelity_weight: float = 0.0
    """In nats: the term is a negative log likelihood."""
    reward_weight: float = 0.0
    """In nats: reward_weight * R(x0) is subtracted."""

    guidance_scale: float = 7.5
    """Default classifier-free guidance of the teacher for text prompts."""
    fake_guidance_scale: float = 1.0
    """Guidance of the fake score, in its training and in the student's step (long-short guidance)."""
    fake_steps: int = 1
    """Updates of the fake score for one of the student."""

    def __post_init__(self) -> None:
        for field in _WEIGHT_FIELDS:
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field} of {self.name} is {value}: expected a finite number, zero or more")
        for kind, value, known in (
            ("recipe form", self.form, get_args(CoreForm)),
            ("kind of student", self.student, get_args(Student)),
            ("normalisation", self.normalisation, ("none", "l1")),
            ("time weight", canonical(self.time_weighting), noise_schedule.time_weight_names()),
        ):
            if value not in known:
                raise unknown_name(kind, value, known)
        if self.form == "uni_instruct" and self.ratio != "one":
            generator.check_form(self.ui_form, self.ratio)
        self._check_student()

    def _check_student(self) -> None:
        f = self.divergence
        if not f.is_constant and self.form in ("sid", "sim"):
            raise ValueError(
                f"{self.name} is defined for reverse_kl, got {f.name}: use uni_instruct for other divergences"
            )
        if not f.is_constant and self.student != "trained":
            raise ValueError(
                f"{self.name} takes the student for a single image, which has no density ratio to weigh "
                f"{f.name} with: use reverse_kl, or a method with a trained fake score such as uni_instruct"
            )
        if self.form != "score_difference" and self.student != "trained":
            raise ValueError(
                f"{self.name}: the form {self.form} needs student='trained', got {self.student!r}"
            )

    @property
    def needs_fake_score(self) -> bool:
        """Whether a fake score is trained and evaluated."""
        return self.student == "trained" and self.score_weight > 0

    @property
    def needs_ratio(self) -> bool:
        """Whether the core reads log r."""
        return self.score_weight > 0 and not self.divergence.is_constant and self.ratio != "one"

    @property
    def needs_ratio_gradient(self) -> bool:
        """Whether log r must be differentiable with respect to x_t."""
        return (
            self.needs_ratio
            and self.form == "uni_instruct"
            and self.ui_form == "exact"
            and self.ratio != "detached"
        )

    @property
    def needs_discriminator(self) -> bool:
        """Whether a discriminator is trained: for the ratio, the adversarial term, or both."""
        return self.needs_ratio or self.adversarial_weight > 0

    @property
    def normalise_ratio(self) -> bool:
        """Whether r should be divided by its mean (`discriminator.RatioNormaliser`): psi is unbounded."""
        return self.needs_ratio and not self.divergence.is_bounded

    @property
    def needs_teacher_jacobian(self) -> bool:
        """Whether gradients must flow through the teacher."""
        return self.score_weight > 0 and self.form != "score_difference"

    @property
    def needs_fake_jacobian(self) -> bool:
        """Whether gradients must flow through the fake score."""
        return self.needs_fake_score and self.form != "score_difference"

    @property
    def required_terms(self) -> tuple[str, ...]:
        """What `generator_loss` needs beyond the predictions of teacher, fake score and discriminator."""
        optional = ("regression", "data_fidelity", "reward")
        terms = [term for term in optional if getattr(self, f"{term}_weight") > 0]
        if self.student == "source" and self.score_weight > 0:
            terms += ["source_x0", "source_teacher_x0"]
        return tuple(terms)

    @property
    def network_passes(self) -> NetworkPasses:
        """What one step costs at the recipe's own guidance scales; a guided prediction is two passes."""
        teacher = 0
        if self.score_weight > 0:
            teacher = (2 if self.guidance_scale != 1 else 1) * (2 if self.student == "source" else 1)
        fake = (2 if self.fake_guidance_scale != 1 else 1) if self.needs_fake_score else 0
        critic = 1 if self.needs_discriminator else 0
        backward = teacher * self.needs_teacher_jacobian + fake * self.needs_fake_jacobian
        backward += critic * (self.needs_ratio_gradient or self.adversarial_weight > 0)
        training = fake + 2 * critic  # the discriminator sees a real and a fake sample
        steps = self.fake_steps
        return NetworkPasses(teacher + fake + critic, backward, training * steps, training * steps)

    @property
    def terms(self) -> str:
        """The loss in one line, for people. D is Delta = D_q - D_p; sg stops gradients."""
        core = {
            "score_difference": "<sg(psi D), x0>",
            "sid": f"<D, D_p-x0> {1 - self.alpha:+g}|D|^2" if self.alpha != 1 else "<D, D_p-x0>",
            "sim": "<grad huber(D), D_p-x0>",
            "uni_instruct": self._ui_terms(),
        }[self.form]
        if self.student != "trained":
            core += {"dirac": ", D_p=sg(x0)", "source": ", D_p=sg(x0)+source error"}[self.student]
        if self.self_normalise:
            core += ", psi/mean"
        parts = [core] if self.score_weight > 0 else []
        parts += [
            label
            for label, weight in (
                ("GAN", self.adversarial_weight),
                ("regression", self.regression_weight),
                ("data fidelity", self.data_fidelity_weight),
            )
            if weight > 0
        ]
        return " + ".join(parts) + (" - reward" if self.reward_weight > 0 else "")

    def _ui_terms(self) -> str:
        if self.ratio == "one":
            published = self.ui_form == "published"
            return "psi(1) <D, D_p-x0>" if published else "2 psi(1) <D, D_p-x0> + (psi-r psi')(1) |D|^2"
        weights = "sg " if self.ratio == "detached" else ""
        return {
            "exact": f"2 {weights}psi <D, D_p-x0> + {weights}(psi-r psi') |D|^2",
            "four_term": "2 sg psi <D, D_p-x0> + sg(psi-r psi') |D|^2 + cross + drift",
            "published": "sg psi <D, D_p-x0> + drift",
        }[self.ui_form]


def _recipes() -> tuple[Recipe, ...]:
    reverse_kl = divergences.get("reverse_kl")
    diff_instruct = Recipe(
        name="diff_instruct",
        title="Diff-Instruct",
        divergence=reverse_kl,
        form="score_difference",
        time_weighting="integral",
    )
    di_plus_plus = replace(
        diff_instruct,
        name="di_plus_plus",
        title="Diff-Instruct++",
        note="the teacher is guided; how much the reward weighs is the user's",
        reward_weight=1.0,
    )
    sim = Recipe(
        name="sim",
        title="Score implicit matching",
        divergence=reverse_kl,
        form="sim",
        time_weighting="uniform",
    )
    di_star = replace(
        sim,
        name="di_star",
        title="Diff-Instruct*",
        note="the teacher is guided; reward as in Diff-Instruct++",
        reward_weight=1.0,
    )
    vsd = replace(
        diff_instruct,
        name="vsd",
        title="Variational score distillation (ProlificDreamer)",
        time_weighting="vsd",
    )
    swift_brush = replace(vsd, name="swift_brush", title="SwiftBrush", note="VSD of an amortised generator")
    sds = replace(
        vsd,
        name="sds",
        title="Score distillation sampling (DreamFusion)",
        student="dirac",
        guidance_scale=100.0,
    )
    dds = replace(sds, name="dds", title="Delta denoising score", student="source", guidance_scale=7.5)
    red_diff = replace(
        sds,
        name="red_diff",
        title="RED-diff",
        note="weight SNR^-1/2 on eps (from memory), uniform in x0 units",
        time_weighting="uniform",
        data_fidelity_weight=1.0,
        guidance_scale=1.0,
    )
    return (
        diff_instruct,
        di_plus_plus,
        di_star,
        sds,
        dds,
        vsd,
        *_dmd_recipes(diff_instruct),
        red_diff,
        swift_brush,
        sim,
        *_sid_recipes(),
        *_uni_instruct_recipes(),
    )


def _dmd_recipes(diff_instruct: Recipe) -> tuple[Recipe, ...]:
    dmd = replace(
        diff_instruct,
        name="dmd",
        title="Distribution matching distillation",
        note="regression: 0.25 LPIPS on the teacher's noise-image pairs (from memory)",
        time_weighting="uniform",
        normalisation="l1",
        regression_weight=0.25,
    )
    dmd2 = replace(
        dmd,
        name="dmd2",
        title="DMD2",
        note="GAN weight and five fake score steps from memory",
        regression_weight=0.0,
        adversarial_weight=3e-3,
        fake_steps=5,
    )
    f_distill = replace(
        dmd2,
        name="f_distill",
        title="f-distill",
        note="GAN weight as in DMD2",
        divergence=divergences.get("js"),
        accepts_divergence=True,
        self_normalise=True,
        fake_steps=1,
    )
    return dmd, dmd2, f_distill


def _sid_recipes() -> tuple[Recipe, ...]:
    sid = Recipe(
        name="sid",
        title="Score identity distillation",
        note="alpha 1.0; 1.2 for some data sets; 0.5 is the exact gradient",
        divergence=divergences.get("reverse_kl"),
        form="sid",
        time_weighting="uniform",
        normalisation="l1",
    )
    sida = replace(
        sid,
        name="sida",
        title="SiD with adversarial loss",
        adversarial_weight=1e-4,
        normalise_adversarial=True,
    )
    sid_lsg = replace(
        sid,
        name="sid_lsg",
        title="SiD with long-short guidance",
        note="the fake score is guided in training and use (from memory)",
        guidance_scale=1.5,
        fake_guidance_scale=1.5,
    )
    return sid, sida, sid_lsg


def _uni_instruct_recipes() -> tuple[Recipe, ...]:
    exact = Recipe(
        name="uni_instruct",
        title="Uni-Instruct, exact gradient",
        divergence=divergences.get("forward_kl"),
        accepts_divergence=True,
        form="uni_instruct",
        time_weighting="vsd_expansion",
        adversarial_weight=1e-4,
    )
    integral = replace(
        exact,
        name="uni_instruct_integral",
        title="Uni-Instruct, integral form without Jacobians",
        note="the same objectives by another weight over time; the cheapest exact estimator",
        form="score_difference",
        time_weighting="vsd",
    )
    four_term = replace(
        exact,
        name="uni_instruct_four_term",
        title="Uni-Instruct, exact with detached ratio",
        ui_form="four_term",
    )
    detached = replace(
        exact,
        name="uni_instruct_detached",
        title="Uni-Instruct, as published",
        note="what the authors' program intends, with a true ratio; biased",
        ui_form="published",
        time_weighting="uniform",
        normalisation="l1",
        normalise_adversarial=True,
    )
    released = replace(
        detached,
        name="uni_instruct_released",
        title="Uni-Instruct, as the released program evaluates",
        note="its ratio is 1 to three digits: SiDA with alpha 1, times psi(1)",
        ratio="one",
    )
    return exact, integral, four_term, detached, released


_RECIPES = {recipe.name: recipe for recipe in _recipes()}


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
    the source image and the teacher's prediction of it under its own prompt with the same noise (DDS). Each
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
    """D_p: the fake score's prediction, or what it would be for a student that is the single image x0."""
    if recipe.student == "trained":
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
