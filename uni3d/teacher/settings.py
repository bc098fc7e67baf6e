"""Settings of the embedded teacher's training, as plain data; values out of range raise ConfigError.

Every field is a key of `configs/teacher.yaml`. Minutes are wall-clock minutes of training, in all sessions
together; a schedule is driven by minutes where `planned_minutes` is set and by steps where it is not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from uni3d.config.values import MAX_SEED, check_ranges
from uni3d.errors import ConfigError

Range = tuple[float, float]
_SHARE: Range = (0, 1)
_COUNT: Range = (1, 1e9)
_WEIGHT: Range = (0, 1e6)
_MINUTES: Range = (0.001, 1e6)


def _check_multiple(key: str, value: int, divisor_key: str, divisor: int) -> None:
    if value % divisor:
        raise ConfigError(f"{key} is {value}; expected a multiple of {divisor_key} ({divisor})")


@dataclass(frozen=True)
class TeacherDataConfig:
    """Which views are trained on and how they are varied. Probabilities are per sample."""

    roles: tuple[str, ...] = ("teacher", "both")
    """Roles of the view records that may be trained on."""
    limit_views: int | None = None
    """Use only so many views (a quick run); None uses all."""
    num_workers: int = 8
    """Threads that decode the view shards."""
    heldout_assets: int = 16
    """Assets kept out of the autoencoder's training; its PSNR is measured on them."""
    balance_power: float = 0.5
    """Views are drawn with a weight of (views of the same noun)^-power, so that rare nouns are seen."""
    recolour_probability: float = 0.4
    """Recolour the main material to a random colour word, and say that word in the caption."""
    recolour_jitter: float = 0.025
    """Standard deviation of the target colour around its word's colours, sRGB in [0, 1]."""
    flip_probability: float = 0.5
    """Mirror the image and negate the azimuth."""
    grey_background_probability: float = 1.0
    """Background a grey in [0.45, 1]; any colour otherwise. Backgrounds fill most of an image, and what a
    short training learns of their colours it does not learn of objects."""
    gradient_background_probability: float = 0.0
    """Background that runs from one colour to another instead of a plain one."""
    caption_variants: int = 12
    """Different captions per asset, drawn before training."""
    recolour_caption_variants: int = 4
    """The same, for every colour word that the asset can be recoloured to."""
    view_word_probability: float = 0.85
    """Captions that end with the view word (", front view")."""

    def __post_init__(self) -> None:
        if not self.roles:
            raise ConfigError("data.roles is empty; expected at least one role, such as teacher")
        check_ranges(
            "data.",
            self,
            {
                "limit_views": _COUNT,
                "num_workers": (0, 1024),
                "heldout_assets": (0, 1e6),
                "balance_power": (0, 10),
                "recolour_probability": _SHARE,
                "recolour_jitter": _SHARE,
                "flip_probability": _SHARE,
                "grey_background_probability": _SHARE,
                "gradient_background_probability": _SHARE,
                "caption_variants": (1, 1000),
                "recolour_caption_variants": (1, 1000),
                "view_word_probability": _SHARE,
            },
        )


@dataclass(frozen=True)
class AutoencoderConfig:
    """AutoencoderKL: its shape and its training."""

    image_size: int = 128
    """Side of the square images, pixels."""
    block_out_channels: tuple[int, ...] = (32, 64, 128, 128)
    """Channels per resolution; each but the last halves the side."""
    layers_per_block: int = 1
    latent_channels: int = 8
    norm_num_groups: int = 16
    batch_size: int = 96
    learning_rate: float = 8e-4
    weight_decay: float = 1e-4
    warmup_steps: int = 200
    planned_minutes: float | None = 5.0
    """Length of the run; None trains `planned_steps` steps, 0 keeps that of `initial_teacher`."""
    planned_steps: int = 4000
    gradient_clip: float = 1.0
    crop_size: int | None = None
    """Side of the squares around object pixels that are trained on first, because most of an image is
    background; None takes half an image's, where the halvings allow it."""
    crop_share: float = 0.6
    """Share of the run on such squares, as many of them as fill the images of a batch; then whole images."""
    foreground_weight: float = 6.0
    """Extra weight of the object's pixels: they are a fifth of the image."""
    chroma_weight: float = 2.0
    """Weight of the error of colour less its grey part; without it colours fade to grey."""
    gradient_weight: float = 0.5
    """Weight of the error of neighbouring pixels' differences (edges)."""
    coarse_weight: float = 0.5
    """Weight of the L1 errors at a half, a quarter and an eighth of the size."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence to a unit Gaussian, summed over a latent."""
    compile: bool = False
    """torch.compile; it seldom pays within a few minutes."""

    def __post_init__(self) -> None:
        check_ranges(
            "autoencoder.",
            self,
            {
                "image_size": (8, 4096),
                "block_out_channels": (1, 8192),
                "layers_per_block": (1, 64),
                "latent_channels": (1, 1024),
                "norm_num_groups": (1, 8192),
                "batch_size": (1, 65536),
                "learning_rate": (0, 10),
                "weight_decay": (0, 10),
                "warmup_steps": (0, 1e9),
                "planned_minutes": (0, 1e6),
                "planned_steps": _COUNT,
                "gradient_clip": (1e-6, 1e9),
                "crop_size": (1, 4096),
                "crop_share": _SHARE,
                "foreground_weight": _WEIGHT,
                "chroma_weight": _WEIGHT,
                "gradient_weight": _WEIGHT,
                "coarse_weight": _WEIGHT,
                "kl_weight": _WEIGHT,
            },
        )
        for channels in self.block_out_channels:
            _check_multiple(
                "autoencoder.block_out_channels", channels, "norm_num_groups", self.norm_num_groups
            )
        halvings = len(self.block_out_channels) - 1
        if self.image_size % 2**halvings:
            raise ConfigError(
                f"autoencoder.image_size is {self.image_size}; expected a multiple of {2**halvings}, because "
                f"{len(self.block_out_channels)} block_out_channels halve it {halvings} times"
            )
        if self.crop_size and (self.image_size % self.crop_size or self.crop_size % 2**halvings):
            raise ConfigError(
                f"autoencoder.crop_size is {self.crop_size}; expected a multiple of {2**halvings} that "
                f"divides image_size ({self.image_size})"
            )

    @property
    def crop_side(self) -> int:
        """Side of the squares, the default worked out."""
        half = self.image_size // 2
        fits = half % 2 ** (len(self.block_out_channels) - 1) == 0
        return self.crop_size or (half if fits else self.image_size)


@dataclass(frozen=True)
class DenoiserConfig:
    """UNet, text encoder and camera token: their shapes and their joint training."""

    block_out_channels: tuple[int, ...] = (96, 192, 352)
    """Channels per resolution; the last level has no attention to the text but in the middle block."""
    attention_heads: tuple[int, ...] = (3, 6, 11)
    """Heads per resolution (32 channels each)."""
    layers_per_block: int = 2
    norm_num_groups: int = 16
    context_dim: int = 256
    """Width of the text encoder and of the context."""
    context_length: int = 32
    """Tokens of a prompt, start and end included; the last one makes room for the camera."""
    text_layers: int = 5
    text_heads: int = 8
    batch_size: int = 512
    """Samples per step, over all processes."""
    accumulate_steps: int = 1
    """Split each process's share of the batch into so many parts to save memory."""
    learning_rate: float = 6e-4
    min_learning_rate_fraction: float = 0.01
    """The learning rate ends at this fraction of its peak."""
    weight_decay: float = 0.01
    warmup_steps: int = 500
    resume_warmup_steps: int = 100
    """Warm-up after a compact resume, whose optimiser starts with empty moments."""
    planned_minutes: float | None = 17.0
    """Length of the run in all sessions together; None trains `planned_steps` steps."""
    planned_steps: int = 20000
    gradient_clip: float = 1.0
    loss_weighting: Literal["v", "min_snr"] = "v"
    """"v": plain v-loss; "min_snr": Hang et al. 2023 with gamma 5."""
    text_dropout: float = 0.10
    """The caption is emptied, for classifier-free guidance."""
    camera_dropout: float = 0.15
    """The camera token is left out, for pipelines that know no camera."""
    ema_decay: float = 0.9995
    """Decay of the averaged weights per step, reached gradually."""
    latent_reuse: int = 4
    """Every encoded view is drawn so many times, with new noise, from a pool of latents."""
    latent_pool: int = 16384
    """Latents in the pool."""
    compile: bool = True
    """torch.compile of the UNet on a GPU; falls back to plain execution, and says so, when it fails."""

    def __post_init__(self) -> None:
        check_ranges(
            "denoiser.",
            self,
            {
                "block_out_channels": (1, 8192),
                "attention_heads": (1, 1024),
                "layers_per_block": (1, 64),
                "norm_num_groups": (1, 8192),
                "context_dim": (1, 8192),
                "context_length": (4, 1024),
                "text_layers": (1, 64),
                "text_heads": (1, 1024),
                "batch_size": (1, 65536),
                "accumulate_steps": (1, 65536),
                "learning_rate": (0, 10),
                "min_learning_rate_fraction": _SHARE,
                "weight_decay": (0, 10),
                "warmup_steps": (0, 1e9),
                "resume_warmup_steps": (0, 1e9),
                "planned_minutes": _MINUTES,
                "planned_steps": _COUNT,
                "gradient_clip": (1e-6, 1e9),
                "text_dropout": _SHARE,
                "camera_dropout": _SHARE,
                "ema_decay": _SHARE,
                "latent_reuse": (1, 1e6),
                "latent_pool": (1, 1e8),
            },
        )
        if len(self.attention_heads) != len(self.block_out_channels):
            raise ConfigError(
                f"denoiser.attention_heads has {len(self.attention_heads)} entries and block_out_channels "
                f"{len(self.block_out_channels)}; expected one for each"
            )
        for channels, heads in zip(self.block_out_channels, self.attention_heads, strict=True):
            _check_multiple("denoiser.block_out_channels", channels, "norm_num_groups", self.norm_num_groups)
            _check_multiple("denoiser.block_out_channels", channels, "attention_heads", heads)
        _check_multiple("denoiser.context_dim", self.context_dim, "text_heads", self.text_heads)
        _check_multiple("denoiser.batch_size", self.batch_size, "accumulate_steps", self.accumulate_steps)


@dataclass(frozen=True)
class TeacherConfig:
    """Everything `uni3d teacher train` needs besides its folders."""

    seed: int = 0
    device: str = "auto"
    """"auto" takes a CUDA device when there is one; bf16 on it, float32 on CPUs."""
    initial_teacher: str | None = None
    """Start from the weights of a teacher: a folder, or "embedded"; None starts from random ones.

    Latent channels may have been added since, and words; other sizes have to be that teacher's.
    """
    log_every_s: float = 20.0
    """Seconds between progress lines."""
    checkpoint_every_minutes: float = 2.0
    grid_every_minutes: float = 4.0
    """Minutes between sample grids; 0 draws none but the last."""
    grid_prompts: tuple[str, ...] = (
        "a red wooden chair",
        "a blue car",
        "a green tree",
        "a brown wooden table",
        "a white bed",
        "a yellow house",
        "a black lamp",
        "a red apple",
        "a grey rock",
        "a blue vase",
        "a brown horse",
        "a pink sofa",
        "a green cactus",
        "a brown barrel",
        "a purple crystal",
        "an orange fish",
    )
    """Prompts of the sample grids, one row each."""
    guidance_scale: float = 5.0
    num_sampling_steps: int = 25
    max_file_mib: float | None = None
    """Split the files of a checkpoint so that none is larger; None writes one file per kind."""
    data: TeacherDataConfig = field(default_factory=TeacherDataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)

    def __post_init__(self) -> None:
        check_ranges(
            "",
            self,
            {
                "seed": (0, MAX_SEED),
                "log_every_s": (0, 1e9),
                "checkpoint_every_minutes": (0, 1e6),
                "grid_every_minutes": (0, 1e6),
                "guidance_scale": (0, 1000),
                "num_sampling_steps": (1, 1000),
                "max_file_mib": (0.001, 1e6),
            },
        )
        if self.autoencoder.planned_minutes == 0 and self.initial_teacher is None:
            raise ConfigError(
                "autoencoder.planned_minutes is 0, which keeps the autoencoder of initial_teacher, and there "
                "is none; set initial_teacher or train longer"
            )
