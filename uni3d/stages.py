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

from uni3d.config import TextTo3DConfig
from uni3d.diffusion.stable_diffusion import LatentDiffusionTeacher
from uni3d.mesh.deformable_surface import DeformableSurface
from uni3d.mesh.surface import Surface
from uni3d.mesh.surface_renderer import SurfaceImages
from uni3d.mesh_optimiser import (
    FieldColour,
    GeometryStudent,
    MeshOptimiser,
    geometry_optimiser,
    is_same_recipe,
    texture_optimiser,
)
from uni3d.scene.camera import Cameras
from uni3d.scene.renderer import RenderOutput
from uni3d.scene_optimiser import SceneOptimiser, StepReport

logger = logging.getLogger(__name__)

STAGES = ("field", "geometry", "texture")


class StagedOptimiser:
    """Runs the stages of `config` that have steps; the field always comes first.

    Args:
        config: the run; `config.steps` is the length of the field stage.
        teacher: frozen; its network receives the LoRA adapters of the fake score, see `close`.
    """

    def __init__(self, config: TextTo3DConfig, teacher: LatentDiffusionTeacher) -> None:
        self.config = config
        self.teacher = teacher
        self.device = teacher.device
        self._lengths: dict[str, int] = {
            "field": config.steps,
            "geometry": config.stages.geometry.steps,
            "texture": config.stages.texture.steps,
        }
        self.scene = SceneOptimiser(config, teacher)
        self.stage = "field"
        self.mesh: MeshOptimiser | None = None
        # what the current mesh stage started from
        self._start: Surface | None = None
        self._before_step: Callable[[], object] | None = None

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
    def current(self) -> SceneOptimiser | MeshOptimiser:
        """The optimiser of the stage that is running."""
        return self.scene if self.mesh is None else self.mesh

    @property
    def generator(self) -> torch.Generator:
        """CPU generator of all that is random."""
        return self.current.generator

    def prepare(self, *, before_step: Callable[[], object] | None = None) -> None:
        """As `SceneOptimiser.prepare`; `before_step` also serves the stages that follow."""
        self._before_step = before_step
        self.scene.prepare(before_step=before_step)

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
        surface = self.surface()
        before = self.current.distiller
        guidance = getattr(self.config.stages, following).guidance
        goes_on = is_same_recipe(self.config, guidance, before)
        if not goes_on:
            before.close()
        self._enter(following, surface)
        logger.info("%s stage from a surface of %d triangles", following, len(surface.faces))
        assert self.mesh is not None
        if goes_on:
            self.mesh.go_on_with(before)
        else:
            self.mesh.prepare(before_step=self._before_step, real_latents=before.real_latents)

    def _enter(self, stage: str, start: Surface) -> None:
        """Build the optimiser of `stage`, which starts from `start` and the field's colours."""
        colour = FieldColour(self.scene.field)
        if stage == "geometry":
            deformable = DeformableSurface.from_mesh(start, self.config.stages.geometry.resolution)
            self.mesh = geometry_optimiser(self.config, deformable, colour, self.teacher)
        else:
            self.mesh = texture_optimiser(self.config, start, colour, self.teacher)
        self.stage, self._start = stage, start

    # ------------------------------------------------------------------ what it looks like

    def render(self, cameras: Cameras, size: int, background: Tensor | float) -> RenderOutput | SurfaceImages:
        """Pictures of what is optimised now, as it is exported: without light."""
        return self.current.render(cameras, size, background)

    def surface(self) -> Surface:
        """The closed surface as it stands."""
        if self.mesh is None:
            return self.scene.surface()
        if isinstance(self.mesh.student, GeometryStudent):
            return self.mesh.student.surface.extract(self.config.mesh.max_triangles)
        assert self._start is not None
        return self._start

    def surface_colour(self, points: Tensor, face: Tensor, barycentric: Tensor) -> Tensor:
        """Colours [K, 3] of points on the surface."""
        return self.scene.surface_colour(points, face, barycentric)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on: nested dicts of tensors and plain data."""
        state: dict[str, Any] = {"stage": self.stage, "current": self.current.state_dict()}
        if self._start is not None:
            state["field"] = self.scene.field.state_dict()
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
            self.scene = SceneOptimiser(self.config, self.teacher)
            self.stage, self.mesh, self._start = stage, None, None
        else:
            self.scene.field.load_state_dict(state["field"])
            start = state["start"]
            vertices, faces = (np.ascontiguousarray(start[name].numpy()) for name in ("vertices", "faces"))
            self._enter(stage, Surface(vertices, faces, float(start["iso_level"]), dict(start["report"])))
        self.current.load_state_dict(state["current"])


def make_optimiser(
    config: TextTo3DConfig, teacher: LatentDiffusionTeacher
) -> SceneOptimiser | StagedOptimiser:
    """The optimiser of a run: of the field alone, or of all its stages."""
    has_mesh_stages = config.stages.geometry.steps + config.stages.texture.steps > 0
    return (StagedOptimiser if has_mesh_stages else SceneOptimiser)(config, teacher)
