"""Generator losses: formulas, gradients, shapes, precision and errors, on plain random tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from uni3d.losses import divergence as divergences
from uni3d.losses import generator

NAMES = divergences.names()


def tensors(
    batch: int = 5, shape: tuple[int, ...] = (2, 3), dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0, teacher_x0, fake_x0 [B, ...] and log_ratio [B], all leaves that require gradients."""
    noise = torch.Generator().manual_seed(batch)
    images = [torch.randn(batch, *shape, generator=noise, dtype=torch.float64) for _ in range(3)]
    log_ratio = torch.randn(batch, generator=noise, dtype=torch.float64)
    return tuple(t.to(dtype).requires_grad_() for t in (*images, log_ratio))  # type: ignore[return-value]


def gradients(loss: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss.sum(), inputs, retain_graph=True, allow_unused=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 3)])
def test_uni_instruct_formula(name: str, shape: tuple[int, ...]) -> None:
    """Value and all four gradients against the formula, written out with an explicit loop over samples."""
    x0, teacher, fake, log_ratio = inputs = tensors(shape=shape)
    weight = torch.rand(5, dtype=torch.float64)
    f = divergences.get(name)
    loss = generator.uni_instruct_loss(x0, 0.7, teacher, fake, log_ratio, name, weight)
    rows = []
    for b in range(5):
        delta = teacher[b] - fake[b]
        score = (delta * (fake[b] - x0[b])).sum()
        psi, square = f.score_weight(log_ratio[b]), f.square_weight(log_ratio[b])
        rows.append(weight[b] * (2 * psi * score + square * delta.square().sum()))
    expected = torch.stack(rows)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(gradients(loss, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(got, want)
    # Where psi is constant the ratio may be left out: nobody has to estimate it.
    if f.is_constant:
        torch.testing.assert_close(
            generator.uni_instruct_loss(x0, 0.7, teacher, fake, None, name, weight), loss
        )


@pytest.mark.parametrize("name", NAMES)
def test_score_difference_gradient_is_exact(name: str) -> None:
    """-time_weight * psi * Delta to the last bit, and nothing flows into the networks or the ratio."""
    inputs = tensors(dtype=torch.float32)
    x0, teacher, fake, log_ratio = inputs
    weight = torch.rand(5)
    loss = generator.score_difference_loss(x0, teacher, fake, log_ratio, name, weight)
    gradient, *others = gradients(loss, inputs)
    psi = divergences.get(name).score_weight(log_ratio)
    step = (weight * psi)[:, None, None] * (teacher - fake)
    assert gradient is not None and torch.equal(gradient, -step)
    assert others == [None, None, None]
    torch.testing.assert_close(loss, 0.5 * weight * psi * (teacher - fake).square().sum(dim=(1, 2)))


def test_score_difference_gradient_through_a_student() -> None:
    """Any value of x0's parametrisation gets the chain rule of the step."""
    theta = torch.randn(3, dtype=torch.float64, requires_grad=True)
    basis = torch.randn(4, 6, 3, dtype=torch.float64)
    x0 = (basis @ theta).sin()
    _, teacher, fake, log_ratio = tensors(4, (6,))
    loss = generator.score_difference_loss(x0, teacher, fake, log_ratio, "js", 0.3)
    (gradient,) = torch.autograd.grad(loss.sum(), theta)
    step = 0.3 * log_ratio.sigmoid()[:, None] * (teacher - fake)
    expected = -((step * (basis @ theta).cos())[..., None] * basis).sum(dim=(0, 1))
    torch.testing.assert_close(gradient, expected)


def test_loss_is_zero_where_student_and_teacher_agree() -> None:
    x0, teacher, _, log_ratio = tensors()
    for name in NAMES:
        fake = teacher.detach()
        assert (generator.score_difference_loss(x0, teacher, fake, log_ratio, name, 1.0) == 0).all()
        loss = generator.uni_instruct_loss(x0, 1.0, teacher.detach(), fake, log_ratio, name, 1.0)
        assert (loss == 0).all()
        (gradient,) = torch.autograd.grad(loss.sum(), x0)
        assert (gradient == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_ratio_options(name: str) -> None:
    """Detached: same value, same gradient into the networks, none into the ratio."""
    inputs = tensors()
    x0, teacher, fake, log_ratio = inputs
    attached = generator.uni_instruct_loss(x0, 1.0, teacher, fake, log_ratio, name, 1.0, ratio="attached")
    detached = generator.uni_instruct_loss(x0, 1.0, teacher, fake, log_ratio, name, 1.0, ratio="detached")
    torch.testing.assert_close(attached, detached)
    for one, other in zip(gradients(attached, inputs)[:3], gradients(detached, inputs)[:3], strict=True):
        torch.testing.assert_close(one, other)
    assert gradients(detached, inputs)[3] is None
    into_ratio = gradients(attached, inputs)[3]
    assert into_ratio is not None and bool((into_ratio == 0).all()) == (name == "reverse_kl")


@pytest.mark.parametrize("name", NAMES)
def test_published_form_formula(name: str) -> None:
    inputs = tensors()
    x0, teacher, fake, log_ratio = inputs
    sigma = torch.rand(5, dtype=torch.float64) + 0.2
    loss = generator.uni_instruct_loss(x0, sigma, teacher, fake, log_ratio, name, 1.0, form="published")
    f = divergences.get(name)
    delta = teacher - fake
    psi, drift = f.score_weight(log_ratio).detach(), f.square_slope(log_ratio).detach()
    push = (drift * delta.square().sum(dim=(1, 2)) / sigma**2)[:, None, None] * delta
    score = psi * (delta * (fake - x0)).sum(dim=(1, 2))
    expected = score + (push.detach() * (x0 - x0.detach())).sum(dim=(1, 2))
    torch.testing.assert_close(loss, expected)
    for got, want in zip(gradients(loss, inputs)[:3], gradients(expected, inputs)[:3], strict=True):
        torch.testing.assert_close(got, want)


def test_sid_is_half_of_reverse_kl_and_its_alpha() -> None:
    inputs = tensors()
    x0, teacher, fake, _ = inputs
    exact = generator.uni_instruct_loss(x0, 1.0, teacher, fake, None, "reverse_kl", 0.3)
    half = generator.sid_loss(x0, teacher, fake, 0.3, alpha=0.5)
    torch.testing.assert_close(2 * half, exact)
    for one, other in zip(gradients(2 * half, inputs)[:3], gradients(exact, inputs)[:3], strict=True):
        torch.testing.assert_close(one, other)
    delta = teacher - fake
    for alpha in (0.0, 1.0, 1.2):
        written = ((delta * (teacher - x0)) - alpha * delta.square()).sum(dim=(1, 2))
        torch.testing.assert_close(generator.sid_loss(x0, teacher, fake, 1.0, alpha=alpha), written)


def test_score_implicit_loss_is_sid_for_the_squared_distance() -> None:
    x0, teacher, fake, _ = tensors()
    squared = generator.score_implicit_loss(x0, teacher, fake, 1.0, distance=generator.Squared())
    torch.testing.assert_close(squared, 2 * generator.sid_loss(x0, teacher, fake, 1.0, alpha=1.0))


def test_pseudo_huber_gradient_is_its_derivative_and_it_is_stable() -> None:
    difference = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    for constant in (0.00054, 0.3, 5.0):
        d = generator.PseudoHuber(constant)
        (gradient,) = torch.autograd.grad(d.value(difference).sum(), difference)
        torch.testing.assert_close(gradient, d.gradient(difference))
        zero = torch.zeros(2, 3, requires_grad=True)
        assert (d.value(zero) == 0).all() and (d.gradient(zero) == 0).all()
        (at_zero,) = torch.autograd.grad((d.value(zero) + d.gradient(zero).sum(dim=1)).sum(), zero)
        assert at_zero.isfinite().all()
    tiny = torch.full((1, 1), 1e-4)
    value = generator.PseudoHuber(1.0).value(tiny)
    torch.testing.assert_close(value, torch.tensor([0.5e-8]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("extreme", [-30.0, 30.0])
def test_half_precision_inputs_are_computed_in_float32(dtype: torch.dtype, name: str, extreme: float) -> None:
    x0, teacher, fake, _ = tensors(shape=(64, 8), dtype=dtype)
    log_ratio = torch.full((5,), extreme, dtype=dtype, requires_grad=True)
    wide = [t.detach().float().requires_grad_() for t in (x0, teacher, fake, log_ratio)]
    for form in ("exact", "four_term", "published"):
        loss = generator.uni_instruct_loss(x0, 1.0, teacher, fake, log_ratio, name, 1.0, form=form)
        reference = generator.uni_instruct_loss(wide[0], 1.0, *wide[1:], name, 1.0, form=form)
        assert loss.dtype == torch.float32 and loss.isfinite().all()
        torch.testing.assert_close(loss, reference)
        for gradient in (*gradients(reference, tuple(wide)), gradients(loss, (log_ratio,))[0]):
            assert gradient is None or gradient.isfinite().all()
    loss = generator.score_difference_loss(x0, teacher, fake, log_ratio, name, 1.0)
    assert loss.dtype == torch.float32 and loss.isfinite().all()


def test_numbers_per_sample_in_every_shape() -> None:
    x0, teacher, fake, log_ratio = tensors()
    expected = generator.uni_instruct_loss(x0, 0.5, teacher, fake, log_ratio, "js", 0.3, form="four_term")
    column = (5, 1, 1)
    for shape in ((5,), column, (1,), ()):
        got = generator.uni_instruct_loss(
            x0,
            torch.full(shape, 0.5),
            teacher,
            fake,
            log_ratio.reshape(column),
            "js",
            torch.full(shape, 0.3, dtype=torch.float64),
            form="four_term",
        )
        torch.testing.assert_close(got, expected)
    empty = torch.zeros(0, 3)
    assert generator.uni_instruct_loss(empty, 1.0, empty, empty, torch.zeros(0), "js", 1.0).shape == (0,)


def test_time_weight_is_a_constant() -> None:
    x0, teacher, fake, log_ratio = tensors()
    weight = torch.ones(5, dtype=torch.float64, requires_grad=True)
    for loss in (
        generator.uni_instruct_loss(x0, 1.0, teacher, fake, log_ratio, "js", weight),
        generator.score_difference_loss(x0, teacher, fake, log_ratio, "js", weight),
        generator.sid_loss(x0, teacher, fake, weight),
        generator.score_implicit_loss(x0, teacher, fake, weight),
    ):
        assert gradients(loss, (weight,)) == [None]


def test_l1_normaliser() -> None:
    x0 = torch.tensor([[0.0, 4.0], [1.0, 1.0]], requires_grad=True)
    normaliser = generator.l1_normaliser(x0, torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
    torch.testing.assert_close(normaliser, torch.tensor([1 / 3, 1e5]))
    assert not normaliser.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_ratio": None}, "log_ratio is None"),
        ({"log_ratio": torch.zeros(4)}, r"log_ratio has shape \(4,\)"),
        ({"time_weight": torch.zeros(5, 2)}, "time_weight has shape"),
        ({"teacher_x0": torch.zeros(5, 3)}, "teacher_x0 has shape"),
        ({"fake_x0": torch.zeros(1, 2, 3)}, "fake_x0 has shape"),
        ({"sigma": torch.zeros(4)}, r"sigma has shape \(4,\)"),
        ({"sigma": None}, "sigma is a NoneType: pass a float or a tensor"),
        ({"time_weight": [1.0] * 5}, "time_weight is a list"),
        ({"log_ratio": torch.zeros(4), "divergence": "reverse_kl"}, r"log_ratio has shape \(4,\)"),
        ({name: torch.tensor(1.0) for name in ("x0", "teacher_x0", "fake_x0")}, "x0 has no axes"),
        ({"divergence": "jz"}, "did you mean 'js'"),
        ({"form": "four_terms"}, "did you mean 'four_term'"),
        ({"ratio": "attach"}, "did you mean 'attached'"),
        ({"form": "four_term", "ratio": "attached"}, "takes the ratio as a constant"),
    ],
)
def test_errors_say_what_to_do(changes: dict[str, object], message: str) -> None:
    x0, teacher, fake, log_ratio = tensors()
    arguments: dict[str, object] = {
        "x0": x0,
        "sigma": 1.0,
        "teacher_x0": teacher,
        "fake_x0": fake,
        "log_ratio": log_ratio,
        "divergence": "js",
        "time_weight": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        generator.uni_instruct_loss(**(arguments | changes))  # type: ignore[arg-type]
