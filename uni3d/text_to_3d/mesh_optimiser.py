"""The optimisation loop of the mesh stages: a surface or its colours, guided as the field is.

One step, left to right:

    cameras -> mesh.surface_renderer(student) -> images -> training.distiller -> losses -> optimisers

`GeometryStudent` moves a surface whose colours stay, `TextureStudent` colours a surface that stays;
`MeshOptimiser` does for either what `SceneOptimiser` does for a field, with the same promise: on a CPU its
state after N steps is bitwise the same whether or not it was saved and restored on the way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from uni3d.config.stages import GeometryConfig, StageGuidanceConfig, TextureConfig
from uni3d.config.text_to_3d import TextTo3DConfig
from uni3d.config.values import Schedule, value_at
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.mesh.deformable_surface import DeformableSurface
from uni3d.mesh.rasteriser import MeshEdges, mesh_edges
from uni3d.mesh.source_colour import COLOUR_MARGIN
from uni3d.mesh.surface import Surface
from uni3d.mesh.surface_renderer import SurfaceColour, SurfaceImages, SurfaceRenderer, View, sample_lights
from uni3d.mesh.surface_terms import laplacian, normal_consistency, sign_entropy
from uni3d.mesh.tetrahedra import SurfaceTopology
from uni3d.scene.camera import Cameras, ring_cameras
from uni3d.scene.radiance_field import RadianceField
from uni3d.scene.regularisers import total_variation
from uni3d.text_to_3d.first_colours import (
    BACKGROUND,
    fit_colours,
    object_pixels,
    teacher_pictures,
    typical_colour,
)
from uni3d.text_to_3d.scene_optimiser import (
    StepReport,
    build_distiller,
    noise_and_scale,
    num_warmup_steps,
    resolve_recipe,
    training_backgrounds,
    training_cameras,
)
from uni3d.training.descent import descend
from uni3d.training.distiller import Distiller
from uni3d.training.guidance import RealLatents

MAX_GRADIENT_NORM = 10.0
# Coarse grids of a dense field that take the first colours: finer ones would hold the pixels of single views.
MAX_FIRST_LEVELS = 2


class Student(Protocol):
    """What is optimised in a stage. `progress` is the share of the stage that is done, in [0, 1]."""

    def renderer(self) -> SurfaceRenderer:
        """The mesh as it is now, with gradient where it is optimised."""
        ...

    def regularisation(self, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        """Weighted terms by name; those of weight zero are left out."""
        ...

    def move(self, loss: Tensor, progress: float) -> Tensor:
        """One optimiser step on `loss`; a bool scalar, false, and nothing moved, if it could not be made."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class FieldColour(nn.Module):
    """The colours of a surface: those of a radiance field, added to what the mesh had where `base` is given,
    and to one colour for all of it.

    The sum is formed before the sigmoid, so that a field of zeros leaves the base as it is and every colour
    stays in reach.

    Args:
        field: its colour is trained, its density is not used.
        base: colours float32 [K, 3] of points [K, 3], faces [K] and barycentric weights [K, 3].

    Attributes:
        tint: what is added everywhere, float32 [3]; zero at first.
    """

    tint: Tensor

    def __init__(self, field: RadianceField, base: SurfaceColour | None = None) -> None:
        super().__init__()
        self.field = field
        self.base = base
        self.register_buffer("tint", torch.zeros(3, device=next(field.parameters()).device))

    def forward(self, points: Tensor, face: Tensor, barycentric: Tensor) -> Tensor:
        start = self.tint
        if self.base is not None:
            with torch.no_grad():
                start = start + torch.logit(self.base(points, face, barycentric), eps=COLOUR_MARGIN)
        return torch.sigmoid(torch.logit(self.field.colour(points), eps=1e-6) + start)


class GeometryStudent:
    """A deformable surface in colours that stay."""

    def __init__(self, settings: GeometryConfig, surface: DeformableSurface, colour: SurfaceColour) -> None:
        self.settings = settings
        self.surface = surface
        self.colour = colour
        self._edges: tuple[SurfaceTopology, MeshEdges] | None = None
        self.optimiser = torch.optim.Adam(
            [
                {"params": [surface.distance], "lr": 0.0},
                {"params": [surface.shift], "lr": 0.0},
            ],
            betas=(0.9, 0.99),
            eps=1e-15,
            fused=True,
        )

    def renderer(self) -> SurfaceRenderer:
        vertices, topology = self.surface()
        if self._edges is None or self._edges[0] is not topology:
            self._edges = (topology, mesh_edges(topology.faces))
        return SurfaceRenderer(vertices, topology.faces, edges=self._edges[1])

    def regularisation(self, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        settings = self.settings
        vertices, topology = self.surface()
        terms: dict[str, Tensor] = {}
        if settings.normal_consistency > 0:
            terms["normal_consistency"] = settings.normal_consistency * normal_consistency(vertices, topology)
        if settings.laplacian > 0:
            terms["laplacian"] = settings.laplacian * laplacian(vertices, topology)
        if settings.sign_entropy > 0:
            distance = self.surface.node_distance()
            terms["sign_entropy"] = settings.sign_entropy * sign_entropy(
                distance, topology, self.surface.spacing
            )
        return terms

    def move(self, loss: Tensor, progress: float) -> Tensor:
        settings = self.settings
        distances, shifts = self.optimiser.param_groups
        # in cubes, so that a learning rate means the same at every resolution
        distances["lr"] = self.surface.spacing * value_at(settings.distance_learning_rate, progress)
        shifts["lr"] = value_at(settings.shift_learning_rate, progress)
        before = self.surface.distance.detach().clone()
        moved = descend(loss, self.optimiser, [self.surface.distance, self.surface.shift], MAX_GRADIENT_NORM)
        if moved and self.surface.is_empty:
            with torch.no_grad():
                self.surface.distance.copy_(before)
            return torch.zeros_like(moved)
        return moved

    def state_dict(self) -> dict[str, Any]:
        return {"surface": self.surface.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.surface.load_state_dict(state["surface"])
        self.optimiser.load_state_dict(state["optimiser"])


class TextureStudent:
    """The colours of a surface that stays."""

    def __init__(self, settings: TextureConfig, surface: Surface, colour: FieldColour) -> None:
        self.settings = settings
        self.colour = colour
        device = next(colour.parameters()).device
        self.vertices = torch.from_numpy(surface.vertices).to(device)
        self._renderer = SurfaceRenderer(self.vertices, torch.from_numpy(surface.faces).to(device))
        field = colour.field
        names = ("colour",) if field.encoding == "dense" else field.parameter_group_names
        groups = field.parameter_groups(dict.fromkeys(field.parameter_group_names, 0.0))
        self.optimiser = torch.optim.Adam(
            [group for group in groups if group["name"] in names], betas=(0.9, 0.99), eps=1e-15, fused=True
        )

    def renderer(self) -> SurfaceRenderer:
        return self._renderer

    def regularisation(self, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        weight = value_at(self.settings.smoothness, progress)
        field = self.colour.field
        if weight <= 0 or field.encoding != "dense":
            return {}
        term = total_variation(field, density_weight=0.0, colour_weight=weight, generator=generator)
        return {"smoothness": term}

    def move(self, loss: Tensor, progress: float) -> Tensor:
        rate = value_at(self.settings.learning_rate, progress)
        parameters: list[nn.Parameter] = []
        for group in self.optimiser.param_groups:
            group["lr"] = rate * (0.1 if group["name"] == "network" else 1.0)
            parameters += group["params"]
        return descend(loss, self.optimiser, parameters, MAX_GRADIENT_NORM)

    def take_tint(self, seen: SurfaceImages, pictures: Tensor) -> None:
        """Give the mesh, which looks as `seen`, the middle colour of what `pictures` [B, 3, H, W] show."""
        now = typical_colour(seen.image, seen.opacity > 0.9)
        wanted = typical_colour(pictures, object_pixels(pictures))
        if now is not None and wanted is not None:
            self.colour.tint += wanted - now

    def fit(self, cameras: Cameras, pictures: Tensor, generator: torch.Generator) -> None:
        """Make the mesh look from `cameras` roughly as in `pictures` [B, 3, H, W], of a dense field by its
        coarse grids alone; the stage's optimiser is not used."""
        field = self.colour.field
        parameters = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        zero = torch.zeros((), device=pictures.device)

        def smoothness() -> Tensor:
            return sum(self.regularisation(0.0, generator).values(), zero)

        if field.encoding == "dense":
            num_coarse = min(MAX_FIRST_LEVELS, len(field.resolutions))
            field.set_active_levels(num_coarse)
            parameters = parameters[:num_coarse]
        fit_colours(parameters, self._renderer, self.colour, cameras, pictures, smoothness)
        field.set_active_levels(len(field.resolutions))

    def state_dict(self) -> dict[str, Any]:
        return {
            "field": self.colour.field.state_dict(),
            "tint": self.colour.tint,
            "optimiser": self.optimiser.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.colour.field.load_state_dict(state["field"])
        self.colour.tint.copy_(state["tint"])
        self.optimiser.load_state_dict(state["optimiser"])


class MeshOptimiser:
    """Optimises one student towards `config.prompt`.

    Args:
        config: the run; prompt, seed, networks and cameras are read from it.
        guidance: of this stage.
        student: what moves.
        colour: what colours it.
        views: what the teacher sees, in turn.
        num_steps: length of the stage.
        fake_base: the model that carries the fake score; none: the teacher.
        teacher: frozen.

    `prepare`, `go_on_with` or `load_state_dict` comes before the first step.
    """

    def __init__(
        self,
        config: TextTo3DConfig,
        guidance: StageGuidanceConfig,
        student: Student,
        colour: SurfaceColour,
        teacher: LatentDiffusionTeacher,
        *,
        num_steps: int,
        views: Sequence[View] = ("colour",),
        fake_base: LatentDiffusionTeacher | None = None,
    ) -> None:
        self.config = stage_config(config, guidance)
        self.guidance = guidance
        self.student = student
        self.colour = colour
        self.views = tuple(views)
        self.num_steps = num_steps
        self.teacher = teacher
        self._fake_base = fake_base
        self.device = teacher.device
        self.step_index = 0
        self.num_warmup_steps = 0
        self.generator = torch.Generator().manual_seed(config.seed)
        self._distiller: Distiller | None = None

    @property
    def distiller(self) -> Distiller:
        """The networks that judge the images."""
        assert self._distiller is not None, "prepare(), go_on_with() or load_state_dict() comes first"
        return self._distiller

    def _build_distiller(self) -> Distiller:
        distiller = build_distiller(self.config, self.teacher, self.generator, fake_base=self._fake_base)
        distiller.follow(resolve_recipe(self.config))
        return distiller

    def follow(self, config: TextTo3DConfig, guidance: StageGuidanceConfig) -> None:
        """Go on under other settings of the same run."""
        self.config, self.guidance = stage_config(config, guidance), guidance

    def go_on_with(self, distiller: Distiller) -> None:
        """Take over the networks of the stage before, which had the same recipe, and its generator."""
        self._distiller, self.generator = distiller, distiller.generator

    def prepare(
        self,
        *,
        before_step: Callable[[], object] | None = None,
        real_latents: RealLatents | None = None,
    ) -> None:
        """Make new networks, and draw the teacher samples that they need or take over those of another stage;
        once, before the first step. `before_step` as in `SceneOptimiser.prepare`."""
        self._distiller = self._build_distiller()
        self.num_warmup_steps = num_warmup_steps(self.config, self.distiller.recipe, self.num_steps)
        settings = self.config.discriminator
        num_samples = settings.num_real_samples if self.distiller.recipe.needs_discriminator else 0
        cameras = self._sample_cameras(0 if real_latents is not None else num_samples)
        self.distiller.prepare(
            cameras.conditioning(),
            cameras.view_words(),
            guidance_scale=self._value(self.guidance.guidance_scale),
            num_steps=settings.sampling_steps,
            before_step=before_step,
            real_latents=real_latents,
        )

    def paint_first_colours(self, before_step: Callable[[], object] | None = None) -> None:
        """Start the colours from the teacher's pictures of the mesh, if this stage asks for that; once, after
        the networks are there and before the first step. `before_step` as in `prepare`."""
        student = self.student
        if not isinstance(student, TextureStudent) or student.settings.first_views == 0:
            return
        cameras = ring_cameras(
            student.settings.first_views, elevation_deg=20.0, fov_y_deg=self.config.cameras.fov_y_deg
        ).to(self.device)

        def pictures(seen: SurfaceImages, noise_level: float) -> Tensor:
            return teacher_pictures(
                self.distiller.contexts,
                seen.image,
                cameras,
                noise_level=noise_level,
                guidance_scale=self._value(self.guidance.guidance_scale),
                generator=self.generator,
                before_step=before_step,
            )

        size, settings = self.teacher.image_size, student.settings
        if settings.tint_noise > 0:
            seen = self.render(cameras, size, BACKGROUND)
            student.take_tint(seen, pictures(seen, settings.tint_noise))
        seen = self.render(cameras, size, BACKGROUND)
        student.fit(cameras, pictures(seen, settings.first_noise), self.generator)

    def close(self) -> None:
        """Take the fake score's adapters off the shared teacher."""
        if self._distiller is not None:
            self._distiller.close()

    @property
    def progress(self) -> float:
        """Share of the stage that is done, in [0, 1]."""
        return min(self.step_index / max(self.num_steps, 1), 1.0)

    # ------------------------------------------------------------------ one step

    def step(self) -> StepReport:
        """Render, ask the teacher, move the student, fake score and discriminator once. Non-finite gradients
        move nothing."""
        is_warming_up = self.step_index < self.num_warmup_steps
        images, conditioning, words = self._view()
        losses = self.distiller.losses(
            images, conditioning, words, **self._noise(), train_student=not is_warming_up
        )
        terms = self.student.regularisation(self.progress, self.generator)
        loss = losses.student + sum(terms.values(), torch.zeros((), device=self.device))
        if is_warming_up:
            loss = loss.detach()
        applied = self.student.move(loss, self.progress)
        self.distiller.set_fake_score_learning_rate(self._value(self.config.fake_score.learning_rate))
        applied = applied & self.distiller.train(losses)
        self.step_index += 1
        return StepReport(losses.statistics | terms, applied)

    def _view(self) -> tuple[Tensor, Tensor, list[str]]:
        """This step's pictures [B, 3, H, W], the conditioning of their cameras and their view words."""
        cameras = self._sample_cameras(self.guidance.views_per_step)
        view = self.views[self.step_index % len(self.views)]
        lights = sample_lights(len(cameras), generator=self.generator) if view == "shaded" else None
        images = self.student.renderer().render(
            cameras.to(self.device),
            round(self._value(self.guidance.resolution)),
            training_backgrounds(self.config.renderer, len(cameras), self.generator, self.device),
            colour=self.colour,
            view=view,
            lights=lights,
        )
        return images.image, cameras.conditioning(), cameras.view_words()

    def _noise(self) -> dict[str, Any]:
        return noise_and_scale(self.guidance, self.progress)

    def _value(self, schedule: Schedule) -> float:
        return value_at(schedule, self.progress)

    def _sample_cameras(self, num: int) -> Cameras:
        return training_cameras(self.config.cameras, num, self.generator)

    # ------------------------------------------------------------------ rendering and state

    @torch.no_grad()
    def render(
        self, cameras: Cameras, size: int, background: Tensor | float, *, supersample: int = 2
    ) -> SurfaceImages:
        """The coloured mesh as it is now, without light."""
        return self.student.renderer().render(
            cameras.to(self.device), size, background, colour=self.colour, supersample=supersample
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on: nested dicts of tensors and plain data."""
        state = {
            "step": self.step_index,
            "num_warmup_steps": self.num_warmup_steps,
            "generator": self.generator.get_state(),
            "student": self.student.state_dict(),
        }
        return state if self._distiller is None else state | self._distiller.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken; configuration and student must be the same."""
        self.student.load_state_dict(state["student"])
        if self.num_steps > 0:
            if self._distiller is None:
                self._distiller = self._build_distiller()
            self._distiller.load_state_dict(state)
        # Last, since building the parts draws from it.
        self.generator.set_state(state["generator"])
        self.num_warmup_steps = int(state["num_warmup_steps"])
        self.step_index = int(state["step"])


def stage_config(config: TextTo3DConfig, guidance: StageGuidanceConfig) -> TextTo3DConfig:
    """The run's settings with the method and the cameras of one stage in their places."""
    method = guidance.method or config.method
    divergence = guidance.divergence
    if divergence is None and method == config.method:
        divergence = config.divergence
    cameras = dataclasses.replace(
        config.cameras,
        fov_y_deg=config.cameras.fov_y_deg if guidance.fov_y_deg is None else guidance.fov_y_deg,
        radius=config.cameras.radius if guidance.radius is None else guidance.radius,
    )
    return dataclasses.replace(config, method=method, divergence=divergence, cameras=cameras)


def geometry_optimiser(
    config: TextTo3DConfig,
    surface: DeformableSurface,
    colour: SurfaceColour,
    teacher: LatentDiffusionTeacher,
    *,
    fake_base: LatentDiffusionTeacher | None = None,
) -> MeshOptimiser:
    """The geometry stage of `config`."""
    settings = config.stages.geometry
    student = GeometryStudent(settings, surface.to(teacher.device), colour)
    return MeshOptimiser(
        config,
        settings.guidance,
        student,
        colour,
        teacher,
        num_steps=settings.steps,
        fake_base=fake_base,
        views=settings.views,
    )


def texture_optimiser(
    config: TextTo3DConfig,
    surface: Surface,
    colour: FieldColour,
    teacher: LatentDiffusionTeacher,
    *,
    fake_base: LatentDiffusionTeacher | None = None,
) -> MeshOptimiser:
    """The texture stage of `config`."""
    settings = config.stages.texture
    student = TextureStudent(settings, surface, colour.to(teacher.device))
    return MeshOptimiser(
        config,
        settings.guidance,
        student,
        colour,
        teacher,
        num_steps=settings.steps,
        fake_base=fake_base,
        views=("shaded",) if settings.lit else ("colour",),
    )


def is_same_recipe(config: TextTo3DConfig, guidance: StageGuidanceConfig, before: Distiller) -> bool:
    """Whether a stage can go on with the distiller of the stage before it."""
    return resolve_recipe(stage_config(config, guidance)) == before.student_recipe
