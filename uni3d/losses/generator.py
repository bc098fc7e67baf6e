"""Losses that move the student, per sample: every function returns [B], sums over all axes but the first.

Inputs, shared by all: `x0` [B, ...] is what the student made (attached to its parameters), x_t = x0 + sigma
eps, `teacher_x0` and `fake_x0` are the x0-predictions D_q(x_t) and D_p(x_t) of teacher and fake score,
`log_ratio` is log r(x_t) with r = teacher/student density, Delta = D_q - D_p. The caller freezes the
parameters of all networks but lets gradients flow through x_t where a loss says that it reads them attached.
Arithmetic is in float32 or better.

Two camps, one family (Uni-Instruct, Theorems 3.1 and 3.2; psi is `Divergence.score_weight`):

- `score_difference_loss` has the gradient of D_f(q_t||p_t) at one noise level and needs no network Jacobian
  (Diff-Instruct, SDS, VSD, DMD, f-distill);
- `uni_instruct_loss` has the gradient of E[psi |Delta|^2] at one noise level, whose integral is
  D_f(q_0||p_0), and differentiates through both networks and the ratio (SIM, SiD, Uni-Instruct).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from uni3d.losses import divergence as divergences
from uni3d.losses.divergence import Divergence
from uni3d.losses.names import unknown_name
from uni3d.losses.per_sample import (
    at_least_float32,
    mean_per_sample,
    over_elements,
    per_sample,
    sum_per_sample,
)

Form = Literal["exact", "four_term", "published"]
Ratio = Literal["attached", "detached"]


class Distance(Protocol):
    """d(Delta), convex and zero at zero: what takes the place of |Delta|^2 (score implicit matching)."""

    def value(self, difference: Tensor) -> Tensor:
        """[B, ...] -> [B]."""
        ...

    def gradient(self, difference: Tensor) -> Tensor:
        """grad d, shaped as `difference`; differentiable itself."""
        ...


@dataclass(frozen=True)
class Squared:
    """|Delta|^2, the distance of the f-divergences."""

    def value(self, difference: Tensor) -> Tensor:
        return sum_per_sample(difference.square())

    def gradient(self, difference: Tensor) -> Tensor:
        return 2 * difference


@dataclass(frozen=True)
class PseudoHuber:
    """sqrt(|Delta|^2 + c^2) - c with c = constant * sqrt(number of elements): SIM's robust distance.

    The default constant is the one that improved consistency training proposes for images.
    """

    constant: float = 0.00054

    def value(self, difference: Tensor) -> Tensor:
        square = sum_per_sample(difference.square())
        c = self._c(difference)
        # sqrt(square + c^2) - c without the cancellation for small differences.
        return square / ((square + c**2).sqrt() + c)

    def gradient(self, difference: Tensor) -> Tensor:
        root = (sum_per_sample(difference.square()) + self._c(difference) ** 2).sqrt()
        return difference / over_elements(root, difference)

    def _c(self, difference: Tensor) -> float:
        return self.constant * (difference[0].numel() if len(difference) else 1) ** 0.5


def score_difference_loss(
    x0: Tensor,
    teacher_x0: Tensor,
    fake_x0: Tensor,
    log_ratio: Tensor | None,
    divergence: str | Divergence,
    time_weight: Tensor | float,
) -> Tensor:
    """A loss whose gradient with respect to x0 is exactly -time_weight * psi(r) * Delta, with psi and Delta
    detached.

    With time_weight = 1 / sigma^2 that is the gradient of D_f(q_t||p_t): the Diff-Instruct form, for any f.
    Its value is time_weight * psi * |Delta|^2 / 2: the quadratic with that gradient, zero where the student
    equals the teacher.

    x0, teacher_x0, fake_x0 [B, ...]; log_ratio [B], or None where psi is constant (reverse_kl); time_weight a
    float or [B], taken as a constant. Only x0 is differentiated, so the networks may run under
    `torch.no_grad`. Returns [B]. Raises ValueError for shapes that differ, an unknown divergence, or a
    missing log_ratio.
    """
    x0, teacher_x0, fake_x0 = _predictions(x0, teacher_x0, fake_x0)
    f = divergences.get(divergence)
    with torch.no_grad():
        psi = f.score_weight(_log_ratio(log_ratio, f, x0))
        difference = teacher_x0 - fake_x0
        step = over_elements(per_sample(time_weight, x0, "time_weight") * psi, x0) * difference
        value = 0.5 * sum_per_sample(step * difference)
    # x0 - sg(x0) is zero with derivative one: the gradient is -step without the rounding of |x0 - sg(x0 +
    # step)|^2 / 2.
    return value - sum_per_sample(step * (x0 - x0.detach()))


def uni_instruct_loss(
    x0: Tensor,
    sigma: Tensor | float,
    teacher_x0: Tensor,
    fake_x0: Tensor,
    log_ratio: Tensor | None,
    divergence: str | Divergence,
    time_weight: Tensor | float,
    *,
    form: Form = "exact",
    ratio: Ratio | None = None,
    distance: Distance | None = None,
) -> Tensor:
    """time_weight * (2 psi <Delta, fake_x0 - x0> + (psi - r psi') |Delta|^2), whose expected gradient is that
    of time_weight * E_{p_t}[psi(r) |Delta|^2]; with `noise_schedule.expansion_weight` the integral over sigma
    is D_f.

    Arguments as in `score_difference_loss`; the value of `sigma` (float or [B]) matters only to the forms
    other than "exact". Gradients flow through x0, teacher_x0, fake_x0 and, in the exact form, log_ratio
    (where psi is constant that gradient is zero, so pass None); the time weight is a constant.

    `form`:

    - ``exact``: as above. With ratio="detached" the weights psi and psi - r psi' are constants, which is
      cheaper by the backward pass of the discriminator and biased for every divergence but reverse_kl: the
      cross term r psi' (u . (s_p - s_c)) u is lost.
    - ``four_term``: detached weights and the two terms that repair them,
      2 sg[psi] <Delta, D_p - x0> + 2 sg[r psi' <Delta, D_p - x0> Delta / sigma^2] . x_t
      + sg[psi - r psi'] |Delta|^2 + sg[-r^2 psi'' |Delta|^2 Delta / sigma^2] . x_t.
      Unbiased like the exact form (and equal to it sample by sample when log_ratio is the optimal logit).
    - ``published``: what the authors' program intends: sg[psi] <Delta, D_p - x0> + sg[-r^2 psi'' |Delta|^2
      Delta / sigma^2] . x_t. No |Delta|^2 term, half the score term, no cross term: biased.

    All terms written ". x_t" have value zero here (they act on x0 - sg(x0)), so exact and four_term agree in
    value too.

    `ratio`: None is "attached" for the exact form and "detached" for the others, which accept nothing else.
    `distance` d replaces |Delta|^2 by d(Delta) and 2 Delta by grad d(Delta); None is `Squared`.

    Returns [B]. Raises ValueError as `score_difference_loss`, and for an unknown form or ratio.
    """
    check_form(form, ratio)
    x0, teacher_x0, fake_x0 = _predictions(x0, teacher_x0, fake_x0)
    weight = per_sample(time_weight, x0, "time_weight").detach()
    sigma = per_sample(sigma, x0, "sigma")
    f = divergences.get(divergence)
    log_ratio = _log_ratio(log_ratio, f, x0)
    if form != "exact" or ratio == "detached":
        log_ratio = log_ratio.detach()
    d = Squared() if distance is None else distance

    difference = teacher_x0 - fake_x0
    score = sum_per_sample(d.gradient(difference) * (fake_x0 - x0))
    psi = f.score_weight(log_ratio)
    if form == "exact":
        return weight * (psi * score + f.square_weight(log_ratio) * d.value(difference))

    with torch.no_grad():
        drift = f.square_slope(log_ratio) * d.value(difference)
        if form == "four_term":
            drift = drift + f.score_slope(log_ratio) * score
        noise_variance = sigma.square()
        push = over_elements(drift / noise_variance, x0) * difference
    terms = sum_per_sample(push * (x0 - x0.detach()))  # d x_t = d x0, since the noise is fixed
    if form == "four_term":
        return weight * (psi * score + f.square_weight(log_ratio) * d.value(difference) + terms)
    return weight * (0.5 * psi * score + terms)


def sid_loss(
    x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor, time_weight: Tensor | float, *, alpha: float = 1.0
) -> Tensor:
    """SiD, all attached: time_weight * (<Delta, teacher_x0 - x0> - alpha |Delta|^2), [B].

    alpha = 1/2 is half of `uni_instruct_loss` for reverse KL, the exact gradient. alpha = 1 drops the
    |Delta|^2 term (the sampling distribution is taken as frozen); 1.2 is the value of the paper (Zhou et al.
    2024) for some data sets.
    """
    x0, teacher_x0, fake_x0 = _predictions(x0, teacher_x0, fake_x0)
    difference = teacher_x0 - fake_x0
    weight = per_sample(time_weight, x0, "time_weight").detach()
    # <Delta, D_q - x0> = <Delta, D_p - x0> + |Delta|^2; one product less in the common case alpha = 1.
    loss = sum_per_sample(difference * (fake_x0 - x0))
    if alpha != 1.0:
        loss = loss + (1 - alpha) * sum_per_sample(difference.square())
    return weight * loss


def score_implicit_loss(
    x0: Tensor,
    teacher_x0: Tensor,
    fake_x0: Tensor,
    time_weight: Tensor | float,
    *,
    distance: Distance | None = None,
) -> Tensor:
    """Score implicit matching: time_weight * <grad d(Delta), fake_x0 - x0>, everything attached, [B].

    The gradient of E[d(Delta)] whose sampling distribution is frozen (Luo et al. 2024, Theorem 3.1).
    `distance` d: None is `PseudoHuber()`. The term d(Delta) that makes it the gradient of the reverse KL
    expansion is in `uni_instruct_loss(..., "reverse_kl", ..., distance=d)`.
    """
    x0, teacher_x0, fake_x0 = _predictions(x0, teacher_x0, fake_x0)
    d = PseudoHuber() if distance is None else distance
    weight = per_sample(time_weight, x0, "time_weight").detach()
    return weight * sum_per_sample(d.gradient(teacher_x0 - fake_x0) * (fake_x0 - x0))


def l1_normaliser(x0: Tensor, teacher_x0: Tensor, *, minimum: float = 1e-5) -> Tensor:
    """1 / max(mean |x0 - teacher_x0|, minimum) per sample, detached, [B]: the time weight of DMD and SiD.

    It evens out noise levels without a schedule, but it depends on the sample, so a loss that carries it is
    no longer the exact gradient of its divergence.
    """
    with torch.no_grad():
        error = mean_per_sample((at_least_float32(x0) - at_least_float32(teacher_x0)).abs())
        return 1 / error.clamp(min=minimum)


def check_form(form: str, ratio: str | None) -> None:
    """Raises ValueError unless `form` and `ratio` are options of `uni_instruct_loss` that go together."""
    if form not in ("exact", "four_term", "published"):
        raise unknown_name("form", form, ("exact", "four_term", "published"))
    if ratio not in (None, "attached", "detached"):
        raise unknown_name("ratio option", ratio, ("attached", "detached"))
    if form != "exact" and ratio == "attached":
        raise ValueError(
            f"form {form!r} takes the ratio as a constant: leave ratio out, or use the form 'exact'"
        )


def _predictions(x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    for name, prediction in (("teacher_x0", teacher_x0), ("fake_x0", fake_x0)):
        if prediction.shape != x0.shape:
            raise ValueError(
                f"{name} has shape {tuple(prediction.shape)} and x0 {tuple(x0.shape)}: they must be equal"
            )
    return at_least_float32(x0), at_least_float32(teacher_x0), at_least_float32(fake_x0)


def _log_ratio(log_ratio: Tensor | None, f: Divergence, x0: Tensor) -> Tensor:
    """[B]; None becomes zeros where psi is constant, so that no discriminator has to run for nothing."""
    if log_ratio is None and f.is_constant:
        return per_sample(0.0, x0, "log_ratio")
    if log_ratio is None:
        raise ValueError(
            f"{f.name} weighs samples by the density ratio, but log_ratio is None: pass log r, shape [B]"
        )
    wide = divergences.widen_ratio(log_ratio) if isinstance(log_ratio, Tensor) else log_ratio
    return per_sample(wide, x0, "log_ratio")
