"""The 2-D mode: the scene is one picture per view, without a renderer, to try a guidance in a minute.

The pictures are latents of the teacher, optimised by the same `Distiller` with the same settings as a field;
nothing ties the views together. What a method does to a picture it does to the renders of a field as well,
so much of its quality and diversity shows here already; Janus faces and broken surfaces do not.
Legend: V views, C H W latent channels and pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from uni3d.config.text_to_3d import TextTo3DConfig
from uni3d.config.values import Schedule, value_at
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.scene.camera import Cameras
from uni3d.text_to_3d.scene_optimiser import (
    StepReport,
    build_distiller,
    noise_and_scale,
    num_warmup_steps,
    stage_recipe,
)
from uni3d.training.descent import descend

_INITIAL_STD = 0.5


class PictureOptimiser:
    """Optimises a picture for each of `cameras` towards `config.prompt` under `teacher`.

    Each step looks at `guidance.views_per_step` of the views in turn; the learning rate is
    `optimiser.colour_learning_rate`, of latents here. Settings of field, renderer and mesh are not read.
    """

    def __init__(self, config: TextTo3DConfig, teacher: LatentDiffusionTeacher, cameras: Cameras) -> None:
        self.config = config
        self.teacher = teacher
        self.cameras = cameras
        self.step_index = 0
        self.generator = torch.Generator().manual_seed(config.seed)
        start = torch.randn(len(cameras), *teacher.latent_shape, generator=self.generator)
        # One parameter for each view: one that is not looked at has no gradient and does not drift on.
        self._latents = [nn.Parameter(view) for view in (_INITIAL_STD * start).to(teacher.device)]
        self.optimiser = torch.optim.Adam(self._latents, betas=(0.9, 0.99))
        self.distiller = build_distiller(config, teacher, self.generator)

    def prepare(self) -> None:
        """Draw the teacher samples that a discriminator needs, spread evenly over the views."""
        settings = self.config.discriminator
        num = settings.num_real_samples if self.distiller.recipe.needs_discriminator else 0
        cameras = self.cameras[torch.arange(num) % len(self.cameras)]
        self.distiller.prepare(
            cameras.conditioning(),
            cameras.view_words(),
            guidance_scale=self._value(self.config.guidance.guidance_scale),
            num_steps=settings.sampling_steps,
        )

    def step(self) -> StepReport:
        """Ask the teacher about the next views; move them, the fake score and the discriminator once."""
        num = min(self.config.guidance.views_per_step, len(self.cameras))
        chosen = (self.step_index * num + torch.arange(num)) % len(self.cameras)
        view = self.cameras[chosen].conditioning(), self.cameras[chosen].view_words()
        pictures = torch.stack([self._latents[index] for index in chosen.tolist()])
        is_waiting = self._is_warming_up
        self.distiller.follow(stage_recipe(self.config, self._progress))
        losses = self.distiller.losses(pictures, *view, **self._noise(), train_student=not is_waiting)
        for group in self.optimiser.param_groups:
            group["lr"] = self._value(self.config.optimiser.colour_learning_rate)
        applied = descend(
            losses.student, self.optimiser, self._latents, self.config.optimiser.max_gradient_norm
        )
        self.distiller.set_fake_score_learning_rate(self._value(self.config.fake_score.learning_rate))
        applied = applied & self.distiller.train(losses)
        self.step_index += 1
        return StepReport(losses.statistics, applied)

    @property
    def latents(self) -> Tensor:
        """A copy of the pictures as latents, float32 [V, C, H, W]."""
        return torch.stack([view.detach() for view in self._latents])

    def pictures(self) -> Tensor:
        """Images float32 [V, 3, h, w] in [0, 1], one for each camera."""
        return self.teacher.decode_latents(self.latents)

    def close(self) -> None:
        """Take the fake score's adapters off the shared teacher."""
        self.distiller.close()

    @property
    def _is_warming_up(self) -> bool:
        return self.step_index < num_warmup_steps(self.config, self.distiller.recipe, self.config.steps)

    def _noise(self) -> dict[str, Any]:
        return noise_and_scale(self.config.guidance, self._progress)

    @property
    def _progress(self) -> float:
        return min(self.step_index / self.config.steps, 1.0)

    def _value(self, schedule: Schedule) -> float:
        return value_at(schedule, self._progress)
