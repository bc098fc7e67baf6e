"""One step of score distillation: who gets which gradient, and what the options change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from no_waiting import QueuedCopies

from uni3d.benchmark.budgets import PassCounter, Passes
from uni3d.diffusion.discriminator import DiscriminatorHead
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.diffusion.lora_score import LoRAFakeScore
from uni3d.diffusion.prompt import PromptContexts
from uni3d.losses import recipes
from uni3d.scene.camera import Cameras
from uni3d.training.fake_score_law import FakeScoreLaw
from uni3d.training.guidance import GuidanceLosses, RealLatents, ScoreDistillation

WORDS = ["front", "side"]
CAMERAS = Cameras.from_lists([0.0, 90.0], [10.0, 10.0]).conditioning()


@pytest.fixture
def teacher(tiny_teacher_folder: Path) -> LatentDiffusionTeacher:
    return LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder)


class Step:
    """Everything that one step needs, made so that a fake score and a head say something."""

    def __init__(self, teacher: LatentDiffusionTeacher) -> None:
        generator = torch.Generator().manual_seed(0)
        self.teacher = teacher
        device = teacher.device
        self.contexts = PromptContexts.encode(teacher, "a red chair")
        self.fake = LoRAFakeScore(teacher, rank=2, generator=generator)
        self.head = DiscriminatorHead(teacher.feature_channels, generator=generator).to(device)
        with torch.no_grad():
            for parameter in [*self.fake.parameters(), *self.head.parameters()]:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(device))
        latents = torch.randn(4, *teacher.latent_shape, generator=generator)
        self.real = RealLatents(latents.to(device), torch.tensor([0, 1, 2, 3]), CAMERAS.repeat(2, 1))
        size = teacher.image_size
        self.images = torch.rand(2, 3, size, size, generator=generator).to(device)

    def losses(self, recipe: recipes.Recipe, *, train_student: bool = True, **options: Any) -> GuidanceLosses:
        self.images = self.images.detach().requires_grad_()
        guidance = ScoreDistillation(
            self.teacher, self.contexts, recipe, fake_score=self.fake, discriminator=self.head,
            real_latents=self.real, **options,
        )  # fmt: skip
        return guidance.losses(
            self.images, CAMERAS, WORDS, noise_range=(0.3, 0.6), guidance_scale=3.0,
            generator=torch.Generator().manual_seed(1), train_student=train_student,
        )  # fmt: skip

    def image_gradient(self, losses: GuidanceLosses) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(losses.student, self.images, retain_graph=True)
        return gradient


@pytest.fixture
def step(teacher: LatentDiffusionTeacher) -> Step:
    return Step(teacher)


@pytest.mark.parametrize("variant", ["exact", "integral"])
def test_each_part_gets_its_own_gradient(step: Step, variant: str) -> None:
    """A pass that student and fake score share gives each what a pass of its own would."""
    recipe = recipes.get("uni_instruct", divergence="js", variant=variant)
    shared = step.losses(recipe)
    student = step.image_gradient(shared)
    assert all(parameter.grad is None for parameter in step.fake.parameters())
    assert shared.fake_score is not None and shared.discriminator is not None
    trained = torch.autograd.grad(shared.fake_score, step.fake.parameters(), retain_graph=True)
    torch.autograd.grad(shared.discriminator, list(step.head.parameters()), retain_graph=True)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(shared.fake_score, step.images, retain_graph=True)

    # The fake score's part does not depend on whether the student learns at all.
    alone = step.losses(recipe, train_student=False)
    assert alone.fake_score is not None
    for got, expected in zip(
        torch.autograd.grad(alone.fake_score, step.fake.parameters()), trained, strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    # Nor does the student's on how the fake score is trained.
    own = FakeScoreLaw(noise_range=(0.0, 1.0), camera_dropout=0.5, weighting="eps")
    assert not own.is_shared
    separate = step.losses(recipe, fake_law=own)
    torch.testing.assert_close(step.image_gradient(separate), student, rtol=1e-4, atol=1e-7)
    assert separate.fake_score is not None
    other = torch.autograd.grad(separate.fake_score, step.fake.parameters())
    assert any(not torch.allclose(a, b) for a, b in zip(other, trained, strict=True))


@pytest.mark.parametrize("law", [FakeScoreLaw(), FakeScoreLaw(noise_range=(0.0, 1.0))])
def test_critics_that_learn_alone_ask_no_teacher(step: Step, law: FakeScoreLaw) -> None:
    """Of two views each: a pass of the fake score, and half ones of renders and teacher samples."""
    recipe = recipes.get("uni_instruct", divergence="js")
    first = step.losses(recipe, fake_law=law)
    fake, discriminator = {"forward": 2}, {"encoder": 4}
    for learn, expected in (
        ((True, True), fake | discriminator),
        ((True, False), fake),
        ((False, True), discriminator),
    ):
        with PassCounter(step.teacher) as counter:
            losses = first.again(train_fake_score=learn[0], train_discriminator=learn[1])
        assert counter.passes == Passes(**expected)
        assert (losses.fake_score is not None, losses.discriminator is not None) == learn
    with PassCounter(step.teacher) as counter:  # while the student waits
        step.losses(recipe, fake_law=law, train_student=False)
    assert counter.passes == Passes(**fake, **discriminator)


def test_a_gpu_is_not_waited_for(tiny_teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is drawn or chosen on the CPU goes over by queued copies; meta tensors have no values to wait
    for."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    step = Step(LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder, device="meta"))
    recipe = recipes.get("uni_instruct", divergence="js")
    law = FakeScoreLaw(camera_dropout=0.5, reads_view=False)
    step.losses(recipe, fake_law=law)  # fills tables that are kept
    with QueuedCopies():
        losses = step.losses(recipe, fake_law=law, perp_neg=1.0)
        losses.again(train_fake_score=True, train_discriminator=True)
    assert losses.student.device.type == "meta"
    with pytest.raises(AssertionError, match="waited for"), QueuedCopies():
        CAMERAS.to("meta")


def test_jacobians_change_the_gradient_one_by_one(step: Step) -> None:
    gradients = []
    for changes in (
        {},
        {"jac_teacher": False},
        {"jac_fake": False},
        {"jac_teacher": False, "jac_fake": False},
    ):
        recipe = recipes.get("uni_instruct", divergence="js", adversarial_weight=0.0, **changes)
        gradient = step.image_gradient(step.losses(recipe))
        assert bool(gradient.isfinite().all()) and gradient.abs().sum() > 0
        assert not any(torch.allclose(gradient, other, rtol=1e-3, atol=0) for other in gradients)
        gradients.append(gradient)


def test_csd_asks_for_both_predictions_and_trains_nothing(step: Step) -> None:
    losses = step.losses(recipes.get("csd"))
    assert losses.fake_score is None and losses.discriminator is None
    assert step.image_gradient(losses).abs().sum() > 0


def test_perp_neg_and_plain_prompts_change_what_is_asked(step: Step) -> None:
    vsd = recipes.get("vsd")
    plain = step.image_gradient(step.losses(vsd))
    for options in ({"perp_neg": 1.0}, {"fake_law": FakeScoreLaw(reads_view=False)}):
        assert not torch.allclose(step.image_gradient(step.losses(vsd, **options)), plain, rtol=1e-3, atol=0)
    repelled = step.contexts.repelled(["side", "overhead"], 2.0)
    assert [other.weight.tolist() for other in repelled] == [[2.0, 1.0], [1.0, 0.5]]
    assert torch.equal(repelled[0].context[0], step.contexts.by_view["front"][0])


# ---------------------------------------------------------------------- several views denoised together


class JointViews:
    """Self-attention over all views of a group: what makes a network a multi-view one (MVDream's 3D
    attention), around the processor of one view."""

    def __init__(self, processor: Any, views_per_group: int) -> None:
        self.processor, self.views = processor, views_per_group

    def __call__(
        self, attention: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        batch, tokens, width = hidden_states.shape
        joint = hidden_states.reshape(batch // self.views, self.views * tokens, width)
        return self.processor(attention, joint, *args, **kwargs).reshape(batch, tokens, width)


def test_a_multi_view_teacher_fits_the_contract(teacher: LatentDiffusionTeacher) -> None:
    processors = teacher.network.attn_processors
    teacher.network.set_attn_processor(
        {
            name: JointViews(processor, 2) if name.endswith("attn1.processor") else processor
            for name, processor in processors.items()
        }
    )
    teacher.views_per_group = 2
    step = Step(teacher)
    contexts = step.contexts.conditional(WORDS, CAMERAS)
    x, sigma = torch.randn(2, *teacher.latent_shape, requires_grad=True), torch.tensor([0.8, 0.8])
    # Each view sees the other one ...
    first = teacher.predict_x0(x, sigma, contexts)[0].square().sum()
    (gradient,) = torch.autograd.grad(first, x)
    assert (gradient.abs().flatten(1).sum(1) > 1e-6).all()
    # ... at one noise level, and guidance keeps groups together.
    guided = teacher.predict_guided_x0(x, sigma, contexts, step.contexts.unconditional(2), 2.0)
    torch.testing.assert_close(
        guided.conditional, teacher.predict_x0(x, sigma, contexts), rtol=1e-4, atol=1e-5
    )
    losses = step.losses(recipes.get("uni_instruct", divergence="js"))
    assert step.image_gradient(losses).abs().sum() > 0
    assert losses.fake_score is not None and losses.discriminator is not None
    picked, conditioning = step.real.pick(WORDS, torch.Generator().manual_seed(0), views_per_group=2)
    index = [int((step.real.latents == latent).flatten(1).all(1).nonzero()) for latent in picked]
    assert index[0] % 2 == 0 and index[1] == index[0] + 1 and conditioning.shape == CAMERAS.shape
