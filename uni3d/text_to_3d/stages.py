"""Field, geometry, texture: the stages of one text-to-3D run, one after the other in memory.

`StagedOptimiser` looks like one optimiser from outside: one count of steps, one state to save. A stage starts
from what the one before it leaves: the geometry stage from the field's surface, the texture stage from the
surface and the field's colours. Networks that judge images go on from stage to stage while the recipe stays
the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uni3d.config.text_to_3d import TextTo3DConfig
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.mesh.deformable_surface import DeformableSurface
from uni3d.mesh.extraction import EmptySurfaceError
from uni3d.mesh.renderable import RenderableMesh
from uni3d.mesh.source_colour import SourceColour
from uni3d.mesh.surface import Surface
from uni3d.mesh.surface_renderer import SurfaceImages
from uni3d.scene.camera import Cameras
from uni3d.scene.radiance_field import RadianceField
from uni3d.scene.renderer import RenderOutput
from uni3d.text_to_3d.mesh_optimiser import (
    FieldColour,
    GeometryStudent,
    MeshOptimiser,
    geometry_optimiser,
    is_same_recipe,
    texture_optimiser,
)
from uni3d.text_to_3d.scene_optimiser import SceneOptimiser, StepReport

logger = logging.getLogger(__name__)

STAGES = ("field", "geometry", "texture")


class StagedOptimiser:
    """Runs the stages of `config` that have steps.

    Args:
        config: the run; `config.steps` is the length of the field stage.
        teacher: frozen; its network receives the LoRA adapters of the fake score, see `close`.
        source: a mesh to start from instead of a field; then the first stage is a mesh stage.
        fake_base: the model of `config.fake_score.base`, which receives the adapters instead.
    """

    def __init__(
        self,
        config: TextTo3DConfig,
        teacher: LatentDiffusionTeacher,
        source: RenderableMesh | None = None,
        *,
        fake_base: LatentDiffusionTeacher | None = None,
    ) -> None:
        self._config = config
        self.teacher = teacher
        self._fake_base = fake_base
        self.device = teacher.device
        self.source = source
        self._lengths: dict[str, int] = {
            "field": config.steps if source is None else 0,
            "geometry": config.stages.geometry.steps,
            "texture": config.stages.texture.steps,
        }
        self._before_step: Callable[[], object] | None = None
        self.stage = "field"
        self.current: SceneOptimiser | MeshOptimiser
        # what the current mesh stage started from
        self._start: Surface | None = None
        if source is None:
            self.current = SceneOptimiser(config, teacher, fake_base=fake_base)
            self.field = self.current.field
        else:
            # colours are added to those of the source, so it starts at zero
            self.field = RadianceField(
                resolutions=config.field.resolutions, half_extent=config.field.half_extent
            ).to(self.device)
            self._enter("geometry" if self._lengths["geometry"] else "texture", as_surface(source))

    @property
    def config(self) -> TextTo3DConfig:
        """The run; may be set to other bounds of the same run, for this stage and those to come."""
        return self._config

    @config.setter
    def config(self, config: TextTo3DConfig) -> None:
        self._config = config
        if isinstance(self.current, SceneOptimiser):
            self.current.config = config
        else:
            self.current.follow(config, getattr(config.stages, self.stage).guidance)

    @property
    def num_steps(self) -> int:
        """Steps of all stages together."""
        return sum(self._lengths.values())

    @property
    def step_index(self) -> int:
        """Steps done, in all stages."""
        before = sum(self._lengths[name] for name in STAGES[: STAGES.index(self.stage)])
        return before + self.current.step_index

    @property
    def generator(self) -> torch.Generator:
        """CPU generator of all that is random."""
        return self.current.generator

    def prepare(self, *, before_step: Callable[[], object] | None = None) -> None:
        """As `SceneOptimiser.prepare`; `before_step` also serves the stages that follow."""
        self._before_step = before_step
        if self.num_steps > 0:
            self.current.prepare(before_step=before_step)
            self._paint_first_colours()

    def _paint_first_colours(self) -> None:
        if isinstance(self.current, MeshOptimiser):
            self.current.paint_first_colours(self._before_step)

    def close(self) -> None:
        """Take the fake score's adapters off the shared teacher."""
        self.current.close()

    def step(self) -> StepReport:
        """One step of the stage whose turn it is."""
        if self.current.step_index >= self._lengths[self.stage]:
            self._advance()
        return self.current.step()

    # ------------------------------------------------------------------ from stage to stage

    def _advance(self) -> None:
        """Enter the next stage that has steps, with what the current one made."""
        following = next(name for name in STAGES[STAGES.index(self.stage) + 1 :] if self._lengths[name])
        surface = self._surface_to_go_on_with()
        before = self.current.distiller
        guidance = getattr(self.config.stages, following).guidance
        goes_on = is_same_recipe(self.config, guidance, before)
        if not goes_on:
            before.close()
        self._enter(following, surface)
        logger.info("%s stage from a surface of %d triangles", following, len(surface.faces))
        assert isinstance(self.current, MeshOptimiser)
        if goes_on:
            self.current.go_on_with(before)
        else:
            self.current.prepare(before_step=self._before_step, real_latents=before.real_latents)
        self._paint_first_colours()

    def _surface_to_go_on_with(self) -> Surface:
        """The surface as it stands, or if the field has none, that of its densest part."""
        try:
            return self.surface()
        except EmptySurfaceError as error:
            if not isinstance(self.current, SceneOptimiser):
                raise
            logger.warning("%s; the next stage starts from the densest part of the field instead", error)
            return self.current.densest_surface()

    def _enter(self, stage: str, start: Surface) -> None:
        """Build the optimiser of `stage`, which starts from `start` and the colours that there are."""
        colour = FieldColour(self.field, self._base_colour(stage, start))
        if stage == "geometry":
            deformable = DeformableSurface.from_mesh(start, self.config.stages.geometry.resolution)
            self.current = geometry_optimiser(
                self.config, deformable, colour, self.teacher, fake_base=self._fake_base
            )
        else:
            self.current = texture_optimiser(
                self.config, start, colour, self.teacher, fake_base=self._fake_base
            )
        self.stage, self._start = stage, start

    def _base_colour(self, stage: str, start: Surface) -> SourceColour | None:
        if self.source is None:
            return None
        is_own = stage == "texture" and np.array_equal(start.faces, self.source.faces)
        fading = self.config.stages.texture.fading if stage == "texture" else 0.0
        return SourceColour(self.source, by_face=is_own, fading=fading)

    # ------------------------------------------------------------------ what it looks like

    def render(self, cameras: Cameras, size: int, background: Tensor | float) -> RenderOutput | SurfaceImages:
        """Pictures of what is optimised now, as it is exported: without light."""
        return self.current.render(cameras, size, background)

    def surface(self) -> Surface:
        """The closed surface as it stands."""
        if isinstance(self.current, SceneOptimiser):
            return self.current.surface()
        if isinstance(self.current.student, GeometryStudent):
            return self.current.student.surface.extract(self.config.mesh.max_triangles)
        assert self._start is not None
        return self._start

    def surface_colour(self, points: Tensor, face: Tensor, barycentric: Tensor) -> Tensor:
        """Colours [K, 3] of points [K, 3] on faces [K] of `surface`, at barycentric weights [K, 3]."""
        if isinstance(self.current, SceneOptimiser):
            return self.current.surface_colour(points, face, barycentric)
        return self.current.colour(points, face, barycentric)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on: nested dicts of tensors and plain data."""
        state: dict[str, Any] = {"stage": self.stage, "current": self.current.state_dict()}
        if self._start is not None:
            state["field"] = self.field.state_dict()
            state["start"] = {
                "vertices": torch.from_numpy(self._start.vertices),
                "faces": torch.from_numpy(self._start.faces),
                "iso_level": self._start.iso_level,
                "report": self._start.report,
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken, in whatever stage that was."""
        stage = state["stage"]
        self.close()
        if stage == "field":
            self.current = SceneOptimiser(self.config, self.teacher, fake_base=self._fake_base)
            self.field, self.stage, self._start = self.current.field, stage, None
        else:
            self.field.load_state_dict(state["field"])
            start = state["start"]
            vertices, faces = (np.ascontiguousarray(start[name].numpy()) for name in ("vertices", "faces"))
            self._enter(stage, Surface(vertices, faces, float(start["iso_level"]), dict(start["report"])))
        self.current.load_state_dict(state["current"])


def make_optimiser(
    config: TextTo3DConfig,
    teacher: LatentDiffusionTeacher,
    fake_base: LatentDiffusionTeacher | None = None,
) -> SceneOptimiser | StagedOptimiser:
    """The optimiser of a run: of the field alone, or of all its stages."""
    has_mesh_stages = config.stages.geometry.steps + config.stages.texture.steps > 0
    return (StagedOptimiser if has_mesh_stages else SceneOptimiser)(config, teacher, fake_base=fake_base)


def as_surface(mesh: RenderableMesh) -> Surface:
    """The triangles of a prepared mesh, without its colours."""
    return Surface(np.ascontiguousarray(mesh.vertices, np.float32), mesh.faces.astype(np.int64), 0.0)
