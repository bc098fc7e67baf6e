"""The optimisation loop of text to 3D: a field, the networks that guide it, and everything a checkpoint
must hold.

One step, left to right:

    cameras -> scene.renderer(field) -> images -> training.guidance -> losses -> three optimisers

`SceneOptimiser` is deterministic on a CPU: its state after N steps is bitwise the same whether or not it
was saved
and restored on the way.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from uni3d.config.stages import StageGuidanceConfig
from uni3d.config.text_to_3d import (
    CamerasConfig,
    GuidanceConfig,
    RegularisersConfig,
    RendererConfig,
    TextTo3DConfig,
)
from uni3d.config.values import Schedule, value_at
from uni3d.device_draws import to_device
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.diffusion.prompt import PromptContexts
from uni3d.errors import ConfigError, UsageError
from uni3d.losses import recipes
from uni3d.mesh.extraction import densest_level, extract_surface
from uni3d.mesh.surface import Surface
from uni3d.scene.backends import (
    ChosenEncoding,
    ChosenRenderer,
    choose_encoding_backend,
    choose_renderer,
)
from uni3d.scene.backgrounds import random_backgrounds, random_greys
from uni3d.scene.camera import Cameras, sample_orbit_cameras
from uni3d.scene.occupancy import OccupancyGrid
from uni3d.scene.radiance_field import RadianceField
from uni3d.scene.regularisers import opacity_entropy, opacity_sparsity, total_variation
from uni3d.scene.renderer import RenderOutput
from uni3d.text_to_3d.first_colours import sampled_colour
from uni3d.training.descent import descend
from uni3d.training.distiller import CriticSettings, Distiller
from uni3d.training.fake_score_law import FakeScoreLaw
from uni3d.training.guidance import RealLatents
from uni3d.training.processes import Processes

logger = logging.getLogger(__name__)

# psi = 1 / (1 + r) is bounded and stays near one while the discriminator still tells every render from a
# sample;
# forward KL's psi = r starves the student there.
DEFAULT_DIVERGENCE = "softened_reverse_kl"
# Images [B, 3, H, W] with their cameras' conditioning [B, K] and view words.
View = tuple[Tensor, Tensor, Sequence[str]]
WHITE = 0.95
GREY = 0.5


class StepReport:
    """Numbers of one step for the log; `finite` says whether the step was applied.

    They stay on the device until the first of them is read, and come over together.
    """

    def __init__(self, figures: Mapping[str, Tensor], applied: Tensor) -> None:
        self._names = list(figures)
        self._tensors = [figure.detach().float() for figure in (*figures.values(), applied)]

    @functools.cached_property
    def _numbers(self) -> list[float]:
        return torch.stack(self._tensors).tolist()

    @property
    def values(self) -> dict[str, float]:
        """The figures by name."""
        return dict(zip(self._names, self._numbers, strict=False))

    @property
    def finite(self) -> bool:
        """Whether every gradient was finite and the step was applied."""
        return bool(self._numbers[-1])


class SceneOptimiser:
    """Optimises a radiance field towards `config.prompt` under `teacher`.

    Args:
        config: the run; prompt, seed, schedules and weights are read from it.
        teacher: frozen; its network receives the LoRA adapters of the fake score, see `close`.
        fake_base: the model of `config.fake_score.base`, which receives them instead.
        processes: each of them renders and scores its share of a step's views; all else is the same in all.

    Raises UsageError for views that cannot be shared out evenly.
    """

    stage = "field"

    def __init__(
        self,
        config: TextTo3DConfig,
        teacher: LatentDiffusionTeacher,
        *,
        fake_base: LatentDiffusionTeacher | None = None,
        processes: Processes = Processes(),  # noqa: B008 - frozen
    ) -> None:
        if config.guidance.views_per_step % processes.num:
            raise UsageError(
                f"{config.guidance.views_per_step} views a step cannot be shared by {processes.num} "
                f"processes; set --guidance.views-per-step to a multiple of {processes.num}"
            )
        self.config = config
        self.processes = processes
        self.teacher = teacher
        check_groups(config, teacher.views_per_group)
        self.device = teacher.device
        self.step_index = 0
        self.generator = torch.Generator().manual_seed(config.seed)
        self._build_scene()
        _warn_of_voxel_terms(config)
        self.distiller = build_distiller(
            config, teacher, self.generator, fake_base=fake_base, processes=processes
        )
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

    def prepare(self, *, before_step: Callable[[], object] | None = None) -> None:
        """Draw the teacher samples that a discriminator needs, and give the field the colour of their object;
        once, before the first step. `before_step` is called before every denoising step and may raise, to
        leave in between."""
        settings = self.config.discriminator
        num_samples = settings.num_real_samples if self.distiller.recipe.needs_discriminator else 0
        cameras = self._sample_cameras(num_samples)
        self.distiller.prepare(
            cameras.conditioning(),
            cameras.view_words(),
            guidance_scale=self._value(self.config.guidance.guidance_scale),
            num_steps=settings.sampling_steps,
            before_step=before_step,
        )
        colour = first_colour(
            self.config,
            self.distiller.contexts,
            self.distiller.real_latents,
            seed=self.config.seed,
            before_step=before_step,
        )
        if colour is not None:
            self._shift_colour(colour)

    def _shift_colour(self, logits: Tensor) -> None:
        self.field.shift_colour(logits)

    def close(self) -> None:
        """Take the fake score's adapters off the shared teacher."""
        self.distiller.close()

    # ------------------------------------------------------------------ one step

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return min(self.step_index / self.config.steps, 1.0)

    @property
    def num_steps(self) -> int:
        """Steps of the run."""
        return self.config.steps

    def step(self) -> StepReport:
        """Render, ask the teacher, move field, fake score and discriminator once. Non-finite gradients
        move nothing."""
        config = self.config
        if self.step_index % config.renderer.occupancy_interval == 0:
            self.occupancy.update(self.field, generator=self.generator)
        view, output = self._view()
        losses = self.distiller.losses(*view, **self._noise(), train_student=not self._is_warming_up)
        regularisation = self._regularisation(output)
        student = losses.student + sum(regularisation.values(), torch.zeros((), device=self.device))
        if self._is_warming_up:  # the field waits, and with it the terms that would shrink it
            student = student.detach()
        applied = self._move_field(student)
        self.distiller.set_fake_score_learning_rate(self._value(config.fake_score.learning_rate))
        applied = applied & self.distiller.train(losses)
        self.step_index += 1
        self._follow_schedules()
        figures = losses.statistics | regularisation | {"opacity": output.opacity.mean()}
        return StepReport(self._averaged(figures), applied)

    def _averaged(self, figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The figures of a step, means over the processes."""
        row = torch.stack([value.detach() for value in figures.values()])
        self.processes.add_up_([row])
        return dict(zip(figures, row / self.processes.num, strict=True))

    def _follow_schedules(self) -> None:
        """Set what changes over the run and is not trained; whenever `step_index` changes."""
        self.distiller.follow(stage_recipe(self.config, self.progress))
        self.field.set_density_sharpness(self._value(self.config.field.density_sharpness))

    @property
    def _is_warming_up(self) -> bool:
        """Whether the field still waits for the fake score."""
        return self.step_index < num_warmup_steps(self.config, self.distiller.recipe, self.config.steps)

    def _view(self) -> tuple[View, RenderOutput]:
        """What this step looks at, rendered."""
        config = self.config
        cameras = self._sample_cameras(config.guidance.views_per_step)
        size = round(self._value(config.renderer.resolution))
        background = training_backgrounds(config.renderer, len(cameras), self.generator, self.device)
        own = self.processes.share(len(cameras))
        cameras, background = cameras[own], background[own]
        output = self.render(cameras, size, background, training=True)
        return (output.image, cameras.conditioning(), cameras.view_words()), output

    def _noise(self) -> dict[str, Any]:
        return noise_and_scale(self.config.guidance, self.progress)

    def _move_field(self, student: Tensor) -> Tensor:
        config = self.config
        rates = {
            "density": self._value(config.optimiser.density_learning_rate),
            "colour": self._value(config.optimiser.colour_learning_rate),
            "encoding": self._value(config.optimiser.colour_learning_rate),
            "network": 0.1 * self._value(config.optimiser.colour_learning_rate),
        }
        for group in self.field_optimiser.param_groups:
            group["lr"] = rates[group["name"]]
        return descend(
            student,
            self.field_optimiser,
            list(self.field.parameters()),
            config.optimiser.max_gradient_norm,
            self.processes,
        )

    def _regularisation(self, output: RenderOutput) -> dict[str, Tensor]:
        variation = functools.partial(total_variation, self.field, generator=self.generator)
        return field_terms(
            self.config.regularisers,
            self.progress,
            output.opacity,
            variation if self.field.encoding == "dense" else None,
        )

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
            generator=self.distiller.views_stream if training else None,
            max_samples=self.config.renderer.max_samples if training else None,
        )

    def surface(self) -> Surface:
        """The field's closed surface, at an iso level that suits it; EmptySurfaceError if it has none."""
        self.occupancy.update(self.field)
        return self._surface_at(self.config.mesh.iso_level)

    def densest_surface(self) -> Surface:
        """The surface of the densest part of a field that is fog all over; EmptySurfaceError if all of it is
        alike."""
        return self._surface_at(densest_level(self.field.density, self.field.half_extent, device=self.device))

    def _surface_at(self, iso_level: float | None) -> Surface:
        settings = self.config.mesh
        return extract_surface(
            self.field.density,
            self.field.half_extent,
            settings.resolution,
            iso_level=iso_level,
            max_triangles=settings.max_triangles,
            device=self.device,
        )

    def surface_colour(self, points: Tensor, face: Tensor, barycentric: Tensor) -> Tensor:
        """Colours [K, 3] of points [K, 3] on the surface; where on which face is not asked."""
        return self.field.colour(points.to(self.device))

    def _sample_cameras(self, num: int) -> Cameras:
        return training_cameras(self.config.cameras, num, self.generator)

    def _value(self, schedule: Schedule) -> float:
        return value_at(schedule, self.progress)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on: nested dicts of tensors and plain data."""
        state = {
            "step": self.step_index,
            "generator": self.generator.get_state(),
            "field": self.field.state_dict(),
            "occupancy": self.occupancy.state_dict(),
            "field_optimiser": self.field_optimiser.state_dict(),
        }
        return state | self.distiller.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken; the configuration must be the same."""
        self.field.load_state_dict(state["field"])
        self.occupancy.load_state_dict(state["occupancy"])
        self.field_optimiser.load_state_dict(state["field_optimiser"])
        self.distiller.load_state_dict(state)
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


def _warn_of_voxel_terms(config: TextTo3DConfig) -> None:
    weights = config.regularisers
    is_smoothing = any(value > 0 for _, value in weights.smoothness + weights.colour_smoothness)
    if config.field.encoding != "dense" and is_smoothing:
        logger.warning(
            "regularisers.smoothness and colour_smoothness compare voxels; a hash field has none, "
            "so they are left out"
        )


def critic_settings(config: TextTo3DConfig) -> CriticSettings:
    """How `config` has the fake score and the discriminator built and trained."""
    fake, discriminator = config.fake_score, config.discriminator
    return CriticSettings(
        lora_rank=fake.lora_rank,
        fake_score_learning_rate=value_at(fake.learning_rate, 0.0),
        fake_score_weight_decay=fake.weight_decay,
        fake_score_updates=fake.updates_per_step,
        fake_law=FakeScoreLaw(
            weighting=fake.weighting,
            noise_range=fake.noise_range,
            camera_dropout=fake.camera_dropout,
            reads_view=fake.view_prompts,
        ),
        discriminator_learning_rate=discriminator.learning_rate,
        discriminator_updates=discriminator.updates_per_step,
        max_log_ratio=discriminator.max_log_ratio,
        perp_neg=config.guidance.perp_neg,
    )


def check_groups(config: TextTo3DConfig, views_per_group: int) -> None:
    """Raise ConfigError unless views and samples make whole groups of a multi-view teacher."""
    for key, number in (
        ("guidance.views_per_step", config.guidance.views_per_step),
        ("discriminator.num_real_samples", config.discriminator.num_real_samples),
    ):
        if number % views_per_group:
            raise ConfigError(
                f"{key} is {number}, but the teacher sees {views_per_group} views together; expected a "
                f"multiple of {views_per_group}"
            )


def build_distiller(
    config: TextTo3DConfig,
    teacher: LatentDiffusionTeacher,
    generator: torch.Generator,
    *,
    fake_base: LatentDiffusionTeacher | None = None,
    processes: Processes = Processes(),  # noqa: B008 - frozen
) -> Distiller:
    """The `Distiller` that `config` describes, for any student; draws from and keeps `generator`."""
    return Distiller(
        teacher,
        prompt_contexts(config, teacher, config.prompt),
        most_demanding_recipe(config),
        critic_settings(config),
        fake_base=fake_base,
        fake_camera=config.fake_score.camera,
        generator=generator,
        processes=processes,
    )


def prompt_contexts(config: TextTo3DConfig, teacher: LatentDiffusionTeacher, prompt: str) -> PromptContexts:
    """`prompt` as the teacher reads it under the other settings of `config`."""
    return PromptContexts.encode(
        teacher,
        prompt,
        config.negative_prompt,
        use_view_words=config.guidance.view_prompts,
        use_camera=config.guidance.camera_token,
    )


def num_warmup_steps(config: TextTo3DConfig, recipe: recipes.Recipe, num_steps: int) -> int:
    """How long a student waits for a new fake score: at most a tenth of its run or stage of `num_steps`."""
    return min(config.fake_score.warmup_steps, num_steps // 10) if recipe.needs_fake_score else 0


def field_terms(
    weights: RegularisersConfig,
    progress: float,
    opacity: Tensor,
    variation: Callable[..., Tensor] | None,
) -> dict[str, Tensor]:
    """Weighted terms that keep a field compact, by name; a term of weight zero is not computed.

    Args:
        progress: share of the run that is done.
        opacity: of the renders, [B, 1, H, W]; or [S, B, 1, H, W] for S fields, whose terms are [S].
        variation: total variation of their voxels by `density_weight` and `colour_weight`; None: there are
            no voxels.
    """
    of_each = torch.func.vmap if opacity.ndim == 5 else lambda term: term
    terms: dict[str, Tensor] = {}
    smoothness, colour_smoothness = (
        value_at(schedule, progress) for schedule in (weights.smoothness, weights.colour_smoothness)
    )
    if variation is not None and (smoothness > 0 or colour_smoothness > 0):
        terms["smoothness"] = variation(density_weight=smoothness, colour_weight=colour_smoothness)
    if (weight := value_at(weights.opacity_entropy, progress)) > 0:
        terms["opacity_entropy"] = weight * of_each(opacity_entropy)(opacity)
    if (weight := value_at(weights.opacity, progress)) > 0:
        terms["opacity_penalty"] = weight * of_each(opacity_sparsity)(opacity)
    return terms


def training_cameras(settings: CamerasConfig, num: int, generator: torch.Generator) -> Cameras:
    """`num` cameras drawn as the settings say."""
    return sample_orbit_cameras(
        num,
        generator=generator,
        elevation_range_deg=settings.elevation_deg,
        overhead_range_deg=settings.overhead_deg,
        overhead_probability=settings.overhead_probability,
        radius_range=settings.radius,
        fov_y_deg=settings.fov_y_deg,
    )


def first_colour(
    config: TextTo3DConfig,
    contexts: PromptContexts,
    samples: RealLatents | None,
    *,
    seed: int,
    before_step: Callable[[], object] | None,
) -> Tensor | None:
    """Logits [3] of the colour that a scene starts from, see `sampled_colour`; none leaves it grey."""
    if config.field.initial_colour == "grey":
        return None
    return sampled_colour(
        contexts,
        samples,
        cameras=functools.partial(training_cameras, config.cameras),
        guidance_scale=value_at(config.guidance.guidance_scale, 0.0),
        seed=seed,
        before_step=before_step,
    )


def noise_and_scale(guidance: GuidanceConfig | StageGuidanceConfig, progress: float) -> dict[str, Any]:
    """What `Distiller.losses` is told when the fraction `progress` of a run or a stage is done."""
    return {
        "noise_range": (value_at(guidance.noise_min, progress), value_at(guidance.noise_max, progress)),
        "guidance_scale": value_at(guidance.guidance_scale, progress),
    }


def training_backgrounds(
    settings: RendererConfig, num: int, generator: torch.Generator, device: torch.device
) -> Tensor:
    """What stands behind the object in `num` training pictures, sRGB [num, 3]."""
    match settings.background:
        case "random":
            return to_device(random_backgrounds(num, generator=generator), device)
        case "greys":
            return to_device(random_greys(num, generator=generator), device)
        case "white":
            return torch.full((num, 3), WHITE, device=device)
        case _:
            return torch.full((num, 3), GREY, device=device)


def stage_recipe(config: TextTo3DConfig, progress: float) -> recipes.Recipe:
    """The recipe that moves the student when the fraction `progress` of the run is done."""
    first = config.guidance.first_stage_divergence
    if first is not None and progress < config.guidance.first_stage_share:
        return resolve_recipe(dataclasses.replace(config, divergence=first))
    return resolve_recipe(config)


def most_demanding_recipe(config: TextTo3DConfig) -> recipes.Recipe:
    """Of a run's stages, the one that needs a discriminator if any does: it must learn from the start."""
    stages = stage_recipe(config, 0.0), resolve_recipe(config)
    return max(stages, key=lambda recipe: recipe.needs_discriminator)


def resolve_recipe(config: TextTo3DConfig) -> recipes.Recipe:
    """The recipe that `config` names; ConfigError if its parts do not fit or it needs more than a prompt."""
    overrides: dict[str, Any] = {}
    divergence = config.divergence
    if not (config.guidance.jac_teacher and config.guidance.jac_fake):
        overrides |= {"jac_teacher": config.guidance.jac_teacher, "jac_fake": config.guidance.jac_fake}
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
