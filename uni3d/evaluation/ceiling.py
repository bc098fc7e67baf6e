"""What the evaluator itself gets right on renders of assets that no network was trained on.

No measurement made with it can be trusted beyond this: a perfect image would score about these figures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from uni3d.evaluation.augmentation import on_background
from uni3d.evaluation.benchmark_nouns import BENCHMARK_COLOURS, record_category
from uni3d.evaluation.evaluator import Evaluator
from uni3d.evaluation.evaluator_data import basic_colours, recolourable
from uni3d.evaluation.network import VIEW_WORDS, ImageOutput
from uni3d.evaluation.smoothing import lossy_generator
from uni3d.evaluation.statistics import Rate, bootstrap_rate, frechet_distance, macro_rate
from uni3d.evaluation.verdicts import front_quadrants, right_view
from uni3d.scene.camera import view_word

if TYPE_CHECKING:
    from uni3d.data.view_shards import ViewRecord, Views

_SECTOR_CENTRE_DEG = 20.0
_CHUNK = 512
_STRESS_BATCH = 64


def grey_composites(images: np.ndarray, *, seed: int = 0) -> Tensor:
    """RGBA uint8 [N, H, W, 4] on plain greys between 0.35 and 0.95, float32 [N, 3, H, W] in [0, 1]."""
    rgba = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255
    generator = torch.Generator().manual_seed(seed)
    grey = 0.35 + 0.6 * torch.rand(len(rgba), 1, 1, 1, generator=generator)
    return on_background(rgba, grey.expand(-1, 3, -1, -1))


def measure_ceiling(
    evaluator: Evaluator,
    views: Views,
    *,
    max_views: int | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy on `views` of unseen assets among the benchmark's nouns, as plain JSON values.

    Images are averaged per asset before the bootstrap resamples assets. `noun` averages the images of an
    asset, `noun_macro` those of a noun (captions ask for all nouns alike), and `noun_by_object` averages the
    probabilities over an asset's views first. `noun_stress` and `noun_stress_macro` ask after the fixed loss
    of detail of `lossy_generator`: generated images are as smooth. `colour_natural` uses the assets' own
    dominant colour word, `colour_recoloured` paints the main material in random colours. `view` follows
    `right_view`; `view_with_front` and `view_strict` use the four-way choice for objects with a front and for
    all objects.
    `max_views` measures a random subset (for progress reports).
    """
    nouns = evaluator.noun_names
    records = list(views.records)
    keep = [index for index, record in enumerate(records) if record_category(record) in nouns]
    if max_views is not None and len(keep) > max_views:
        order = np.random.default_rng(seed).permutation(len(keep))[:max_views]
        keep = sorted(keep[index] for index in order)
    records = [records[index] for index in keep]
    categories = [record_category(record) or "" for record in records]
    if not records:
        return {"num_images": 0, "num_assets": 0, "noun": None, "noun_macro": None}
    parts: list[ImageOutput] = []
    stressed: list[Tensor] = []
    painted_right: list[tuple[int, float]] = []
    for start in range(0, len(keep), _CHUNK):
        chosen = keep[start : start + _CHUNK]
        images = np.asarray(views.images[chosen])
        composites = grey_composites(images, seed=seed + start)
        parts.append(evaluator.encode(composites))
        pieces = composites.to(evaluator.device).split(_STRESS_BATCH)
        smooth = torch.cat([lossy_generator(piece) for piece in pieces])
        stressed.append(evaluator.noun_probabilities(evaluator.encode(smooth), nouns))
        masks = np.asarray(views.main_masks[chosen])
        painted_right += [
            (start + index, value)
            for index, value in _recoloured_accuracy(
                evaluator, images, masks, records[start : start + _CHUNK], seed=seed + start
            )
        ]
    output = ImageOutput(
        *(
            torch.cat([getattr(part, name) for part in parts])
            for name in ("features", "embedding", "view_logits")
        )
    )
    noun_probabilities = evaluator.noun_probabilities(output, nouns)
    asked_noun = torch.tensor([nouns.index(category) for category in categories])
    noun_right = (noun_probabilities.argmax(1) == asked_noun).float()
    stress_right = (torch.cat(stressed).argmax(1) == asked_noun).float()
    colour = _natural_colour_accuracy(evaluator, output, records)
    view_probabilities = evaluator.view_probabilities(output)
    asked_view = [view_word(record.azimuth_deg, record.elevation_deg) for record in records]
    fronts = {noun.name: noun.has_front for noun in evaluator.benchmark_nouns}
    with_front = [fronts[category] for category in categories]
    strict = right_view(view_probabilities, asked_view, [True] * len(records)).float()
    assets = [record.asset_id for record in records]

    def rate(values: Sequence[tuple[int, float]]) -> dict[str, Any] | None:
        return _as_dict(_rate_over_assets(values, assets, num_bootstrap))

    def where(values: Tensor, chosen: Sequence[bool]) -> list[tuple[int, float]]:
        return [(index, float(value)) for index, value in enumerate(values) if chosen[index]]

    everything = [True] * len(records)
    central = [front and _is_central(record) for front, record in zip(with_front, records, strict=True)]
    return {
        "num_images": len(records),
        "num_assets": len(set(assets)),
        "num_nouns": len(set(categories)),
        "noun": rate(where(noun_right, everything)),
        "noun_by_object": _by_object(noun_probabilities, asked_noun, assets, num_bootstrap),
        "noun_macro": macro_rate(noun_right, categories, num_bootstrap),
        "noun_stress": rate(where(stress_right, everything)),
        "noun_stress_macro": macro_rate(stress_right, categories, num_bootstrap),
        "colour_natural": rate(colour),
        "colour_recoloured": rate(painted_right),
        "view": rate(where(right_view(view_probabilities, asked_view, with_front).float(), everything)),
        "view_with_front": rate(where(strict, with_front)),
        "view_with_front_central": rate(where(strict, central)),
        "view_strict": rate(where(strict, everything)),
        "janus_false_alarm": _janus_false_alarms(view_probabilities, records, with_front, num_bootstrap),
        "fd_evaluator_floor": _half_distance(output.features, assets) if max_views is None else None,
        "per_noun": _per_noun(noun_right, categories, assets, noun_probabilities, nouns),
        "view_confusion": _view_confusion(view_probabilities, asked_view, with_front),
    }


def _as_dict(rate: Rate | None) -> dict[str, Any] | None:
    return None if rate is None else rate.as_dict()


def _rate_over_assets(
    values: Sequence[tuple[int, float]], assets: Sequence[str], num_bootstrap: int
) -> Rate | None:
    by_asset: dict[str, list[float]] = defaultdict(list)
    for index, value in values:
        by_asset[assets[index]].append(value)
    means = [float(np.mean(entries)) for entries in by_asset.values()]
    return bootstrap_rate(means, num_resamples=num_bootstrap)


def _by_object(
    probabilities: Tensor, asked: Tensor, assets: Sequence[str], num_bootstrap: int
) -> dict[str, Any] | None:
    right = []
    names = np.asarray(assets)
    for asset in dict.fromkeys(assets):
        rows = torch.from_numpy(np.flatnonzero(names == asset))
        right.append(float(probabilities[rows].mean(0).argmax() == asked[rows[0]]))
    return _as_dict(bootstrap_rate(right, num_resamples=num_bootstrap))


def _natural_colour_accuracy(
    evaluator: Evaluator, output: ImageOutput, records: Sequence[ViewRecord]
) -> list[tuple[int, float]]:
    predicted = evaluator.colour_probabilities(output, BENCHMARK_COLOURS).argmax(1).tolist()
    result = []
    for index, record in enumerate(records):
        basics = basic_colours(record.colours)
        if basics:
            result.append((index, float(BENCHMARK_COLOURS[predicted[index]] == basics[0])))
    return result


def _recoloured_accuracy(
    evaluator: Evaluator, images: np.ndarray, masks: np.ndarray, records: Sequence[ViewRecord], *, seed: int
) -> list[tuple[int, float]]:
    """Paint each image whose main material is large enough in one random basic colour and ask for it."""
    from uni3d.data.captions import COLOUR_WORDS
    from uni3d.data.recolour import recolour

    colours = [colour for colour in BENCHMARK_COLOURS if colour in COLOUR_WORDS]
    main_colours = torch.tensor([record.main_colour for record in records], dtype=torch.float32)
    can = recolourable(torch.as_tensor(images), torch.as_tensor(masks), main_colours).numpy()
    rows = np.flatnonzero(can)
    if len(rows) == 0 or not colours:
        return []
    rng = np.random.default_rng(seed)
    words = rng.integers(0, len(colours), size=len(rows))
    shades = [COLOUR_WORDS[colours[word]] for word in words]
    target = torch.tensor([entry[rng.integers(0, len(entry))] for entry in shades], dtype=torch.float32)
    rgba = torch.as_tensor(images[rows]).permute(0, 3, 1, 2).float() / 255
    mask = torch.as_tensor(masks[rows])[:, None].float() / 255
    painted = recolour(rgba[:, :3], mask, main_colours[torch.from_numpy(rows)], target).clamp(0, 1)
    grey = torch.from_numpy(0.35 + 0.6 * rng.random((len(rows), 1, 1, 1))).float().expand(-1, 3, -1, -1)
    composite = on_background(torch.cat([painted, rgba[:, 3:]], dim=1), grey)
    predicted = evaluator.colour_probabilities(composite, BENCHMARK_COLOURS).argmax(1).tolist()
    return [
        (int(row), float(BENCHMARK_COLOURS[guess] == colours[word]))
        for row, guess, word in zip(rows, predicted, words, strict=True)
    ]


def _is_central(record: ViewRecord) -> bool:
    """Within 20 degrees of the middle of its view word's sector."""
    if view_word(record.azimuth_deg, record.elevation_deg) == "overhead":
        return True
    return abs((record.azimuth_deg + 45.0) % 90.0 - 45.0) <= _SECTOR_CENTRE_DEG


def _janus_false_alarms(
    probabilities: Tensor, records: Sequence[ViewRecord], with_front: Sequence[bool], num_bootstrap: int
) -> dict[str, Any] | None:
    """Share of real objects with a front whose front is recognised in three or more quadrants."""
    rows: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        if with_front[index] and view_word(record.azimuth_deg, record.elevation_deg) != "overhead":
            rows[record.asset_id].append(index)
    verdicts = []
    for indices in rows.values():
        azimuths = [records[index].azimuth_deg for index in indices]
        verdicts.append(float(len(front_quadrants(probabilities[indices], azimuths)) >= 3))
    return _as_dict(bootstrap_rate(verdicts, num_resamples=num_bootstrap))


def _half_distance(features: Tensor, assets: Sequence[str]) -> float | None:
    """FD-evaluator between two halves of the unseen assets: what sampling alone gives."""
    names = np.asarray(assets)
    order = list(dict.fromkeys(assets))
    first = np.isin(names, order[::2])
    a, b = features[torch.from_numpy(first)], features[torch.from_numpy(~first)]
    return frechet_distance(a, b) if min(len(a), len(b)) >= 2 else None


def _per_noun(
    right: Tensor,
    categories: Sequence[str],
    assets: Sequence[str],
    probabilities: Tensor,
    nouns: Sequence[str],
) -> dict[str, dict[str, Any]]:
    names, asset_names = np.asarray(categories), np.asarray(assets)
    predicted = probabilities.argmax(1).numpy()
    table: dict[str, dict[str, Any]] = {}
    for name in sorted(set(categories)):
        rows = names == name
        wrong = [str(nouns[index]) for index in predicted[rows] if nouns[index] != name]
        table[name] = {
            "accuracy": float(right.numpy()[rows].mean()),
            "images": int(rows.sum()),
            "assets": len(set(asset_names[rows])),
            "most_confused_with": max(sorted(set(wrong)), key=wrong.count) if wrong else None,
        }
    return table


def _view_confusion(
    probabilities: Tensor, asked: Sequence[str], with_front: Sequence[bool]
) -> dict[str, dict[str, int]]:
    """Counts, objects with a front: asked view word -> predicted view word."""
    table = {word: dict.fromkeys(VIEW_WORDS, 0) for word in VIEW_WORDS}
    for word, guess, counts in zip(asked, probabilities.argmax(1).tolist(), with_front, strict=True):
        if counts:
            table[word][VIEW_WORDS[guess]] += 1
    return table
