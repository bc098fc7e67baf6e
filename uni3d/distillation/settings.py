"""Settings of the image programs `train-teacher` and `distill`; values out of range raise ConfigError.

Every field is a key of `configs/train_teacher_*.yaml` or `configs/distill_*.yaml`. Lengths are counted in
images (one step sees `batch` of them), so that a change of the batch size leaves schedules where they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from uni3d.config.values import MAX_SEED, METHOD_NAMES, check_name, check_ranges, parse_divergence
from uni3d.diffusion.edm_config import Body, EDMConfig, preset
from uni3d.errors import ConfigError

Range = tuple[float, float]
_SHARE: Range = (0, 1)
_COUNT: Range = (1, 1e12)
_IMAGES: Range = (0, 1e12)
_WEIGHT: Range = (0, 1e6)
_RATE: Range = (1e-12, 10)
_MINUTES: Range = (0.001, 1e6)

# Methods whose student is an image generator and that need neither prompts nor a reward.
IMAGE_METHODS: tuple[str, ...] = (
    "diff-instruct",
    "dmd",
    "dmd2",
    "sim",
    "sid",
    "sida",
    "f-distill",
    "uni-instruct",
    "uni-instruct-integral",
    "uni-instruct-four-term",
    "uni-instruct-detached",
    "uni-instruct-released",
)
assert set(IMAGE_METHODS) <= set(METHOD_NAMES)


@dataclass(frozen=True)
class ImageDataConfig:
    """The images: where they are and how they are varied."""

    source: str | None = None
    """EDM zip, folder, .npz or .npz.xz, CIFAR-10 as distributed, or shapes:N[:SIZE] for drawn ones."""
    split: Literal["train", "test"] = "train"
    """Which part of CIFAR-10."""
    labels: Literal["auto", "none"] = "auto"
    """auto takes the labels that are there, none leaves them out (an unconditional network)."""
    as_rgb: bool = False
    """Read grey, palette and CMYK pictures as RGB."""
    mirror: bool = False
    """Flip every draw left to right with probability one half."""
    num_workers: int = 4
    """Threads that decode."""
    max_resident_mib: int = 4096
    """Keep all images on the device if they need no more than this; else decode them as they are drawn."""

    def __post_init__(self) -> None:
        check_ranges("data.", self, {"num_workers": (1, 1024), "max_resident_mib": (0, 1e9)})


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of a teacher's network; resolution, colours and classes are those of the images."""

    preset: str | None = None
    """A published network by name, such as cifar10-32x32-cond-vp; the shape below is then not read."""
    body: Body = "ddpm++"
    """ddpm++, ncsn++ or adm."""
    model_channels: int = 128
    """Channels that channel_mult multiplies; a multiple of 32."""
    channel_mult: tuple[int, ...] = (2, 2, 2)
    """One multiplier for each level, finest first; each level halves the side."""
    embedding_mult: int = 4
    """Width of the embedding of noise level and class, in model channels."""
    num_blocks: int = 4
    """Residual blocks of each level of the encoder."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Sides of the feature maps that attend, pixels; 0 is none."""
    dropout: float = 0.13
    """Probability of zeroing an activation, when training."""
    label_dropout: float = 0.0
    """Probability of leaving a sample's class out, when training."""
    sigma_data: float = 0.5
    """Standard deviation of the images, in units of [-1, 1]."""

    def __post_init__(self) -> None:
        if self.preset is not None:
            preset(self.preset)
        check_ranges(
            "network.",
            self,
            {
                "model_channels": (4, 2048),
                "channel_mult": (1, 16),
                "embedding_mult": (1, 16),
                "num_blocks": (1, 16),
                "attention_resolutions": (0, 1024),
                "dropout": _SHARE,
                "label_dropout": _SHARE,
                "sigma_data": (1e-6, 1e6),
            },
        )

    def edm_config(self, *, resolution: int, image_channels: int, label_dim: int) -> EDMConfig:
        """The network for such images. Raises ConfigError where a shape or preset does not fit them."""
        if self.preset is not None:
            known = preset(self.preset)
            found = (resolution, image_channels, label_dim)
            if (known.resolution, known.image_channels, known.label_dim) != found:
                raise ConfigError(
                    f"network.preset {self.preset} is for {known.resolution}x{known.resolution} images with "
                    f"{known.image_channels} channels and {known.label_dim} classes, the data have "
                    f"{resolution}x{resolution}, {image_channels} and {label_dim}; choose another preset, or "
                    f"data.labels"
                )
            values = {**known.as_dict(), "augment_dim": 0}
            return EDMConfig.from_dict(values)
        return EDMConfig(
            body=self.body,
            resolution=resolution,
            image_channels=image_channels,
            label_dim=label_dim,
            model_channels=self.model_channels,
            channel_mult=self.channel_mult,
            embedding_mult=self.embedding_mult,
            num_blocks=self.num_blocks,
            attention_resolutions=tuple(side for side in self.attention_resolutions if side),
            dropout=self.dropout,
            label_dropout=self.label_dropout if label_dim else 0.0,
            sigma_data=self.sigma_data,
        )


@dataclass(frozen=True)
class OptimiserConfig:
    """Adam, whose step is skipped as a whole when a gradient is not finite."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    ramp_images: int = 0
    """Images over which the learning rate rises from zero."""
    final_fraction: float = 1.0
    """The learning rate ends at this fraction of its peak, by a half cosine; 1 keeps it constant."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.999
    """Decay of Adam's second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    gradient_clip: float = 0.0
    """Largest norm of a gradient; 0 leaves it as it is."""

    def __post_init__(self) -> None:
        check_ranges(
            "optimiser.",
            self,
            {
                "learning_rate": _RATE,
                "ramp_images": _IMAGES,
                "final_fraction": _SHARE,
                "beta1": (0, 0.99999),
                "beta2": (0, 0.9999999),
                "epsilon": (1e-20, 1),
                "gradient_clip": _WEIGHT,
            },
        )


@dataclass(frozen=True)
class AverageConfig:
    """The running average (EMA) of the weights, which is what a run publishes."""

    half_life_images: float = 500_000
    """Images after which a weight counts half."""
    ramp_up: float = 0.05
    """The half-life is at most this fraction of the images seen so far; 0 takes it whole from the start."""

    def __post_init__(self) -> None:
        check_ranges("average.", self, {"half_life_images": (1, 1e12), "ramp_up": (0, 1)})


@dataclass(frozen=True)
class RunConfig:
    """Length, machine and records of a run."""

    total_images: int = 200_000_000
    """Images that the trained network sees in all sessions together."""
    batch: int = 512
    """Images per step, over all processes."""
    accumulate: int = 1
    """Split each process's share of the batch into so many parts to save memory."""
    seed: int = 0
    """Seed of everything that is drawn."""
    device: str = "auto"
    """auto takes a CUDA device when there is one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """What the networks' bodies compute in; auto is bf16 on a GPU. Weights and losses are float32."""
    compile: bool = False
    """torch.compile of the networks on a GPU; falls back to plain execution, and says so, when it fails."""
    checkpoint_every_minutes: float = 10.0
    """Minutes between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    grid_every_minutes: float = 10.0
    """Minutes between sample grids; 0 draws none but the last."""
    log_every_s: float = 20.0
    """Seconds between lines of metrics, for which alone the device is waited for."""
    max_minutes: float | None = None
    """Save and stop after so many minutes of this session; null goes on to the end."""

    def __post_init__(self) -> None:
        check_ranges(
            "run.",
            self,
            {
                "total_images": _COUNT,
                "batch": (1, 1 << 24),
                "accumulate": (1, 65536),
                "seed": (0, MAX_SEED),
                "checkpoint_every_minutes": (0, 1e6),
                "keep_checkpoints": (1, 1000),
                "grid_every_minutes": (0, 1e6),
                "log_every_s": (0, 1e9),
                "max_minutes": _MINUTES,
            },
        )
        if self.batch % self.accumulate:
            raise ConfigError(
                f"run.batch is {self.batch}; expected a multiple of run.accumulate ({self.accumulate})"
            )

    @property
    def num_steps(self) -> int:
        """Steps until `total_images` have been seen."""
        return -(-self.total_images // self.batch)


# What may differ between the sessions of one run: it changes no number of an exact continuation.
SESSION_KEYS: Mapping[str, tuple[str, ...]] = {
    "run": (
        "device",
        "compile",
        "checkpoint_every_minutes",
        "keep_checkpoints",
        "grid_every_minutes",
        "log_every_s",
        "max_minutes",
    ),
    "data": ("source", "num_workers", "max_resident_mib"),
}


@dataclass(frozen=True)
class LognormalConfig:
    """EDM's training distribution of noise levels, ln sigma ~ N(mean, std^2)."""

    mean: float = -1.2
    """P_mean."""
    std: float = 1.2
    """P_std."""

    def __post_init__(self) -> None:
        check_ranges("noise.", self, {"mean": (-20, 20), "std": (1e-6, 20)})


@dataclass(frozen=True)
class TeacherTrainingConfig:
    """Everything `uni3d train-teacher` needs besides its output folder."""

    data: ImageDataConfig = field(default_factory=lambda: ImageDataConfig(mirror=True))
    network: NetworkConfig = field(default_factory=NetworkConfig)
    noise: LognormalConfig = field(default_factory=LognormalConfig)
    optimiser: OptimiserConfig = field(default_factory=lambda: OptimiserConfig(ramp_images=10_000_000))
    average: AverageConfig = field(default_factory=AverageConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True)
class SigmaLawConfig:
    """Noise levels at which teacher and fake score are compared."""

    law: Literal["rho", "lognormal"] = "rho"
    """rho: EDM's spacing of timesteps, uniform up to t_max; lognormal: EDM's training distribution."""
    sigma_min: float = 0.002
    """Smallest level of the spacing."""
    sigma_max: float = 80.0
    """Largest level of the spacing, reached at timestep 1."""
    rho: float = 7.0
    """Exponent of the spacing."""
    t_max: float = 0.8
    """Timesteps are uniform on [0, t_max] of the spacing; 0.8 ends at sigma = 24.4."""
    mean: float = -1.2
    """P_mean of the lognormal law."""
    std: float = 1.2
    """P_std of the lognormal law."""
    companions: Literal["generator", "published", "mixture"] = "generator"
    """Levels that fake score and discriminator are trained at: the law above; EDM's lognormal one as
    published, which rarely shows them the high levels that the student asks about; or half of each."""

    def __post_init__(self) -> None:
        check_ranges(
            "noise.",
            self,
            {
                "sigma_min": (1e-6, 1e3),
                "sigma_max": (1e-6, 1e5),
                "rho": (1, 100),
                "t_max": (0.01, 1),
                "mean": (-20, 20),
                "std": (1e-6, 20),
            },
        )
        if self.sigma_min >= self.sigma_max:
            raise ConfigError(
                f"noise.sigma_min is {self.sigma_min:g}; expected less than sigma_max ({self.sigma_max:g})"
            )


@dataclass(frozen=True)
class MethodConfig:
    """Which member of the family distils, and in what stages."""

    method: str = "uni-instruct"
    """diff-instruct, dmd, dmd2, sim, sid, sida, f-distill, uni-instruct, or one of its variants."""
    divergence: str | None = None
    """forward_kl, reverse_kl, jeffreys, js, pearson_chi2, ... or a mixture 0.4*forward_kl+0.6*reverse_kl,
    where the method leaves the choice; null is the method's own."""
    ratio: Literal["attached", "detached"] | None = None
    """Whether uni-instruct differentiates the density ratio (exact) or takes it as a constant (as published,
    biased but cheaper); null is the method's own way."""
    alpha: float | None = None
    """SiD's alpha; null is the method's own, 1.2 the value published for some data sets."""
    adversarial_weight: float | None = None
    """Weight of the GAN term, relative to the mean over elements of the score term; null is the method's."""
    weighting: Literal["l1", "recipe", "expansion"] = "l1"
    """l1: 1 / mean |x0 - D_q| of each sample, as published for images; recipe: the method's own; expansion:
    exact for the divergence weighted by sigma^weighting_power."""
    weighting_power: float = 2.0
    """Exponent k of lambda(sigma) = sigma^k for the weighting expansion."""
    max_log_ratio: float = 5.0
    """The discriminator's logit is clamped to +- this before it becomes a ratio."""
    normalise_ratio: bool = True
    """Divide the ratio by its running mean at that noise level where a divergence weighs it without bound."""
    discriminator: Literal["fake_score", "teacher"] = "fake_score"
    """Whose encoder the discriminator's head reads. The fake score's default costs nothing for generated
    images, which pass through it anyway, and its features learn the task, as published; the teacher's stay
    fixed, which is steadier with few images and costs one more encoder pass."""
    first_stage_divergence: str | None = None
    """Divergence of the first of two stages, for example reverse_kl before forward_kl; null has one stage."""
    first_stage_images: int = 0
    """Images until the second stage, warm-ups included."""
    score_warmup_images: int = 100_000
    """Images at the start during which only fake score and discriminator learn."""
    plain_warmup_images: int = 100_000
    """Images after that with the plain score identity loss (SiD, alpha 1): no ratio, no GAN term."""
    fake_steps: int | None = None
    """Updates of the fake score and the discriminator for one of the student; null is the method's own."""
    regression_pairs: int = 2048
    """Noise-image pairs that the teacher draws at the start, for dmd's regression term only."""
    regression_steps: int = 18
    """Steps of the sampler that draws them."""

    def __post_init__(self) -> None:
        name = self.method.strip().lower().replace("_", "-")
        check_name("method", name, METHOD_NAMES)
        if name not in IMAGE_METHODS:
            raise ConfigError(
                f"method {name!r} needs prompts, guidance or a reward; expected one of "
                f"{', '.join(IMAGE_METHODS)}"
            )
        for text in (self.divergence, self.first_stage_divergence):
            if text is not None:
                parse_divergence(text)
        check_ranges(
            "method.",
            self,
            {
                "alpha": (-10, 10),
                "adversarial_weight": _WEIGHT,
                "weighting_power": (0.01, 10),
                "max_log_ratio": (0.01, 30),
                "first_stage_images": _IMAGES,
                "score_warmup_images": _IMAGES,
                "plain_warmup_images": _IMAGES,
                "fake_steps": (1, 1000),
                "regression_pairs": (1, 1e7),
                "regression_steps": (1, 1000),
            },
        )
        if (self.first_stage_divergence is None) != (self.first_stage_images == 0):
            raise ConfigError(
                "method.first_stage_divergence and method.first_stage_images belong together: give both, or "
                "null and 0"
            )


@dataclass(frozen=True)
class CompanionsConfig:
    """Training of the fake score and of the discriminator."""

    learning_rate: float = 1e-5
    """Learning rate of the fake score."""
    head_learning_rate: float = 3e-4
    """Learning rate of the discriminator's head, which starts from nothing."""
    beta1: float = 0.0
    """Decay of Adam's first moment."""
    beta2: float = 0.999
    """Decay of Adam's second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    gradient_clip: float = 0.0
    """Largest norm of a gradient; 0 leaves it as it is."""
    discriminator_weight: float = 0.05
    """Weight of the discriminator's loss beside the mean denoising error of the fake score."""
    head_channels: int = 64
    """Width of the discriminator's head."""

    def __post_init__(self) -> None:
        check_ranges(
            "companions.",
            self,
            {
                "learning_rate": _RATE,
                "head_learning_rate": _RATE,
                "beta1": (0, 0.99999),
                "beta2": (0, 0.9999999),
                "epsilon": (1e-20, 1),
                "gradient_clip": _WEIGHT,
                "discriminator_weight": (1e-6, 1e6),
                "head_channels": (1, 4096),
            },
        )


@dataclass(frozen=True)
class DistillConfig:
    """Everything `uni3d distill` needs besides its output folder."""

    teacher: str | None = None
    """Folder of the teacher: RUN/teacher of train-teacher, or what import-edm wrote."""
    initial_student: str | None = None
    """Folder of a network of the same shape that the student starts from; null starts from the teacher."""
    sigma_init: float = 2.5
    """The student's one noise level: x = G(sigma_init * z)."""
    dropout: float | None = None
    """Dropout of student and fake score in their training steps; null is the teacher's."""
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    noise: SigmaLawConfig = field(default_factory=SigmaLawConfig)
    optimiser: OptimiserConfig = field(
        default_factory=lambda: OptimiserConfig(learning_rate=1e-5, beta1=0.0, beta2=0.999)
    )
    companions: CompanionsConfig = field(default_factory=CompanionsConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(total_images=300_000_000, batch=256))

    def __post_init__(self) -> None:
        check_ranges("", self, {"sigma_init": (1e-3, 1e3), "dropout": _SHARE})
