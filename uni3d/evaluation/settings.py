"""Settings of the evaluator's training and of the measurements, as plain data; standard library only.

Every field of `EvaluatorSettings` is a key of `configs/evaluator.yaml`. The schedule is driven by steps or by
minutes, whichever is nearer to its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EvaluatorSettings:
    """How the evaluator is built and trained."""

    image_size: int = 128
    """Side of the square images, pixels."""
    initial_tower: Path | None = None
    """File of ImageNet weights that the image tower starts from, .safetensors; none starts at random."""
    input_size: int = 192
    """Side to which the image tower enlarges its images, pixels; larger feature maps cost more time."""
    stage_channels: tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    """Channels of the image tower per stage, at most seven; the values of EfficientNet-Lite0."""
    stage_blocks: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    """Blocks per stage; the values of EfficientNet-Lite0."""
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
    category_balance: float = 0.5
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
    fog_low: float = 0.1
    """Opacity from which a pixel belongs to the silhouette."""
    fog_high: float = 0.9
    """Opacity from which a pixel of the silhouette is solid."""
    max_fog: float = 0.10
    """Largest share of silhouette pixels that may be neither empty nor solid."""
    janus_quadrants: int = 3
    """A front recognised in at least this many of the four quadrants is a Janus."""
    num_bootstrap: int = 1000
    """Resamples of the meshes behind each 95 % interval."""
