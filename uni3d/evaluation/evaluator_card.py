"""The evaluator's model card, written from its own metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uni3d.evaluation.evaluator import Evaluator
from uni3d.evaluation.report import format_rate
from uni3d.training.checkpoint import atomic_write_text

if TYPE_CHECKING:
    from uni3d.data.view_shards import ViewRecord

_ROWS = (
    ("noun", "right noun among {num}, per image"),
    ("noun_macro", "the same, all nouns alike"),
    ("noun_by_object", "right noun among {num}, mean probability over an object's views"),
    ("noun_stress", "right noun among {num}, per image, after a fixed loss of detail"),
    ("noun_stress_macro", "the same, all nouns alike"),
    ("colour_recoloured", "right colour word of 11, main material painted in it"),
    ("colour_natural", "right colour word of 11, the object's own dominant colour"),
    ("view", "right view word (objects without a front: overhead or not)"),
    ("view_with_front", "right view word of 4, objects with a front"),
    ("view_with_front_central", "the same, within 20 degrees of a sector's middle"),
    ("view_strict", "right view word of 4, all objects"),
    ("janus_false_alarm", "real objects with a front taken for a Janus"),
)


def write_card(
    path: Path,
    evaluator: Evaluator,
    metrics: dict[str, Any],
    records: Sequence[ViewRecord],
    *,
    credit: str = "",
) -> None:
    """Write README.md beside the weights; `credit` is a last section, for weights that were started from."""
    training, ceiling = metrics["training"], metrics["ceiling"]
    lines = [
        "# Evaluator",
        "",
        "A small contrastive image-text network with a view classifier. It says which object, colour and",
        "view a 128 x 128 picture shows, and it is used only to measure generated images and meshes. It was",
        "trained on renders of other assets than the teacher wherever a noun has several, with other light,",
        "backgrounds and cameras everywhere. It knows the objects of its data, not the world: a score says",
        "nothing about others.",
        "",
        f"{training['parameters'] / 1e6:.1f} M parameters; {training['views']} views of {training['assets']} "
        f"assets; {training['steps']} steps, {training['images_seen'] / 1e6:.2f} M images, "
        f"{training['seconds']:.0f} s on {training['device']}.",
        "",
        "## Its own accuracy",
        "",
        "Renders of assets that neither this network nor the teacher was trained on; 95 % bootstrap",
        "intervals over assets. These are the ceilings of what it measures: perfect images would score about",
        "this. Generated images are smoother than renders, so nouns are also asked for after a fixed loss of",
        "detail (`lossy_generator` in `uni3d/evaluation/smoothing.py`).",
        "",
    ]
    lines += _accuracy_table(ceiling, len(evaluator.benchmark_nouns)) if ceiling else ["Not measured."]
    lines += ["", "## The nouns it chooses among", "", *_noun_table(evaluator, ceiling or {})]
    lines += ["", "## Data", "", "Renders of assets from:", "", *_sources(records), ""]
    lines += ["The creators of the assets are named in the project's NOTICE.", ""]
    atomic_write_text(path, "\n".join(lines) + credit)


def _accuracy_table(ceiling: dict[str, Any], num_nouns: int) -> list[str]:
    rows = []
    for key, label in _ROWS:
        if key not in ceiling:  # Measured before there was such a row.
            continue
        rate = ceiling[key]
        number = 0 if rate is None else rate["num"]
        rows.append(f"| {label.format(num=num_nouns)} | {format_rate(rate)} | {number} |")
    floor = ceiling.get("fd_evaluator_floor")
    note = [] if floor is None else ["", f"FD-evaluator between two halves of these assets: {floor:.2f}."]
    return ["| what | rate | assets (nouns) |", "|---|---|---|", *rows, *note]


def _noun_table(evaluator: Evaluator, ceiling: dict[str, Any]) -> list[str]:
    per_noun = ceiling.get("per_noun", {})
    lines = [
        "| noun | front | assets in the data | unseen: accuracy, assets | most confused with |",
        "|---|---|---|---|---|",
    ]
    for noun in evaluator.benchmark_nouns:
        entry = per_noun.get(noun.name)
        unseen = f"{100 * entry['accuracy']:.0f} %, {entry['assets']}" if entry else "-"
        confused = (entry or {}).get("most_confused_with") or "-"
        front = "yes" if noun.has_front else "no"
        lines.append(f"| {noun.name} | {front} | {noun.num_assets} | {unseen} | {confused} |")
    return lines


def _sources(records: Sequence[ViewRecord]) -> list[str]:
    assets = {record.asset_id: (record.source, record.licence) for record in records}
    counts = Counter(assets.values())
    return [
        f"- {source} ({licence}): {number} assets" for (source, licence), number in sorted(counts.items())
    ]
