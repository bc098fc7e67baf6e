"""The optimisation loop of text to 3D: a field, the networks that guide it, and everything a checkpoint
must hold.

One step, left to right:

    cameras -> scene.renderer(field) -> images -> training.guidance -> losses -> three optimisers

`SceneOptimiser` is deterministic on a CPU: its state after N steps is bitwise the same whether or not it
was saved
and restored on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from uni3d.config import TextTo3DConfig
from uni3d.config_values import Schedule, value_at
from uni3d.diffusion.discriminator import DiscriminatorHead
from uni3d.diffusion.lora_score import LoRAFakeScore
from uni3d.diffusion.prompt import PromptContexts
from uni3d.diffusion.stable_diffusion import LatentDiffusionTeacher
from uni3d.errors import ConfigError
from uni3d.losses import recipes
from uni3d.losses.discriminator import RatioNormaliser
from uni3d.scene.backends import (
    ChosenEncoding,
    ChosenRenderer,
    choose_encoding_backend,
    choose_renderer,
)
from uni3d.scene.backgrounds import random_backgrounds, random_greys
from uni3d.scene.camera import Cameras, sample_orbit_cameras
from uni3d.scene.device_draws import to_device
from uni3d.scene.occupancy import OccupancyGrid
from uni3d.scene.radiance_field import RadianceField
from uni3d.scene.regularisers import opacity_entropy, opacity_sparsity, total_variation
from uni3d.scene.renderer import RenderOutput
from uni3d.training.guidance import GuidanceLosses, RealLatents, ScoreDistillation

# psi = 1 / (1 + r) is bounded and stays near one while the discriminator still tells every render from a
# sample;
# forward KL's psi = r starves the student there.
DEFAULT_DIVERGENCE = "softened_reverse_kl"
WHITE = 0.95
GREY = 0.5


@dataclass(frozen=True)
class StepReport:
    """Numbers of one step for the log; `finite` says whether the step was applied."""

    values: dict[str, float]
    finite: bool


class SceneOptimiser:
    """Optimises a radiance field towards `config.prompt` under `teacher`.

    Args:
        config: the run; prompt, seed, schedules and weights are read from it.
        teacher: frozen; its network receives the LoRA adapters of the fake score, see `close`.
    """

    def __init__(self, config: TextTo3DConfig, teacher: LatentDiffusionTeacher) -> None:
        self.config = config
        self.teacher = teacher
        self.device = teacher.device
        self.step_index = 0
        self.generator = torch.Generator().manual_seed(config.seed)
        self.recipe = resolve_recipe(config)
        self._build_scene()
        self._build_guidance()
        self._follow_schedules()

    # ------------------------------------------------------------------ construction

    def _build_scene(self) -> None:
        config = self.config
        self.renderer, self.encoding_backend = choose_backends(config, self.device)
        self.field = RadianceField(
            encoding=config.field.encoding,
            encoding_backend=self.encoding_backend.name,
            resolutions=config.field.resolutions,
            half_extent=config.field.half_extent,
            blob_radius=config.field.initial_radius,
            generator=self.generator,
        ).to(self.device)
        self.occupancy = OccupancyGrid(half_extent=config.field.half_extent).to(self.device)
        rates = {name: 1.0 for name in self.field.parameter_group_names}
        self.field_optimiser = torch.optim.Adam(
            self.field.parameter_groups(rates), betas=(0.9, 0.99), eps=1e-15, fused=True
        )

    def _build_guidance(self) -> None:
        config = self.config
        self.contexts = PromptContexts.encode(
            self.teacher,
            config.prompt,
            config.negative_prompt,
            use_view_words=config.guidance.view_prompts,
            use_camera=config.guidance.camera_token,
        )
        self.fake_score: LoRAFakeScore | None = None
        self.fake_optimiser: torch.optim.Optimizer | None = None
        if self.recipe.needs_fake_score:
            self.fake_score = LoRAFakeScore(
                self.teacher, rank=config.fake_score.lora_rank, generator=self.generator
            )
            self.fake_optimiser = torch.optim.AdamW(
                self.fake_score.parameters(), lr=config.fake_score.learning_rate, weight_decay=0.0, fused=True
            )
        self.discriminator: DiscriminatorHead | None = None
        self.normaliser: RatioNormaliser | None = None
        self.real_latents: RealLatents | None = None
        self.discriminator_optimiser: torch.optim.Optimizer | None = None
        self.distillation: ScoreDistillation | None = None

    def prepare(self, *, before_step: Callable[[], object] | None = None) -> None:
        """Draw the teacher samples that a discriminator needs and connect the parts; once, before the
        first step. `before_step` is called before every denoising step and may raise, to leave in between."""
        if self.recipe.needs_discriminator:
            self._build_discriminator(self._draw_real_latents(before_step))
        self._connect()

    def _build_discriminator(self, real_latents: RealLatents) -> None:
        settings = self.config.discriminator
        self.real_latents = real_latents
        self.discriminator = DiscriminatorHead(self.teacher.feature_channels, generator=self.generator).to(
            self.device
        )
        self.normaliser = RatioNormaliser().to(self.device)
        self.discriminator_optimiser = torch.optim.AdamW(
            self.discriminator.parameters(), lr=settings.learning_rate, betas=(0.0, 0.99), fused=True
        )

    def _draw_real_latents(self, before_step: Callable[[], object] | None) -> RealLatents:
        settings = self.config.discriminator
        cameras = self._sample_cameras(settings.num_real_samples)
        return RealLatents.draw(
            self.contexts,
            cameras.conditioning(),
            cameras.view_words(),
            guidance_scale=self._value(self.config.guidance.guidance_scale),
            num_steps=settings.sampling_steps,
            generator=self.generator,
            before_step=before_step,
        )

    def _connect(self) -> None:
        self.distillation = ScoreDistillation(
            self.teacher,
            self.contexts,
            self.recipe,
            fake_score=self.fake_score,
            discriminator=self.discriminator,
            normaliser=self.normaliser,
            real_latents=self.real_latents,
            max_log_ratio=self.config.discriminator.max_log_ratio,
        )

    def close(self) -> None:
        """Take the fake score's adapters off the shared teacher."""
        if self.fake_score is not None:
            self.fake_score.remove()

    # ------------------------------------------------------------------ one step

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return min(self.step_index / self.config.steps, 1.0)

    def step(self) -> StepReport:
        """Render, ask the teacher, move field, fake score and discriminator once. Non-finite gradients
        move nothing."""
        assert self.distillation is not None, "prepare() or load_state_dict() comes first"
        config = self.config
        if self.step_index % config.renderer.occupancy_interval == 0:
            self.occupancy.update(self.field, generator=self.generator)
        output, losses = self._forward()
        regularisation = self._regularisation(output)
        student = losses.student + sum(regularisation.values(), torch.zeros((), device=self.device))
        if self._is_warming_up:  # the field waits, and with it the terms that would shrink it
            student = student.detach()
        values = {
            **{name: float(value) for name, value in losses.statistics.items()},
            **{name: float(value.detach()) for name, value in regularisation.items()},
            "opacity": float(output.opacity.detach().mean()),
        }
        applied = self._apply(student, losses)
        self.step_index += 1
        self._follow_schedules()
        return StepReport(values, applied)

    def _follow_schedules(self) -> None:
        """Set what of the field changes over the run and is not trained; whenever `step_index` changes."""
        self.field.set_density_sharpness(self._value(self.config.field.density_sharpness))

    @property
    def _is_warming_up(self) -> bool:
        """Whether the field still waits for the fake score: never for more than a tenth of the run."""
        wait = min(self.config.fake_score.warmup_steps, self.config.steps // 10)
        return self.recipe.needs_fake_score and self.step_index < wait

    def _forward(self) -> tuple[RenderOutput, GuidanceLosses]:
        config = self.config
        assert self.distillation is not None
        cameras = self._sample_cameras(config.guidance.views_per_step)
        size = round(self._value(config.renderer.resolution))
        output = self.render(cameras, size, self._backgrounds(len(cameras)), training=True)
        losses = self.distillation.losses(
            output.image,
            cameras.conditioning(),
            cameras.view_words(),
            noise_range=(self._value(config.guidance.noise_min), self._value(config.guidance.noise_max)),
            guidance_scale=self._value(config.guidance.guidance_scale),
            generator=self.generator,
            train_student=not self._is_warming_up,
        )
        return output, losses

    def _apply(self, student: Tensor, losses: GuidanceLosses) -> bool:
        config = self.config
        rates = {
            "density": self._value(config.optimiser.density_learning_rate),
            "colour": self._value(config.optimiser.colour_learning_rate),
            "encoding": self._value(config.optimiser.colour_learning_rate),
            "network": 0.1 * self._value(config.optimiser.colour_learning_rate),
        }
        for group in self.field_optimiser.param_groups:
            group["lr"] = rates[group["name"]]
        applied = _descend(
            student, self.field_optimiser, list(self.field.parameters()), config.optimiser.max_gradient_norm
        )
        if losses.fake_score is not None and self.fake_optimiser is not None and self.fake_score is not None:
            applied &= _descend(losses.fake_score, self.fake_optimiser, self.fake_score.parameters(), 1.0)
        if losses.discriminator is not None and self.discriminator_optimiser is not None:
            assert self.discriminator is not None
            applied &= _descend(
                losses.discriminator, self.discriminator_optimiser, list(self.discriminator.parameters()), 1.0
            )
        return applied

    def _regularisation(self, output: RenderOutput) -> dict[str, Tensor]:
        """Weighted terms that keep the field compact; a term of weight zero is not computed."""
        weights = self.config.regularisers
        terms: dict[str, Tensor] = {}
        smoothness, colour_smoothness = (
            self._value(schedule) for schedule in (weights.smoothness, weights.colour_smoothness)
        )
        if smoothness > 0 or colour_smoothness > 0:
            terms["smoothness"] = total_variation(
                self.field,
                density_weight=smoothness,
                colour_weight=colour_smoothness,
                generator=self.generator,
            )
        if (weight := self._value(weights.opacity_entropy)) > 0:
            terms["opacity_entropy"] = weight * opacity_entropy(output.opacity)
        if (weight := self._value(weights.opacity)) > 0:
            terms["opacity_penalty"] = weight * opacity_sparsity(output.opacity)
        return terms

    # ------------------------------------------------------------------ rendering

    def render(
        self, cameras: Cameras, size: int, background: Tensor | float, *, training: bool = False
    ) -> RenderOutput:
        """Render the field for `cameras` at `size` pixels; stratified samples only while training."""
        return self.renderer.render(
            self.field,
            cameras.to(self.device),
            size,
            size,
            background,
            num_samples=self.config.renderer.samples_per_ray,
            occupancy=self.occupancy,
            generator=self.generator if training else None,
            max_samples=self.config.renderer.max_samples if training else None,
        )

    def _sample_cameras(self, num: int) -> Cameras:
        cameras = self.config.cameras
        return sample_orbit_cameras(
            num,
            generator=self.generator,
            elevation_range_deg=cameras.elevation_deg,
            overhead_range_deg=cameras.overhead_deg,
            overhead_probability=cameras.overhead_probability,
            radius_range=cameras.radius,
            fov_y_deg=cameras.fov_y_deg,
        )

    def _backgrounds(self, num: int) -> Tensor | float:
        if self.config.renderer.background == "random":
            return to_device(random_backgrounds(num, generator=self.generator), self.device)
        if self.config.renderer.background == "greys":
            return to_device(random_greys(num, generator=self.generator), self.device)
        return WHITE if self.config.renderer.background == "white" else GREY

    def _value(self, schedule: Schedule) -> float:
        return value_at(schedule, self.progress)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on: nested dicts of tensors and plain data."""
        state: dict[str, Any] = {
            "step": self.step_index,
            "generator": self.generator.get_state(),
            "field": self.field.state_dict(),
            "occupancy": self.occupancy.state_dict(),
            "field_optimiser": self.field_optimiser.state_dict(),
        }
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
        """Continue exactly where `state_dict` was taken; the configuration must be the same."""
        self.field.load_state_dict(state["field"])
        self.occupancy.load_state_dict(state["occupancy"])
        self.field_optimiser.load_state_dict(state["field_optimiser"])
        if self.fake_score is not None and self.fake_optimiser is not None:
            self.fake_score.load_state_dict(state["fake_score"])
            self.fake_optimiser.load_state_dict(state["fake_optimiser"])
        if self.recipe.needs_discriminator:
            real = {name: tensor.to(self.device) for name, tensor in state["real_latents"].items()}
            if self.discriminator is None:
                self._build_discriminator(RealLatents(**real))
            assert self.discriminator is not None and self.normaliser is not None
            assert self.discriminator_optimiser is not None
            self.discriminator.load_state_dict(state["discriminator"])
            self.normaliser.load_state_dict(state["normaliser"])
            self.discriminator_optimiser.load_state_dict(state["discriminator_optimiser"])
        self._connect()
        # Last, since building the parts draws from it.
        self.generator.set_state(state["generator"])
        self.step_index = int(state["step"])
        self._follow_schedules()


def choose_backends(config: TextTo3DConfig, device: torch.device) -> tuple[ChosenRenderer, ChosenEncoding]:
    """Who renders and who looks up the field on `device`; MissingPackageError or UsageError for what cannot
    be had there, ConfigError for fewer samples than the largest training images have rays."""
    renderer = choose_renderer(config.renderer.backend, device)
    encoding = choose_encoding_backend(
        config.field.encoding_backend, device, is_hashed=config.field.encoding == "hash"
    )
    most = config.renderer.max_samples
    side = round(max(size for _, size in config.renderer.resolution))
    num_rays = config.guidance.views_per_step * side * side
    if renderer.name == "triton" and most is not None and most < num_rays:
        raise ConfigError(
            f"renderer.max_samples is {most}, but a step renders up to {num_rays} rays and backend triton "
            f"needs a sample for each; raise it to {num_rays} or more, or lower renderer.resolution"
        )
    return renderer, encoding


def resolve_recipe(config: TextTo3DConfig) -> recipes.Recipe:
    """The recipe that `config` names; ConfigError if its parts do not fit or it needs more than a prompt."""
    overrides: dict[str, Any] = {}
    divergence = config.divergence
    if config.method.replace("_", "-") == "uni-instruct":
        overrides["variant"] = config.guidance.variant
        overrides["adversarial_weight"] = config.guidance.adversarial_weight
        divergence = divergence or DEFAULT_DIVERGENCE
    try:
        recipe = recipes.get(config.method, divergence=divergence, **overrides)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if recipe.required_terms:
        raise ConfigError(
            f"method '{config.method}' needs {', '.join(recipe.required_terms)}, which a prompt does not "
            f"give; choose "
            "another method, or call uni3d.losses.recipes.generator_loss with your own"
        )
    return recipe


def _descend(
    loss: Tensor, optimiser: torch.optim.Optimizer, parameters: list[nn.Parameter], max_norm: float
) -> bool:
    """One optimiser step on `loss` unless the loss or a gradient is not finite; returns whether it was
    made."""
    optimiser.zero_grad(set_to_none=True)
    if not loss.requires_grad:
        return bool(torch.isfinite(loss))
    loss.backward()
    limit = max_norm if max_norm > 0 else float("inf")
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    if not bool(torch.isfinite(loss.detach()) & torch.isfinite(norm)):
        optimiser.zero_grad(set_to_none=True)
        return False
    optimiser.step()
    return True
