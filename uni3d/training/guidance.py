"""One score-distillation step: images in, losses out. The only place where the family's parts meet.

    images -> latents x0 -> x = x0 + sigma * eps -> teacher D_q, fake score D_p, discriminator logit
           -> uni3d.losses -> a loss for the student, one for the fake score, one for the discriminator

Who makes the images is not known here; nothing is optimised here either. The fake score's pass is shared: its
output serves the student's gradient and its own denoising score matching loss, which is unbiased because the
fake score moves only after both. The student's gradient is taken down to the latents at once and carried on
from there, so that of a pass that both share each gets its own part.
Several scenes can share a step (`num_scenes`): their views come scene by scene, each scene draws from its own
generator, and every loss is a mean over one scene's views.
Legend: B views, S scenes, C H W latent channels and pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from uni3d.device_draws import to_device
from uni3d.diffusion.discriminator import DiscriminatorHead
from uni3d.diffusion.inversion import Inversion, ddim_inversion
from uni3d.diffusion.latent_teacher import GuidedPrediction, LatentDiffusionTeacher
from uni3d.diffusion.lora_score import LoRAFakeScore
from uni3d.diffusion.prompt import VIEW_WORDS, PromptContexts
from uni3d.losses import recipes
from uni3d.losses.discriminator import RatioNormaliser, discriminator_loss, log_ratio_from_logits
from uni3d.losses.fake_score import denoising_loss
from uni3d.random_streams import SharedStream, Streams, integers, normal, uniform
from uni3d.training.fake_score_law import SHARED_LAW, FakeScoreLaw

# Adam does not feel it; it sets the loss against the regularisers' weights.
STUDENT_SCALE = 0.1


@dataclass
class GuidanceLosses:
    """What one step asks for; each loss is a scalar to call `backward` on, or None when that part has no
    work.

    Attributes:
        student: gradient flows to the images only; here and below a scalar, or [S] for several scenes.
        fake_score: gradient flows to the fake score's parameters only.
        discriminator: gradient flows to the discriminator's parameters only.
        again: `again(train_fake_score=..., train_discriminator=...)` gives those losses of the same images at
            fresh noise.
        statistics: numbers for the log; 0-d tensors.
    """

    student: Tensor
    fake_score: Tensor | None
    discriminator: Tensor | None
    again: Callable[..., GuidanceLosses]
    statistics: dict[str, Tensor]


class RealLatents:
    """Samples of the teacher for the prompt, by view word: what the discriminator calls real.

    There is no data set for a prompt, and the ratio's optimum needs samples of the teacher's own
    distribution, so
    these are drawn once with guidance and kept.
    """

    def __init__(self, latents: Tensor, view_index: Tensor, conditioning: Tensor) -> None:
        self.latents = latents
        self.view_index = view_index.cpu()  # the host chooses by it
        self.conditioning = to_device(conditioning, latents.device)

    @classmethod
    def draw(
        cls,
        contexts: PromptContexts,
        conditioning: Tensor,
        view_words: Sequence[str],
        *,
        guidance_scale: float,
        num_steps: int,
        generator: Streams,
        batch_size: int = 8,
        before_step: Callable[[], object] | None = None,
        is_one_of_many: bool = False,
    ) -> RealLatents:
        """Sample one latent for each camera in `conditioning` [N, K]; `before_step` is called before every
        denoising step and may raise. `is_one_of_many`: more draws of this shape follow, so that capturing
        it pays."""
        teacher = contexts.teacher
        drawn = []
        for start in range(0, len(view_words), batch_size):
            part = slice(start, start + batch_size)
            context = contexts.conditional(view_words[part], conditioning[part])
            with nullcontext() if is_one_of_many else teacher.uncaptured():
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

    def pick(
        self, view_words: Sequence[str], generator: Streams, *, views_per_group: int = 1
    ) -> tuple[Tensor, Tensor]:
        """For each view a random real latent of the same view word: latents [B, C, H, W], conditioning [B,
        K].

        A view word without samples takes any. Of a group of views denoised together all come from one group
        of samples, whatever their words.
        """
        assert isinstance(generator, torch.Generator | SharedStream)
        index = self.choose(view_words, generator, views_per_group=views_per_group)
        return self.rows(index)

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The latents and conditioning of samples `index`, int64 [B] on the CPU."""
        index = to_device(index, self.latents.device)
        return self.latents[index], self.conditioning[index]

    def choose(
        self,
        view_words: Sequence[str],
        generator: torch.Generator | SharedStream,
        *,
        views_per_group: int = 1,
    ) -> Tensor:
        """The rows that `pick` takes, int64 [B] on the CPU."""
        if views_per_group > 1:
            num_groups = len(self.latents) // views_per_group
            groups = integers([num_groups] * (len(view_words) // views_per_group), generator)
            return (torch.tensor(groups)[:, None] * views_per_group + torch.arange(views_per_group)).flatten()
        candidates = []
        for word in view_words:
            rows = torch.nonzero(self.view_index == VIEW_WORDS.index(word))[:, 0]
            candidates.append(rows if len(rows) > 0 else torch.arange(len(self.view_index)))
        places = integers([len(rows) for rows in candidates], generator)
        return torch.stack([rows[place] for rows, place in zip(candidates, places, strict=True)])

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
        fake_law: how the fake score is trained.
        perp_neg: how strongly guidance keeps away from the prompt's other views (Perp-Neg); 0 leaves it out.
        num_scenes: how many scenes the views of a batch belong to, in equal runs; the other parts are then
            those of several scenes as well (`uni3d.training.distiller_stack`), and losses are [num_scenes].
            None: a single one, whose losses are scalars.
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
        fake_law: FakeScoreLaw = SHARED_LAW,
        perp_neg: float = 0.0,
        num_scenes: int | None = None,
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
        self.fake_law = fake_law
        self.perp_neg = perp_neg
        self.num_scenes = num_scenes

    def losses(
        self,
        images: Tensor,
        conditioning: Tensor,
        view_words: Sequence[str],
        *,
        noise_range: tuple[float, float],
        guidance_scale: float,
        generator: Streams,
        train_student: bool = True,
        train_fake_score: bool = True,
        train_discriminator: bool = True,
    ) -> GuidanceLosses:
        """All losses of one step for `images` [B, 3, H, W] in [0, 1] seen by cameras `conditioning` [B, K].

        Args:
            images: or latents of the teacher, [B, *teacher.latent_shape], which are taken as they are.
            noise_range: smallest and largest noise level, as fractions of the teacher's timesteps.
            generator: CPU generator of timesteps and noise; for several scenes one for each.
            train_student, train_fake_score, train_discriminator: who learns; a pass that only the others
                would read is not made.
        """
        with torch.set_grad_enabled(train_student):
            is_latent = images.shape[1:] == self.teacher.latent_shape
            encoded = images if is_latent else self.teacher.encode_images(images)
        x0 = encoded.detach().requires_grad_(train_student)
        conditioning = to_device(conditioning, x0.device)
        sigma = self._draw_sigma(noise_range, x0.shape[0], generator)
        eps = _noise_like(x0, generator)
        context = self.contexts.conditional(view_words, conditioning)
        negative = self.contexts.unconditional(x0.shape[0])
        through_networks = train_student and (
            self.recipe.needs_teacher_jacobian or self.recipe.needs_fake_jacobian
        )
        x = (x0 if through_networks else x0.detach()) + sigma[:, None, None, None] * eps
        interval_x0 = None
        if self.recipe.noise == "inverted":
            x, interval_x0 = self._invert(x0.detach(), sigma, context, negative)

        guided = fake_x0 = fake_loss = features = None
        if train_student and self.recipe.score_weight > 0:
            with torch.set_grad_enabled(through_networks and self.recipe.needs_teacher_jacobian):
                guided = self._ask_teacher(x, sigma, context, negative, guidance_scale, view_words)
        if train_student or (train_fake_score and self.fake_law.is_shared):
            fake_x0, fake_loss = self._fake_score(x, x0, sigma, context, conditioning, through_networks)
        if train_fake_score and not self.fake_law.is_shared:
            fake_loss = self._separate_fake_loss(x0.detach(), context, conditioning, generator)
        if train_student or train_discriminator:
            features = self._features(guided, x, sigma, context)
        log_ratio, adversarial_logits = self._ratio(features, x0, sigma, eps, context, train_student)
        statistics = {"sigma": self._mean(sigma).detach()}
        if log_ratio is not None:
            statistics["log_ratio"] = self._mean(log_ratio).detach()
        if fake_loss is not None:
            statistics["fake_score_loss"] = fake_loss.detach()

        if train_student:
            # What takes the fake score's place where none is trained.
            stand_in = {"classifier": None if guided is None else guided.negative, "interval": interval_x0}
            per_sample = recipes.generator_loss(
                self.recipe,
                x0=x0,
                sigma=sigma,
                teacher_x0=None if guided is None else guided.x0,
                fake_x0=stand_in.get(self.recipe.student, fake_x0),
                log_ratio=log_ratio,
                adversarial_logits=adversarial_logits,
            )
            per_sample = _carried_on(per_sample, x0, encoded)
            student = STUDENT_SCALE * self._mean(per_sample)
            statistics["student_loss"] = student.detach()
        else:
            student = torch.zeros_like(statistics["sigma"])
        critic_loss = None
        if train_discriminator and features is not None:
            critic_loss = self._discriminator_loss(features.detach(), sigma, view_words, generator)
            statistics["discriminator_loss"] = critic_loss.detach()
        again = partial(
            self.losses,
            encoded.detach(),
            conditioning,
            view_words,
            noise_range=noise_range,
            guidance_scale=guidance_scale,
            generator=generator,
            train_student=False,
        )
        return GuidanceLosses(student, fake_loss, critic_loss, again, statistics)

    # ------------------------------------------------------------------ parts

    def _mean(self, per_sample: Tensor) -> Tensor:
        """Mean of [B] over the views of each scene, [S]; a scalar where scenes are not told apart."""
        if self.num_scenes is None:
            return per_sample.mean()
        return per_sample.view(self.num_scenes, -1).mean(dim=1)

    def _draw_sigma(self, noise_range: tuple[float, float], num: int, generator: Streams) -> Tensor:
        last = self.teacher.schedule.num_timesteps - 1
        low, high = noise_range
        group = self.teacher.views_per_group
        fraction = low + (high - low) * uniform((num // group,), generator)
        timestep = to_device(fraction * last, self.teacher.device)
        return self.teacher.schedule.sigma(timestep).repeat_interleave(group)

    def _ask_teacher(
        self,
        x: Tensor,
        sigma: Tensor,
        context: Tensor,
        negative: Tensor,
        guidance_scale: float,
        view_words: Sequence[str],
    ) -> GuidedPrediction:
        return self.teacher.predict_guided_x0(
            x,
            sigma,
            context,
            negative,
            guidance_scale,
            repelled=self.contexts.repelled(view_words, self.perp_neg) if self.perp_neg > 0 else (),
            needs_negative=self.recipe.needs_negative,
        )

    def _features(
        self, guided: GuidedPrediction | None, x: Tensor, sigma: Tensor, context: Tensor
    ) -> Tensor | None:
        """What a discriminator reads of x: the middle of the guided pass, or of half a pass where no score
        was asked for; None without one."""
        if self.discriminator is None:
            return None
        if guided is not None:
            return guided.middle
        with torch.no_grad():
            return self.teacher.middle_features(x, sigma, context)

    def _invert(self, x0: Tensor, sigma: Tensor, context: Tensor, negative: Tensor) -> Inversion:
        """Carry x0 up to sigma [B] by the recipe's inversion, in equal steps of the teacher's timesteps."""
        scale = self.recipe.inversion_guidance_scale
        schedule = self.teacher.schedule
        share = torch.linspace(0, 1, self.recipe.inversion_steps + 1, device=x0.device)
        sigmas = schedule.sigma(share[:, None] * schedule.timestep(sigma))

        def predict(x: Tensor, level: Tensor) -> Tensor:
            if scale == 0.0:
                return self.teacher.predict_x0(x, level, negative)
            return self.teacher.predict_guided_x0(x, level, context, negative, scale).x0

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
        """The fake x0-prediction for the student, and of the same pass the fake score's own loss, unless the
        law of its training is another; None where no fake score is trained."""
        if self.fake_score is None:
            return None, None
        is_attached = through_networks and self.recipe.needs_fake_jacobian
        with torch.set_grad_enabled(is_attached or self.fake_law.is_shared):
            prediction = self.fake_score.predict_x0(
                x if is_attached else x.detach(),
                sigma,
                self._fake_context(context, conditioning),
                conditioning,
            )
        loss = None
        if self.fake_law.is_shared:
            loss = self._mean(denoising_loss(prediction, x0, sigma, weighting=self.fake_law.weighting))
        return (prediction if is_attached else prediction.detach()), loss

    def _separate_fake_loss(
        self, x0: Tensor, context: Tensor, conditioning: Tensor, generator: Streams
    ) -> Tensor | None:
        """The fake score's loss at its own noise level, fresh noise, and now and then without the camera."""
        if self.fake_score is None:
            return None
        law = self.fake_law
        sigma = self._draw_sigma(law.noise_range or (0.0, 1.0), x0.shape[0], generator)
        eps = _noise_like(x0, generator)
        is_known = to_device(uniform(x0.shape[:1], generator) >= law.camera_dropout, x0.device)
        prediction = self.fake_score.predict_x0(
            x0 + sigma[:, None, None, None] * eps,
            sigma,
            self._fake_context(context, conditioning),
            conditioning,
            knows_camera=is_known,
        )
        return self._mean(denoising_loss(prediction, x0, sigma, weighting=law.weighting))

    def _fake_context(self, context: Tensor, conditioning: Tensor) -> Tensor:
        """The prompt as the fake score reads it, which may not name the view."""
        return context if self.fake_law.reads_view else self.contexts.without_view(conditioning)

    def _ratio(
        self,
        features: Tensor | None,
        x0: Tensor,
        sigma: Tensor,
        eps: Tensor,
        context: Tensor,
        train_student: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """log(q_t / p_t) per sample, and the logits of the GAN term attached to x0 when the recipe has
        one."""
        if self.discriminator is None or features is None:
            return None, None
        adversarial = train_student and self.recipe.adversarial_weight > 0
        is_attached = adversarial or (train_student and self.recipe.needs_ratio_gradient)
        if is_attached and not features.requires_grad:
            features = self.teacher.middle_features(x0 + sigma[:, None, None, None] * eps, sigma, context)
        with _frozen(self.discriminator):
            logits = self.discriminator(features, sigma)
        log_ratio = log_ratio_from_logits(logits, max_abs=self.max_log_ratio)
        if self.normaliser is not None:
            log_ratio = self.normaliser(log_ratio, sigma)
        return log_ratio, (logits if adversarial else None)

    def _discriminator_loss(
        self, features: Tensor, sigma: Tensor, view_words: Sequence[str], generator: Streams
    ) -> Tensor:
        """The loss of telling teacher samples from what was rendered, whose `features` hold no graph."""
        assert self.discriminator is not None and self.real_latents is not None
        real, conditioning = self.real_latents.pick(
            view_words, generator, views_per_group=self.teacher.views_per_group
        )
        noise = _noise_like(real, generator)
        context = self.contexts.conditional(view_words, conditioning)
        with torch.no_grad():
            real_features = self.teacher.middle_features(
                real + sigma[:, None, None, None] * noise, sigma, context
            )
        # In pairs, so that the rows stay scene by scene.
        pairs = torch.stack([real_features, features], dim=1).flatten(0, 1)
        logits = self.discriminator(pairs, sigma.repeat_interleave(2)).unflatten(0, (-1, 2))
        return self._mean(discriminator_loss(logits[:, 0], logits[:, 1]))


def _noise_like(latents: Tensor, generator: Streams) -> Tensor:
    """Standard normal numbers in the shape, type and place of `latents`, drawn where the generators are."""
    return to_device(normal(latents.shape, generator), latents.device).to(latents.dtype)


def _carried_on(per_sample: Tensor, latents: Tensor, encoded: Tensor) -> Tensor:
    """Losses [B] whose gradient goes on from the cut `latents` to the images that were `encoded` to them.

    The graph behind `latents` stays for who shares a part of it.
    """
    (gradient,) = torch.autograd.grad(per_sample.sum(), latents, retain_graph=True)
    # x - sg(x) is zero with derivative one.
    return per_sample.detach() + (gradient * (encoded - encoded.detach())).flatten(1).sum(dim=1)


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
