"""Several fields for one prompt: particles that share a teacher, a fake score and a discriminator.

The fake score stands for the distribution of all particles, as variational score distillation asks of it
(Wang et al. 2023, ProlificDreamer, section 3.2): they need not agree on one shape. All of them move in a
step, or one at random, as ProlificDreamer trains four.
Legend: S particles, B views particle by particle.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uni3d.config.text_to_3d import TextTo3DConfig
from uni3d.mesh.export import write_mesh
from uni3d.mesh.textured_mesh import TexturedMesh
from uni3d.mesh.turntable import write_preview, write_turntable
from uni3d.outputs import check_output_file
from uni3d.scene.camera import Cameras
from uni3d.scene.field_stack import FieldStack, total_variation_each
from uni3d.scene.occupancy import OccupancyGrid
from uni3d.scene.radiance_field import RadianceField
from uni3d.scene.renderer import RenderOutput
from uni3d.scene.stack_renderer import OccupancyStack, render_stack, through_images
from uni3d.text_to_3d.pipeline import (
    GenerateResult,
    RunWatch,
    _checked,
    _open_run,
    build_mesh,
    choose_device,
    load_run_teacher,
    provenance,
    run_optimiser,
)
from uni3d.text_to_3d.scene_batch import FinishedScene
from uni3d.text_to_3d.scene_optimiser import (
    SceneOptimiser,
    StepReport,
    choose_backends,
    field_terms,
    stage_recipe,
    training_backgrounds,
)
from uni3d.training.checkpoint import atomic_write_json
from uni3d.training.guidance import GuidanceLosses
from uni3d.training.stack_optimiser import StackOptimiser
from uni3d.training.stop import StopFlag

logger = logging.getLogger(__name__)

# Raw units; without it all particles start as the same ball.
START_NOISE = 0.1


class ParticleOptimiser(SceneOptimiser):
    """`config.particles` dense fields towards one prompt; seen from outside, its first particle."""

    def _build_scene(self) -> None:
        self.renderer, self.encoding_backend = choose_backends(self.config, self.device)
        config = self.config.field
        fields = []
        for _ in range(self.config.particles):
            field = RadianceField(
                encoding=config.encoding,
                encoding_backend=self.encoding_backend.name,
                resolutions=config.resolutions,
                half_extent=config.half_extent,
                blob_radius=config.initial_radius,
                generator=self.generator,
            )
            for parameter in field.parameters():
                parameter.data += START_NOISE * torch.randn(parameter.shape, generator=self.generator)
            fields.append(field.to(self.device))
        self.fields = FieldStack(fields)
        grid = OccupancyGrid(half_extent=config.half_extent).to(self.device)
        self.occupancies = OccupancyStack(len(fields), grid)
        self.field_optimiser = StackOptimiser(
            self.fields.parameter_groups, torch.optim.Adam, lr=1.0, betas=(0.9, 0.99), eps=1e-15
        )

    @property
    def field(self) -> RadianceField:
        """A copy of the first particle's field."""
        return self.fields.field(0)

    @property
    def occupancy(self) -> OccupancyGrid:
        """A copy of the first particle's occupied cells."""
        return self.occupancies.grid(0)

    def _follow_schedules(self) -> None:
        self.distiller.follow(stage_recipe(self.config, self.progress))
        self.fields.set_density_sharpness(self._value(self.config.field.density_sharpness))

    def _shift_colour(self, logits: Tensor) -> None:
        for particle in range(self.config.particles):
            self.fields.shift_colour(particle, logits)

    def step(self) -> StepReport:
        """One step of all particles, or of one; what is not finite moves nothing."""
        config = self.config
        if self.step_index % config.renderer.occupancy_interval == 0:
            self.occupancies.update(self.fields, streams=self.generator)
        chosen = self._choose()
        cameras = self._sample_cameras(config.guidance.views_per_step * len(chosen))
        output = self._render_particles(chosen, cameras)
        view = output.image, cameras.conditioning(), cameras.view_words()
        losses = self.distiller.losses(*view, **self._noise(), train_student=not self._is_warming_up)
        regularisation = self._particle_regularisation(output, chosen)
        figures = {
            **losses.statistics,
            **{name: value.mean() for name, value in regularisation.items()},
            "opacity": output.opacity.mean(),
        }
        applied = self._move_particles(chosen, losses, output, regularisation)
        self.distiller.set_fake_score_learning_rate(self._value(config.fake_score.learning_rate))
        applied = self.distiller.train(losses) & applied
        self.step_index += 1
        self._follow_schedules()
        return StepReport(figures, applied)

    def _choose(self) -> list[int]:
        num = self.config.particles
        if self.config.particles_per_step == "all":
            return list(range(num))
        return [int(torch.randint(num, (1,), generator=self.generator))]

    def _render_particles(self, chosen: list[int], cameras: Cameras) -> RenderOutput:
        config = self.config.renderer
        size = round(self._value(config.resolution))
        particle = torch.tensor(chosen).repeat_interleave(len(cameras) // len(chosen))
        return render_stack(
            self.fields,
            particle.to(self.device),
            cameras.to(self.device),
            size,
            size,
            training_backgrounds(config, len(cameras), self.generator, self.device),
            num_samples=config.samples_per_ray,
            occupancy=self.occupancies,
            streams=self.generator,
        )

    def _particle_regularisation(self, output: RenderOutput, chosen: list[int]) -> dict[str, Tensor]:
        """The weighted terms of the chosen particles, one number each."""

        def variation(**weights: float) -> Tensor:
            return total_variation_each(self.fields, streams=self.generator, **weights)[chosen]

        opacity = output.opacity.unflatten(0, (len(chosen), -1))
        return field_terms(self.config.regularisers, self.progress, opacity, variation)

    def _move_particles(
        self,
        chosen: list[int],
        losses: GuidanceLosses,
        output: RenderOutput,
        regularisation: Mapping[str, Tensor],
    ) -> bool:
        config = self.config.optimiser
        if self._is_warming_up:
            return bool(torch.isfinite(losses.student.detach()))
        # The loss is a mean over all views; each particle descends the mean over its own.
        own = through_images(len(chosen) * losses.student, output.image, len(chosen))
        student = torch.zeros(self.config.particles, device=self.device)
        student = student.index_add(
            0, torch.tensor(chosen, device=self.device), sum(regularisation.values(), own)
        )
        self.field_optimiser.set_learning_rates(
            {
                "density": self._value(config.density_learning_rate),
                "colour": self._value(config.colour_learning_rate),
            }
        )
        verdicts = self.field_optimiser.descend(student, config.max_gradient_norm, only=chosen)
        return all(verdicts)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """As `SceneOptimiser.state_dict`, the fields' parts in one list each."""
        particles = range(self.config.particles)
        state = {
            "step": self.step_index,
            "generator": self.generator.get_state(),
            "fields": [self.fields.state_dict(index) for index in particles],
            "occupancies": [self.occupancies.state_dict(index) for index in particles],
            "field_optimisers": [self.field_optimiser.state_dict(index) for index in particles],
        }
        return state | self.distiller.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken; the configuration must be the same."""
        for index in range(self.config.particles):
            self.fields.load_state_dict(index, state["fields"][index])
            self.occupancies.load_state_dict(index, state["occupancies"][index])
            self.field_optimiser.load_state_dict(index, state["field_optimisers"][index])
        self.distiller.load_state_dict(state)
        # Last, since building the parts draws from it.
        self.generator.set_state(state["generator"])
        self.step_index = int(state["step"])
        self._follow_schedules()

    def particle(self, index: int) -> FinishedScene:
        """One particle as it stands, to make a mesh of."""
        state = {
            "step": self.step_index,
            "field": self.fields.state_dict(index),
            "occupancy": self.occupancies.state_dict(index),
        }
        return FinishedScene(self.config, state, self.device)


def generate_particles(config: TextTo3DConfig, *, watch: RunWatch | None = None) -> GenerateResult:
    """As `text_to_3d.generate`, with mesh_0, mesh_1, ... in one run directory.

    Raises UsageError too where `config.output` with such numbers cannot be written.
    """
    outputs = _numbered_outputs(config)
    config = _checked(dataclasses.replace(config, output=None))
    device, reason = choose_device(config.device)
    seconds: dict[str, float] = {}
    teacher, warning = load_run_teacher(config, device)
    with _open_run(config) as run, StopFlag() as stop:
        logger.info("device: %s (%s); %d particles", device, reason, config.particles)
        if warning:
            logger.warning("%s", warning)
        optimiser = ParticleOptimiser(config, teacher)
        try:
            run_optimiser(optimiser, run, seconds, stop, watch or RunWatch())
            meshes = [build_mesh(optimiser.particle(index)) for index in range(config.particles)]
        finally:
            optimiser.close()
        for index, (mesh, _, _) in enumerate(meshes):
            _write_particle(run.path, config, mesh, index)
        for (mesh, _, _), output in zip(meshes, outputs, strict=False):
            write_mesh(mesh, output, extras=provenance(config))
        report = {
            "prompt": config.prompt,
            "seed": config.seed,
            "method": config.method,
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "particles": [figures for _, figures, _ in meshes],
        }
        atomic_write_json(run.path / "metrics.json", json.loads(json.dumps(report, default=float)))
        first = outputs[0] if outputs else run.path / f"mesh_0.{config.mesh.formats[0]}"
        return GenerateResult(first, run.path, report)


def _numbered_outputs(config: TextTo3DConfig) -> list[Path]:
    """chair_0.glb, chair_1.glb, ... for chair.glb, all of them free to write."""
    output = config.output
    if output is None:
        return []
    numbered = [output.with_stem(f"{output.stem}_{index}") for index in range(config.particles)]
    return [check_output_file(path, overwrite=config.overwrite) for path in numbered]


def _write_particle(folder: Path, config: TextTo3DConfig, mesh: TexturedMesh, index: int) -> None:
    extras = {**provenance(config), "particle": index}
    for suffix in config.mesh.formats:
        write_mesh(mesh, folder / f"mesh_{index}.{suffix}", extras=extras)
    write_preview(mesh, folder / f"preview_{index}.png")
    if config.mesh.turntable_frames > 0:
        write_turntable(mesh, folder / f"turntable_{index}.mp4", frames=config.mesh.turntable_frames)
