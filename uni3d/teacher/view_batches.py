"""Training batches assembled where the views live: gathered, recoloured, composited, mirrored.

All views stay on the device as 8-bit RGBA, and every caption that the loop may need is tokenised beforehand,
so that the training loop neither copies images nor waits for the CPU.
Legend: N views, B batch, H W pixels, K assets, V caption variants, C colour words, L tokens of a prompt,
S ways to end a caption (no view word, or one of the four).
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from uni3d.data.captions import COLOUR_WORDS, sample_caption
from uni3d.data.recolour import can_recolour, recolour
from uni3d.errors import UsageError
from uni3d.scene.camera import Cameras, view_word
from uni3d.teacher.settings import TeacherDataConfig
from uni3d.teacher.tokenizer import token_ids, train_tokenizer, words_of
from uni3d.training.seeds import mix_seeds

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from uni3d.data.view_shards import ViewRecord, Views

logger = logging.getLogger(__name__)

VIEW_WORDS = ("front", "side", "back", "overhead")
# Function words a user may type that no caption template need contain.
_EXTRA_WORDS = ("a", "an", "the", "of", "with", "and", "in", "on", "made", "view", "object", "small", "large")
# Fewer pixels of the main material than this share of the frame are too few to call the object recoloured.
_MIN_RECOLOUR_SHARE = 0.004


@dataclass(frozen=True)
class CaptionTexts:
    """All captions of a training run without view words: assets as they are and with another main colour."""

    asset_of_view: np.ndarray
    """Index of each view's asset, int64 [N]."""
    plain: list[list[str]]
    """[K][V] captions."""
    recoloured: list[list[list[str]]]
    """[K][C][V'] captions whose main colour is the C-th of `colour_words`."""
    colour_words: list[str]

    def all_words(self) -> list[str]:
        """Every word of every caption, the colours and view words: what the tokenizer must know."""
        words = set(words_of([*_EXTRA_WORDS, *VIEW_WORDS, *self.colour_words]))
        for variants, by_colour in zip(self.plain, self.recoloured, strict=True):
            words.update(words_of(variants))
            words.update(words_of(text for texts in by_colour for text in texts))
        return sorted(words)


def collect_captions(records: Sequence[ViewRecord], config: TeacherDataConfig, *, seed: int) -> CaptionTexts:
    """Draw the caption variants of every distinct asset among `records`, repeatably for a seed."""
    colour_words = list(COLOUR_WORDS)
    index_of: dict[str, int] = {}
    representatives: list[ViewRecord] = []
    asset_of_view = np.empty(len(records), dtype=np.int64)
    for index, record in enumerate(records):
        if record.asset_id not in index_of:
            index_of[record.asset_id] = len(representatives)
            representatives.append(record)
        asset_of_view[index] = index_of[record.asset_id]
    plain: list[list[str]] = []
    recoloured: list[list[list[str]]] = []
    rng = np.random.default_rng(seed)
    for record in representatives:
        plain.append([sample_caption(record, rng, view=False) for _ in range(config.caption_variants)])
        others = tuple(record.colours[1:])
        by_colour = []
        for word in colour_words:
            colours = (word, *(other for other in others if other != word))
            variants = range(config.recolour_caption_variants)
            by_colour.append([sample_caption(record, rng, colours=colours, view=False) for _ in variants])
        recoloured.append(by_colour)
    return CaptionTexts(asset_of_view, plain, recoloured, colour_words)


def tokenizer_for(texts: CaptionTexts, *, extra_words: Sequence[str], context_length: int) -> CLIPTokenizer:
    """The tokenizer that knows every word of `texts` and of `extra_words` (synonyms, known nouns)."""
    words = sorted(set(texts.all_words()) | set(words_of(extra_words)))
    tokenizer = train_tokenizer(words, context_length=context_length)
    logger.info("tokenizer: %d known words, %d tokens", len(words), len(tokenizer))
    return tokenizer


@dataclass(frozen=True)
class ViewPool:
    """All views of one training run on one device, with what a batch needs to know of each."""

    images: Tensor
    """uint8 [N, H, W, 4], RGBA with straight alpha."""
    main_masks: Tensor
    """uint8 [N, H, W], coverage of the main material."""
    main_colours: Tensor
    """float32 [N, 3], sRGB in [0, 1]."""
    conditioning: Tensor
    """float32 [N, 5], see Cameras.conditioning."""
    can_recolour: Tensor
    """bool [N]."""
    assets: Tensor
    """int64 [N], row of the caption tables."""
    view_words: Tensor
    """int64 [N], 1 + index into VIEW_WORDS; 0 stands for a caption without a view word."""
    captions: Tensor
    """int16 [K, V, S, L]."""
    recoloured_captions: Tensor
    """int16 [K, C, V', S, L]."""
    colour_targets: Tensor
    """float32 [C, M, 3]: the sRGB colours of each colour word, the last repeated up to M."""
    colour_counts: Tensor
    """int64 [C]: how many of the M are distinct."""
    weights: Tensor
    """float64 [N], sampling weights of the views, summing to 1."""
    is_heldout: Tensor
    """bool [N]: views of the assets on which the autoencoder is measured."""

    def __len__(self) -> int:
        return self.images.shape[0]


@dataclass(frozen=True)
class ViewBatch:
    """What one training step sees."""

    images: Tensor
    """float32 [B, 3, H, W] in [-1, 1]."""
    alpha: Tensor
    """float32 [B, 1, H, W] in [0, 1]."""
    token_ids: Tensor
    """int64 [B, L]."""
    conditioning: Tensor
    """float32 [B, 5]."""

    def crops(self, size: int, generator: torch.Generator) -> ViewBatch:
        """Squares of side `size` around random pixels of the object, as many of each image as would tile it.

        Prompts and cameras stay those of the whole views.
        """
        num, _, height, width = self.images.shape
        each = (height // size) * (width // size)
        device = self.alpha.device
        draw = torch.rand(each, num, height * width, device=device, generator=generator)
        pixel = (draw * (self.alpha.flatten(1) + 1e-3)).argmax(dim=2).flatten()
        jitter = torch.rand(2, num * each, device=device, generator=generator) - 0.5
        shift = (jitter * (size // 2)).long()
        top = (pixel // width - size // 2 + shift[0]).clamp(0, height - size)
        left = (pixel % width - size // 2 + shift[1]).clamp(0, width - size)
        side = torch.arange(size, device=device)
        rows, columns = (top[:, None] + side)[:, :, None], (left[:, None] + side)[:, None, :]
        which = torch.arange(num, device=device).repeat(each)[:, None, None]

        def cut(pixels: Tensor) -> Tensor:
            return pixels.permute(0, 2, 3, 1)[which, rows, columns].permute(0, 3, 1, 2).contiguous()

        return ViewBatch(
            cut(self.images),
            cut(self.alpha),
            self.token_ids.repeat(each, 1),
            self.conditioning.repeat(each, 1),
        )

    def part(self, rows: slice) -> ViewBatch:
        """The batch of these rows."""
        return ViewBatch(self.images[rows], self.alpha[rows], self.token_ids[rows], self.conditioning[rows])


def build_view_pool(
    views: Views,
    texts: CaptionTexts,
    tokenizer: CLIPTokenizer,
    config: TeacherDataConfig,
    *,
    device: torch.device,
) -> ViewPool:
    """Put the views, their captions and sampling weights on `device`. Raises UsageError without views."""
    records = views.records
    if not records:
        raise UsageError("no views to train on; run `uni3d teacher render` first or check data.roles")
    main_masks = torch.as_tensor(views.main_masks)
    # In chunks: the masks of a whole set as floats would not fit.
    share = torch.cat([chunk.float().mean(dim=(1, 2)) for chunk in main_masks.split(4096)]) / 255.0
    cameras = Cameras(
        *(
            torch.tensor([getattr(record, name) for record in records], dtype=torch.float32)
            for name in ("azimuth_deg", "elevation_deg", "radius", "fov_y_deg")
        )
    )
    main_colours = torch.tensor([record.main_colour for record in records], dtype=torch.float32)
    targets, counts = _colour_table(texts.colour_words)
    words = [view_word(record.azimuth_deg, record.elevation_deg) for record in records]
    plain = _token_table(tokenizer, texts.plain)
    recoloured = _token_table(tokenizer, [sum(by_colour, []) for by_colour in texts.recoloured])
    recoloured = recoloured.unflatten(1, (len(texts.colour_words), -1))
    return ViewPool(
        images=torch.as_tensor(views.images).to(device),
        main_masks=main_masks.to(device),
        main_colours=main_colours.to(device),
        conditioning=cameras.conditioning().to(device),
        can_recolour=((share > _MIN_RECOLOUR_SHARE) & can_recolour(main_colours)).to(device),
        assets=torch.from_numpy(texts.asset_of_view).to(device),
        view_words=torch.tensor([1 + VIEW_WORDS.index(word) for word in words], device=device),
        captions=plain.to(device),
        recoloured_captions=recoloured.to(device),
        colour_targets=targets.to(device),
        colour_counts=counts.to(device),
        weights=balanced_weights([record.noun for record in records], config.balance_power).to(device),
        is_heldout=_heldout_views(records, config.heldout_assets).to(device),
    )


def balanced_weights(nouns: Sequence[str], power: float) -> Tensor:
    """Sampling weights float64 [N] proportional to (views of the same noun)^-power, summing to 1."""
    counts = Counter(nouns)
    weights = torch.tensor([counts[noun] ** -power for noun in nouns], dtype=torch.float64)
    return weights / weights.sum()


def _heldout_views(records: Sequence[ViewRecord], num_assets: int) -> Tensor:
    """True for the views of `num_assets` assets, chosen repeatably; never more than a tenth of the assets."""
    assets = sorted({record.asset_id for record in records})
    num_assets = min(num_assets, len(assets) // 10)
    chosen = set(np.random.default_rng(1).permutation(assets)[:num_assets].tolist())
    return torch.tensor([record.asset_id in chosen for record in records])


def _token_table(tokenizer: CLIPTokenizer, texts: list[list[str]]) -> Tensor:
    """[K][V] texts -> int16 [K, V, S, L]: each without and with every view word.

    Tokens never join across a comma, so the endings are tokenised once and set behind each text's own tokens.
    """
    length = tokenizer.model_max_length
    plain = token_ids(tokenizer, [text for variants in texts for text in variants])
    # Column of each text's first end token; ends that would not fit push the text's last words out.
    stops = (plain == tokenizer.eos_token_id).argmax(axis=1)
    rows = np.arange(len(plain))
    tables = [plain]
    for word in VIEW_WORDS:
        ending = token_ids(tokenizer, [f", {word} view"])[0]
        num = int((ending == tokenizer.eos_token_id).argmax()) - 1
        table = plain.copy()
        starts = np.minimum(stops, length - 1 - num)
        for offset in range(num):
            table[rows, starts + offset] = ending[1 + offset]
        table[rows, starts + num] = tokenizer.eos_token_id
        tables.append(table)
    ids = torch.from_numpy(np.stack(tables, axis=1))
    return ids.reshape(len(texts), -1, len(tables), length)


def _colour_table(words: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The sRGB colours of each word as one padded table float32 [C, M, 3] and their counts int64 [C]."""
    width = max(len(COLOUR_WORDS[word]) for word in words)
    rows = []
    for word in words:
        colours = [tuple(float(channel) for channel in colour) for colour in COLOUR_WORDS[word]]
        rows.append(colours + [colours[-1]] * (width - len(colours)))
    counts = torch.tensor([len(COLOUR_WORDS[word]) for word in words])
    return torch.tensor(rows, dtype=torch.float32), counts


class ViewSampler:
    """Draws augmented batches from a pool: batch j of a seed is always the same, wherever training resumes.

    Args:
        pool: the views.
        config: probabilities of the augmentations.
        seed: of this stream of batches.
        is_allowed: bool [N], views that may be drawn; None allows all.
    """

    def __init__(
        self, pool: ViewPool, config: TeacherDataConfig, *, seed: int, is_allowed: Tensor | None = None
    ) -> None:
        self.pool = pool
        self.config = config
        self.seed = seed
        weights = pool.weights if is_allowed is None else pool.weights * is_allowed
        self._cumulative = (weights / weights.sum()).cumsum(0)
        self._generator = torch.Generator(device=pool.images.device)

    @torch.no_grad()
    def batch(self, index: int, size: int) -> ViewBatch:
        """The `index`-th batch (any integer) of `size` views."""
        pool, device = self.pool, self.pool.images.device
        self._generator.manual_seed(mix_seeds(self.seed, index))
        uniform = self._uniform
        # Inverse of the cumulative distribution: unlike multinomial it never waits for the device.
        position = torch.rand(size, device=device, dtype=torch.float64, generator=self._generator)
        views = torch.searchsorted(self._cumulative, position).clamp_max(len(pool) - 1)
        rgba = pool.images[views].permute(0, 3, 1, 2).float() / 255.0
        rgb, alpha = rgba[:, :3], rgba[:, 3:]
        variant = (uniform(size) * pool.captions.shape[1]).long()
        is_named = uniform(size) < self.config.view_word_probability
        ending = torch.where(is_named, pool.view_words[views], 0)
        ids = pool.captions[pool.assets[views], variant, ending]
        # The views are in random order, so recolouring the first few is recolouring random ones.
        num_recoloured = round(self.config.recolour_probability * size)
        if num_recoloured:
            first = views[:num_recoloured]
            repainted, repainted_ids = self._recoloured(first, rgb[:num_recoloured], ending[:num_recoloured])
            is_done = pool.can_recolour[first]
            repainted = torch.where(is_done[:, None, None, None], repainted, rgb[:num_recoloured])
            repainted_ids = torch.where(is_done[:, None], repainted_ids, ids[:num_recoloured])
            rgb = torch.cat([repainted, rgb[num_recoloured:]])
            ids = torch.cat([repainted_ids, ids[num_recoloured:]])
        background = random_backgrounds(
            size,
            rgb.shape[-2],
            rgb.shape[-1],
            grey_probability=self.config.grey_background_probability,
            gradient_probability=self.config.gradient_background_probability,
            uniform=uniform,
        )
        images = rgb * alpha + background * (1 - alpha)
        is_flipped = uniform(size) < self.config.flip_probability
        images = torch.where(is_flipped[:, None, None, None], images.flip(-1), images)
        alpha = torch.where(is_flipped[:, None, None, None], alpha.flip(-1), alpha)
        conditioning = pool.conditioning[views].clone()
        # A mirrored view is the view from the mirrored azimuth: only its sine changes sign.
        conditioning[:, 0] = torch.where(is_flipped, -conditioning[:, 0], conditioning[:, 0])
        return ViewBatch(images.clamp(0, 1) * 2 - 1, alpha, ids.long(), conditioning)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, device=self.pool.images.device, generator=self._generator)

    def _recoloured(self, views: Tensor, rgb: Tensor, ending: Tensor) -> tuple[Tensor, Tensor]:
        """`rgb` [B, 3, H, W] with its main material in a random named colour, and captions that say so."""
        pool, size = self.pool, views.shape[0]
        word = (self._uniform(size) * pool.colour_targets.shape[0]).long()
        shade = (self._uniform(size) * pool.colour_counts[word]).long()
        jitter = torch.randn(size, 3, device=rgb.device, generator=self._generator)
        target = pool.colour_targets[word, shade] + self.config.recolour_jitter * jitter
        target = target.clamp(0, 1)
        mask = pool.main_masks[views][:, None].float() / 255.0
        variant = (self._uniform(size) * pool.recoloured_captions.shape[2]).long()
        ids = pool.recoloured_captions[pool.assets[views], word, variant, ending]
        return recolour(rgb, mask, pool.main_colours[views], target), ids


def random_backgrounds(
    num: int,
    height: int,
    width: int,
    *,
    grey_probability: float,
    gradient_probability: float,
    uniform: Callable[..., Tensor],
) -> Tensor:
    """Plain or linearly graded backgrounds float32 [num, 3, height, width] in [0, 1].

    `uniform(*shape)` draws numbers in [0, 1) on the device of the result.
    """
    grey = 0.45 + 0.55 * uniform(num, 2, 1).expand(-1, -1, 3)
    coloured = uniform(num, 2, 3)
    is_grey = uniform(num, 1, 1) < grey_probability
    ends = torch.where(is_grey, grey, coloured)
    is_graded = uniform(num, 1) < gradient_probability
    start, end = ends[:, 0], torch.where(is_graded, ends[:, 1], ends[:, 0])
    angle = uniform(num, 1, 1) * (2 * math.pi)
    y = torch.linspace(-1, 1, height, device=ends.device)[None, :, None]
    x = torch.linspace(-1, 1, width, device=ends.device)[None, None, :]
    along = 0.5 + 0.5 * (x * angle.cos() + y * angle.sin()) / math.sqrt(2)
    mixed = start[:, :, None, None] + (end - start)[:, :, None, None] * along[:, None]
    return mixed.clamp(0, 1)
