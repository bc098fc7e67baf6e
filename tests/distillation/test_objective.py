"""The losses of a step against the same losses written out by hand on the same noise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from distillation_fixtures import NUM_CLASSES, SIZE, random_network
from torch import Tensor

from uni3d.diffusion.discriminator import DiscriminatorHead
from uni3d.diffusion.edm import EDMDenoiser
from uni3d.distillation.frozen import frozen_view
from uni3d.distillation.objective import (
    CompanionView,
    Draw,
    ObjectiveSettings,
    StudentView,
    companion_losses,
    student_losses,
)
from uni3d.distillation.settings import MethodConfig
from uni3d.distillation.stages import recipe_of
from uni3d.losses import discriminator, fake_score, generator
from uni3d.losses.discriminator import RatioNormaliser, log_ratio_from_logits


class Scene:
    """A student, a teacher, a fake score and a head with unlike random weights, and one draw."""

    def __init__(self, num: int = 4) -> None:
        self.student, self.teacher, self.fake = (random_network(seed) for seed in (1, 2, 3))
        rng = torch.Generator().manual_seed(4)
        self.head = DiscriminatorHead(8, hidden_channels=8, generator=rng)
        with torch.no_grad():
            self.head.logit.weight.copy_(0.3 * torch.randn(self.head.logit.weight.shape, generator=rng))
        shape = (num, 3, SIZE, SIZE)
        self.draw = Draw(
            latent=torch.randn(shape, generator=rng),
            sigma=torch.tensor([0.3, 0.8, 2.0, 6.0])[:num],
            eps=torch.randn(shape, generator=rng),
            labels=torch.randint(NUM_CLASSES, (num,), generator=rng),
            real_eps=torch.randn(shape, generator=rng),
        )
        self.real = torch.rand(shape, generator=rng) * 2 - 1

    def student_view(self, **changes: Any) -> StudentView:
        networks: dict[str, Any] = {
            "student": self.student,
            "teacher": frozen_view(self.teacher),
            "fake": frozen_view(self.fake),
            "head": frozen_view(self.head),
        }
        return StudentView(**networks | changes)

    def x_t(self, x0: Tensor, eps: Tensor | None = None) -> Tensor:
        return x0 + self.draw.sigma[:, None, None, None] * (self.draw.eps if eps is None else eps)

    def x0(self, network: EDMDenoiser) -> Tensor:
        return network(2.5 * self.draw.latent, 2.5, self.draw.labels)


def gradients(network: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    return found


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name)


def test_the_score_difference_path_is_the_hand_written_one() -> None:
    scene = Scene()
    recipe = recipe_of(MethodConfig(method="diff-instruct"), None)
    losses, statistics = student_losses(
        scene.student_view(head=None), recipe, scene.draw, ObjectiveSettings()
    )
    losses.mean().backward()
    found = gradients(scene.student)
    x0 = scene.x0(scene.student)
    with torch.no_grad():
        x_t = scene.x_t(x0)
        teacher_x0 = scene.teacher.eval()(x_t, scene.draw.sigma, scene.draw.labels)
        fake_x0 = scene.fake.eval()(x_t, scene.draw.sigma, scene.draw.labels)
    weight = generator.l1_normaliser(x0, teacher_x0)
    expected = generator.score_difference_loss(x0, teacher_x0, fake_x0, None, "reverse_kl", weight)
    torch.testing.assert_close(losses, expected)
    expected.mean().backward()
    compare(found, gradients(scene.student))
    assert "log_ratio" not in statistics
    assert all(p.grad is None for net in (scene.teacher, scene.fake) for p in net.parameters())


@pytest.mark.parametrize("placement", ["fake_score", "teacher"])
@pytest.mark.parametrize("ratio", ["attached", "detached"])
def test_the_full_path_is_the_hand_written_one(placement: Any, ratio: Any) -> None:
    scene = Scene()
    recipe = recipe_of(MethodConfig(divergence="jeffreys", ratio=ratio, adversarial_weight=0.01), "jeffreys")
    settings = ObjectiveSettings(placement=placement)
    normaliser = RatioNormaliser(num_bins=3).eval()
    by_hand = copy.deepcopy(normaliser).train()
    losses, _ = student_losses(scene.student_view(), recipe, scene.draw, settings, normaliser=normaliser)
    losses.mean().backward()
    found = gradients(scene.student)

    x0 = scene.x0(scene.student)
    x_t = scene.x_t(x0)
    sigma, labels = scene.draw.sigma, scene.draw.labels
    teacher_x0, teacher_features = scene.teacher.eval().x0_and_features(x_t, sigma, labels)
    fake_x0, fake_features = scene.fake.eval().x0_and_features(x_t, sigma, labels)
    logits = scene.head(teacher_features if placement == "teacher" else fake_features, sigma)
    # The ratio comes from the logit.
    log_ratio = by_hand(log_ratio_from_logits(logits, max_abs=5.0), sigma)
    weight = generator.l1_normaliser(x0, teacher_x0)
    expected = generator.uni_instruct_loss(
        x0, sigma, teacher_x0, fake_x0, log_ratio, "jeffreys", weight, ratio=ratio
    )
    adversarial = discriminator.adversarial_loss(logits) * weight
    expected = expected + 0.01 * x0[0].numel() * adversarial
    torch.testing.assert_close(losses, expected)
    expected.mean().backward()
    compare(found, gradients(scene.student))
    torch.testing.assert_close(normaliser.mean_ratio, by_hand.mean_ratio)


@pytest.mark.parametrize("placement", ["fake_score", "teacher"])
def test_the_companions_path_is_the_hand_written_one(placement: Any) -> None:
    scene = Scene()
    settings = ObjectiveSettings(placement=placement, discriminator_weight=0.1)
    view = CompanionView(
        frozen_view(scene.student), scene.fake, scene.head, teacher=frozen_view(scene.teacher)
    )
    losses, statistics = companion_losses(view, scene.draw, settings, scene.real)
    losses.mean().backward()
    found, found_head = gradients(scene.fake), gradients(scene.head)
    sigma, labels = scene.draw.sigma, scene.draw.labels
    x0 = scene.x0(scene.student).detach()
    x_t, real_t = scene.x_t(x0), scene.x_t(scene.real, scene.draw.real_eps)
    error = fake_score.denoising_loss(
        scene.fake(x_t, sigma, labels), x0, sigma, weighting="edm", reduction="sum"
    )
    source = scene.fake if placement == "fake_score" else scene.teacher.requires_grad_(False)
    real_logits = scene.head(source.features(real_t, sigma, labels), sigma)
    fake_logits = scene.head(source.features(x_t, sigma, labels), sigma)
    critic = discriminator.discriminator_loss(real_logits, fake_logits)
    expected = error + 0.1 * x0[0].numel() * critic
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(statistics["discriminator_loss"], critic.detach())
    expected.mean().backward()
    compare(found, gradients(scene.fake))
    compare(found_head, gradients(scene.head))
    assert all(p.grad is None for p in scene.student.parameters())


class Watched:
    """A network that notes how it was called."""

    def __init__(self, network: EDMDenoiser) -> None:
        self.network = network
        self.calls: list[tuple[str, bool]] = []

    def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> Any:
        differentiates = torch.is_grad_enabled() and x.requires_grad
        self.calls.append((options.get("output", "x0"), differentiates))
        return self.network(x, *arguments, **options)


@pytest.mark.parametrize(
    ("method", "teacher_calls", "fake_calls"),
    [
        ("diff-instruct", [("x0", False)], [("x0", False)]),
        ("sid", [("x0", True)], [("x0", True)]),
        ("sim", [("x0", True)], [("x0", True)]),
        ("dmd2", [("x0", False)], [("both", True)]),
        ("f-distill", [("x0", False)], [("both", True)]),
        ("uni-instruct", [("x0", True)], [("both", True)]),
    ],
)
def test_no_more_is_evaluated_than_the_recipe_weighs(
    method: str, teacher_calls: list[Any], fake_calls: list[Any]
) -> None:
    scene = Scene()
    teacher, fake = Watched(frozen_view(scene.teacher)), Watched(frozen_view(scene.fake))
    view = scene.student_view(teacher=teacher, fake=fake)
    recipe = recipe_of(MethodConfig(method=method), None)
    losses, _ = student_losses(view, recipe, scene.draw, ObjectiveSettings())
    losses.mean().backward()
    assert teacher.calls == teacher_calls and fake.calls == fake_calls


def test_without_gradients_the_decoder_is_left_out_of_the_graph() -> None:
    network = random_network().requires_grad_(False)
    x = torch.randn(2, 3, SIZE, SIZE, requires_grad=True)
    labels = torch.tensor([0, 1])
    x0, features = network(x, torch.ones(2), labels, output="both", detach_x0=True)
    assert not x0.requires_grad and features.requires_grad
    attached, _ = network(x, torch.ones(2), labels, output="both")
    assert attached.requires_grad
    torch.testing.assert_close(x0, attached, rtol=0, atol=0)


def test_a_frozen_view_follows_its_network() -> None:
    network = random_network()
    view = frozen_view(network)
    assert not any(p.requires_grad for p in view.parameters()) and not view.training
    with torch.no_grad():
        network.model.map_layer0.weight.add_(1.0)  # type: ignore[union-attr]
    assert torch.equal(view.model.map_layer0.weight, network.model.map_layer0.weight)  # type: ignore[union-attr]
    assert network.training and all(p.requires_grad for p in network.parameters())
