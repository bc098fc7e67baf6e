"""The teacher's quality, measured on samplers whose mistakes are known."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_fixtures import PixelEvaluator, painted_views, record

from uni3d.errors import UsageError
from uni3d.evaluation.benchmark_nouns import BenchmarkNoun, parse_prompt
from uni3d.evaluation.settings import TeacherQualitySettings
from uni3d.evaluation.teacher_quality import (
    FROM_ASSET,
    References,
    TeacherCaption,
    cameras_for_views,
    evaluate_teacher,
    held_out_captions,
    reference_renders,
    teacher_markdown,
)
from uni3d.evaluation.verdicts import right_view

NOUNS = [
    BenchmarkNoun(name, front, 1, (name,))
    for name, front in (("chair", True), ("rock", False), ("vase", False))
]
EVALUATOR = PixelEvaluator([(noun.name, noun.has_front) for noun in NOUNS])
SETTINGS = TeacherQualitySettings(num_captions=12, seeds=(0, 1), batch_size=5, num_bootstrap=50)


def _records() -> list:
    return [
        record("t0", "chair", "red", role="teacher"),
        record("t1", "armchair", "blue", role="both"),
        record("n0", "rock", "grey", role="neither"),
        record("e0", "vase", "white", role="evaluator"),
    ]


def _perfect(texts: Sequence[str], views: Sequence[str], seed: int) -> torch.Tensor:
    parts = [parse_prompt(text) for text in texts]
    return torch.stack(
        [EVALUATOR.image(part.noun or "", part.colour, view) for part, view in zip(parts, views, strict=True)]
    )


def _references(captions: Sequence[TeacherCaption]) -> References:
    images = _perfect([c.text for c in captions], [c.view for c in captions], 0)
    return References(images, [c.noun for c in captions])


def test_captions_are_held_out_balanced_and_repeatable() -> None:
    captions = held_out_captions(NOUNS, _records(), num=24, seed=3)
    assert captions == held_out_captions(NOUNS, _records()[::-1], num=24, seed=3)
    assert len({caption.text for caption in captions}) == 24
    assert Counter(caption.noun for caption in captions) == {"chair": 8, "rock": 8, "vase": 8}
    assert set(Counter(caption.view for caption in captions).values()) == {6}
    assert not [c for c in captions if c.noun == "chair" and c.colour in ("red", "blue")]
    described = [caption for caption in captions if caption.source == FROM_ASSET]
    assert [(caption.noun, caption.colour) for caption in described] == [("rock", "grey")]
    known = held_out_captions(NOUNS, [*_records(), record("t2", "rock", "grey", role="teacher")], num=24)
    assert not [caption for caption in known if caption.source == FROM_ASSET]
    assert all(caption.text.endswith(f", {caption.view} view") for caption in captions)


def test_captions_trained_word_for_word_are_left_out() -> None:
    first = held_out_captions(NOUNS, _records(), num=6)
    blocked = {caption.text for caption in first}
    second = held_out_captions(NOUNS, _records(), num=6, trained_captions=blocked)
    assert not blocked & {caption.text for caption in second}


def test_a_perfect_teacher_scores_everything_and_reports_are_written(tmp_path: Path) -> None:
    captions = held_out_captions(NOUNS, _records(), num=12)
    report = evaluate_teacher(_perfect, EVALUATOR, captions, settings=SETTINGS, output_dir=tmp_path)  # type: ignore[arg-type]
    for name in ("noun", "colour", "view", "view_with_front", "all"):
        assert report["rates"][name]["mean"] == 1.0, name
    assert report["rates"]["noun"]["per_seed"] == [1.0, 1.0]
    assert report["rates"]["view_with_front"]["num"] == 4
    assert json.loads((tmp_path / "teacher_quality.json").read_text())["num_captions"] == 12
    assert "100.0 %" in (tmp_path / "teacher_quality.md").read_text()
    assert (tmp_path / "teacher_quality.png").stat().st_size > 0


def test_mistakes_and_failed_images_are_counted_not_dropped() -> None:
    captions = [
        TeacherCaption(f"a red chair, {view} view", "chair", "red", view, "x") for view in ("front", "back")
    ]

    def sample(texts: Sequence[str], views: Sequence[str], seed: int) -> torch.Tensor:
        images = torch.stack([EVALUATOR.image("chair", "blue", "front") for _ in texts])
        if seed:
            images[0] = float("nan")
        return images

    report = evaluate_teacher(sample, EVALUATOR, captions, settings=SETTINGS)  # type: ignore[arg-type]
    assert report["num_failed_images"] == 1
    assert report["rates"]["noun"]["per_seed"] == [1.0, 0.5]
    assert report["rates"]["colour"]["mean"] == 0.0
    assert report["rates"]["view"]["per_seed"] == [0.5, 0.0]
    assert report["rates"]["all"]["mean"] == 0.0
    assert report["rates"]["noun"]["std_over_seeds"] == pytest.approx(0.5 / 2**0.5)
    assert "1 failed images, counted as wrong" in teacher_markdown(report)


def test_frechet_distance_tells_good_from_bad_samples() -> None:
    captions = held_out_captions(NOUNS, _records(), num=12)
    reference = _references(captions * 2)

    def grey(texts: Sequence[str], views: Sequence[str], seed: int) -> torch.Tensor:
        return torch.full((len(texts), 3, 8, 8), 0.5)

    good = evaluate_teacher(_perfect, EVALUATOR, captions, settings=SETTINGS, reference=reference)  # type: ignore[arg-type]
    bad = evaluate_teacher(grey, EVALUATOR, captions, settings=SETTINGS, reference=reference)  # type: ignore[arg-type]
    assert good["fd_evaluator"]["value"] == pytest.approx(0.0, abs=1e-4)
    assert bad["fd_evaluator"]["value"] > 0.05
    assert good["fd_evaluator"]["num_reference"] == 24


def test_what_an_autoencoder_loses_stands_beside_the_samples() -> None:
    captions = held_out_captions(NOUNS, _records(), num=12)
    reference = _references(captions)

    def chairs_only(images: torch.Tensor) -> torch.Tensor:
        return EVALUATOR.image("chair", "red", "front").expand_as(images)

    def report(reconstruct: Callable[[torch.Tensor], torch.Tensor] | None) -> dict[str, Any]:
        return evaluate_teacher(
            _perfect,
            EVALUATOR,  # type: ignore[arg-type]
            captions,
            settings=SETTINGS,
            reference=reference,
            reconstruct=reconstruct,
        )

    faithful, poor = report(lambda images: images), report(chairs_only)
    assert faithful["autoencoder"]["noun_macro_after"]["mean"] == 1.0
    assert faithful["autoencoder"]["fd_evaluator"] == pytest.approx(0.0, abs=1e-6)
    assert poor["autoencoder"]["noun_macro_before"]["mean"] == 1.0
    assert poor["autoencoder"]["noun_macro_after"]["mean"] == pytest.approx(1 / 3)
    assert poor["autoencoder"]["fd_evaluator"] > 0.05
    assert "after the autoencoder in 33.3 %" in teacher_markdown(poor)
    assert report(None)["autoencoder"] is None


def test_a_sampler_of_the_wrong_shape_is_refused() -> None:
    captions = held_out_captions(NOUNS, _records(), num=3)
    with pytest.raises(UsageError, match="expected \\[3, 3, H, W\\]"):
        evaluate_teacher(lambda t, v, s: torch.zeros(2, 3, 8, 8), EVALUATOR, captions, settings=SETTINGS)  # type: ignore[arg-type]


def test_cameras_and_references_match_what_is_asked() -> None:
    words = ["front", "side", "back", "overhead"] * 10
    assert cameras_for_views(words, seed=1).view_words() == words
    views = painted_views(10, role="neither")
    reference = reference_renders(views, ["crate"], num=3)
    assert reference.images.shape == (3, 3, 32, 32) and reference.nouns == ["crate"] * 3


def test_view_rule_for_objects_with_and_without_a_front() -> None:
    probabilities = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]])
    assert right_view(probabilities, ["back", "back", "back"], [True, False, False]).tolist() == [
        False,
        True,
        False,
    ]
    assert right_view(probabilities, ["front", "overhead", "overhead"], [True, False, True]).tolist() == [
        True,
        False,
        True,
    ]
