"""`uni3d train-teacher` and `uni3d distill`: the tiny configurations, and every mistake in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from distillation_fixtures import SIZE, save_teacher
from PIL import Image

from uni3d import cli
from uni3d.diffusion import edm
from uni3d.resources import resource_path

SHORT = ["--run.total-images", "64", "--run.device", "cpu", "--quiet"]
TINY = ["--config", str(resource_path("configs/distill_tiny.yaml"))]


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(exit code, the one sentence on stderr)."""
    code = cli.main(words)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("uni3d: error: "), err
    return code, err


def test_the_tiny_configurations_from_images_to_a_student(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train-teacher", "--config", str(resource_path("configs/train_teacher_tiny.yaml"))]
    assert cli.main([*words, "--output", str(tmp_path / "teacher"), *SHORT]) == 0
    out, _ = capsys.readouterr()
    assert out == f"{tmp_path / 'teacher' / 'teacher'} (finished; 64 images)\n"
    words = ["distill", *TINY, "--teacher", str(tmp_path / "teacher" / "teacher")]
    words += ["--output", str(tmp_path / "student"), *SHORT, "--json"]
    words += ["--method.score-warmup-images", "32", "--method.plain-warmup-images", "0"]
    assert cli.main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["is_finished"] and result["images"] == 64
    student = edm.load(result["network"])
    assert student.config.resolution == 16 and student.config.label_dim == 4
    grid = np.asarray(Image.open(tmp_path / "student" / "grids" / "step_00000002.png"))
    assert grid.shape == (512, 512, 3) and grid.std() > 0
    # Going on needs the folder alone; --run.total-images is no change of what was done.
    words = ["distill", "--output", str(tmp_path / "student"), "--resume", "--run.total-images", "96"]
    assert cli.main([*words, "--quiet"]) == 0
    assert "96 images" in capsys.readouterr().out
    code, sentence = said([*words, "--quiet", "--companions.learning-rate", "2e-3"], capsys)
    assert code == 2 and "companions.learning_rate was 0.001, now 0.002" in sentence
    assert "--accept-changes" in sentence


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teachers") / "teacher")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("shapes:20:16", "has images of 16x16 pixels, the teacher makes 8x8"),
        ("shapes:20:8x", "write shapes:N or shapes:N:SIZE"),
        ("missing.zip", "'missing.zip' does not exist"),
        ("grey.npz", "has 1 channels, the teacher 3"),
        ("unlabelled.npz", "has no labels, but the teacher knows 4 classes"),
        ("many.npz", "has 9 classes, the teacher 4"),
        ("empty", "empty"),
        ("damaged.zip", "damaged.zip' cannot be read as a zip"),
        (None, "no images were given; pass --data.source"),
    ],
)
def test_images_that_do_not_go_with_the_teacher(
    source: str | None,
    message: str,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    pixels = np.zeros((10, SIZE, SIZE, 3), np.uint8)
    np.savez("grey.npz", images=pixels[..., 0], labels=np.arange(10) % 4)
    np.savez("unlabelled.npz", images=pixels)
    np.savez("many.npz", images=pixels, labels=np.arange(10) % 9)
    Path("empty").mkdir()
    Path("damaged.zip").write_bytes(b"PK\x03\x04 and no more")
    words = ["distill", "--teacher", str(teacher), "--output", "run", *SHORT]
    code, sentence = said([*words, *([] if source is None else ["--data.source", source])], capsys)
    assert code == 2 and message in sentence
    assert not Path("run").exists()


def test_teachers_that_are_none(tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["distill", "--output", str(tmp_path / "run"), "--data.source", "shapes:20:8", *SHORT]
    code, sentence = said(words, capsys)
    assert code == 2 and "no teacher was given; pass --teacher" in sentence
    code, sentence = said([*words, "--teacher", str(tmp_path / "none")], capsys)
    assert code == 2 and "is not a folder; pass one that train-teacher or import-edm wrote" in sentence
    other = save_teacher(tmp_path / "other", model_channels=16)
    code, sentence = said([*words, "--teacher", str(teacher), "--initial-student", str(other)], capsys)
    assert code == 2 and "is of another architecture than the teacher" in sentence
    weights = other / edm.WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:-8])
    code, sentence = said([*words, "--teacher", str(other)], capsys)
    assert code == 2 and "damaged" in sentence
    assert not (tmp_path / "run").exists()


def test_folders_and_methods_that_do_not_work(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["distill", "--teacher", str(teacher), "--data.source", "shapes:20:8", *SHORT]
    run = tmp_path / "run"
    code, sentence = said([*words, "--output", str(run), "--resume"], capsys)
    assert code == 2 and "is not the folder of a run (it has no config.yaml)" in sentence
    for flags, message in (
        (["--method.method", "vsd"], "needs prompts, guidance or a reward"),
        (["--method.method", "sid", "--method.ratio", "attached"], "method.ratio belongs to uni-instruct"),
        (["--method.method", "sid", "--method.divergence", "js"], "sid minimises reverse_kl by definition"),
        (["--run.batch", "0"], "run.batch is 0; expected a number from 1"),
        (["--noise.t-max", "2"], "noise.t_max is 2.0; expected a number from 0.01 to 1"),
    ):
        code, sentence = said([*words, "--output", str(run), *flags], capsys)
        assert code == 2 and message in sentence
    assert not run.exists()
    run.mkdir()
    (run / "config.yaml").write_text("teacher: null\n")
    for command in (words, ["train-teacher", "--data.source", "shapes:20:8", *SHORT]):
        code, sentence = said([*command, "--output", str(run)], capsys)
        assert code == 2 and "holds a run already; pass --resume to go on, or another folder" in sentence
    assert [path.name for path in run.iterdir()] == ["config.yaml"]


def test_a_preset_of_another_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train-teacher", "--data.source", "shapes:20:8", "--output", str(tmp_path / "run"), *SHORT]
    code, sentence = said([*words, "--network.preset", "cifar10-32x32-cond-vp"], capsys)
    assert code == 2 and "is for 32x32 images with 3 channels and 10 classes, the data have 8x8" in sentence
    code, sentence = said([*words, "--network.attention-resolutions", "-3"], capsys)
    assert code == 2
    assert not (tmp_path / "run").exists()
