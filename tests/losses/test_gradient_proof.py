"""The gradients, proved by quadrature on Gaussian mixtures with exact scores, in one and two dimensions.

A student x0 = mean_k + A_k z with parameters theta is diffused to x_t = x0 + sigma eps. Its density is known,
so the divergence, its expansion and their gradients are integrals over a grid; what the losses estimate is an
expectation over (component, z, eps), evaluated by Gauss-Hermite quadrature. The two must agree for every
divergence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from uni3d.diffusion.analytic import GaussianMixture
from uni3d.losses import divergence as divergences
from uni3d.losses import generator, noise_schedule, recipes

NAMES = divergences.names()
MIXTURE = "0.4*forward_kl + 0.6*reverse_kl"
ALL = [*NAMES, MIXTURE]
RATIO_FREE = "reverse_kl"

Loss = Callable[["Sample"], Tensor]


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class World:
    """A teacher, and a student family with its parameters."""

    teacher: GaussianMixture
    theta: Tensor
    dim: int
    student_weights: tuple[float, ...]
    half_width: float
    grid_size: int

    def means(self, theta: Tensor) -> Tensor:
        return theta[: 2 * self.dim].reshape(2, self.dim)

    def factors(self, theta: Tensor) -> Tensor:
        return theta[2 * self.dim :].reshape(2, self.dim, self.dim)

    def student(self, theta: Tensor) -> GaussianMixture:
        factors = self.factors(theta)
        return GaussianMixture(self.means(theta), factors @ factors.mT, f64(self.student_weights))

    def grid(self) -> tuple[Tensor, float]:
        axis = torch.linspace(-self.half_width, self.half_width, self.grid_size, dtype=torch.float64)
        points = torch.stack(torch.meshgrid(*[axis] * self.dim, indexing="ij"), dim=-1).reshape(-1, self.dim)
        return points, float(axis[1] - axis[0]) ** self.dim


LINE = World(
    teacher=GaussianMixture(f64([[-1.2], [0.9], [2.2]]), f64([0.40, 0.52, 0.35]), f64([0.3, 0.5, 0.2])),
    theta=f64([-0.7, 1.5, 0.66, 0.72]),
    dim=1,
    student_weights=(0.45, 0.55),
    half_width=18.0,
    grid_size=3601,
)
PLANE = World(
    teacher=GaussianMixture(
        f64([[-1.0, 0.2], [1.1, 0.5], [0.1, -1.1]]),
        f64([[[0.35, 0.05], [0.05, 0.30]], [[0.30, -0.08], [-0.08, 0.42]], [[0.40, 0.0], [0.0, 0.30]]]),
        f64([0.35, 0.35, 0.3]),
    ),
    theta=f64([-0.7, 0.4, 0.8, -0.5, 0.65, 0.05, -0.1, 0.6, 0.68, 0.0, 0.15, 0.66]),
    dim=2,
    student_weights=(0.5, 0.5),
    half_width=9.0,
    grid_size=241,
)


@dataclass(frozen=True)
class Sample:
    """What the losses see: one row per quadrature node; `probability` sums to one per noise level."""

    x0: Tensor
    sigma: Tensor
    teacher_x0: Tensor
    fake_x0: Tensor
    log_ratio: Tensor
    probability: Tensor


def hermite(num: int) -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(num)
    return f64(nodes), f64(weights / weights.sum())


def product_rule(rules: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    nodes = torch.meshgrid(*[node for node, _ in rules], indexing="ij")
    weights = torch.meshgrid(*[weight for _, weight in rules], indexing="ij")
    probability = torch.stack(weights).prod(dim=0).reshape(-1)
    return torch.stack([node.reshape(-1) for node in nodes], dim=-1), probability


def draw(world: World, theta: Tensor, sigma: float, num: int) -> Sample:
    """Nodes for E over component, z and eps, with x0 attached to theta and the networks frozen at theta.

    (z, eps) is rotated so that x_t depends on the first half of the coordinates only. The integrand is a
    polynomial of low degree in the others, for which three nodes are exact; many go only where they count.
    """
    frozen = world.student(theta.detach())
    rules = [hermite(num)] * world.dim + [hermite(3)] * world.dim
    rotated, probability = product_rule(rules)
    x0_parts, eps_parts, probabilities = [], [], []
    for k, weight in enumerate(world.student_weights):
        factor = world.factors(theta)[k]
        spread = torch.cat([factor.detach(), sigma * torch.eye(world.dim, dtype=torch.float64)], dim=1)
        basis, _ = torch.linalg.qr(spread.mT, mode="complete")
        coordinates = rotated @ basis.mT
        z, eps = coordinates[:, : world.dim], coordinates[:, world.dim :]
        x0_parts.append(world.means(theta)[k] + z @ factor.mT)
        eps_parts.append(eps)
        probabilities.append(weight * probability)
    x0 = torch.cat(x0_parts)
    x_t = x0 + sigma * torch.cat(eps_parts)
    return Sample(
        x0,
        torch.full((len(x0),), sigma, dtype=torch.float64),
        world.teacher.denoise(x_t, sigma),
        frozen.denoise(x_t, sigma),
        world.teacher.log_prob(x_t, sigma) - frozen.log_prob(x_t, sigma),
        torch.cat(probabilities),
    )


def draw_levels(world: World, theta: Tensor, sigmas: Tensor, weights: Tensor, num: int) -> Sample:
    """`draw` at several noise levels in one batch, each with its own weight."""
    samples = [draw(world, theta, float(sigma), num) for sigma in sigmas]
    scaled = [weight * sample.probability for weight, sample in zip(weights, samples, strict=True)]
    fields = ("x0", "sigma", "teacher_x0", "fake_x0", "log_ratio")
    return Sample(*(torch.cat([getattr(s, name) for s in samples]) for name in fields), torch.cat(scaled))


def expected_gradients(theta: Tensor, sample: Sample, losses: list[Loss]) -> list[Tensor]:
    """d/dtheta of the expectation of each loss."""
    return [
        torch.autograd.grad((sample.probability * loss(sample)).sum(), theta, retain_graph=True)[0]
        for loss in losses
    ]


def exact_divergence(world: World, name: str, theta: Tensor, sigma: float) -> Tensor:
    """D_f(q_sigma||p_sigma) on the grid."""
    x, cell = world.grid()
    log_p = world.student(theta).log_prob(x, sigma)
    ratio = (world.teacher.log_prob(x, sigma) - log_p).exp()
    return (log_p.exp() * divergences.get(name).f(ratio)).sum() * cell


def exact_score_divergences(
    world: World, names: list[str], theta: Tensor, sigma: float, distance: generator.Distance | None = None
) -> list[Tensor]:
    """E_{p_t}[psi(r) d(Delta)] on the grid, attached to theta in the density, the ratio and the score."""
    x, cell = world.grid()
    student = world.student(theta)
    log_p = student.log_prob(x, sigma)
    log_ratio = world.teacher.log_prob(x, sigma) - log_p
    d = distance or generator.Squared()
    integrand = log_p.exp() * d.value(world.teacher.denoise(x, sigma) - student.denoise(x, sigma)) * cell
    return [(integrand * divergences.get(name).score_weight(log_ratio)).sum() for name in names]


def bias(estimate: Tensor, truth: Tensor) -> float:
    return float((estimate - truth).norm() / truth.norm())


def ui(name: str, **options: object) -> Loss:
    return lambda s: generator.uni_instruct_loss(
        s.x0,
        s.sigma,
        s.teacher_x0,
        s.fake_x0,
        s.log_ratio,
        name,
        1.0,
        **options,  # type: ignore[arg-type]
    )


def score_difference(name: str) -> Loss:
    return lambda s: generator.score_difference_loss(
        s.x0, s.teacher_x0, s.fake_x0, s.log_ratio, name, s.sigma.pow(-2)
    )


@pytest.fixture(params=["line", "plane"], scope="module")
def at_one_level(request: pytest.FixtureRequest) -> tuple[World, Tensor, Sample, dict[str, Tensor]]:
    """A world at one noise level, and the true gradient of E[psi |Delta|^2] there for every divergence."""
    world, sigma, num = (LINE, 0.4, 100) if request.param == "line" else (PLANE, 0.6, 44)
    theta = world.theta.clone().requires_grad_()
    values = exact_score_divergences(world, ALL, theta, sigma)
    truth = {
        name: torch.autograd.grad(value, theta, retain_graph=True)[0]
        for name, value in zip(ALL, values, strict=True)
    }
    return world, theta, draw(world, theta, sigma, num), truth


# ---- the expansion


@pytest.mark.parametrize("world_name", ["line", "plane"])
def test_expanded_integral_is_the_divergence(world_name: str) -> None:
    """D_f(q_0||p_0) - D_f(q_S||p_S) = integral over sigma of E[psi |Delta|^2] / sigma^3."""
    world = LINE if world_name == "line" else PLANE
    first, last, num = (0.0, 3.0, 40) if world_name == "line" else (0.3, 1.5, 12)
    nodes, weights = np.polynomial.legendre.leggauss(num)
    # sigma = first + (last - first) s^2 crowds the nodes where sigma is small.
    s, w = f64(0.5 * (nodes + 1)), f64(0.5 * weights)
    sigmas, steps = first + (last - first) * s**2, 2 * (last - first) * s * w
    expanded = torch.zeros(len(ALL), dtype=torch.float64)
    for sigma, step in zip(sigmas, steps, strict=True):
        weight = noise_schedule.time_weight("expansion", sigma)
        values = exact_score_divergences(world, ALL, world.theta, float(sigma))
        expanded += step * weight * torch.stack(values)
    ends = [[exact_divergence(world, name, world.theta, sigma) for name in ALL] for sigma in (first, last)]
    truth = torch.stack(ends[0]) - torch.stack(ends[1])
    assert (truth > 1e-3).all()
    torch.testing.assert_close(expanded, truth, rtol=1e-6, atol=0)


# ---- the Uni-Instruct form


def test_uni_instruct_loss_is_unbiased(at_one_level: tuple[World, Tensor, Sample, dict[str, Tensor]]) -> None:
    _, theta, sample, truth = at_one_level
    gradients = expected_gradients(theta, sample, [ui(name) for name in ALL])
    for name, gradient in zip(ALL, gradients, strict=True):
        assert bias(gradient, truth[name]) < 1e-4, name


def test_true_gradient_agrees_with_finite_differences() -> None:
    """The truth above, without autograd."""
    step = 1e-4
    for name in ALL:
        (truth,) = torch.autograd.grad(
            exact_score_divergences(LINE, [name], theta := LINE.theta.clone().requires_grad_(), 0.4)[0], theta
        )
        differences = []
        for i in range(len(LINE.theta)):
            shift = torch.zeros_like(LINE.theta)
            shift[i] = step
            above, below = (
                exact_score_divergences(LINE, [name], LINE.theta + sign * shift, 0.4)[0] for sign in (1, -1)
            )
            differences.append((above - below) / (2 * step))
        assert bias(torch.stack(differences), truth) < 1e-6, name


@pytest.mark.parametrize("world", [LINE, PLANE], ids=["line", "plane"])
def test_four_term_form_equals_the_exact_form_sample_by_sample(world: World) -> None:
    """In value, and in the gradient with respect to every generated sample, not only in expectation."""
    sigma = 0.5
    frozen = world.student(world.theta)
    generator_ = torch.Generator().manual_seed(3)
    x0 = frozen.sample(500, generator=generator_).requires_grad_()
    x_t = x0 + sigma * torch.randn(x0.shape, dtype=x0.dtype, generator=generator_)
    log_ratio = world.teacher.log_prob(x_t, sigma) - frozen.log_prob(x_t, sigma)
    at_x_t = (world.teacher.denoise(x_t, sigma), frozen.denoise(x_t, sigma), log_ratio)
    for name in ALL:
        results = []
        for form in ("exact", "four_term"):
            loss = generator.uni_instruct_loss(x0, sigma, *at_x_t, name, 0.7, form=form)
            (gradient,) = torch.autograd.grad(loss.sum(), x0, retain_graph=True)
            results.append((loss.detach(), gradient))
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-10, msg=name)


def test_four_term_form_is_unbiased(at_one_level: tuple[World, Tensor, Sample, dict[str, Tensor]]) -> None:
    _, theta, sample, truth = at_one_level
    gradients = expected_gradients(theta, sample, [ui(name, form="four_term") for name in ALL])
    for name, gradient in zip(ALL, gradients, strict=True):
        assert bias(gradient, truth[name]) < 1e-4, name


def test_detaching_the_ratio_is_biased(at_one_level: tuple[World, Tensor, Sample, dict[str, Tensor]]) -> None:
    """So the tests above can fail; and reverse KL, whose psi is constant, is the exception."""
    _, theta, sample, truth = at_one_level
    gradients = expected_gradients(theta, sample, [ui(name, ratio="detached") for name in ALL])
    for name, gradient in zip(ALL, gradients, strict=True):
        if name == RATIO_FREE:
            assert bias(gradient, truth[name]) < 1e-4
        else:
            assert bias(gradient, truth[name]) > 0.05, name


def test_published_form_is_biased_even_after_rescaling(
    at_one_level: tuple[World, Tensor, Sample, dict[str, Tensor]],
) -> None:
    _, theta, sample, truth = at_one_level
    for name, gradient in zip(
        ALL, expected_gradients(theta, sample, [ui(name, form="published") for name in ALL]), strict=True
    ):
        cosine = torch.nn.functional.cosine_similarity(gradient, truth[name], dim=0)
        assert cosine < 0.9995, name
        assert bias(gradient * (truth[name].norm() / gradient.norm()), truth[name]) > 0.02, name


@pytest.mark.parametrize("name", ALL)
def test_integral_over_noise_levels_is_the_divergence_gradient(name: str) -> None:
    """uni_instruct_loss with `expansion_weight`, sigma ~ pi, batched: the gradient of D_f(a) - D_f(b)."""
    low, high = 0.3, 3.0
    nodes, weights = np.polynomial.legendre.leggauss(14)
    log_sigmas = 0.5 * (math.log(high / low) * f64(nodes) + math.log(high * low))
    sigmas = log_sigmas.exp()
    probability = f64(0.5 * weights)  # log sigma uniform: pi(sigma) = 1 / (sigma log(high / low))
    theta = LINE.theta.clone().requires_grad_()
    sample = draw_levels(LINE, theta, sigmas, probability, 70)
    density = 1 / (sample.sigma * math.log(high / low))

    def loss(s: Sample) -> Tensor:
        weight = noise_schedule.expansion_weight(s.sigma, density)
        return generator.uni_instruct_loss(s.x0, s.sigma, s.teacher_x0, s.fake_x0, s.log_ratio, name, weight)

    difference = exact_divergence(LINE, name, theta, low) - exact_divergence(LINE, name, theta, high)
    (truth,) = torch.autograd.grad(difference, theta)
    assert bias(expected_gradients(theta, sample, [loss])[0], truth) < 1e-4


@pytest.mark.parametrize("name", ALL)
def test_general_distance_is_unbiased_with_its_second_term(name: str) -> None:
    """E[psi d(Delta)] for a pseudo-Huber d; score implicit matching, without the term d(Delta), is biased."""
    sigma, distance = 0.5, generator.PseudoHuber(0.25)
    theta = LINE.theta.clone().requires_grad_()
    (truth,) = torch.autograd.grad(exact_score_divergences(LINE, [name], theta, sigma, distance)[0], theta)
    sample = draw(LINE, theta, sigma, 150)
    (gradient,) = expected_gradients(theta, sample, [ui(name, distance=distance)])
    assert bias(gradient, truth) < 1e-4
    if name == RATIO_FREE:
        implicit: Loss = lambda s: generator.score_implicit_loss(  # noqa: E731
            s.x0, s.teacher_x0, s.fake_x0, 1.0, distance=distance
        )
        assert bias(expected_gradients(theta, sample, [implicit])[0], truth) > 0.02


# ---- the integral form


@pytest.mark.parametrize("world_name", ["line", "plane"])
def test_score_difference_loss_is_the_divergence_gradient(world_name: str) -> None:
    world, sigma, num = (LINE, 0.4, 100) if world_name == "line" else (PLANE, 0.6, 44)
    theta = world.theta.clone().requires_grad_()
    sample = draw(world, theta, sigma, num)
    gradients = expected_gradients(theta, sample, [score_difference(name) for name in ALL])
    for name, gradient in zip(ALL, gradients, strict=True):
        (truth,) = torch.autograd.grad(exact_divergence(world, name, theta, sigma), theta)
        assert bias(gradient, truth) < 1e-4, name


@pytest.mark.parametrize("name", ALL)
def test_two_camps_have_one_objective(name: str) -> None:
    """Weights vsd (linear in Delta) and vsd_expansion (quadratic) agree over log sigma, up to boundary terms.

    lambda(sigma) = sigma - arctan sigma is the integral of lambda' = sigma^2 / (1 + sigma^2).
    """
    low, high = 0.3, 3.0
    nodes, weights = np.polynomial.legendre.leggauss(14)
    sigmas = (0.5 * (math.log(high / low) * f64(nodes) + math.log(high * low))).exp()
    d_log_sigma = 0.5 * math.log(high / low) * f64(weights)
    theta = LINE.theta.clone().requires_grad_()
    sample = draw_levels(LINE, theta, sigmas, d_log_sigma, 70)

    def loss_of(method: str) -> Loss:
        recipe = recipes.get(method, name, adversarial_weight=0)
        return lambda s: recipes.generator_loss(
            recipe,
            x0=s.x0,
            sigma=s.sigma,
            teacher_x0=s.teacher_x0,
            fake_x0=s.fake_x0,
            log_ratio=s.log_ratio,
        )

    quadratic, linear = expected_gradients(
        theta, sample, [loss_of("uni_instruct"), loss_of("uni_instruct_integral")]
    )
    boundary = sum(
        sign * (sigma - math.atan(sigma)) * exact_divergence(LINE, name, theta, sigma)
        for sign, sigma in ((1, low), (-1, high))
    )
    assert isinstance(boundary, Tensor)
    (at_ends,) = torch.autograd.grad(boundary, theta)
    assert bias(linear + at_ends, quadratic) < 1e-4
    assert bias(linear, quadratic) > 0.01  # the boundary terms are not negligible


# ---- adversarial losses are members of the family


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("non_saturating", "softened_reverse_kl"),
        ("saturating", "js"),
        ("linear", "reverse_kl"),
        *((name, name) for name in NAMES),
    ],
)
def test_adversarial_loss_on_the_optimal_logit_is_a_score_difference(kind: str, name: str) -> None:
    """-log D has the gradient of softened reverse KL, sample by sample, and so on."""
    from uni3d.losses import discriminator

    sigma = 0.5
    frozen = PLANE.student(PLANE.theta)
    generator_ = torch.Generator().manual_seed(0)
    x0 = frozen.sample(200, generator=generator_).requires_grad_()
    x_t = x0 + sigma * torch.randn(x0.shape, dtype=x0.dtype, generator=generator_)
    logit = PLANE.teacher.log_prob(x_t, sigma) - frozen.log_prob(x_t, sigma)
    (adversarial,) = torch.autograd.grad(
        discriminator.adversarial_loss(logit, kind=kind).sum(), x0, retain_graph=True
    )
    difference = generator.score_difference_loss(
        x0, PLANE.teacher.denoise(x_t, sigma), frozen.denoise(x_t, sigma), logit, name, sigma**-2
    )
    torch.testing.assert_close(
        adversarial, torch.autograd.grad(difference.sum(), x0)[0], rtol=1e-9, atol=1e-10
    )
