"""Every setting of `uni3d refine`: a mesh made elsewhere, its geometry or texture optimised towards a prompt.

The groups `geometry` and `texture` are those of the mesh stages of `generate`; only what both programs need
is here as well. `run_settings` says what a refinement is as a text-to-3D run without a field.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from uni3d.config.stages import GeometryConfig, StageGuidanceConfig, StagesConfig, TextureConfig
from uni3d.config.text_to_3d import (
    CamerasConfig,
    CheckpointsConfig,
    DiscriminatorConfig,
    FakeScoreConfig,
    FieldConfig,
    MeshConfig,
    TextTo3DConfig,
)
from uni3d.config.values import (
    MAX_SEED,
    METHOD_NAMES,
    Schedule,
    check_name,
    check_range,
    parse_divergence,
)

Part = Literal["texture", "geometry", "both"]

# The prompt's colours are there from the start, so no far noise is needed; the guidance is that of a field.
_PAINTED = StageGuidanceConfig(guidance_scale=((0.0, 7.5), (1.0, 4.0)))


@dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """One refinement of a mesh."""

    source: Path | None = None
    """The mesh to start from: a .glb, .obj, .ply or .stl file."""
    prompt: str = ""
    """What it should become, for example "a blue wooden chair"."""
    negative_prompt: str = ""
    """What the result should not look like."""
    output: Path | None = None
    """Where the mesh goes (.glb, .obj, .ply, .stl or .usdz); none leaves it in the run directory."""
    part: Part = "texture"
    """What changes: texture, geometry or both; --texture, --geometry and --both are short for it."""
    strength: float = 1.0
    """How far from the input, 0 to 1: the share of the noise, the steps and the fading that is used."""
    runs_folder: Path = Path("outputs")
    """Folder in which each run gets its own directory."""
    seed: int = 0
    """Seed of every random choice."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto takes a GPU if there is one."""
    teacher: str = "embedded"
    """embedded (comes with uni3d), a Stable Diffusion id of the hub, or a directory in that layout."""
    method: str = "uni-instruct"
    """How the teacher guides: uni-instruct, vsd, sds or another name of `uni3d methods`."""
    divergence: str | None = None
    """Divergence of methods that leave it open; none: their own."""
    resume: Path | None = None
    """Run directory of an interrupted run to go on with."""
    overwrite: bool = False
    """Replace an output file that exists."""
    quiet: bool = False
    """No progress on stderr."""
    json: bool = False
    """Print the result as one JSON object instead of a path."""
    colour_resolutions: tuple[int, ...] = (24, 48, 96)
    """Vertices along an edge of each grid of the colours that are learned, coarse to fine."""
    texture_size: int = 1024
    """Side of the colour texture in pixels, a power of two."""
    max_triangles: int = 30_000
    """An optimised geometry is decimated to at most this many triangles; texture mode keeps all."""
    turntable_frames: int = 60
    """Frames of turntable.mp4; 0 writes none."""

    geometry: GeometryConfig = GeometryConfig(steps=150)
    texture: TextureConfig = TextureConfig(
        steps=50,
        learning_rate=((0.0, 0.003), (1.0, 0.001)),
        fading=1.0,
        first_views=6,
        tint_noise=0.97,
        guidance=_PAINTED,
    )
    cameras: CamerasConfig = CamerasConfig()
    fake_score: FakeScoreConfig = FakeScoreConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()

    def __post_init__(self) -> None:
        check_range("strength", self.strength, 0.0, 1.0)
        check_range("seed", self.seed, 0, MAX_SEED)
        check_name("method", self.method.replace("_", "-"), METHOD_NAMES)
        if self.divergence is not None:
            parse_divergence(self.divergence)
        self._mesh_settings()
        FieldConfig(resolutions=self.colour_resolutions)

    def _mesh_settings(self) -> MeshConfig:
        return MeshConfig(
            max_triangles=self.max_triangles,
            texture_size=self.texture_size,
            turntable_frames=self.turntable_frames,
        )

    def run_settings(self) -> TextTo3DConfig:
        """The same as a text-to-3D run: stages that are not asked for have no steps, and the strength is
        spent on steps, noise and fading."""
        geometry = self.geometry if self.part != "texture" else GeometryConfig()
        texture = self.texture if self.part != "geometry" else TextureConfig()
        return TextTo3DConfig(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            seed=self.seed,
            device=self.device,
            teacher=self.teacher,
            method=self.method,
            divergence=self.divergence,
            resume=self.resume,
            quiet=self.quiet,
            cameras=self.cameras,
            field=FieldConfig(resolutions=self.colour_resolutions),
            fake_score=self.fake_score,
            discriminator=self.discriminator,
            stages=StagesConfig(
                geometry=dataclasses.replace(
                    geometry,
                    steps=_steps(geometry.steps, self.strength),
                    guidance=weakened(geometry.guidance, self.strength),
                ),
                texture=dataclasses.replace(
                    texture,
                    steps=_steps(texture.steps, self.strength),
                    fading=self.strength * texture.fading,
                    first_noise=self.strength * texture.first_noise,
                    tint_noise=self.strength * texture.tint_noise,
                    guidance=weakened(texture.guidance, self.strength),
                ),
            ),
            mesh=self._mesh_settings(),
            checkpoints=self.checkpoints,
        )


def _steps(steps: int, strength: float) -> int:
    """The share `strength` of the steps, at least one if there is any strength."""
    return min(steps, max(1, round(strength * steps))) if strength > 0 else 0


def weakened(guidance: StageGuidanceConfig, strength: float) -> StageGuidanceConfig:
    """`guidance` with both ends of the noise range multiplied by `strength`, so that less of the input is
    drowned in noise."""
    if strength in (0.0, 1.0):  # without strength there are no steps either
        return guidance
    return dataclasses.replace(
        guidance,
        noise_max=_scaled(guidance.noise_max, strength),
        noise_min=_scaled(guidance.noise_min, strength),
    )


def _scaled(schedule: Schedule, factor: float) -> Schedule:
    return tuple((position, factor * value) for position, value in schedule)
