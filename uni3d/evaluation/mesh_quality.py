"""How well exported meshes show what their prompts ask for, measured on 24 renders of each file.

Renders are unlit over neutral grey. Object and colour are judged by the mean probability over all views; the
worst view, view words, Janus, fog and emptiness are reported beside them: one good side is not enough. A mesh
that cannot be read or rendered counts as wrong everywhere; nothing is dropped.
Legend: V views, H W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uni3d.errors import UsageError
from uni3d.evaluation.benchmark_nouns import BENCHMARK_COLOURS, HAS_FRONT, parse_prompt
from uni3d.evaluation.contact_sheet import SheetRow, write_contact_sheet
from uni3d.evaluation.evaluator import Evaluator
from uni3d.evaluation.network import VIEW_WORDS, ImageOutput
from uni3d.evaluation.report import format_rate, markdown_table, stress_note
from uni3d.evaluation.settings import MeshQualitySettings
from uni3d.evaluation.statistics import bootstrap_rate
from uni3d.evaluation.verdicts import front_quadrants
from uni3d.scene.camera import Cameras
from uni3d.training.checkpoint import atomic_write_json, atomic_write_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeshItem:
    """One exported mesh; `fog` is the half-transparent share of its field's silhouette, if that is known."""

    path: Path
    prompt: str
    seed: int | None = None
    fog: float | None = None


@dataclass(frozen=True)
class RenderedMesh:
    """Views of one mesh: images float32 [V, 3, H, W] over the background, coverage float32 [V, H, W]."""

    images: Tensor
    coverage: Tensor


@dataclass(frozen=True)
class MeshScore:
    """The verdicts on one mesh; None where a question does not apply (no colour asked for, no front)."""

    path: str
    prompt: str
    seed: int | None
    asked_noun: str | None
    asked_colour: str | None
    has_front: bool
    error: str | None = None
    is_empty: bool = False
    coverage: float = 0.0
    seen_noun: str | None = None
    noun_probability: float = 0.0
    noun_right: bool | None = None
    noun_views_right: float | None = None
    noun_worst_view_probability: float | None = None
    seen_colour: str | None = None
    colour_right: bool | None = None
    view_right: float | None = None
    front_quadrants: list[int] = field(default_factory=list)
    is_janus: bool | None = None
    fog: float | None = None
    is_foggy: bool | None = None
    view_confusion: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        """Rendered, not empty, not foggy, no Janus, and object and colour right where they were asked for."""
        bad = self.error is not None or self.is_empty or self.is_foggy is True or self.is_janus is True
        return not bad and self.noun_right is not False and self.colour_right is not False


@dataclass(frozen=True)
class JudgedMesh:
    """A mesh's verdicts, its views, and what the evaluator saw: None where there was nothing to see."""

    score: MeshScore
    rendered: RenderedMesh | None = None
    output: ImageOutput | None = None


RenderFn = Callable[[Path, Cameras, int, MeshQualitySettings], RenderedMesh]


def evaluation_cameras(settings: MeshQualitySettings | None = None) -> Cameras:
    """The cameras of a mesh's views: one ring per elevation, each starting at the front."""
    settings = settings or MeshQualitySettings()
    step = 360.0 / settings.num_azimuths
    azimuths = [(index * step + 180.0) % 360.0 - 180.0 for index in range(settings.num_azimuths)]
    return Cameras.from_lists(
        azimuths * len(settings.elevations_deg),
        [elevation for elevation in settings.elevations_deg for _ in azimuths],
        radius=settings.radius,
        fov_y_deg=settings.fov_y_deg,
    )


def render_mesh(path: Path, cameras: Cameras, size: int, settings: MeshQualitySettings) -> RenderedMesh:
    """Render a mesh file, fitted into the unit box, unlit over grey. UsageError if it cannot be read."""
    from uni3d.mesh.raycaster import Raycaster, load_renderable

    caster = Raycaster(load_renderable(path).in_unit_box())
    images, coverage = [], []
    for index in range(len(cameras)):
        view = caster.render(cameras[slice(index, index + 1)], size, supersample=settings.supersample)
        alpha = view.alpha[..., None]
        images.append(view.rgb * alpha + settings.background * (1 - alpha))
        coverage.append(view.alpha)
    stacked = torch.from_numpy(np.stack(images).astype(np.float32)).permute(0, 3, 1, 2)
    return RenderedMesh(stacked.clamp(0, 1), torch.from_numpy(np.stack(coverage).astype(np.float32)))


def evaluate_meshes(
    items: Sequence[MeshItem],
    evaluator: Evaluator,
    *,
    settings: MeshQualitySettings | None = None,
    output_dir: str | Path | None = None,
    ceiling: dict[str, Any] | None = None,
    render: RenderFn = render_mesh,
) -> dict[str, Any]:
    """Score meshes against their prompts and report rates with 95 % intervals over meshes.

    The evaluator chooses among its benchmark nouns, and the prompt's own noun where that is not one of them.
    With `output_dir`, writes mesh_quality.json, mesh_quality.md and mesh_quality.png (the contact sheet).
    """
    settings = settings or MeshQualitySettings()
    if not items:
        raise UsageError("got no meshes to evaluate; pass at least one")
    cameras = evaluation_cameras(settings)
    size = evaluator.network.config.image_size
    scores: list[MeshScore] = []
    rows: list[SheetRow] = []
    for item in items:
        judged = judge_mesh(item, evaluator, cameras, size, settings, render)
        scores.append(judged.score)
        rows.append(_sheet_row(judged.score, judged.rendered, settings))
    report: dict[str, Any] = {
        "num_meshes": len(items),
        "num_failed": sum(score.error is not None for score in scores),
        "num_empty": sum(score.is_empty for score in scores),
        "num_nouns": len(evaluator.noun_names),
        "views_per_mesh": len(cameras),
        "rates": _rates(scores, settings),
        "view_confusion": _summed_confusion(scores),
        "ceiling": ceiling,
        "settings": asdict(settings),
        "meshes": [asdict(score) | {"is_good": score.is_good} for score in scores],
    }
    if output_dir is not None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_json(folder / "mesh_quality.json", report)
        atomic_write_text(folder / "mesh_quality.md", mesh_markdown(report))
        write_contact_sheet(rows, folder / "mesh_quality.png")
    return report


def judge_mesh(
    item: MeshItem,
    evaluator: Evaluator,
    cameras: Cameras,
    size: int,
    settings: MeshQualitySettings,
    render: RenderFn = render_mesh,
) -> JudgedMesh:
    """Look at one mesh from `cameras` at `size` pixels; one that cannot be read or is empty is all wrong."""
    asked = parse_prompt(item.prompt)
    front = asked.noun in HAS_FRONT
    known: dict[str, Any] = {
        "path": str(item.path),
        "prompt": item.prompt,
        "seed": item.seed,
        "asked_noun": asked.noun,
        "asked_colour": asked.colour,
        "has_front": front,
    }
    # What a mesh that shows nothing gets: wrong wherever something was asked.
    wrong: dict[str, Any] = {
        "noun_right": None if asked.noun is None else False,
        "noun_views_right": None if asked.noun is None else 0.0,
        "noun_worst_view_probability": None if asked.noun is None else 0.0,
        "colour_right": None if asked.colour is None else False,
        "view_right": 0.0 if front else None,
        "is_janus": True if front else None,
    }
    if item.fog is not None:
        known |= {"fog": item.fog, "is_foggy": item.fog > settings.max_fog}
    try:
        rendered = render(item.path, cameras, size, settings)
    except (UsageError, OSError) as error:
        message = str(error) if str(item.path) in str(error) else f"'{item.path}': {error}"
        logger.warning("%s", message)
        return JudgedMesh(MeshScore(**known, **wrong, error=message))
    known["coverage"] = float(rendered.coverage.mean())
    if known["coverage"] < settings.min_coverage:
        return JudgedMesh(MeshScore(**known, **wrong, is_empty=True), rendered)
    output = evaluator.encode(rendered.images)
    score = MeshScore(**known, **_verdict(output, asked, evaluator, cameras, settings))
    return JudgedMesh(score, rendered, output)


def _verdict(
    output: ImageOutput, asked: Any, evaluator: Evaluator, cameras: Cameras, settings: MeshQualitySettings
) -> dict[str, Any]:
    names = list(evaluator.noun_names)
    if asked.noun is not None and asked.noun not in names and evaluator.vocabulary.knows(asked.noun):
        names.append(asked.noun)
    nouns = evaluator.noun_probabilities(output, names)
    colours = evaluator.colour_probabilities(output, BENCHMARK_COLOURS).mean(0)
    views = evaluator.view_probabilities(output)
    seen = int(nouns.mean(0).argmax())
    verdict: dict[str, Any] = {
        "seen_noun": names[seen],
        "noun_probability": float(nouns.mean(0)[seen]),
        "seen_colour": BENCHMARK_COLOURS[int(colours.argmax())],
    }
    if asked.noun is not None:
        index = names.index(asked.noun) if asked.noun in names else None
        verdict["noun_right"] = index == seen
        right = torch.zeros(len(nouns)) if index is None else (nouns.argmax(1) == index).float()
        verdict["noun_views_right"] = float(right.mean())
        verdict["noun_worst_view_probability"] = 0.0 if index is None else float(nouns[:, index].min())
    if asked.colour is not None:
        verdict["colour_right"] = verdict["seen_colour"] == asked.colour
    if asked.noun in HAS_FRONT:
        words = cameras.view_words()
        guesses = [VIEW_WORDS[index] for index in views.argmax(1).tolist()]
        quadrants = front_quadrants(views, cameras.azimuth_deg.tolist())
        verdict |= {
            "view_right": float(np.mean([word == guess for word, guess in zip(words, guesses, strict=True)])),
            "front_quadrants": quadrants,
            "is_janus": len(quadrants) >= settings.janus_quadrants,
            "view_confusion": _confusion(words, guesses),
        }
    return verdict


def _confusion(words: Sequence[str], guesses: Sequence[str]) -> dict[str, dict[str, int]]:
    table = {word: dict.fromkeys(VIEW_WORDS, 0) for word in dict.fromkeys(words)}
    for word, guess in zip(words, guesses, strict=True):
        table[word][guess] += 1
    return table


def _summed_confusion(scores: Sequence[MeshScore]) -> dict[str, dict[str, int]]:
    total: dict[str, dict[str, int]] = {}
    for score in scores:
        for word, counts in score.view_confusion.items():
            row = total.setdefault(word, dict.fromkeys(VIEW_WORDS, 0))
            for guess, number in counts.items():
                row[guess] += number
    return total


def _rates(scores: Sequence[MeshScore], settings: MeshQualitySettings) -> dict[str, Any]:
    """Rates over the meshes that each question applies to; failed and empty meshes are among them."""
    names = (
        "noun_right",
        "noun_views_right",
        "noun_worst_view_probability",
        "colour_right",
        "view_right",
        "is_janus",
        "fog",
        "is_foggy",
        "is_empty",
        "is_good",
    )
    rates: dict[str, Any] = {}
    for name in names:
        values = [float(value) for score in scores if (value := getattr(score, name)) is not None]
        rate = bootstrap_rate(values, num_resamples=settings.num_bootstrap)
        rates[name] = None if rate is None else rate.as_dict()
    return rates


def _sheet_row(score: MeshScore, rendered: RenderedMesh | None, settings: MeshQualitySettings) -> SheetRow:
    remarks = [score.seen_noun or "", score.seen_colour or ""]
    remarks += (
        ["Janus"] * (score.is_janus is True) + ["fog"] * (score.is_foggy is True) + ["empty"] * score.is_empty
    )
    seed = "" if score.seed is None else f" [{score.seed}]"
    label = f"{score.prompt}{seed}: {score.error or ' '.join(filter(None, remarks))}"
    if rendered is None:
        return SheetRow(label, None, False)
    # Six directions of the last ring, evenly spaced from the front.
    first = settings.num_azimuths * (len(settings.elevations_deg) - 1)
    chosen = [first + round(index * settings.num_azimuths / 6) for index in range(6)]
    return SheetRow(label, rendered.images[chosen], score.is_good)


_LABELS = (
    ("noun_right", "right object, mean over views", "noun_by_object"),
    ("noun_views_right", "views that show the right object", "noun"),
    ("noun_worst_view_probability", "probability of the object in the worst view", ""),
    ("colour_right", "right colour word", "colour_recoloured"),
    ("view_right", "views recognised as what they are, objects with a front", "view_with_front"),
    ("is_janus", "Janus, objects with a front", "janus_false_alarm"),
    ("is_foggy", "fog", ""),
    ("is_empty", "empty", ""),
    ("is_good", "nothing wrong", ""),
)


def mesh_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown: rates, then one line per mesh."""
    ceiling = report["ceiling"] or {}
    rows = []
    for key, label, ceiling_key in _LABELS:
        rate = report["rates"][key]
        label = f"{label} (of {report['num_nouns']})" if key == "noun_right" else label
        number = "0" if rate is None else str(rate["num"])
        rows.append([label, format_rate(rate), number, format_rate(ceiling.get(ceiling_key))])
    header = ["what", "rate (95 % interval)", "meshes", "evaluator on real objects"]
    lines = [
        f"{report['num_meshes']} meshes, {report['views_per_mesh']} views each; {report['num_failed']} could "
        f"not be rendered and {report['num_empty']} are empty, both counted as wrong.",
        "",
        *markdown_table(header, rows),
        *stress_note(ceiling),
        "",
        *markdown_table(
            ["prompt", "seed", "seen as", "views right", "remarks"], [_line(m) for m in report["meshes"]]
        ),
    ]
    return "\n".join(lines) + "\n"


def _line(mesh: dict[str, Any]) -> list[str]:
    seen = " ".join(filter(None, [mesh["seen_colour"], mesh["seen_noun"]])) or "-"
    views = "-" if mesh["noun_views_right"] is None else f"{100 * mesh['noun_views_right']:.0f} %"
    remarks = [mesh["error"]] if mesh["error"] else []
    remarks += ["empty"] * mesh["is_empty"] + ["fog"] * (mesh["is_foggy"] is True)
    remarks += ["Janus"] * (mesh["is_janus"] is True and not mesh["error"])
    remarks += ["wrong object"] * (mesh["noun_right"] is False and not mesh["error"])
    remarks += ["wrong colour"] * (mesh["colour_right"] is False and not mesh["error"])
    seed = "" if mesh["seed"] is None else str(mesh["seed"])
    return [mesh["prompt"], seed, seen, views, ", ".join(remarks) or "-"]
