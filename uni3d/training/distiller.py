"""Everything of a distillation run but the student: the networks that judge images, and how they learn.

A student (a field, a mesh, a batch of pictures) makes images; the `Distiller` turns them into a loss for it
and keeps its own fake score and discriminator up with what the student makes now:

    losses = distiller.losses(images, cameras.conditioning(), cameras.view_words(), ...)
    losses.student.backward()       # reaches the images; the student's optimiser is the caller's
    distiller.train(losses)         # the fake score and the discriminator take their steps
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uni3d.diffusion.discriminator import DiscriminatorHead
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.diffusion.lora_score import CameraInput, LoRAFakeScore, check_fake_base
from uni3d.diffusion.prompt import PromptContexts
from uni3d.losses.discriminator import RatioNormaliser
from uni3d.losses.recipes import Recipe
from uni3d.random_streams import SharedStream
from uni3d.training.descent import descend
from uni3d.training.fake_score_law import SHARED_LAW, FakeScoreLaw
from uni3d.training.guidance import GuidanceLosses, RealLatents, ScoreDistillation
from uni3d.training.processes import Processes

MAX_CRITIC_GRADIENT_NORM = 1.0


class SharedRatioNormaliser(RatioNormaliser):
    """Counts the samples of all processes, so that all divide by the same means."""

    def __init__(self, processes: Processes) -> None:
        super().__init__()
        self.processes = processes

    @torch.no_grad()
    def update(self, log_ratio: Tensor, sigma: Tensor) -> None:
        """As `RatioNormaliser.update`; every process has equally many samples."""
        num = log_ratio.shape[0] * self.processes.num
        rows = torch.stack([log_ratio.float(), sigma.float().to(log_ratio.device)], dim=1)
        whole = self.processes.join_rows(rows, num)
        super().update(whole[:, 0], whole[:, 1])


def critic_updates(
    losses: GuidanceLosses, num_fake: int, num_discriminator: int
) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """The losses of (fake score, discriminator) for each update after a step, None for who has had all of its
    updates. The first are those of the step, the others of the same images at fresh noise."""
    for index in range(max(num_fake, num_discriminator)):
        fake_learns, discriminator_learns = index < num_fake, index < num_discriminator
        if index > 0:
            losses = losses.again(train_fake_score=fake_learns, train_discriminator=discriminator_learns)
        yield (
            losses.fake_score if fake_learns else None,
            losses.discriminator if discriminator_learns else None,
        )


@dataclass(frozen=True, kw_only=True)
class CriticSettings:
    """How the fake score and the discriminator are built, learn and are listened to.

    Attributes:
        lora_rank: of the fake score.
        fake_score_learning_rate, discriminator_learning_rate: of their AdamW.
        fake_score_weight_decay: of its AdamW.
        fake_score_updates, discriminator_updates: of each for one step of the student.
        fake_law: how the fake score is trained.
        max_log_ratio: bound on the absolute log density ratio.
        perp_neg: see `ScoreDistillation`.
    """

    lora_rank: int = 8
    fake_score_learning_rate: float = 1e-3
    fake_score_weight_decay: float = 0.0
    fake_score_updates: int = 1
    fake_law: FakeScoreLaw = SHARED_LAW
    discriminator_learning_rate: float = 1e-3
    discriminator_updates: int = 1
    max_log_ratio: float = 5.0
    perp_neg: float = 0.0


class Distiller:
    """Teacher, fake score and discriminator of one prompt, with the optimisers of the latter two.

    Args:
        teacher: frozen; its network receives the LoRA adapters of the fake score, see `close`.
        contexts: the prompt as `teacher` reads it.
        recipe: which member of the family; parts that it does not need are not built.
        settings: of the fake score and the discriminator.
        fake_base: another model whose network carries the fake score; None: the teacher's own.
        fake_camera: how the fake score is told the camera, see `LoRAFakeScore`.
        generator: CPU generator of initial weights, teacher samples and noise; shared with the caller, and
            its state is the caller's to save.
        processes: that see a share of the views each, with equal copies of everything else, and learn
            together.

    `prepare` or `load_state_dict` comes before the first `losses`.
    """

    def __init__(
        self,
        teacher: LatentDiffusionTeacher,
        contexts: PromptContexts,
        recipe: Recipe,
        settings: CriticSettings,
        *,
        fake_base: LatentDiffusionTeacher | None = None,
        fake_camera: CameraInput = "conditioning",
        generator: torch.Generator,
        processes: Processes = Processes(),  # noqa: B008 - frozen
    ) -> None:
        self.processes = processes
        self.teacher = teacher
        self.contexts = contexts
        self.recipe = recipe
        self.student_recipe = recipe
        self.settings = settings
        self.generator = generator
        self.fake_score: LoRAFakeScore | None = None
        self.fake_optimiser: torch.optim.Optimizer | None = None
        if recipe.needs_fake_score:
            if fake_base is not None:
                check_fake_base(teacher, fake_base)
            self.fake_score = LoRAFakeScore(
                fake_base or teacher,
                rank=settings.lora_rank,
                camera_input=fake_camera,
                generator=generator,
            )
            self.fake_optimiser = torch.optim.AdamW(
                self.fake_score.parameters(),
                lr=settings.fake_score_learning_rate,
                weight_decay=settings.fake_score_weight_decay,
                fused=True,
            )
        self.discriminator: DiscriminatorHead | None = None
        self.discriminator_optimiser: torch.optim.Optimizer | None = None
        self.normaliser: RatioNormaliser | None = None
        self.real_latents: RealLatents | None = None
        self._guidance: ScoreDistillation | None = None

    def follow(self, recipe: Recipe) -> None:
        """Move the student by `recipe` from now on, for runs of several stages.

        Fake score and discriminator are those of the recipe that the distiller was built with and go on
        learning. Raises ValueError if `recipe` needs one that is not there.
        """
        for part, is_needed, is_there in (
            ("fake score", recipe.needs_fake_score, self.recipe.needs_fake_score),
            ("discriminator", recipe.needs_discriminator, self.recipe.needs_discriminator),
        ):
            if is_needed and not is_there:
                raise ValueError(
                    f"{recipe.name} with {recipe.divergence.name} needs a {part}, which this distiller was "
                    f"built without; build it with that recipe"
                )
        self.student_recipe = recipe
        if self._guidance is not None:
            self._guidance.recipe = recipe

    def prepare(
        self,
        conditioning: Tensor,
        view_words: Sequence[str],
        *,
        guidance_scale: float,
        num_steps: int,
        before_step: Callable[[], object] | None = None,
        real_latents: RealLatents | None = None,
    ) -> None:
        """Draw the teacher samples that a discriminator needs and connect the parts; once, before the first
        step.

        Args:
            conditioning, view_words: one sample is drawn for each of these cameras; see `RealLatents.draw`.
            guidance_scale, num_steps: of the sampling.
            before_step: called before every denoising step; may raise, to leave in between.
            real_latents: samples for the same prompt that were drawn before; then none are drawn.
        """
        if self.recipe.needs_discriminator:
            if real_latents is None:
                real_latents = RealLatents.draw(
                    self.contexts,
                    conditioning,
                    view_words,
                    guidance_scale=guidance_scale,
                    num_steps=num_steps,
                    generator=self.generator,
                    before_step=before_step,
                )
            self._build_discriminator(real_latents)
        self._connect()

    def _build_discriminator(self, real_latents: RealLatents) -> None:
        device = self.teacher.device
        self.real_latents = real_latents
        head = DiscriminatorHead(self.teacher.feature_channels, generator=self.generator)
        self.discriminator = head.to(device)
        self.normaliser = SharedRatioNormaliser(self.processes).to(device)
        self.discriminator_optimiser = torch.optim.AdamW(
            self.discriminator.parameters(),
            lr=self.settings.discriminator_learning_rate,
            betas=(0.0, 0.99),
            fused=True,
        )

    def _connect(self) -> None:
        self._guidance = ScoreDistillation(
            self.teacher,
            self.contexts,
            self.recipe,
            fake_score=self.fake_score,
            discriminator=self.discriminator,
            normaliser=self.normaliser,
            real_latents=self.real_latents,
            max_log_ratio=self.settings.max_log_ratio,
            fake_law=self.settings.fake_law,
            perp_neg=self.settings.perp_neg,
        )
        self._guidance.recipe = self.student_recipe

    def losses(
        self,
        images: Tensor,
        conditioning: Tensor,
        view_words: Sequence[str],
        *,
        noise_range: tuple[float, float],
        guidance_scale: float,
        train_student: bool = True,
    ) -> GuidanceLosses:
        """All losses of one step; arguments as `ScoreDistillation.losses`."""
        assert self._guidance is not None, "prepare() or load_state_dict() comes first"
        return self._guidance.losses(
            images,
            conditioning,
            view_words,
            noise_range=noise_range,
            guidance_scale=guidance_scale,
            generator=self.views_stream,
            train_student=train_student,
        )

    @property
    def views_stream(self) -> torch.Generator | SharedStream:
        """What random numbers for this process's views are drawn from."""
        if self.processes.num == 1:
            return self.generator
        return SharedStream(self.generator, self.processes.rank, self.processes.num)

    def set_fake_score_learning_rate(self, rate: float) -> None:
        """Follow a schedule; before `train`."""
        if self.fake_optimiser is not None:
            for group in self.fake_optimiser.param_groups:
                group["lr"] = rate

    def train(self, losses: GuidanceLosses) -> Tensor:
        """Let the fake score and the discriminator take their steps on what the student made in this step.

        Returns a bool scalar on the device, false if one of the updates was not finite; such an update moves
        nothing.
        """
        num_fake = self.settings.fake_score_updates if self.fake_score is not None else 0
        num_discriminator = self.settings.discriminator_updates if self.discriminator is not None else 0
        is_finite = torch.ones((), dtype=torch.bool, device=self.teacher.device)
        for fake_loss, discriminator_loss in critic_updates(losses, num_fake, num_discriminator):
            if fake_loss is not None:
                is_finite = is_finite & self._train_fake_score(fake_loss)
            if discriminator_loss is not None:
                is_finite = is_finite & self._train_discriminator(discriminator_loss)
        return is_finite

    def _train_fake_score(self, loss: Tensor) -> Tensor:
        assert self.fake_score is not None and self.fake_optimiser is not None
        parameters = self.fake_score.parameters()
        return descend(loss, self.fake_optimiser, parameters, MAX_CRITIC_GRADIENT_NORM, self.processes)

    def _train_discriminator(self, loss: Tensor) -> Tensor:
        assert self.discriminator is not None and self.discriminator_optimiser is not None
        parameters = list(self.discriminator.parameters())
        return descend(
            loss, self.discriminator_optimiser, parameters, MAX_CRITIC_GRADIENT_NORM, self.processes
        )

    def close(self) -> None:
        """Take the fake score's adapters off the shared teacher."""
        if self.fake_score is not None:
            self.fake_score.remove()

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts of tensors and plain data: all that the next step depends on but the generator."""
        state: dict[str, Any] = {}
        if self.fake_score is not None and self.fake_optimiser is not None:
            state["fake_score"] = self.fake_score.state_dict()
            state["fake_optimiser"] = self.fake_optimiser.state_dict()
        if self.discriminator is not None and self.discriminator_optimiser is not None:
            assert self.normaliser is not None and self.real_latents is not None
            state["discriminator"] = self.discriminator.state_dict()
            state["discriminator_optimiser"] = self.discriminator_optimiser.state_dict()
            state["normaliser"] = self.normaliser.state_dict()
            state["real_latents"] = self.real_latents.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, recipe and sizes being the same. May draw from the
        generator, so its state is restored after this."""
        if self.fake_score is not None and self.fake_optimiser is not None:
            self.fake_score.load_state_dict(state["fake_score"])
            self.fake_optimiser.load_state_dict(state["fake_optimiser"])
        if self.recipe.needs_discriminator:
            real = {name: tensor.to(self.teacher.device) for name, tensor in state["real_latents"].items()}
            if self.discriminator is None:
                self._build_discriminator(RealLatents(**real))
            assert self.discriminator is not None and self.normaliser is not None
            assert self.discriminator_optimiser is not None
            self.discriminator.load_state_dict(state["discriminator"])
            self.normaliser.load_state_dict(state["normaliser"])
            self.discriminator_optimiser.load_state_dict(state["discriminator_optimiser"])
        self._connect()
