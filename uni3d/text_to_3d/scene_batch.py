"""Several scenes of one setting, optimised together: what `SceneOptimiser` is to one.

Rendering, teacher passes and optimiser steps run once for all scenes, while each scene has its own prompt,
seed, random stream, field, occupancy, fake score, discriminator and state. A scene goes where it would have
gone alone, up to rounding, and its state can be read by `SceneOptimiser`.
Legend: S scenes, B views scene by scene.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uni3d.config.text_to_3d import TextTo3DConfig
from uni3d.config.values import Schedule, value_at
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.scene.backends import choose_encoding_backend
from uni3d.scene.camera import Cameras
from uni3d.scene.field_stack import FieldStack, total_variation_each
from uni3d.scene.occupancy import OccupancyGrid
from uni3d.scene.radiance_field import RadianceField
from uni3d.scene.renderer import RenderOutput
from uni3d.scene.stack_renderer import OccupancyStack, render_stack, through_images
from uni3d.text_to_3d.scene_optimiser import (
    SceneOptimiser,
    check_groups,
    critic_settings,
    field_terms,
    first_colour,
    most_demanding_recipe,
    noise_and_scale,
    num_warmup_steps,
    prompt_contexts,
    stage_recipe,
    training_backgrounds,
    training_cameras,
)
from uni3d.text_to_3d.scene_requests import SceneRequest
from uni3d.training.distiller_stack import DistillerStack
from uni3d.training.stack_optimiser import StackOptimiser


@dataclass(frozen=True)
class BatchReport:
    """Numbers of one step, [S] each and still on the device; `finite` says which scenes moved."""

    values: dict[str, Tensor]
    finite: list[bool]


class SceneBatch:
    """Optimises a dense field for each of `scenes` under one teacher; all else as `SceneOptimiser`.

    Args:
        config: prompt and seed are those of the scenes; everything else holds for all.
    """

    def __init__(
        self, config: TextTo3DConfig, scenes: Sequence[SceneRequest], teacher: LatentDiffusionTeacher
    ) -> None:
        check_groups(config, teacher.views_per_group)
        self.config = config
        self.scenes = list(scenes)
        self.teacher = teacher
        self.device = teacher.device
        self.step_index = 0
        self.generators = [torch.Generator().manual_seed(scene.seed) for scene in scenes]
        # A GPU draws its many numbers, one for every ray and cell, where they are needed.
        self.device_generators = (
            self.generators
            if self.device.type == "cpu"
            else [torch.Generator(self.device).manual_seed(scene.seed) for scene in scenes]
        )
        self._build_fields()
        self.distiller = DistillerStack(
            [prompt_contexts(config, teacher, scene.prompt) for scene in self.scenes],
            most_demanding_recipe(config),
            critic_settings(config),
            generators=self.generators,
        )
        self._scene_of_view = torch.arange(len(self.scenes), device=self.device).repeat_interleave(
            config.guidance.views_per_step
        )
        self._follow_schedules()

    def _build_fields(self) -> None:
        config = self.config.field
        look_up = choose_encoding_backend(config.encoding_backend, self.device, is_hashed=False).name
        fields = [
            RadianceField(
                encoding=config.encoding,
                encoding_backend=look_up,
                resolutions=config.resolutions,
                half_extent=config.half_extent,
                blob_radius=config.initial_radius,
                generator=generator,
            ).to(self.device)
            for generator in self.generators
        ]
        self.fields = FieldStack(fields)
        grid = OccupancyGrid(half_extent=config.half_extent).to(self.device)
        self.occupancy = OccupancyStack(len(self.scenes), grid)
        self.field_optimiser = StackOptimiser(
            self.fields.parameter_groups, torch.optim.Adam, lr=1.0, betas=(0.9, 0.99), eps=1e-15
        )

    def prepare(self, *, before_step: Callable[[], object] | None = None) -> None:
        """Draw the teacher samples that the discriminators need; see `SceneOptimiser.prepare`."""
        settings = self.config.discriminator
        num_samples = settings.num_real_samples if self.distiller.recipe.needs_discriminator else 0
        cameras = [self._sample_cameras(num_samples, generator) for generator in self.generators]
        self.distiller.prepare(
            [one.conditioning() for one in cameras],
            [one.view_words() for one in cameras],
            guidance_scale=self._value(self.config.guidance.guidance_scale),
            num_steps=settings.sampling_steps,
            before_step=before_step,
        )
        samples = self.distiller.real_latents
        for index, scene in enumerate(self.scenes):
            colour = first_colour(
                self.config,
                self.distiller.contexts.contexts[index],
                None if samples is None else samples.scenes[index],
                seed=scene.seed,
                before_step=before_step,
            )
            if colour is not None:
                self.fields.shift_colour(index, colour)

    # ------------------------------------------------------------------ one step

    def step(self) -> BatchReport:
        """One step of every scene; one whose gradients are not finite does not move."""
        if self.step_index % self.config.renderer.occupancy_interval == 0:
            self.occupancy.update(self.fields, streams=self.device_generators)
        cameras, output = self._view()
        view = output.image, cameras.conditioning(), cameras.view_words()
        losses = self.distiller.losses(*view, **self._noise(), train_student=not self._is_warming_up)
        regularisation = self._regularisation(output)
        if self._is_warming_up:
            student = losses.student.detach()
        else:
            student = sum(
                regularisation.values(), through_images(losses.student, output.image, len(self.scenes))
            )
        opacity = output.opacity.detach().view(len(self.scenes), -1).mean(dim=1)
        values = {**losses.statistics, **regularisation, "opacity": opacity}
        moved = self._move_fields(student)
        self.distiller.set_fake_score_learning_rate(self._value(self.config.fake_score.learning_rate))
        trained = self.distiller.train(losses)
        self.step_index += 1
        self._follow_schedules()
        finite = [a and b for a, b in zip(moved, trained, strict=True)]
        return BatchReport({name: value.detach() for name, value in values.items()}, finite)

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return min(self.step_index / self.config.steps, 1.0)

    @property
    def _is_warming_up(self) -> bool:
        return self.step_index < num_warmup_steps(self.config, self.distiller.recipe, self.config.steps)

    def _follow_schedules(self) -> None:
        self.distiller.follow(stage_recipe(self.config, self.progress))
        self.fields.set_density_sharpness(self._value(self.config.field.density_sharpness))

    def _view(self) -> tuple[Cameras, RenderOutput]:
        config = self.config
        num_views = config.guidance.views_per_step
        cameras, backgrounds = [], []
        for generator in self.generators:
            cameras.append(self._sample_cameras(num_views, generator))
            backgrounds.append(training_backgrounds(config.renderer, num_views, generator, self.device))
        joined = Cameras(
            *(
                torch.cat([getattr(one, name) for one in cameras])
                for name in ("azimuth_deg", "elevation_deg", "radius", "fov_y_deg")
            )
        )
        size = round(self._value(config.renderer.resolution))
        output = render_stack(
            self.fields,
            self._scene_of_view,
            joined.to(self.device),
            size,
            size,
            torch.cat(backgrounds),
            num_samples=config.renderer.samples_per_ray,
            occupancy=self.occupancy,
            streams=self.device_generators,
        )
        return joined, output

    def _sample_cameras(self, num: int, generator: torch.Generator) -> Cameras:
        return training_cameras(self.config.cameras, num, generator)

    def _noise(self) -> dict[str, Any]:
        return noise_and_scale(self.config.guidance, self.progress)

    def _move_fields(self, student: Tensor) -> list[bool]:
        config = self.config.optimiser
        self.field_optimiser.set_learning_rates(
            {
                "density": self._value(config.density_learning_rate),
                "colour": self._value(config.colour_learning_rate),
            }
        )
        return self.field_optimiser.descend(student, config.max_gradient_norm)

    def _regularisation(self, output: RenderOutput) -> dict[str, Tensor]:
        variation = functools.partial(total_variation_each, self.fields, streams=self.generators)
        opacity = output.opacity.unflatten(0, (len(self.scenes), -1))
        return field_terms(self.config.regularisers, self.progress, opacity, variation)

    def _value(self, schedule: Schedule) -> float:
        return value_at(schedule, self.progress)

    # ------------------------------------------------------------------ state

    def state_dict(self, scene: int) -> dict[str, Any]:
        """The state of one scene as `SceneOptimiser.state_dict` gives it; views, not copies."""
        own_stream = self.device_generators[scene].get_state() if self.device.type != "cpu" else None
        return {
            "step": self.step_index,
            "generator": self.generators[scene].get_state(),
            **({} if own_stream is None else {"device_generator": own_stream}),
            "field": self.fields.state_dict(scene),
            "occupancy": self.occupancy.state_dict(scene),
            "field_optimiser": self.field_optimiser.state_dict(scene),
        } | self.distiller.state_dict(scene)

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on where the scenes' states were taken, all at the same step."""
        self.distiller.load_state_dicts(states)
        for scene, state in enumerate(states):
            self._load_scene(scene, state)
        self.step_index = int(states[0]["step"])
        self._follow_schedules()

    def set_back(self, scene: int, state: Mapping[str, Any], *, seed: int) -> None:
        """Put one scene back to an earlier state with fresh noise, while the others stay where they are."""
        self.distiller.load_state_dict(scene, state)
        self._load_scene(scene, state)
        for generators in (self.generators, self.device_generators):
            generators[scene].manual_seed(seed)

    def _load_scene(self, scene: int, state: Mapping[str, Any]) -> None:
        self.fields.load_state_dict(scene, state["field"])
        self.occupancy.load_state_dict(scene, state["occupancy"])
        self.field_optimiser.load_state_dict(scene, state["field_optimiser"])
        # Last, since building the parts draws from it.
        self.generators[scene].set_state(state["generator"])
        if self.device.type != "cpu" and "device_generator" in state:
            self.device_generators[scene].set_state(state["device_generator"])

    def without(self, scene: int) -> SceneBatch:
        """A batch of the other scenes, where they stand."""
        kept = [index for index in range(len(self.scenes)) if index != scene]
        states = [self.state_dict(index) for index in kept]
        batch = SceneBatch(self.config, [self.scenes[index] for index in kept], self.teacher)
        batch.load_state_dicts(states)
        return batch


class FinishedScene(SceneOptimiser):
    """A scene after its last step, without the networks: what a mesh is made from.

    Args:
        config: of the scene.
        state: its "step", "field" and "occupancy" in the form of `SceneOptimiser.state_dict`.
    """

    def __init__(
        self, config: TextTo3DConfig, state: Mapping[str, Any], device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.generator = torch.Generator()
        self._build_scene()
        self.field.load_state_dict(state["field"])
        self.occupancy.load_state_dict(state["occupancy"])
        self.step_index = int(state["step"])
        self._follow_schedules()

    def _follow_schedules(self) -> None:
        self.field.set_density_sharpness(self._value(self.config.field.density_sharpness))
