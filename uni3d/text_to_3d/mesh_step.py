"""A step of the geometry and of the texture stage at the sizes of a published model, ready to be timed.

Both see the same bumpy ball of about as many triangles as are asked for, coloured by a radiance field at
random weights; the networks and the images are those of the field stage's step beside them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from uni3d.config.stages import GeometryConfig, StageGuidanceConfig, StagesConfig, TextureConfig
from uni3d.config.text_to_3d import TextTo3DConfig
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.mesh.deformable_surface import DeformableSurface
from uni3d.mesh.rasteriser_benchmark import bumpy_sphere
from uni3d.mesh.surface import Surface
from uni3d.scene.radiance_field import RadianceField
from uni3d.text_to_3d.mesh_optimiser import (
    FieldColour,
    MeshOptimiser,
    geometry_optimiser,
    texture_optimiser,
)
from uni3d.text_to_3d.scene_optimiser import choose_backends

MeshStage = Literal["geometry", "texture"]
# Cut by a lattice of 48 cubes along its longest side, the ball below has 91,608 triangles.
TRIANGLES_PER_SQUARED_CUBE = 39.8
# The ball's radius is about 0.7, that of a scene half of its longest side.
BALL_SCALE = 0.7


def build_mesh_step(
    stage: MeshStage,
    config: TextTo3DConfig,
    teacher: LatentDiffusionTeacher,
    *,
    num_triangles: int,
) -> tuple[MeshOptimiser, int]:
    """The optimiser of `stage` under the method, field and image side of `config`, ready to step, and the
    number of its mesh's triangles, about `num_triangles`."""
    guidance = StageGuidanceConfig(resolution=config.renderer.resolution)
    resolution = max(8, round(math.sqrt(num_triangles / TRIANGLES_PER_SQUARED_CUBE)))
    stages = StagesConfig(
        geometry=GeometryConfig(steps=config.steps, resolution=resolution, guidance=guidance),
        texture=TextureConfig(steps=config.steps, smoothness=((0.0, 0.0),), guidance=guidance),
    )
    config = dataclasses.replace(config, stages=stages)
    _, encoding = choose_backends(config, teacher.device)
    field = RadianceField(
        encoding=config.field.encoding,
        encoding_backend=encoding.name,
        resolutions=config.field.resolutions,
        half_extent=config.field.half_extent,
    ).to(teacher.device)
    vertices, faces = bumpy_sphere(num_triangles)
    ball = Surface((BALL_SCALE * vertices).numpy(), faces.numpy(), 0.0)
    deformable = DeformableSurface.from_mesh(ball, resolution).to(teacher.device)
    colour = FieldColour(field)
    cut, topology = deformable()
    if stage == "geometry":
        optimiser = geometry_optimiser(config, deformable, colour, teacher)
    else:
        surface = Surface(cut.detach().cpu().numpy(), topology.faces.cpu().numpy(), 0.0)
        optimiser = texture_optimiser(config, surface, colour, teacher)
    optimiser.prepare()
    return optimiser, len(topology.faces)
