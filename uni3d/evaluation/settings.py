"""Settings of the evaluator's training and of the measurements: plain data, standard library and errors only.

Every field of `EvaluatorSettings` is a key of `configs/evaluator.yaml`. The schedule is driven by steps or by
minutes, whichever is nearer to its end. Values out of range raise ConfigError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from uni3d.errors import ConfigError

_MAX_SEED = 2**63 - 1


def _check_ranges(settings: object, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raise ConfigError for a number outside its range (NaN is), in tuples too, and for an empty tuple."""
    for key, (low, high) in ranges.items():
        value = getattr(settings, key)
        if value == ():
            raise ConfigError(f"{key} is empty; expected at least one number from {low:g} to {high:g}")
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not low <= number <= high:
                raise ConfigError(f"{key} is {str(number)[:40]}; expected a number from {low:g} to {high:g}")


@dataclass(frozen=True)
class EvaluatorSettings:
    """How the evaluator is built and trained."""

    image_size: int = 128
    """Side of the square images, pixels."""
    initial_tower: Path | None = None
    """File of ImageNet weights that the image tower starts from, .safetensors; none starts at random."""
    input_size: int = 192
    """Side to which the image tower enlarges its images, pixels; larger feature maps cost more time."""
    stage_channels: tuple[int, ...] = (16, 24, 48, 88, 120, 208, 352)
    """Channels of the image tower per stage, at most seven; the values of EfficientNet-Lite2."""
    stage_blocks: tuple[int, ...] = (1, 3, 3, 4, 4, 5, 1)
    """Blocks per stage; the values of EfficientNet-Lite2."""
    stem_channels: int = 32
    """Channels before the first stage; the same in every EfficientNet-Lite."""
    head_channels: int = 1280
    """Channels after the last stage, the pooled features; the same in every EfficientNet-Lite."""
    view_hidden: int = 256
    """Width of the hidden layer of the view classifier; 0 makes it linear."""
    embedding_size: int = 256
    """Length of the vectors in which images and texts are compared."""
    text_width: int = 192
    """Channels of the text tower."""
    text_layers: int = 2
    """Transformer layers of the text tower."""
    text_heads: int = 4
    """Attention heads of the text tower."""
    max_words: int = 24
    """Longer texts are cut."""

    steps: int = 6000
    """Length of the run in steps."""
    max_minutes: float | None = 3.5
    """Length of the run in wall-clock minutes, if they pass before the steps do; none sets no limit."""
    batch_size: int = 256
    """Images per step."""
    learning_rate: float = 1.5e-3
    """Peak AdamW learning rate of all but the image tower; falls on a cosine to zero."""
    tower_learning_rate: float = 3e-4
    """The same of the image tower: lower, so that what it learnt on ImageNet lasts."""
    weight_decay: float = 0.05
    """AdamW weight decay of matrices and kernels."""
    warmup_steps: int = 200
    """Steps in which the learning rates rise to their peak."""
    gradient_clip: float = 2.0
    """Larger gradients are scaled down to this norm."""
    ema_decay: float = 0.998
    """Decay per step of the averaged weights, the ones that are saved."""
    label_smoothing: float = 0.1
    """Share of each target spread over the other classes."""
    dropout: float = 0.2
    """Dropout of the pooled image features while training."""
    category_balance: float = 0.75
    """Assets are drawn with a weight of (assets of the same category)^-balance: rare ones are seen too."""
    recolour_probability: float = 0.5
    """Recolour the main material to a random colour word, which then is the colour label."""
    noun_weight: float = 0.5
    """Loss weight: the right noun among all nouns of the data."""
    benchmark_weight: float = 1.0
    """Loss weight: the right category among the benchmark's nouns."""
    colour_weight: float = 1.0
    """Loss weight: the right colour word."""
    view_weight: float = 1.5
    """Loss weight: the right view word."""
    caption_weight: float = 0.3
    """Loss weight: image against full caption, contrastive within the batch."""
    feature_weight: float = 0.5
    """Loss weight: image features near those that `initial_tower` has of the image before it lost detail."""

    num_benchmark_nouns: int = 50
    """Nouns that measurements choose among."""
    save_seconds: float = 60.0
    """Seconds between checkpoints."""
    log_seconds: float = 15.0
    """Seconds between reports of the losses and the accuracy so far."""
    num_workers: int = 8
    """Processes that decode the view shards."""
    limit_views: int | None = None
    """Use only so many views (a quick run); none uses all."""
    seed: int = 0
    """Seed of weights, batches and augmentation."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        _check_ranges(self, _EVALUATOR_RANGES)
        if len(self.stage_channels) != len(self.stage_blocks) or len(self.stage_channels) > 7:
            raise ConfigError(
                f"stage_channels has {len(self.stage_channels)} entries and stage_blocks "
                f"{len(self.stage_blocks)}; expected equally many, at most 7"
            )
        if self.text_width % self.text_heads:
            raise ConfigError(
                f"text_width is {self.text_width}; expected a multiple of text_heads ({self.text_heads})"
            )


_EVALUATOR_RANGES: dict[str, tuple[float, float]] = {
    "image_size": (8, 4096),
    "input_size": (8, 4096),
    "stage_channels": (1, 8192),
    "stage_blocks": (1, 64),
    "stem_channels": (1, 8192),
    "head_channels": (1, 65536),
    "view_hidden": (0, 65536),
    "embedding_size": (1, 65536),
    "text_width": (1, 8192),
    "text_layers": (1, 64),
    "text_heads": (1, 256),
    "max_words": (3, 1000),
    "steps": (1, 1e9),
    "max_minutes": (0.001, 1e6),
    "batch_size": (2, 65536),
    "learning_rate": (0, 10),
    "tower_learning_rate": (0, 10),
    "weight_decay": (0, 10),
    "warmup_steps": (0, 1e9),
    "gradient_clip": (1e-6, 1e9),
    "ema_decay": (0, 1),
    "label_smoothing": (0, 0.99),
    "dropout": (0, 0.99),
    "category_balance": (0, 10),
    "recolour_probability": (0, 1),
    "noun_weight": (0, 1e6),
    "benchmark_weight": (0, 1e6),
    "colour_weight": (0, 1e6),
    "view_weight": (0, 1e6),
    "caption_weight": (0, 1e6),
    "feature_weight": (0, 1e6),
    "num_benchmark_nouns": (1, 1e6),
    "save_seconds": (0, 1e9),
    "log_seconds": (0, 1e9),
    "num_workers": (0, 1024),
    "limit_views": (1, 1e9),
    "seed": (0, _MAX_SEED),
}


@dataclass(frozen=True)
class TeacherQualitySettings:
    """How many held-out captions and seeds a teacher's quality is measured on."""

    num_captions: int = 200
    """Captions, spread evenly over nouns and view words."""
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    """Every caption is sampled once per seed."""
    batch_size: int = 50
    """Captions sampled at once."""
    num_bootstrap: int = 1000
    """Resamples of the captions behind each 95 % interval."""
    caption_seed: int = 0
    """Seed of the choice of captions."""

    def __post_init__(self) -> None:
        _check_ranges(self, _TEACHER_QUALITY_RANGES)


_TEACHER_QUALITY_RANGES: dict[str, tuple[float, float]] = {
    "num_captions": (1, 1e6),
    "seeds": (0, 2**31 - 1),  # Each is multiplied by a million to part the captions' noise.
    "batch_size": (1, 65536),
    "num_bootstrap": (1, 1e6),
    "caption_seed": (0, _MAX_SEED),
}


@dataclass(frozen=True)
class MeshQualitySettings:
    """Views and thresholds with which exported meshes are scored."""

    num_azimuths: int = 12
    """Azimuths per ring of cameras, the first one at the front; a multiple of 4."""
    elevations_deg: tuple[float, ...] = (10.0, 30.0)
    """One ring of cameras per elevation."""
    radius: float = 2.4
    """Camera distance; the object's longest side is 1."""
    fov_y_deg: float = 40.0
    """Vertical field of view, degrees."""
    supersample: int = 2
    """Rays per pixel and side."""
    background: float = 0.7
    """Grey level behind the object."""
    min_coverage: float = 0.01
    """A mesh that covers less than this share of the frame, averaged over the views, is empty."""
    max_fog: float = 0.10
    """Largest share of the field's silhouette that may be half transparent, where a run recorded it."""
    janus_quadrants: int = 3
    """A front recognised in at least this many of the four quadrants is a Janus."""
    num_bootstrap: int = 1000
    """Resamples of the meshes behind each 95 % interval."""

    def __post_init__(self) -> None:
        _check_ranges(self, _MESH_QUALITY_RANGES)
        if self.num_azimuths % 4:
            raise ConfigError(f"num_azimuths is {self.num_azimuths}; expected a multiple of 4, at least 4")


_MESH_QUALITY_RANGES: dict[str, tuple[float, float]] = {
    "num_azimuths": (4, 360),
    "elevations_deg": (-90, 90),
    "radius": (1, 100),
    "fov_y_deg": (1, 120),
    "supersample": (1, 16),
    "background": (0, 1),
    "min_coverage": (0, 1),
    "max_fog": (0, 1),
    "janus_quadrants": (1, 4),
    "num_bootstrap": (1, 1e6),
}
