"""Every setting of a text-to-3D run as plain dataclasses: the schema of the YAML files and of the flags.

The default values are the `default` quality; `configs/text_to_3d.yaml` repeats them with a comment on every
key. The text under a field is its help on the command line. Values that change during a run are schedules:
`[[0, 8], [1, 4]]` reads "8 at the start, 4 at the end, straight in between", where the first number of each
pair is the fraction of the run that is done. Rooms never import this file; the programs unpack it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from uni3d.config.stages import StagesConfig
from uni3d.config.values import (
    MAX_SEED,
    Schedule,
    check_method,
    check_noise_and_scale,
    check_pair,
    check_range,
    check_schedule,
)
from uni3d.errors import ConfigError

Quality = Literal["default", "draft"]
MeshFormat = Literal["glb", "obj", "ply"]
VRAM_PRESETS = (8, 12, 16, 24, 40)


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """How the teacher's opinion becomes a gradient."""

    guidance_scale: Schedule = ((0.0, 7.5), (1.0, 4.0))
    """Classifier-free guidance of the teacher over the run; 1 means none."""
    noise_max: Schedule = ((0.0, 0.98), (0.8, 0.3))
    """Largest noise level over the run, as a fraction of the teacher's timesteps."""
    noise_min: Schedule = ((0.0, 0.49), (0.8, 0.02))
    """Smallest noise level over the run, as a fraction of the teacher's timesteps."""
    variant: Literal["integral", "exact", "four_term", "detached"] = "integral"
    """Form of uni-instruct: integral needs no network Jacobian; exact and four_term do; detached is as
    published."""
    first_stage_divergence: str | None = None
    """Divergence of the first part of the run, before the run's own takes over; none: one stage."""
    first_stage_share: float = 0.5
    """Share of the run that the first stage takes."""
    adversarial_weight: float = 0.0
    """Weight of the GAN term that uni-instruct adds to the score terms; 0 leaves it out."""
    jac_teacher: bool = True
    """Differentiate the exact forms through the teacher; false is an ablation."""
    jac_fake: bool = True
    """Differentiate the exact forms through the fake score; false is an ablation."""
    perp_neg: float = 0.0
    """How strongly guidance keeps away from the prompt's other views (Perp-Neg); 0 leaves it out."""
    views_per_step: int = 1
    """Views rendered and scored in one step."""
    view_prompts: bool = True
    """Add ', front view' and its like to the prompt according to the camera."""
    camera_token: bool = True
    """Tell a camera-conditioned teacher where the camera stands."""

    def __post_init__(self) -> None:
        check_noise_and_scale(
            "guidance.",
            guidance_scale=self.guidance_scale,
            noise_max=self.noise_max,
            noise_min=self.noise_min,
            span="run",
        )
        check_method(None, self.first_stage_divergence)
        check_range("guidance.first_stage_share", self.first_stage_share, 0.0, 1.0)
        check_range("guidance.adversarial_weight", self.adversarial_weight, 0.0, 1e6)
        check_range("guidance.perp_neg", self.perp_neg, 0.0, 100.0)
        check_range("guidance.views_per_step", self.views_per_step, 1, 64)


@dataclass(frozen=True, kw_only=True)
class CamerasConfig:
    """Where the training cameras stand."""

    elevation_deg: tuple[float, float] = (-10.0, 45.0)
    """Lowest and highest elevation above the horizon, degrees."""
    overhead_deg: tuple[float, float] = (60.0, 85.0)
    """Lowest and highest elevation of overhead views, degrees."""
    overhead_probability: float = 0.1
    """Share of views from overhead."""
    radius: tuple[float, float] = (2.1, 2.7)
    """Nearest and farthest camera distance; the object's longest side is 1."""
    fov_y_deg: float = 40.0
    """Vertical field of view, degrees."""

    def __post_init__(self) -> None:
        check_pair("cameras.elevation_deg", self.elevation_deg, -90.0, 90.0)
        check_pair("cameras.overhead_deg", self.overhead_deg, -90.0, 90.0)
        check_range("cameras.overhead_probability", self.overhead_probability, 0.0, 1.0)
        check_pair("cameras.radius", self.radius, 1.0, 100.0)
        check_range("cameras.fov_y_deg", self.fov_y_deg, 1.0, 120.0)


@dataclass(frozen=True, kw_only=True)
class FieldConfig:
    """The radiance field that is optimised."""

    encoding: Literal["dense", "hash"] = "dense"
    """dense: voxel grids, fast on a CPU. hash: a multiresolution hash grid and a small network, for GPUs."""
    encoding_backend: Literal["auto", "torch", "triton", "tinycudann"] = "auto"
    """Who looks up grids and tables: torch, triton (GPU), tinycudann (GPU, hash only, if installed); auto
    takes triton on a GPU."""
    resolutions: tuple[int, ...] = (24, 48, 96)
    """Vertices along an edge of each dense grid, coarse to fine."""
    half_extent: float = 0.6
    """Half the side of the cube that the field fills; the object's longest side is 1."""
    initial_radius: float = 0.35
    """Radius of the soft ball that the density starts from."""
    initial_colour: Literal["samples", "grey"] = "samples"
    """Colour that all of it starts from: that of the object in a few of the teacher's samples for the prompt,
    which parts that are seldom seen then keep, or grey."""
    density_sharpness: Schedule = ((0.0, 1.0), (0.5, 1.0), (1.0, 6.0))
    """Contrast of the density over the run: above 1 fog clears and edges take less space."""

    def __post_init__(self) -> None:
        if not self.resolutions:
            raise ConfigError("field.resolutions is empty; expected one or more, such as [24, 48, 96]")
        for resolution in self.resolutions:
            check_range("field.resolutions", resolution, 4, 512)
        check_range("field.half_extent", self.half_extent, 0.1, 10.0)
        check_range("field.initial_radius", self.initial_radius, 0.01, self.half_extent)
        check_schedule("field.density_sharpness", self.density_sharpness, 0.1, 100.0)


@dataclass(frozen=True, kw_only=True)
class RendererConfig:
    """Volume rendering during the run."""

    backend: Literal["auto", "torch", "triton", "nerfacc"] = "auto"
    """torch (CPU or GPU), triton (GPU, fixed memory) or nerfacc (GPU, if installed); auto takes triton on a
    GPU."""
    max_samples: int | None = None
    """Most samples that get gradient in a step, which bounds the memory; none: 8 a ray for triton, all for
    others."""
    resolution: Schedule = ((0.0, 64.0), (0.6, 64.0), (0.6, 96.0))
    """Rendered image side in pixels over the run."""
    samples_per_ray: int = 64
    """Samples across the field's cube before empty space is pruned."""
    occupancy_interval: int = 8
    """Steps between two looks at which parts of the cube are empty."""
    background: Literal["random", "greys", "white", "grey"] = "greys"
    """Colour behind the object while training: random colours, random greys, or always the same."""

    def __post_init__(self) -> None:
        check_schedule("renderer.resolution", self.resolution, 8.0, 2048.0)
        if self.max_samples is not None:
            check_range("renderer.max_samples", self.max_samples, 1, 1_000_000_000)
        check_range("renderer.samples_per_ray", self.samples_per_ray, 4, 4096)
        check_range("renderer.occupancy_interval", self.occupancy_interval, 1, 1_000_000)


@dataclass(frozen=True, kw_only=True)
class FakeScoreConfig:
    """The LoRA that learns to denoise the current renders."""

    lora_rank: int = 8
    """Rank of the LoRA on the attention layers of the teacher's UNet."""
    learning_rate: Schedule = ((0.0, 1e-3),)
    """Its AdamW learning rate over the run."""
    weight_decay: float = 0.0
    """Its AdamW weight decay."""
    updates_per_step: int = 1
    """Updates of the fake score for each step of the field."""
    warmup_steps: int = 20
    """Updates of the fake score before the field starts to move; at most a tenth of the run."""
    base: str | None = None
    """A model whose network carries the LoRA, by hub id or directory; none: the teacher's own."""
    camera: Literal["conditioning", "pose"] = "conditioning"
    """How it is told the camera: the five numbers of a camera token, or the 4 x 4 pose."""
    camera_dropout: float = 0.0
    """How often the camera is hidden from a training sample; above 0 its training takes its own pass."""
    view_prompts: bool = True
    """Whether its prompt names the view, as the teacher's does."""
    weighting: Literal["eps", "v", "x0"] = "v"
    """Space in which its squared error is taken: the noise, v, or the clean sample."""
    noise_range: tuple[float, float] | None = None
    """Its own smallest and largest noise level, as fractions of the timesteps; none: those of the field."""

    def __post_init__(self) -> None:
        check_range("fake_score.lora_rank", self.lora_rank, 1, 256)
        check_schedule("fake_score.learning_rate", self.learning_rate, 0.0, 1.0)
        check_range("fake_score.weight_decay", self.weight_decay, 0.0, 10.0)
        check_range("fake_score.camera_dropout", self.camera_dropout, 0.0, 1.0)
        if self.noise_range is not None:
            check_pair("fake_score.noise_range", self.noise_range, 0.0, 1.0)
        check_range("fake_score.updates_per_step", self.updates_per_step, 0, 100)
        check_range("fake_score.warmup_steps", self.warmup_steps, 0, 1_000_000)


@dataclass(frozen=True, kw_only=True)
class NetworksConfig:
    """How the teacher's networks are run."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the teacher: auto takes bfloat16 for a downloaded model on a GPU, else float32."""
    compile: Literal["auto", "off", "compile", "graphs"] = "auto"
    """compile: torch.compile; graphs: captured CUDA graphs, without a compiler; auto: graphs on a GPU;
    off: plain execution, to which the others fall back with a warning."""
    image_size: int | None = None
    """Side in pixels at which the teacher sees the renders; none: the size it was trained on."""
    vae_slicing: bool = False
    """Encode images one by one: less memory for several views."""
    vae_tiling: bool = False
    """Encode large images in tiles: less memory, faint seams."""

    def __post_init__(self) -> None:
        if self.image_size is not None:
            check_range("networks.image_size", self.image_size, 8, 4096)


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """The head that tells teacher samples from renders; its logit is the log ratio."""

    learning_rate: float = 1e-3
    """Its AdamW learning rate."""
    num_real_samples: int = 16
    """Teacher samples drawn for the prompt, shared by the views."""
    sampling_steps: int = 12
    """Denoising steps of each teacher sample."""
    updates_per_step: int = 1
    """Updates of the discriminator for each step of the field."""
    max_log_ratio: float = 5.0
    """Bound on the absolute log ratio that weighs the gradient."""

    def __post_init__(self) -> None:
        check_range("discriminator.learning_rate", self.learning_rate, 0.0, 1.0)
        check_range("discriminator.num_real_samples", self.num_real_samples, 1, 4096)
        check_range("discriminator.sampling_steps", self.sampling_steps, 1, 1000)
        check_range("discriminator.updates_per_step", self.updates_per_step, 0, 100)
        check_range("discriminator.max_log_ratio", self.max_log_ratio, 0.0, 30.0)


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """How the field moves."""

    density_learning_rate: Schedule = ((0.0, 0.08), (0.5, 0.08), (1.0, 0.012))
    """Adam learning rate of the density over the run."""
    colour_learning_rate: Schedule = ((0.0, 0.008), (0.5, 0.008), (1.0, 0.002))
    """Adam learning rate of the colour over the run."""
    max_gradient_norm: float = 10.0
    """Larger gradients of the field are scaled down to this norm; 0 turns it off."""

    def __post_init__(self) -> None:
        check_schedule("optimiser.density_learning_rate", self.density_learning_rate, 0.0, 10.0)
        check_schedule("optimiser.colour_learning_rate", self.colour_learning_rate, 0.0, 10.0)
        check_range("optimiser.max_gradient_norm", self.max_gradient_norm, 0.0, 1e9)


@dataclass(frozen=True, kw_only=True)
class RegularisersConfig:
    """Weights of the terms that keep the field compact and solid."""

    smoothness: Schedule = ((0.0, 3.0), (0.6, 3.0), (1.0, 0.3))
    """Squared differences of density between neighbouring cells."""
    colour_smoothness: Schedule = ((0.0, 30.0),)
    """Squared differences of colour between neighbouring cells."""
    opacity_entropy: Schedule = ((0.0, 0.0), (0.25, 0.0), (1.0, 240.0))
    """Entropy of each pixel's opacity: pushes fog to be either there or not."""
    opacity: Schedule = ((0.0, 0.3),)
    """Mean opacity: removes what no view asks for."""

    def __post_init__(self) -> None:
        check_schedule("regularisers.smoothness", self.smoothness, 0.0, 1e6)
        check_schedule("regularisers.colour_smoothness", self.colour_smoothness, 0.0, 1e6)
        check_schedule("regularisers.opacity_entropy", self.opacity_entropy, 0.0, 1e6)
        check_schedule("regularisers.opacity", self.opacity, 0.0, 1e6)


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """What becomes of the field at the end."""

    resolution: int = 128
    """Cells of the grid on which the surface is extracted, along each side."""
    iso_level: float | None = None
    """Density at the surface; none chooses it so that the mesh matches the renders."""
    max_triangles: int = 30_000
    """The surface is decimated to at most this many triangles."""
    texture_size: int = 1024
    """Side of the colour texture in pixels, a power of two."""
    formats: tuple[MeshFormat, ...] = ("glb",)
    """Files written into the run directory: glb, obj, ply."""
    turntable_frames: int = 60
    """Frames of turntable.mp4; 0 writes none."""

    def __post_init__(self) -> None:
        check_range("mesh.resolution", self.resolution, 16, 1024)
        if self.iso_level is not None:
            check_range("mesh.iso_level", self.iso_level, 1e-6, 1e9)
        check_range("mesh.max_triangles", self.max_triangles, 100, 2_000_000)
        check_range("mesh.texture_size", self.texture_size, 64, 8192)
        if self.texture_size & (self.texture_size - 1):
            raise ConfigError(
                f"mesh.texture_size is {self.texture_size}; expected a power of two such as 512, 1024 or 2048"
            )
        if not self.formats:
            raise ConfigError("mesh.formats is empty; expected at least one of glb, obj, ply")
        check_range("mesh.turntable_frames", self.turntable_frames, 0, 3600)


@dataclass(frozen=True, kw_only=True)
class CheckpointsConfig:
    """How often the run is saved."""

    interval_s: float = 60.0
    """Seconds between checkpoints; an interrupted run loses at most this much."""
    keep: int = 2
    """Newest checkpoints kept; the older one is the fallback if the newest is damaged."""

    def __post_init__(self) -> None:
        check_range("checkpoints.interval_s", self.interval_s, 0.0, 86_400.0)
        check_range("checkpoints.keep", self.keep, 1, 1000)


@dataclass(frozen=True, kw_only=True)
class TextTo3DConfig:
    """One text-to-3D run."""

    prompt: str = ""
    """What to make, for example "a red wooden chair"."""
    negative_prompt: str = ""
    """What the result should not look like."""
    output: Path | None = None
    """Where the mesh goes (.glb, .obj, .ply, .stl or .usdz); none leaves it in the run directory."""
    runs_folder: Path = Path("outputs")
    """Folder in which each run gets its own directory."""
    seed: int = 0
    """Seed of every random choice."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto takes a GPU if there is one."""
    vram: int | None = None
    """8, 12, 16, 24 or 40: fit the run into a GPU of so many gigabytes; none bounds nothing until memory runs
    out."""
    teacher: str = "embedded"
    """embedded (comes with uni3d), a Stable Diffusion id of the hub, or a directory in that layout."""
    teacher_lora: Path | None = None
    """A .safetensors file with a LoRA of the teacher, merged into it."""
    teacher_lora_scale: float = 1.0
    """Strength of that LoRA."""
    quality: Quality = "default"
    """default, or draft for a faster and coarser result; a file and flags override its values."""
    method: str = "uni-instruct"
    """How the teacher guides: uni-instruct, vsd, sds or another name of `uni3d methods`."""
    divergence: str | None = None
    """Divergence of methods that leave it open, or a mixture such as "0.4*forward_kl+0.6*reverse_kl";
    none: their own."""
    steps: int = 400
    """Optimisation steps of the field."""
    particles: int = 1
    """Fields made for the one prompt, which share the fake score and differ; each becomes a mesh."""
    particles_per_step: Literal["all", "one"] = "all"
    """Whether all particles move in a step, or one at random; then `steps` counts for all together."""
    resume: Path | None = None
    """Run directory of an interrupted run to go on with."""
    overwrite: bool = False
    """Replace an output file that exists."""
    quiet: bool = False
    """No progress on stderr."""
    json: bool = False
    """Print the result as one JSON object instead of a path."""

    guidance: GuidanceConfig = GuidanceConfig()
    cameras: CamerasConfig = CamerasConfig()
    field: FieldConfig = FieldConfig()
    renderer: RendererConfig = RendererConfig()
    fake_score: FakeScoreConfig = FakeScoreConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    networks: NetworksConfig = NetworksConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    regularisers: RegularisersConfig = RegularisersConfig()
    stages: StagesConfig = StagesConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 0, MAX_SEED)
        check_range("steps", self.steps, 1, 10_000_000)
        check_range("teacher_lora_scale", self.teacher_lora_scale, -10.0, 10.0)
        check_range("particles", self.particles, 1, 64)
        if self.vram is not None and self.vram not in VRAM_PRESETS:
            expected = ", ".join(map(str, VRAM_PRESETS))
            raise ConfigError(f"vram is {self.vram}; expected the next smaller of {expected} (gigabytes)")
        check_method(self.method, self.divergence)
