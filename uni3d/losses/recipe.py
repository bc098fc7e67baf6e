"""What a method of the family is: a frozen configuration, and what follows from it.

    core = time_weight * normaliser * (score difference | Uni-Instruct | SiD | SIM form of Delta)
    loss = score_weight * core + adversarial + regression + data fidelity - reward

`recipes.generator_loss` evaluates it, `published_methods` holds the known ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from uni3d.losses import generator, noise_schedule
from uni3d.losses.divergence import Divergence
from uni3d.losses.names import canonical, unknown_name

CoreForm = Literal["score_difference", "uni_instruct", "sid", "sim"]
Student = Literal["trained", "dirac", "source", "classifier", "interval"]
Noise = Literal["fresh", "inverted"]


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
    D_p(x_t) = sg(x0); "source": as dirac, less the teacher's error on a source image (DDS); "classifier": the
    teacher's own without the prompt, so that Delta is what guidance alone adds (CSD); "interval": the
    teacher's own prediction one step of the inversion earlier, without the prompt (ISM)."""
    noise: Noise = "fresh"
    """"inverted": x_t is not x0 plus new noise but where DDIM, run backwards from x0, arrives."""
    inversion_steps: int = 0
    """Teacher predictions of one inversion."""
    inversion_guidance_scale: float = 0.0
    """Guidance of these predictions; 0 asks the teacher without the prompt."""

    ui_form: generator.Form = "exact"
    """Form of `generator.uni_instruct_loss`."""
    ratio: Literal["attached", "detached", "one"] | None = None
    """How the ratio enters it; None is the form's own way. "one" replaces r by 1, which is what the released
    program's formula evaluates to, to three digits, whatever the discriminator says."""
    jac_teacher: bool = True
    """Whether the forms that differentiate through networks do so through the teacher; False is an ablation
    that drops J_q^T (...) from the exact gradient."""
    jac_fake: bool = True
    """The same for the fake score."""
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
            ("kind of noise", self.noise, get_args(Noise)),
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
        if (self.noise == "inverted") != (self.inversion_steps > 0):
            raise ValueError(
                f"{self.name}: noise={self.noise!r} with {self.inversion_steps} inversion_steps; "
                f"inverted noise takes at least one step, fresh noise none"
            )
        if self.student == "interval" and self.noise != "inverted":
            raise ValueError(
                f"{self.name}: student='interval' is a step of an inversion; pass noise='inverted'"
            )
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
        return self.score_weight > 0 and self.form != "score_difference" and self.jac_teacher

    @property
    def needs_fake_jacobian(self) -> bool:
        """Whether gradients must flow through the fake score."""
        return self.needs_fake_score and self.form != "score_difference" and self.jac_fake

    @property
    def needs_negative(self) -> bool:
        """Whether the teacher's prediction without the prompt takes the place of the fake score's."""
        return self.student == "classifier" and self.score_weight > 0

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
            is_guided = self.guidance_scale != 1 or self.needs_negative
            teacher = (2 if is_guided else 1) * (2 if self.student == "source" else 1)
            # Guidance scales of 0 and 1 take one pass, without and with the prompt.
            teacher += self.inversion_steps * (1 if self.inversion_guidance_scale in (0, 1) else 2)
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
        psi = "" if self.divergence.is_constant and not self.accepts_divergence else "psi "
        core = {
            "score_difference": f"-<sg({psi}D), x0>",
            "sid": f"<D, D_p-x0> {1 - self.alpha:+g}|D|^2" if self.alpha != 1 else "<D, D_p-x0>",
            "sim": "<grad huber(D), D_p-x0>",
            "uni_instruct": self._ui_terms(),
        }[self.form]
        if self.student != "trained":
            core += {
                "dirac": ", D_p=sg(x0)",
                "source": ", D_p=sg(x0)+source error",
                "classifier": ", D_p=D_q without prompt",
                "interval": ", D_p=D_q before",
            }[self.student]
        if self.noise == "inverted":
            core += ", inverted noise"
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
