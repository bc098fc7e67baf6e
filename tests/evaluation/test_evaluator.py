"""A tiny evaluator learns two painted objects, is saved, loaded and resumed, and says what it cannot do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_fixtures import merged, painted_views

from uni3d.errors import MissingWeightsError, UsageError
from uni3d.evaluation.ceiling import grey_composites
from uni3d.evaluation.evaluator import Evaluator
from uni3d.evaluation.evaluator_card import write_card
from uni3d.evaluation.evaluator_training import fit_evaluator, train_evaluator
from uni3d.evaluation.report import stress_note
from uni3d.evaluation.settings import EvaluatorSettings

TINY = EvaluatorSettings(
    image_size=32,
    input_size=32,
    stage_channels=(16, 16, 24),
    stage_blocks=(1, 1, 1),
    stem_channels=32,
    head_channels=96,
    view_hidden=16,
    embedding_size=16,
    text_width=16,
    text_layers=1,
    text_heads=2,
    steps=40,
    max_minutes=None,
    batch_size=24,
    learning_rate=6e-3,
    tower_learning_rate=6e-3,
    warmup_steps=4,
    ema_decay=0.85,
    recolour_probability=0.0,
    caption_weight=0.1,
    log_seconds=1e9,
    save_seconds=1e9,
    device="cpu",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("evaluator")
    views = merged(painted_views(64, role="evaluator"), painted_views(24, role="neither", seed=1))
    return folder, fit_evaluator(TINY, views, folder)


def test_it_tells_red_crates_from_blue_planets(trained: tuple[Path, dict]) -> None:
    folder, metrics = trained
    evaluator = Evaluator.load(folder)
    views = painted_views(40, role="neither", seed=5)
    images = grey_composites(views.images)
    nouns = evaluator.noun_probabilities(images, ["crate", "planet"])
    colours = evaluator.colour_probabilities(images, ["blue", "red"])
    truth = torch.tensor([index % 2 for index in range(40)])
    assert float((nouns.argmax(1) == truth).float().mean()) >= 0.9
    assert float((colours.argmax(1) == 1 - truth).float().mean()) >= 0.9
    for probabilities in (nouns, colours, evaluator.view_probabilities(images)):
        torch.testing.assert_close(probabilities.sum(1), torch.ones(40))
    ceiling = metrics["ceiling"]
    assert ceiling["num_images"] == 24 and ceiling["num_assets"] == 8
    assert ceiling["noun"]["mean"] >= 0.8
    assert ceiling["noun_stress"]["num"] == 8 and 0 <= ceiling["noun_stress_macro"]["mean"] <= 1
    assert ceiling["noun"]["low"] <= ceiling["noun"]["mean"] <= ceiling["noun"]["high"]


def test_its_folder_holds_weights_nouns_metrics_and_a_card(trained: tuple[Path, dict]) -> None:
    folder, metrics = trained
    assert [noun["name"] for noun in json.loads((folder / "nouns.json").read_text())] == ["crate", "planet"]
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    card = (folder / "README.md").read_text()
    assert "right noun among 2" in card and "| crate |" in card and "painted (CC0-1.0)" in card
    assert "after a fixed loss of detail" in card


def test_metrics_from_before_the_stress_are_still_read(trained: tuple[Path, dict], tmp_path: Path) -> None:
    folder, metrics = trained
    old = {name: value for name, value in metrics["ceiling"].items() if not name.startswith("noun_stress")}
    write_card(tmp_path / "README.md", Evaluator.load(folder), metrics | {"ceiling": old}, [])
    card = (tmp_path / "README.md").read_text()
    assert "right noun among 2, per image |" in card and "a fixed loss of detail |" not in card
    assert stress_note(old) == [] and "falls on smooth images" in stress_note(metrics["ceiling"])[1]


def test_saving_and_loading_keeps_the_scores(trained: tuple[Path, dict], tmp_path: Path) -> None:
    evaluator = Evaluator.load(trained[0])
    evaluator.save(tmp_path)
    again = Evaluator.load(tmp_path)
    images = torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again.image_features(images), evaluator.image_features(images))
    torch.testing.assert_close(again.text_features(["a red crate"]), evaluator.text_features(["a red crate"]))
    assert again.noun_names == ["crate", "planet"]
    assert evaluator.encode(images[:0]).features.shape == (0, 96)
    mirrored = evaluator.view_probabilities(images.flip(-1))
    torch.testing.assert_close(mirrored, evaluator.view_probabilities(images))


def test_training_resumes_where_it_stopped(tmp_path: Path) -> None:
    views = painted_views(16, role="both")
    short = replace(TINY, steps=3, batch_size=4)
    first = fit_evaluator(short, views, tmp_path)
    assert first["training"]["steps"] == 3 and first["ceiling"] is None
    longer = fit_evaluator(replace(short, steps=5), views, tmp_path, resume=True)
    assert longer["training"]["steps"] == 5
    with pytest.raises(UsageError, match="other settings"):
        fit_evaluator(replace(short, embedding_size=8), views, tmp_path, resume=True)
    with pytest.raises(MissingWeightsError, match="no checkpoint"):
        fit_evaluator(short, views, tmp_path / "elsewhere", resume=True)


def test_damaged_and_missing_files_are_named(trained: tuple[Path, dict], tmp_path: Path) -> None:
    Evaluator.load(trained[0]).save(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UsageError, match="damaged"):
        Evaluator.load(tmp_path)
    weights.unlink()
    with pytest.raises(MissingWeightsError, match=r"no model\.safetensors"):
        Evaluator.load(tmp_path)


def test_questions_it_cannot_answer_are_refused(trained: tuple[Path, dict]) -> None:
    evaluator = Evaluator.load(trained[0])
    image = torch.zeros(1, 3, 32, 32)
    with pytest.raises(UsageError, match="'zeppelin'"):
        evaluator.noun_probabilities(image, ["crate", "zeppelin"])
    with pytest.raises(UsageError, match="at least one"):
        evaluator.noun_probabilities(image, [])
    with pytest.raises(UsageError, match=r"\[B, 3, H, W\]"):
        evaluator.image_features(torch.zeros(3, 32, 32))


def test_views_of_the_teacher_alone_are_not_trained_on(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="role"):
        fit_evaluator(TINY, painted_views(8, role="teacher"), tmp_path)
    with pytest.raises(UsageError, match="no view shards"):
        train_evaluator(TINY, tmp_path, tmp_path / "out")


def test_augmentation_keeps_range_and_varies() -> None:
    from uni3d.evaluation.augmentation import augment

    rgba = (
        torch.from_numpy(np.asarray(painted_views(6, role="both").images)).permute(0, 3, 1, 2).float() / 255
    )
    first = augment(rgba, torch.Generator().manual_seed(1)).images
    again = augment(rgba, torch.Generator().manual_seed(1)).images
    other = augment(rgba, torch.Generator().manual_seed(2)).images
    assert first.shape == (6, 3, 32, 32)
    assert float(first.min()) >= 0 and float(first.max()) <= 1
    torch.testing.assert_close(first, again)
    assert float((first - other).abs().mean()) > 0.02


def test_older_folders_are_read_as_they_were_trained(trained: tuple[Path, dict], tmp_path: Path) -> None:
    folder = tmp_path / "older"
    shutil.copytree(trained[0], folder)
    config = json.loads((folder / "config.json").read_text())
    assert (config.pop("stem_channels"), config.pop("head_channels")) == (32, 96)
    assert config.pop("pixel_mean") == [127 / 255] * 3 and config.pop("pixel_std") == [128 / 255] * 3
    (folder / "config.json").write_text(json.dumps(config))
    older = Evaluator.load(folder).network
    assert older.config == replace(
        Evaluator.load(trained[0]).network.config,
        pixel_mean=(0.485, 0.456, 0.406),
        pixel_std=(0.229, 0.224, 0.225),
    )
    torch.testing.assert_close(older.image_tower.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
