"""Settings of the stages that optimise a mesh: its geometry, then its texture.

Used by `generate`, where they follow the field, and by `refine`, where they start from a mesh made elsewhere.
Schedules run over their own stage. The default values are not tuned; the published ones
are in `configs/stages_prolificdreamer.yaml` and `configs/stages_threestudio.yaml`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from uni3d.config.values import (
    Schedule,
    check_method,
    check_noise_and_scale,
    check_pair,
    check_range,
    check_schedule,
)
from uni3d.errors import ConfigError

SurfaceView = Literal["colour", "shaded", "normals"]


@dataclass(frozen=True, kw_only=True)
class StageGuidanceConfig:
    """How the teacher guides one stage."""

    method: str | None = None
    """Guidance method of this stage, such as sds; none takes the method of the run."""
    divergence: str | None = None
    """Divergence of this stage; none takes that of the run if the method is the run's, else the method's
    own."""
    guidance_scale: Schedule = ((0.0, 5.0), (1.0, 4.0))
    """Classifier-free guidance of the teacher over the stage; 1 means none."""
    noise_max: Schedule = ((0.0, 0.7), (1.0, 0.3))
    """Largest noise level over the stage, as a fraction of the teacher's timesteps."""
    noise_min: Schedule = ((0.0, 0.02),)
    """Smallest noise level over the stage, as a fraction of the teacher's timesteps."""
    resolution: Schedule = ((0.0, 64.0), (0.5, 64.0), (0.5, 96.0))
    """Rendered image side in pixels over the stage."""
    views_per_step: int = 1
    """Views rendered and scored in one step."""
    fov_y_deg: float | None = None
    """Vertical field of view of this stage, degrees; none: as in the field stage."""
    radius: tuple[float, float] | None = None
    """Nearest and farthest camera distance of this stage; none: as in the field stage."""

    def __post_init__(self) -> None:
        check_method(self.method, self.divergence)
        check_noise_and_scale(
            "",
            guidance_scale=self.guidance_scale,
            noise_max=self.noise_max,
            noise_min=self.noise_min,
            span="stage",
        )
        check_schedule("resolution", self.resolution, 8.0, 2048.0)
        check_range("views_per_step", self.views_per_step, 1, 64)
        if self.fov_y_deg is not None:
            check_range("fov_y_deg", self.fov_y_deg, 1.0, 120.0)
        if self.radius is not None:
            check_pair("radius", self.radius, 1.0, 100.0)


@dataclass(frozen=True, kw_only=True)
class GeometryConfig:
    """The geometry stage: the field's surface, moved."""

    steps: int = 0
    """Optimisation steps of the surface; 0 leaves the stage out."""
    views: tuple[SurfaceView, ...] = ("colour",)
    """What the teacher sees in turn: colour, shaded (the colour under a light) or normals (as a picture)."""
    resolution: int = 28
    """Cubes of the tetrahedral lattice along the object's longest side."""
    distance_learning_rate: Schedule = ((0.0, 0.02), (1.0, 0.005))
    """Adam learning rate of the signed distances, in lattice cubes."""
    shift_learning_rate: Schedule = ((0.0, 0.02), (1.0, 0.005))
    """Adam learning rate of the shifts of the lattice's nodes."""
    normal_consistency: float = 3.0
    """Weight of 1 - cos between the normals of neighbouring triangles, averaged over edges."""
    laplacian: float = 100.0
    """Weight of the distance of each vertex from the middle of its neighbours, scene units."""
    sign_entropy: float = 0.3
    """Weight of the cross entropy between a distance and its neighbour's sign across the surface."""
    guidance: StageGuidanceConfig = StageGuidanceConfig()

    def __post_init__(self) -> None:
        check_range("geometry.steps", self.steps, 0, 10_000_000)
        if not self.views:
            raise ConfigError("geometry.views is empty; expected one or more of colour, shaded, normals")
        check_range("geometry.resolution", self.resolution, 8, 256)
        check_schedule("geometry.distance_learning_rate", self.distance_learning_rate, 0.0, 10.0)
        check_schedule("geometry.shift_learning_rate", self.shift_learning_rate, 0.0, 10.0)
        for name in ("normal_consistency", "laplacian", "sign_entropy"):
            check_range(f"geometry.{name}", getattr(self, name), 0.0, 1e6)


@dataclass(frozen=True, kw_only=True)
class TextureConfig:
    """The texture stage: the colours of a mesh that stays as it is."""

    steps: int = 0
    """Optimisation steps of the colours; 0 leaves the stage out."""
    learning_rate: Schedule = ((0.0, 0.03), (0.5, 0.03), (1.0, 0.004))
    """Adam learning rate of the colours over the stage."""
    smoothness: Schedule = ((0.0, 30.0),)
    """Squared differences of colour between neighbouring cells of the colour field."""
    fading: float = 0.0
    """How far a given mesh's own colours are first taken towards greys about the middle one, 0 to 1."""
    first_views: int = 0
    """Pictures of the mesh by the teacher that the colours start from; 0 leaves the colours as they are."""
    first_noise: float = 0.6
    """Noise from which the teacher paints those pictures, as a fraction of its timesteps."""
    tint_noise: float = 0.0
    """The same of pictures before them, whose middle colour the whole mesh takes; 0 leaves them out."""
    lit: bool = False
    """Render under a changing light, so that the texture holds colours without light."""
    roughness: float = 1.0
    """Roughness of the written material, 0 to 1; seen where the texture is lit."""
    metalness: float = 0.0
    """Metalness of the written material, 0 to 1; seen where the texture is lit."""
    guidance: StageGuidanceConfig = StageGuidanceConfig()

    def __post_init__(self) -> None:
        check_range("texture.steps", self.steps, 0, 10_000_000)
        check_schedule("texture.learning_rate", self.learning_rate, 0.0, 10.0)
        check_schedule("texture.smoothness", self.smoothness, 0.0, 1e6)
        check_range("texture.fading", self.fading, 0.0, 1.0)
        check_range("texture.first_views", self.first_views, 0, 64)
        check_range("texture.first_noise", self.first_noise, 0.0, 1.0)
        check_range("texture.tint_noise", self.tint_noise, 0.0, 1.0)
        check_range("texture.roughness", self.roughness, 0.0, 1.0)
        check_range("texture.metalness", self.metalness, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class StagesConfig:
    """What follows the field in the same run."""

    geometry: GeometryConfig = GeometryConfig()
    texture: TextureConfig = TextureConfig()
