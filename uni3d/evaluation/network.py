"""The evaluator's network: an image tower, a small text transformer and a view classifier.

Images and texts meet in one embedding space; nouns, colours and captions are classified by comparing an image
with texts, each with its own temperature. Views have a head of their own.
Legend: B batch, H W pixels, L words, F pooled features, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from uni3d.errors import UsageError
from uni3d.evaluation.image_tower import LITE_PIXEL_MEAN, LITE_PIXEL_STD, EfficientNetTower, TowerShape
from uni3d.evaluation.vocabulary import PADDING

VIEW_WORDS: tuple[str, ...] = ("front", "side", "back", "overhead")
_MAX_LOG_SCALE = 4.0


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of the network; saved beside the weights as config.json."""

    image_size: int
    stage_channels: tuple[int, ...]
    stage_blocks: tuple[int, ...]
    embedding_size: int
    text_width: int
    text_layers: int
    text_heads: int
    max_words: int
    vocabulary_size: int
    dropout: float = 0.0
    input_size: int | None = None
    """Side to which the image tower resamples its images first; None takes them as they are."""
    view_hidden: int = 0
    """Width of the view head's hidden layer; 0 makes the head linear."""
    stem_channels: int = 32
    head_channels: int = 1280
    """Pooled features, the channels of the image tower's last convolution."""
    pixel_mean: tuple[float, ...] = LITE_PIXEL_MEAN
    pixel_std: tuple[float, ...] = LITE_PIXEL_STD
    """What the image tower takes off the channels of its images in [0, 1], and then divides them by."""

    def __post_init__(self) -> None:
        if len(self.stage_channels) != len(self.stage_blocks) or not self.stage_channels:
            raise UsageError(
                f"stage_channels has {len(self.stage_channels)} entries and stage_blocks "
                f"{len(self.stage_blocks)}; expected equally many, at least one"
            )
        if self.text_width % self.text_heads:
            raise UsageError(f"text_width {self.text_width} is not divisible by text_heads {self.text_heads}")

    @property
    def tower_shape(self) -> TowerShape:
        """The image tower's part of the shape."""
        return TowerShape(
            stage_channels=self.stage_channels,
            stage_blocks=self.stage_blocks,
            stem_channels=self.stem_channels,
            head_channels=self.head_channels,
        )


class TextTower(nn.Module):
    """Token indices [B, L] to vectors [B, width]: a small transformer, averaged over the words."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width = config.text_width
        self.words = nn.Embedding(config.vocabulary_size, width, padding_idx=PADDING)
        self.positions = nn.Parameter(0.02 * torch.randn(config.max_words, width))
        layer = nn.TransformerEncoderLayer(
            width,
            config.text_heads,
            4 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, config.text_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.words.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        is_padding = tokens == PADDING
        x = self.words(tokens) + self.positions[: tokens.shape[1]]
        x = self.layers(x, src_key_padding_mask=is_padding)
        keep = (~is_padding).to(x.dtype)[..., None]
        return self.norm(((x * keep).sum(1) / keep.sum(1).clamp_min(1)).float())


def _view_head(num_features: int, hidden: int) -> nn.Module:
    """Features [B, F] to view logits [B, 4]; a hidden layer lets the front depend on what the object is."""
    if not hidden:
        return nn.Linear(num_features, len(VIEW_WORDS))
    return nn.Sequential(nn.Linear(num_features, hidden), nn.GELU(), nn.Linear(hidden, len(VIEW_WORDS)))


def network_tower(config: NetworkConfig) -> EfficientNetTower:
    """The image tower that `config` describes, with random weights."""
    return EfficientNetTower(
        config.tower_shape,
        input_size=config.input_size,
        pixel_mean=config.pixel_mean,
        pixel_std=config.pixel_std,
    )


@dataclass(frozen=True)
class ImageOutput:
    """What the image side computes: pooled features [B, F], unit embedding [B, E], view logits [B, 4]."""

    features: Tensor
    embedding: Tensor
    view_logits: Tensor


class EvaluatorNetwork(nn.Module):
    """Image tower, text tower, view head and one temperature each for nouns, colours and captions."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.image_tower = network_tower(config)
        self.text_tower = TextTower(config)
        self.dropout = nn.Dropout(config.dropout)
        self.image_projection = nn.Linear(self.image_tower.num_features, config.embedding_size)
        self.text_projection = nn.Linear(config.text_width, config.embedding_size)
        self.view_head = _view_head(self.image_tower.num_features, config.view_hidden)
        self.log_scales = nn.ParameterDict(
            {kind: nn.Parameter(torch.tensor(2.3)) for kind in ("noun", "colour", "caption")}
        )

    def images(self, images: Tensor) -> ImageOutput:
        """Images float [B, 3, H, W] in [0, 1]; float32 outputs."""
        features = self.image_tower(images)
        kept = self.dropout(features)
        embedding = functional.normalize(self.image_projection(kept).float(), dim=-1)
        return ImageOutput(features, embedding, self.view_head(kept).float())

    def texts(self, tokens: Tensor) -> Tensor:
        """Unit embeddings float32 [B, E] of token indices [B, L]."""
        return functional.normalize(self.text_projection(self.text_tower(tokens)).float(), dim=-1)

    def similarity(self, image_embedding: Tensor, text_embedding: Tensor, kind: str) -> Tensor:
        """Logits [B, T]: cosine times the temperature of `kind` (noun, colour or caption)."""
        scale = self.log_scales[kind].clamp(max=_MAX_LOG_SCALE).exp()
        return scale * image_embedding @ text_embedding.T
