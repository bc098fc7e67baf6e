"""`uni3d sample` on tiny networks: the three outputs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from network_folders import write_network
from PIL import Image

from uni3d import cli
from uni3d.commands.parsing import read_numbers
from uni3d.data.image_readers import open_images
from uni3d.diffusion.edm import CONFIG_NAME, WEIGHTS_NAME
from uni3d.errors import UsageError

STUDENT = {"student": {"sigma_init": 2.0}, "ema": "half-life 500 kimg"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("networks") / "teacher")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("networks") / "student", source=STUDENT, label_dim=0)


def run(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    """The stdout of a command that succeeds, the one line of stderr of one that fails."""
    assert cli.main([str(word) for word in words]) == code
    out, err = capsys.readouterr()
    if code == 0:
        return out
    assert out == "" and err.count("\n") == 1 and err.startswith("uni3d: error: "), err
    return err


def test_the_three_outputs_hold_the_same_images(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", teacher, "--seeds", "4-8", "--steps", "2", "--quiet"]
    for name in ("grid.png", "images.zip", "images"):
        assert run(capsys, *words, "--output", tmp_path / name) == f"{tmp_path / name}\n"
    folder, archive = open_images(tmp_path / "images"), open_images(tmp_path / "images.zip")
    assert np.array_equal(folder.images(), archive.images())
    assert folder.labels.tolist() == archive.labels.tolist() and len(folder) == 5
    assert sorted(file.name for file in (tmp_path / "images").glob("*.png"))[0] == "seed00000004.png"
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (16, 24, 3)
    assert np.array_equal(grid[8:, 8:16].transpose(2, 0, 1), folder.images()[4])
    assert (grid[8:, 16:] == 0).all()


def test_batches_do_not_change_the_images(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for size in (1, 64):
        run(
            capsys, "sample", teacher, "--seeds", "0-3", "--steps", "2", "--quiet",
            "--output", tmp_path / f"{size}.zip", "--batch-size", size, "--class", "2",
        )  # fmt: skip
    one, all_ = (open_images(tmp_path / f"{size}.zip") for size in (1, 64))
    assert np.abs(one.images().astype(int) - all_.images().astype(int)).max() <= 1
    assert one.labels.tolist() == [2] * 4


def test_a_student_takes_one_step(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "sample", student, "--seeds", "0", "--output", tmp_path / "a.png", "--json")
    report = json.loads(out)
    assert report["num_evaluations"] == 1 and report["sigma_init"] == 2.0 and report["sampler"] == "one_step"
    assert report["source"] == STUDENT and report["num_images"] == 1
    refused = run(capsys, "sample", student, "--output", tmp_path / "b.png", "--steps", "3", code=2)
    assert "one-step student; leave --steps out" in refused
    assert not (tmp_path / "b.png").exists()


def test_an_imported_student_is_told_to_take_one_step(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", teacher, "--seeds", "0", "--json", "--quiet"]
    report = json.loads(run(capsys, *words, "--output", tmp_path / "a.png", "--one-step"))
    assert report["sigma_init"] == 2.5
    teacher_report = json.loads(run(capsys, *words, "--output", tmp_path / "b.png", "--churn", "3"))
    assert teacher_report["num_evaluations"] == 35 and teacher_report["s_churn"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "5-2"], "--seeds is '5-2'; expected numbers such as 7, 0-63"),
        (["--seeds", "x"], "--seeds is 'x'"),
        (["--seeds", "0,0"], "names a seed twice"),
        (["--seeds", "0-99999999"], "expected at most 10000000"),
        (["--class", "3"], "--class is 3; the network knows the classes 0 to 2"),
        (["--steps", "0"], "--steps is 0; expected a number from 1"),
        (["--steps", "2", "--one-step"], "contradict each other"),
        (["--sigma-init", "2"], "--sigma-init is for one-step students"),
        (["--one-step", "--churn", "1"], "leave --churn out"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_bad_options_are_one_sentence(
    words: list[str], message: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.png"
    seeds = [] if "--seeds" in words else ["--seeds", "0"]
    assert message in run(capsys, "sample", teacher, "--output", output, *seeds, *words, code=2)
    assert not output.exists()


def test_an_unconditional_network_knows_no_class(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run(capsys, "sample", student, "--output", tmp_path / "a.png", "--class", "0", code=2)
    assert "unconditional" in said


def test_nothing_is_overwritten(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    words = ["sample", teacher, "--seeds", "0", "--steps", "1", "--quiet", "--output"]
    for name, message in (("a.png", "exists"), ("full", "not empty"), ("a.gif", "use .png, .zip")):
        assert message in run(capsys, *words, tmp_path / name, code=2)
    assert (tmp_path / "a.png").read_text() == "mine"
    run(capsys, *words, tmp_path / "a.png", "--overwrite")
    run(capsys, *words, tmp_path / "full", "--overwrite")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_damaged_networks_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--seeds", "0", "--output", tmp_path / "a.png"]
    assert "is not a folder" in run(capsys, "sample", tmp_path / "none", *output, code=2)
    assert "no folder of a network" in run(capsys, "sample", tmp_path, *output, code=2)
    cut = write_network(tmp_path / "cut")
    (cut / WEIGHTS_NAME).write_bytes((cut / WEIGHTS_NAME).read_bytes()[:-9])
    run(capsys, "sample", cut, *output, code=2)
    (cut / CONFIG_NAME).write_text("{")
    assert "damaged" in run(capsys, "sample", cut, *output, code=2)
    wide = write_network(tmp_path / "wide", image_channels=4)
    assert "4 channels" in run(capsys, "sample", wide, *output, code=2)
    odd = write_network(tmp_path / "odd", source={"student": 3})
    assert "damaged 'student' entry" in run(capsys, "sample", odd, *output, code=2)


def test_numbers() -> None:
    assert read_numbers("--seeds", "7") == range(7, 8)
    assert list(read_numbers("--seeds", " 0-2,9 , 4 - 5")) == [0, 1, 2, 9, 4, 5]
    for text in ("", "-1", "1-", "1--2", "1.5", "9223372036854775808"):
        with pytest.raises(UsageError, match="expected numbers"):
            read_numbers("--seeds", text)
