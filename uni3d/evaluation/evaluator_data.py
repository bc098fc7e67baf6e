"""What the evaluator learns from: rendered views with the labels of their records, on the training device.

Labels are tables that the training loop indexes, so that it never waits for the CPU: nouns, benchmark
categories, colour words, view words and tokenised captions for every colour an object can be painted in.
Legend: N views, B batch, A assets, C colour words, K basic colours, M benchmark nouns, U nouns of the data,
V caption variants, L words, H W pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from uni3d.errors import UsageError
from uni3d.evaluation.augmentation import augment
from uni3d.evaluation.benchmark_nouns import (
    BENCHMARK_COLOURS,
    BenchmarkNoun,
    basic_colour,
    category_of,
    record_category,
    record_has_front,
)
from uni3d.evaluation.evaluator import colour_text, noun_text
from uni3d.evaluation.network import VIEW_WORDS
from uni3d.evaluation.settings import EvaluatorSettings
from uni3d.evaluation.vocabulary import Vocabulary
from uni3d.scene.camera import view_word

if TYPE_CHECKING:
    from uni3d.data.view_shards import ViewRecord, Views

TRAINING_ROLES = frozenset({"evaluator", "both"})
UNSEEN_ROLE = "neither"
# Less of the silhouette than this in the main material, and a recoloured object keeps its old main colour.
MIN_RECOLOUR_SHARE = 0.45
_CAPTION_VARIANTS = 3
_FIRST_COLOUR_SHARE = 0.75


def select_views(views: Views, roles: Iterable[str]) -> Views:
    """The views of `views` whose records have one of `roles`; images are copied, records shared."""
    from uni3d.data.view_shards import Views

    wanted = frozenset(roles)
    keep = [index for index, record in enumerate(views.records) if record.role in wanted]
    records = [views.records[index] for index in keep]
    return Views(images=views.images[keep], main_masks=views.main_masks[keep], records=records)


def colour_targets(colours: Sequence[str], words: Sequence[str]) -> list[float]:
    """Soft label over `words`: most of it on the first of `colours` among them, the rest on the others."""
    known = [words.index(colour) for colour in dict.fromkeys(colours) if colour in words]
    target = [0.0] * len(words)
    for rank, index in enumerate(known):
        others = (1 - _FIRST_COLOUR_SHARE) / max(len(known) - 1, 1)
        target[index] = (_FIRST_COLOUR_SHARE if len(known) > 1 else 1.0) if rank == 0 else others
    return target


def basic_colours(colours: Sequence[str]) -> list[str]:
    """The basic colours of a record's colour words in order; none if the first, dominant word has none."""
    basics = [basic_colour(word) for word in colours]
    return [] if not basics or basics[0] is None else [basic for basic in basics if basic is not None]


def compatible_nouns(nouns: Sequence[str]) -> np.ndarray:
    """Bool [U, U]: two different nouns fit one object: same category, or one has all words of the other."""
    categories = [category_of(noun) for noun in nouns]
    word_sets = [frozenset(noun.split()) for noun in nouns]
    result = np.zeros((len(nouns), len(nouns)), dtype=bool)
    for i in range(len(nouns)):
        for j in range(i):
            same = categories[i] is not None and categories[i] == categories[j]
            nested = word_sets[i] <= word_sets[j] or word_sets[j] <= word_sets[i]
            result[i, j] = result[j, i] = same or nested
    return result


@dataclass(frozen=True)
class LabelWords:
    """The classes of the training losses, as text."""

    nouns: list[str]
    """U nouns of the training records and of the benchmark."""
    benchmark: list[BenchmarkNoun]
    """M categories."""
    colour_words: Mapping[str, Sequence[Sequence[float]]]
    """C colour words and the sRGB colours that each stands for."""


@dataclass(frozen=True)
class EvaluatorBatch:
    """What one training step sees; see `EvaluatorPool` for the label conventions."""

    images: Tensor
    """float32 [B, 3, H, W] in [0, 1]."""
    crisp: Tensor
    """The same before they lost detail and were relit."""
    noun: Tensor
    benchmark: Tensor
    colour: Tensor
    basic: Tensor
    view: Tensor
    front: Tensor
    caption: Tensor
    caption_key: Tensor
    """int64 [B]; captions with the same key describe the same noun in the same colour."""


@dataclass(frozen=True)
class EvaluatorPool:
    """Views and labels on one device."""

    images: Tensor
    """uint8 [N, H, W, 4] straight-alpha RGBA."""
    main_masks: Tensor
    """uint8 [N, H, W] coverage of the main material."""
    main_colours: Tensor
    """float32 [N, 3] sRGB."""
    can_recolour: Tensor
    """bool [N]."""
    asset: Tensor
    """int64 [N] index of the asset."""
    noun: Tensor
    """int64 [N] index among the nouns."""
    benchmark: Tensor
    """int64 [N] index among the benchmark's nouns, -1 for none."""
    colour: Tensor
    """float32 [N, C] soft label over colour words, all zero where none is known."""
    basic: Tensor
    """float32 [N, K] the same over basic colours."""
    view: Tensor
    """int64 [N] index in VIEW_WORDS."""
    front: Tensor
    """int64 [N]: 1 the object has a front, 0 it has none, -1 not known."""
    captions: Tensor
    """int16 [A, 1 + C, V, L] tokens; entry 0 has the asset's own colours, 1 + c is painted in colour c."""
    view_tokens: Tensor
    """int16 [4] the token of each view word."""
    word_of_basic: Tensor
    """float32 [C, K] one-hot basic colour of each colour word, zero where it has none."""
    colour_table: Tensor
    """float32 [C, T, 3] sRGB colours of each word, repeated up to T."""
    cumulative: Tensor
    """float64 [N] cumulative sampling weights."""

    def __len__(self) -> int:
        return self.images.shape[0]


CaptionFn = Callable[["ViewRecord", np.random.Generator, "tuple[str, ...] | None"], str]


def label_words(
    records: Sequence[ViewRecord],
    benchmark: list[BenchmarkNoun],
    colour_words: Mapping[str, Sequence[Sequence[float]]],
) -> LabelWords:
    """Collect the classes of the training records and the benchmark."""
    nouns = sorted({record.noun for record in records} | {noun.name for noun in benchmark})
    return LabelWords(nouns, benchmark, colour_words)


def collect_captions(
    records: Sequence[ViewRecord], words: LabelWords, caption: CaptionFn, *, seed: int
) -> tuple[list[str], list[list[list[str]]]]:
    """Asset ids [A] and captions [A][1 + C][V] without view words, repeatable for a seed."""
    representatives = {record.asset_id: record for record in records}
    rng = np.random.default_rng(seed)
    texts: list[list[list[str]]] = []
    for record in representatives.values():
        colourings: list[tuple[str, ...] | None] = [None, *((word,) for word in words.colour_words)]
        texts.append(
            [[caption(record, rng, colours) for _ in range(_CAPTION_VARIANTS)] for colours in colourings]
        )
    return list(representatives), texts


def build_vocabulary(words: LabelWords, captions: list[list[list[str]]]) -> Vocabulary:
    """Every word of the captions, nouns, colours, view words and scoring templates."""
    texts = [text for asset in captions for variants in asset for text in variants]
    texts += [noun_text(noun) for noun in words.nouns] + [colour_text(word) for word in words.colour_words]
    texts += [colour_text(colour) for colour in BENCHMARK_COLOURS] + [f"{view} view" for view in VIEW_WORDS]
    return Vocabulary.from_texts(texts)


def build_pool(
    views: Views,
    words: LabelWords,
    assets: list[str],
    captions: list[list[list[str]]],
    vocabulary: Vocabulary,
    settings: EvaluatorSettings,
    *,
    device: torch.device,
) -> EvaluatorPool:
    """Put views and labels on `device`. Images of another size than the settings' raise UsageError."""
    records = views.records
    images = torch.as_tensor(views.images)
    if images.shape[1] != settings.image_size or images.shape[2] != settings.image_size:
        raise UsageError(
            f"views have {images.shape[1]} x {images.shape[2]} pixels, image_size is {settings.image_size}; "
            f"render views of that size or change image_size"
        )
    masks = torch.as_tensor(views.main_masks)
    main_colours = torch.tensor([record.main_colour for record in records], dtype=torch.float32)
    noun_index = {noun: index for index, noun in enumerate(words.nouns)}
    benchmark_index = {noun.name: index for index, noun in enumerate(words.benchmark)}
    asset_index = {asset: index for index, asset in enumerate(assets)}
    colour_names = list(words.colour_words)
    fronts = {True: 1, False: 0, None: -1}
    labels = {
        "asset": [asset_index[record.asset_id] for record in records],
        "noun": [noun_index[record.noun] for record in records],
        "benchmark": [benchmark_index.get(record_category(record) or "", -1) for record in records],
        "view": [VIEW_WORDS.index(view_word(record.azimuth_deg, record.elevation_deg)) for record in records],
        "front": [fronts[record_has_front(record)] for record in records],
    }
    flat = [text for asset in captions for variants in asset for text in variants]
    tokens = vocabulary.encode(flat, settings.max_words - 2).to(torch.int16)
    weights = sampling_weights(records, settings.category_balance)
    basics = [basic_colours(record.colours) for record in records]
    return EvaluatorPool(
        images=images.to(device),
        main_masks=masks.to(device),
        main_colours=main_colours.to(device),
        can_recolour=recolourable(images, masks, main_colours).to(device),
        colour=torch.tensor(
            [colour_targets(record.colours, colour_names) for record in records], device=device
        ),
        basic=torch.tensor([colour_targets(colours, BENCHMARK_COLOURS) for colours in basics], device=device),
        captions=tokens.view(len(assets), 1 + len(colour_names), _CAPTION_VARIANTS, -1).to(device),
        view_tokens=torch.tensor(
            [vocabulary.index(view) for view in VIEW_WORDS], dtype=torch.int16, device=device
        ),
        word_of_basic=torch.tensor(
            [colour_targets(basic_colours([word]), BENCHMARK_COLOURS) for word in colour_names], device=device
        ),
        colour_table=_colour_table(words.colour_words).to(device),
        cumulative=(weights / weights.sum()).cumsum(0).to(device),
        **{name: torch.tensor(values, device=device) for name, values in labels.items()},
    )


def recolourable(images: Tensor, masks: Tensor, main_colours: Tensor) -> Tensor:
    """Bool [N]: the main material can be painted, and fills enough of the silhouette to decide its colour."""
    from uni3d.data.recolour import can_recolour

    alpha = torch.cat([chunk[..., 3].float().sum(dim=(1, 2)) for chunk in images.split(2048)])
    main = torch.cat([chunk.float().sum(dim=(1, 2)) for chunk in masks.split(2048)])
    return can_recolour(main_colours) & (main > MIN_RECOLOUR_SHARE * alpha.clamp_min(1))


def sampling_weights(records: Sequence[ViewRecord], balance: float) -> Tensor:
    """Weight float64 [N] of each view: (assets of its category)^-balance, shared among the asset's views."""
    views_of_asset = Counter(record.asset_id for record in records)
    group = {record.asset_id: record_category(record) or record.noun for record in records}
    assets_of_group = Counter(group.values())
    return torch.tensor(
        [assets_of_group[group[r.asset_id]] ** -balance / views_of_asset[r.asset_id] for r in records],
        dtype=torch.float64,
    )


def _colour_table(colour_words: Mapping[str, Sequence[Sequence[float]]]) -> Tensor:
    longest = max(map(len, colour_words.values()))
    rows = [[colours[index % len(colours)] for index in range(longest)] for colours in colour_words.values()]
    return torch.tensor(rows, dtype=torch.float32)


RecolourFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def draw_batch(
    pool: EvaluatorPool,
    size: int,
    generator: torch.Generator,
    recolour: RecolourFn,
    *,
    recolour_probability: float,
) -> EvaluatorBatch:
    """Draw, recolour and augment `size` views; `generator` lives on the pool's device."""
    device = pool.images.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    picks = torch.rand(size, generator=generator, device=device, dtype=torch.float64)
    views = torch.searchsorted(pool.cumulative, picks).clamp_max(len(pool) - 1)
    rgba = pool.images[views].permute(0, 3, 1, 2).float() / 255
    num_words, num_shades = pool.colour_table.shape[:2]
    word = (uniform(size) * num_words).long().clamp_max(num_words - 1)
    shade = (uniform(size) * num_shades).long().clamp_max(num_shades - 1)
    painted = pool.can_recolour[views] & (uniform(size) < recolour_probability)
    mask = pool.main_masks[views][:, None].float() / 255
    repainted = recolour(rgba[:, :3], mask, pool.main_colours[views], pool.colour_table[word, shade])
    rgb = torch.where(painted[:, None, None, None], repainted, rgba[:, :3]).clamp(0, 1)
    one_hot = torch.nn.functional.one_hot(word, num_words).float()
    colouring = torch.where(painted, word + 1, 0)
    variant = (uniform(size) * pool.captions.shape[2]).long().clamp_max(pool.captions.shape[2] - 1)
    augmented = augment(torch.cat([rgb, rgba[:, 3:]], dim=1), generator)
    return EvaluatorBatch(
        images=augmented.images,
        crisp=augmented.crisp,
        noun=pool.noun[views],
        benchmark=pool.benchmark[views],
        colour=torch.where(painted[:, None], one_hot, pool.colour[views]),
        basic=torch.where(painted[:, None], pool.word_of_basic[word], pool.basic[views]),
        view=pool.view[views],
        front=pool.front[views],
        caption=_with_view_word(
            pool, pool.captions[pool.asset[views], colouring, variant], views, uniform(size)
        ),
        caption_key=pool.noun[views] * (num_words + 1)
        + torch.where(painted, word, pool.colour[views].argmax(1)),
    )


def _with_view_word(pool: EvaluatorPool, captions: Tensor, views: Tensor, chance: Tensor) -> Tensor:
    """Append the view word to half of the captions [B, L], behind their last word -> int64 [B, L + 1]."""
    length = (captions != 0).sum(1)
    padded = torch.cat([captions, torch.zeros_like(captions[:, :1])], dim=1).long()
    word = torch.where(chance < 0.5, pool.view_tokens[pool.view[views]].long(), 0)
    return padded.scatter(1, length[:, None], word[:, None])
