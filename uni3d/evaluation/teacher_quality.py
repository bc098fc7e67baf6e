"""How well a teacher draws what captions ask for: right object, right colour, right view, and FD-evaluator.

The teacher comes as a function that samples images, so that any teacher can be measured. Every caption is
sampled with several seeds; intervals resample captions, because the seeds of one caption are not independent.
Legend: C captions, H W pixels.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from uni3d.errors import UsageError
from uni3d.evaluation.benchmark_nouns import BENCHMARK_COLOURS, BenchmarkNoun, record_category
from uni3d.evaluation.ceiling import grey_composites
from uni3d.evaluation.contact_sheet import SheetRow, write_contact_sheet
from uni3d.evaluation.evaluator import Evaluator
from uni3d.evaluation.evaluator_data import UNSEEN_ROLE, basic_colours
from uni3d.evaluation.network import VIEW_WORDS, ImageOutput
from uni3d.evaluation.report import format_rate, markdown_table, stress_note
from uni3d.evaluation.settings import TeacherQualitySettings
from uni3d.evaluation.statistics import bootstrap_rate, frechet_distance, macro_rate
from uni3d.evaluation.verdicts import right_view
from uni3d.training.checkpoint import atomic_write_json, atomic_write_text

if TYPE_CHECKING:
    from uni3d.data.view_shards import ViewRecord, Views

logger = logging.getLogger(__name__)

# (captions with view words, view words, seed) -> images float [C, 3, H, W] in [0, 1]
SampleFn = Callable[[Sequence[str], Sequence[str], int], Tensor]

_TRAINED_ROLES = frozenset({"teacher", "both"})
# Renders that are sent through the autoencoder, and how many at once.
_NUM_RECONSTRUCTED = 500
_RECONSTRUCTION_BATCH = 50
FROM_ASSET, NEW_COMBINATION = "held-out asset", "new combination"


@dataclass(frozen=True)
class TeacherCaption:
    """A caption and what it asks for; `colour` is None where its colour word is no benchmark colour."""

    text: str
    noun: str
    colour: str | None
    view: str
    source: str


def held_out_captions(
    nouns: Sequence[BenchmarkNoun],
    records: Iterable[ViewRecord],
    *,
    num: int = 200,
    seed: int = 0,
    trained_captions: Collection[str] = (),
) -> list[TeacherCaption]:
    """Captions spread evenly over nouns and view words that no asset of the teacher's training data fits.

    A caption either describes an asset with role "neither" in words that describe none of the teacher's
    assets, or combines a noun with a colour that none of the teacher's assets of that noun has. A teacher
    trained with recolouring may have met either on a recoloured view: hand in `trained_captions` (view words
    included) to leave out what it was trained on word for word.
    Returns fewer than `num` captions, with a warning, if there are not that many.
    """
    if num < 1:
        raise UsageError(f"num is {num}; expected at least one caption")
    assets = {record.asset_id: record for record in records}
    described, trained_pairs = _survey(assets.values())
    rng = np.random.default_rng(seed)
    blocked = set(trained_captions)
    captions: list[TeacherCaption] = []
    order = [nouns[index] for index in rng.permutation(len(nouns))]
    free: dict[str, list[tuple[str, str | None, str]]] = {}
    for noun in order:
        new = [colour for colour in BENCHMARK_COLOURS if (noun.name, colour) not in trained_pairs]
        combinations = [(_with_article(f"{colour} {noun.name}"), colour, NEW_COMBINATION) for colour in new]
        free[noun.name] = _alternate(_shuffled(described[noun.name], rng), _shuffled(combinations, rng))
    round_number = 0
    while len(captions) < num and any(free.values()):
        for position, noun in enumerate(order):
            if len(captions) >= num:
                break
            view = VIEW_WORDS[(position + round_number) % len(VIEW_WORDS)]
            while free[noun.name]:
                text, colour, source = free[noun.name].pop(0)
                full = f"{text}, {view} view"
                if full not in blocked:
                    captions.append(TeacherCaption(full, noun.name, colour, view, source))
                    break
        round_number += 1
    if len(captions) < num:
        logger.warning("only %d held-out captions of the %d asked for exist", len(captions), num)
    if not captions:
        raise UsageError(
            "every caption over the benchmark's nouns and colours was trained on; none is held out"
        )
    return captions


def _survey(
    assets: Iterable[ViewRecord],
) -> tuple[dict[str, list[tuple[str, str | None, str]]], set[tuple[str, str]]]:
    """Descriptions of unseen assets by noun, and the (noun, colour) pairs that trained assets show."""
    from uni3d.data.captions import canonical_caption

    described: dict[str, list[tuple[str, str | None, str]]] = defaultdict(list)
    trained_pairs: set[tuple[str, str]] = set()
    trained_texts: set[str] = set()
    for record in assets:
        category, colours = record_category(record), basic_colours(record.colours)
        if category is None:
            continue
        if record.role in _TRAINED_ROLES:
            trained_pairs.update((category, colour) for colour in colours)
            trained_texts.add(canonical_caption(record))
        elif record.role == UNSEEN_ROLE:
            described[category].append(
                (canonical_caption(record), colours[0] if colours else None, FROM_ASSET)
            )
    for category, entries in described.items():
        described[category] = sorted({entry for entry in entries if entry[0] not in trained_texts}, key=str)
    return described, trained_pairs


def _with_article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _shuffled(items: list[Any], rng: np.random.Generator) -> list[Any]:
    return [items[index] for index in rng.permutation(len(items))]


def _alternate(first: list[Any], second: list[Any]) -> list[Any]:
    """first[0], second[0], first[1], ...; what is left of the longer one at the end."""
    shared = min(len(first), len(second))
    mixed = [item for pair in zip(first, second, strict=False) for item in pair]
    return mixed + first[shared:] + second[shared:]


@dataclass(frozen=True)
class References:
    """Renders of unseen assets of the benchmark's nouns, in random order: images float32 [N, 3, H, W] in
    [0, 1] on plain greys, and what each shows."""

    images: Tensor
    nouns: list[str]


def reference_renders(views: Views, nouns: Sequence[str], *, num: int, seed: int = 0) -> References:
    """Up to `num` of them."""
    keep = [
        index
        for index, record in enumerate(views.records)
        if record.role == UNSEEN_ROLE and record_category(record) in nouns
    ]
    chosen = [keep[index] for index in np.random.default_rng(seed).permutation(len(keep))[:num]]
    categories = [record_category(views.records[index]) or "" for index in chosen]
    return References(grey_composites(views.images[chosen], seed=seed), categories)


def evaluate_teacher(
    sample: SampleFn,
    evaluator: Evaluator,
    captions: Sequence[TeacherCaption],
    *,
    settings: TeacherQualitySettings | None = None,
    reference: References | None = None,
    reconstruct: Callable[[Tensor], Tensor] | None = None,
    ceiling: dict[str, Any] | None = None,
    output_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Sample every caption with every seed, score the images, and report rates with 95 % intervals.

    `sample(texts, view_words, seed)` returns images [C, 3, H, W] in [0, 1]; it decides itself whether to use
    cameras for the view words (`cameras_for_views` makes matching ones). Images with NaN or infinity count as
    wrong. `reference` are held-out renders for FD-evaluator; `reconstruct` sends images [B, 3, H, W] in
    [0, 1] through the teacher's autoencoder, whose loss is then measured on some of them. `ceiling` is the
    evaluator's own accuracy (metrics.json, key "ceiling"), shown beside the figures. With `output_dir`,
    writes teacher_quality.json, teacher_quality.md and teacher_quality.png (a row per caption, a view per
    seed).
    """
    settings = settings or TeacherQualitySettings()
    if not captions or not settings.seeds:
        raise UsageError(
            f"got {len(captions)} captions and {len(settings.seeds)} seeds; expected at least one of each"
        )
    scorer = _Scorer(evaluator, captions)
    shown: list[list[Tensor]] = [[] for _ in captions]
    features: list[Tensor] = []
    verdicts: dict[str, list[Tensor]] = defaultdict(list)
    num_failed = 0
    for seed in settings.seeds:
        images = _sample_all(sample, captions, seed, settings.batch_size)
        is_finite = torch.isfinite(images).flatten(1).all(dim=1)
        num_failed += int((~is_finite).sum())
        seed_verdicts, seed_features = scorer.score(torch.nan_to_num(images, 0.0, 0.0, 0.0), is_finite)
        for name, values in seed_verdicts.items():
            verdicts[name].append(values)
        features.append(seed_features[is_finite])
        for row, image in zip(shown, images, strict=True):
            row.append(image)
        logger.info("seed %d: %d images scored", seed, len(images))
    stacked = {name: torch.stack(values).float() for name, values in verdicts.items()}
    seen = None if reference is None else evaluator.encode(reference.images)
    report: dict[str, Any] = {
        "num_captions": len(captions),
        "seeds": list(settings.seeds),
        "num_failed_images": num_failed,
        "num_nouns": len(evaluator.noun_names),
        "captions_by_source": {
            source: sum(caption.source == source for caption in captions)
            for source in (FROM_ASSET, NEW_COMBINATION)
        },
        "rates": {
            name: _summary(values, scorer.applies[name], settings.num_bootstrap)
            for name, values in stacked.items()
        },
        "fd_evaluator": None if seen is None else _distance(torch.cat(features), seen.features),
        "autoencoder": None
        if reference is None or seen is None or reconstruct is None
        else _autoencoder_loss(evaluator, reference, seen, reconstruct, settings.num_bootstrap),
        "ceiling": ceiling,
        "per_noun": _group_means(stacked["noun"], [caption.noun for caption in captions]),
        "per_view": _group_means(stacked["view"], [caption.view for caption in captions]),
        "per_source": _group_means(stacked["noun"], [caption.source for caption in captions]),
        "captions": [
            asdict(caption)
            | {"right": {name: float(values[:, index].mean()) for name, values in stacked.items()}}
            for index, caption in enumerate(captions)
        ],
    }
    if output_dir is not None:
        _write(report, shown, captions, stacked["all"], Path(output_dir))
    return report


def cameras_for_views(view_words: Sequence[str], *, seed: int = 0) -> Any:
    """`Cameras` in the middle half of each view word's sector, for teachers that take cameras."""
    from uni3d.scene.camera import Cameras

    rng = np.random.default_rng(seed)
    azimuths, elevations = [], []
    for word in view_words:
        if word not in VIEW_WORDS:
            raise UsageError(f"{word!r} is no view word; expected one of {', '.join(VIEW_WORDS)}")
        centre = {"front": 0.0, "back": 180.0, "side": 90.0 * rng.choice([-1, 1]), "overhead": 0.0}[word]
        azimuths.append(centre + (rng.uniform(-180, 180) if word == "overhead" else rng.uniform(-22, 22)))
        elevations.append(rng.uniform(68, 82) if word == "overhead" else rng.uniform(5, 30))
    return Cameras.from_lists([(a + 180.0) % 360.0 - 180.0 for a in azimuths], elevations)


class _Scorer:
    """The captions as tensors, and the verdicts on one seed's images."""

    def __init__(self, evaluator: Evaluator, captions: Sequence[TeacherCaption]) -> None:
        self.evaluator = evaluator
        fronts = {noun.name: noun.has_front for noun in evaluator.benchmark_nouns}
        names = evaluator.noun_names
        missing = sorted({caption.noun for caption in captions} - set(names))
        if missing:
            raise UsageError(f"the evaluator does not choose among {', '.join(missing)}; use its own nouns")
        colours = {None: -1} | {colour: index for index, colour in enumerate(BENCHMARK_COLOURS)}
        self.noun = torch.tensor([names.index(caption.noun) for caption in captions])
        self.colour = torch.tensor([colours[caption.colour] for caption in captions])
        self.views = [caption.view for caption in captions]
        self.fronts = [fronts[caption.noun] for caption in captions]
        everywhere = [True] * len(captions)
        self.applies = {
            "noun": everywhere,
            "colour": [caption.colour is not None for caption in captions],
            "view": everywhere,
            "view_with_front": self.fronts,
            "view_strict": everywhere,
            "all": everywhere,
        }

    def score(self, images: Tensor, is_finite: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Bool verdicts [C] by name, and features [C, F]."""
        evaluator = self.evaluator
        output = evaluator.encode(images)
        noun = evaluator.noun_probabilities(output, evaluator.noun_names).argmax(1) == self.noun
        colour = evaluator.colour_probabilities(output, BENCHMARK_COLOURS).argmax(1) == self.colour
        views = evaluator.view_probabilities(output)
        view = right_view(views, self.views, self.fronts)
        strict = right_view(views, self.views, [True] * len(self.views))
        verdicts = {
            "noun": noun,
            "colour": colour,
            "view": view,
            "view_with_front": strict,
            "view_strict": strict,
        }
        verdicts["all"] = noun & (colour | (self.colour < 0)) & view
        return {name: values & is_finite for name, values in verdicts.items()}, output.features


def _sample_all(sample: SampleFn, captions: Sequence[TeacherCaption], seed: int, batch_size: int) -> Tensor:
    parts = []
    for start in range(0, len(captions), batch_size):
        chunk = captions[start : start + batch_size]
        # Every chunk has a seed of its own: equal noise in all chunks would correlate the captions.
        images = sample([c.text for c in chunk], [c.view for c in chunk], seed * 1_000_003 + start)
        if images.dim() != 4 or len(images) != len(chunk) or images.shape[1] != 3:
            raise UsageError(
                f"the teacher returned images of shape {tuple(images.shape)} for {len(chunk)} captions; "
                f"expected [{len(chunk)}, 3, H, W]"
            )
        parts.append(images.detach().float().cpu())
    return torch.cat(parts)


def _summary(values: Tensor, applies: Sequence[bool], num_bootstrap: int) -> dict[str, Any] | None:
    """Rate over captions (seeds averaged), per-seed rates and their spread; values [S, C]."""
    chosen = values[:, torch.tensor(list(applies))]
    rate = bootstrap_rate(chosen.mean(0).numpy(), num_resamples=num_bootstrap)
    if rate is None:
        return None
    per_seed = chosen.mean(1).tolist()
    spread = float(np.std(per_seed, ddof=1)) if len(per_seed) > 1 else 0.0
    return rate.as_dict() | {"per_seed": per_seed, "std_over_seeds": spread}


def _group_means(values: Tensor, groups: Sequence[str]) -> dict[str, float]:
    names = np.asarray(groups)
    means = values.mean(0).numpy()
    return {name: float(means[names == name].mean()) for name in sorted(set(groups))}


def _autoencoder_loss(
    evaluator: Evaluator,
    reference: References,
    seen: ImageOutput,
    reconstruct: Callable[[Tensor], Tensor],
    num_bootstrap: int,
) -> dict[str, Any] | None:
    """How often the evaluator, which sees `reference` as `seen`, names renders right, all nouns alike, before
    and after the autoencoder: what no denoiser can win back."""
    num = min(len(reference.images), _NUM_RECONSTRUCTED)
    if num < 2:
        return None
    nouns = reference.nouns[:num]
    asked = torch.tensor([evaluator.noun_names.index(noun) for noun in nouns])
    parts = reference.images[:num].split(_RECONSTRUCTION_BATCH)
    rebuilt = evaluator.encode(torch.cat([reconstruct(part) for part in parts]))

    def rate(output: ImageOutput) -> dict[str, Any] | None:
        named = evaluator.noun_probabilities(output, evaluator.noun_names)[:num].argmax(1)
        return macro_rate((named == asked).float(), nouns, num_bootstrap)

    return {
        "num_renders": num,
        "noun_macro_before": rate(seen),
        "noun_macro_after": rate(rebuilt),
        "fd_evaluator": frechet_distance(rebuilt.features, seen.features[:num]),
    }


def _distance(features: Tensor, real: Tensor) -> dict[str, Any] | None:
    if len(real) < 4 or len(features) < 2:
        return None
    return {
        "value": frechet_distance(features, real),
        "num_generated": len(features),
        "num_reference": len(real),
        "reference_halves": frechet_distance(real[::2], real[1::2]),
    }


_LABELS = (
    ("noun", "right object", "noun_macro"),
    ("colour", "right colour word", "colour_recoloured"),
    ("view", "right view word (objects without a front: overhead or not)", "view"),
    ("view_with_front", "right view word of 4, objects with a front", "view_with_front"),
    ("view_strict", "right view word of 4, all objects", "view_strict"),
    ("all", "object, colour and view right", ""),
)


def teacher_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown: a table of rates and the distance."""
    ceiling = report["ceiling"] or {}
    rows = []
    for key, label, ceiling_key in _LABELS:
        rate = report["rates"][key]
        per_seed = "-" if rate is None else ", ".join(f"{100 * value:.1f}" for value in rate["per_seed"])
        label = f"{label} (of {report['num_nouns']})" if key == "noun" else label
        rows.append([label, format_rate(rate), per_seed, format_rate(ceiling.get(ceiling_key))])
    lines = [
        f"{report['num_captions']} held-out captions, seeds {', '.join(map(str, report['seeds']))}; "
        f"{report['num_failed_images']} failed images, counted as wrong.",
        "",
        *markdown_table(["what", "rate (95 % interval)", "per seed, %", "evaluator's ceiling"], rows),
        *stress_note(ceiling),
    ]
    distance = report["fd_evaluator"]
    if distance is not None:
        lines += [
            "",
            f"FD-evaluator {distance['value']:.2f} ({distance['num_generated']} samples against "
            f"{distance['num_reference']} held-out renders; the renders' two halves: "
            f"{distance['reference_halves']:.2f}).",
        ]
    loss = report["autoencoder"]
    if loss is not None:
        lines += [
            "",
            f"Of {loss['num_renders']} held-out renders, all nouns alike, the right object is seen in "
            f"{format_rate(loss['noun_macro_before'])}, and after the autoencoder in "
            f"{format_rate(loss['noun_macro_after'])} (FD-evaluator {loss['fd_evaluator']:.2f}).",
        ]
    return "\n".join(lines) + "\n"


def _write(
    report: dict[str, Any],
    shown: list[list[Tensor]],
    captions: Sequence[TeacherCaption],
    all_right: Tensor,
    folder: Path,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_json(folder / "teacher_quality.json", report)
    atomic_write_text(folder / "teacher_quality.md", teacher_markdown(report))
    good = (all_right.mean(0) >= 0.5).tolist()
    rows = [
        SheetRow(caption.text, torch.stack(images), is_good)
        for caption, images, is_good in zip(captions, shown, good, strict=True)
    ]
    write_contact_sheet(rows, folder / "teacher_quality.png", views_per_row=len(report["seeds"]), size=64)
