"""One score-distillation step: images in, losses out. The only place where the family's parts meet.

    images -> latents x0 -> x = x0 + sigma * eps -> teacher D_q, fake score D_p, discriminator logit
           -> uni3d.losses -> a loss for the student, one for the fake score, one for the discriminator

Who makes the images is not known here; nothing is optimised here either. The fake score's pass is shared: its
output serves the student's gradient (detached) and its own denoising score matching loss, which is
unbiased because
the fake score moves only after both.
Legend: B views, C H W latent channels and pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from uni3d.diffusion.discriminator import DiscriminatorHead
from uni3d.diffusion.inversion import Inversion, ddim_inversion
from uni3d.diffusion.lora_score import LoRAFakeScore
from uni3d.diffusion.prompt import VIEW_WORDS, PromptContexts
from uni3d.diffusion.stable_diffusion import LatentDiffusionTeacher
from uni3d.losses import recipes
from uni3d.losses.discriminator import RatioNormaliser, discriminator_loss, log_ratio_from_logits
from uni3d.losses.fake_score import denoising_loss

# Adam does not feel it; it sets the loss against the regularisers' weights.
STUDENT_SCALE = 0.1


@dataclass
class GuidanceLosses:
    """What one step asks for; each loss is a scalar to call `backward` on, or None when that part has no
    work.

    Attributes:
        student: gradient flows to the images only.
        fake_score: gradient flows to the fake score's parameters only.
        discriminator: gradient flows to the discriminator's parameters only.
        statistics: numbers for the log; 0-d tensors.
    """

    student: Tensor
    fake_score: Tensor | None = None
    discriminator: Tensor | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)


class RealLatents:
    """Samples of the teacher for the prompt, by view word: what the discriminator calls real.

    There is no data set for a prompt, and the ratio's optimum needs samples of the teacher's own
    distribution, so
    these are drawn once with guidance and kept.
    """

    def __init__(self, latents: Tensor, view_index: Tensor, conditioning: Tensor) -> None:
        self.latents = latents
        self.view_index = view_index
        self.conditioning = conditioning

    @classmethod
    def draw(
        cls,
        contexts: PromptContexts,
        conditioning: Tensor,
        view_words: Sequence[str],
        *,
        guidance_scale: float,
        num_steps: int,
        generator: torch.Generator,
        batch_size: int = 8,
        before_step: Callable[[], object] | None = None,
    ) -> RealLatents:
        """Sample one latent for each camera in `conditioning` [N, K]; `before_step` is called before every
        denoising step and may raise."""
        teacher = contexts.teacher
        drawn = []
        for start in range(0, len(view_words), batch_size):
            part = slice(start, start + batch_size)
            context = contexts.conditional(view_words[part], conditioning[part])
            drawn.append(
                teacher.sample(
                    context,
                    contexts.unconditional(context.shape[0]),
                    guidance_scale=guidance_scale,
                    num_steps=num_steps,
                    generator=generator,
                    before_step=before_step,
                )
            )
        view_index = torch.tensor([VIEW_WORDS.index(word) for word in view_words])
        return cls(torch.cat(drawn), view_index, conditioning)

    def pick(self, view_words: Sequence[str], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """For each view a random real latent of the same view word: latents [B, C, H, W], conditioning [B,
        K].

        A view word without samples takes any.
        """
        chosen = []
        for word in view_words:
            candidates = torch.nonzero(self.view_index == VIEW_WORDS.index(word))[:, 0]
            if len(candidates) == 0:
                candidates = torch.arange(len(self.view_index))
            chosen.append(candidates[torch.randint(len(candidates), (1,), generator=generator)])
        index = torch.cat(chosen)
        return self.latents[index.to(self.latents.device)], self.conditioning[
            index.to(self.conditioning.device)
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors to save."""
        return {"latents": self.latents, "view_index": self.view_index, "conditioning": self.conditioning}


class ScoreDistillation:
    """The Uni-Instruct family on latents of a teacher.

    Args:
        recipe: which member, from `uni3d.losses.recipes`.
        fake_score: needed when the recipe trains one.
        discriminator, real_latents: needed when the recipe weighs by the density ratio or adds a GAN term.
        normaliser: keeps the mean ratio at 1 in each noise bin; None leaves the ratio as the logit says.
        max_log_ratio: bound on the absolute log ratio.
    """

    def __init__(
        self,
        teacher: LatentDiffusionTeacher,
        contexts: PromptContexts,
        recipe: recipes.Recipe,
        *,
        fake_score: LoRAFakeScore | None = None,
        discriminator: DiscriminatorHead | None = None,
        normaliser: RatioNormaliser | None = None,
        real_latents: RealLatents | None = None,
        max_log_ratio: float = 5.0,
    ) -> None:
        if recipe.needs_fake_score and fake_score is None:
            raise ValueError(f"recipe '{recipe.name}' trains a fake score; pass fake_score")
        if recipe.needs_discriminator and (discriminator is None or real_latents is None):
            raise ValueError(
                f"recipe '{recipe.name}' reads a density ratio; pass discriminator and real_latents"
            )
        self.teacher = teacher
        self.contexts = contexts
        self.recipe = recipe
        self.fake_score = fake_score if recipe.needs_fake_score else None
        self.discriminator = discriminator if recipe.needs_discriminator else None
        self.normaliser = normaliser if recipe.needs_discriminator else None
        self.real_latents = real_latents
        self.max_log_ratio = max_log_ratio

    def losses(
        self,
        images: Tensor,
        conditioning: Tensor,
        view_words: Sequence[str],
        *,
        noise_range: tuple[float, float],
        guidance_scale: float,
        generator: torch.Generator,
        train_student: bool = True,
    ) -> GuidanceLosses:
        """All losses of one step for `images` [B, 3, H, W] in [0, 1] seen by cameras `conditioning` [B, K].

        Args:
            images: or latents of the teacher, [B, *teacher.latent_shape], which are taken as they are.
            noise_range: smallest and largest noise level, as fractions of the teacher's timesteps.
            generator: CPU generator of timesteps and noise.
            train_student: False computes the fake score's and the discriminator's losses only.
        """
        with torch.set_grad_enabled(train_student):
            is_latent = images.shape[1:] == self.teacher.latent_shape
            x0 = images if is_latent else self.teacher.encode_images(images)
        sigma = self._draw_sigma(noise_range, x0.shape[0], generator).to(x0.device)
        eps = torch.randn(x0.shape, generator=generator).to(x0)
        context = self.contexts.conditional(view_words, conditioning)
        negative = self.contexts.unconditional(x0.shape[0])
        through_networks = train_student and (
            self.recipe.needs_teacher_jacobian or self.recipe.needs_fake_jacobian
        )
        x = (x0 if through_networks else x0.detach()) + sigma[:, None, None, None] * eps
        interval_x0 = None
        if self.recipe.noise == "inverted":
            x, interval_x0 = self._invert(x0.detach(), sigma, context, negative)

        with torch.set_grad_enabled(through_networks and self.recipe.needs_teacher_jacobian):
            guided_x0, features = self._ask_teacher(x, sigma, context, negative, guidance_scale)
        fake_x0, fake_loss = self._fake_score(x, x0, sigma, context, conditioning, through_networks)
        log_ratio, adversarial_logits = self._ratio(features, x0, sigma, eps, context, train_student)
        statistics = {"sigma": sigma.mean().detach()}
        if log_ratio is not None:
            statistics["log_ratio"] = log_ratio.mean().detach()
        if fake_loss is not None:
            statistics["fake_score_loss"] = fake_loss.detach()

        if train_student:
            per_sample = recipes.generator_loss(
                self.recipe,
                x0=x0,
                sigma=sigma,
                teacher_x0=guided_x0,
                fake_x0=interval_x0 if self.recipe.student == "interval" else fake_x0,
                log_ratio=log_ratio,
                adversarial_logits=adversarial_logits,
            )
            student = STUDENT_SCALE * per_sample.mean()
            statistics["student_loss"] = student.detach()
        else:
            student = torch.zeros((), device=x0.device)
        critic_loss = self._discriminator_loss(features.detach(), sigma, view_words, generator)
        if critic_loss is not None:
            statistics["discriminator_loss"] = critic_loss.detach()
        return GuidanceLosses(student, fake_loss, critic_loss, statistics)

    # ------------------------------------------------------------------ parts

    def _draw_sigma(self, noise_range: tuple[float, float], num: int, generator: torch.Generator) -> Tensor:
        last = self.teacher.schedule.num_timesteps - 1
        low, high = noise_range
        fraction = low + (high - low) * torch.rand(num, generator=generator)
        return self.teacher.schedule.sigma((fraction * last).to(self.teacher.device))

    def _ask_teacher(
        self, x: Tensor, sigma: Tensor, context: Tensor, negative: Tensor, guidance_scale: float
    ) -> tuple[Tensor | None, Tensor]:
        """The guided x0-prediction, None where no score enters the loss, and the middle block's output."""
        if self.recipe.score_weight == 0:
            with torch.no_grad():
                return None, self.teacher.middle_features(x, sigma, context)
        with self.teacher.recorded_middle() as recorded:
            guided_x0, _ = self.teacher.predict_guided_x0(x, sigma, context, negative, guidance_scale)
        return guided_x0, recorded[0][: x.shape[0]]

    def _invert(self, x0: Tensor, sigma: Tensor, context: Tensor, negative: Tensor) -> Inversion:
        """Carry x0 up to sigma [B] by the recipe's inversion, in equal steps of the teacher's timesteps."""
        scale = self.recipe.inversion_guidance_scale
        schedule = self.teacher.schedule
        share = torch.linspace(0, 1, self.recipe.inversion_steps + 1, device=x0.device)
        sigmas = schedule.sigma(share[:, None] * schedule.timestep(sigma))

        def predict(x: Tensor, level: Tensor) -> Tensor:
            if scale == 0.0:
                return self.teacher.predict_x0(x, level, negative)
            return self.teacher.predict_guided_x0(x, level, context, negative, scale)[0]

        return ddim_inversion(predict, x0, sigmas)

    def _fake_score(
        self,
        x: Tensor,
        x0: Tensor,
        sigma: Tensor,
        context: Tensor,
        conditioning: Tensor,
        through_networks: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The fake x0-prediction for the student (None for a Dirac student) and the fake score's own loss."""
        if self.fake_score is None:
            return None, None
        trained = self.fake_score.predict_x0(x.detach(), sigma, context, conditioning)
        loss = denoising_loss(trained, x0.detach(), sigma, weighting="v").mean()
        if not (through_networks and self.recipe.needs_fake_jacobian):
            return trained.detach(), loss
        attached = self.fake_score.predict_x0(x, sigma, context, conditioning)
        return attached, loss

    def _ratio(
        self, features: Tensor, x0: Tensor, sigma: Tensor, eps: Tensor, context: Tensor, train_student: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """log(q_t / p_t) per sample, and the logits of the GAN term attached to x0 when the recipe has
        one."""
        if self.discriminator is None:
            return None, None
        adversarial = train_student and self.recipe.adversarial_weight > 0
        if adversarial and not features.requires_grad:
            features = self.teacher.middle_features(x0 + sigma[:, None, None, None] * eps, sigma, context)
        with _frozen(self.discriminator):
            logits = self.discriminator(features, sigma)
        log_ratio = log_ratio_from_logits(logits, max_abs=self.max_log_ratio)
        if self.normaliser is not None:
            log_ratio = self.normaliser(log_ratio, sigma)
        return log_ratio, (logits if adversarial else None)

    def _discriminator_loss(
        self, rendered_features: Tensor, sigma: Tensor, view_words: Sequence[str], generator: torch.Generator
    ) -> Tensor | None:
        if self.discriminator is None or self.real_latents is None:
            return None
        real, conditioning = self.real_latents.pick(view_words, generator)
        noise = torch.randn(real.shape, generator=generator).to(real)
        context = self.contexts.conditional(view_words, conditioning)
        with torch.no_grad():
            real_features = self.teacher.middle_features(
                real + sigma[:, None, None, None] * noise, sigma, context
            )
        logits = self.discriminator(torch.cat([real_features, rendered_features]), torch.cat([sigma, sigma]))
        real_logits, rendered_logits = logits.chunk(2)
        return discriminator_loss(real_logits, rendered_logits).mean()


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Parameters of `module` collect no gradient within the block; its inputs still do."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
