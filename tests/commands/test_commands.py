"""Commands on their real programs, as small as they go: render, sample, vocabulary, measure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from uni3d import cli
from uni3d.commands.evaluation import recorded_fog


@pytest.fixture(scope="module")
def views_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("views") / "vases"
    words = ["teacher", "render", "procedural:vases:2", "--output", str(folder), "--num-views", "2"]
    assert cli.main([*words, "--size", "32", "--workers", "1", "--quiet"]) == 0
    return folder


def test_render_goes_on_where_it_stopped(views_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["teacher", "render", "procedural:vases:2", "--output", str(views_folder), "--num-views", "2"]
    assert cli.main([*words, "--size", "32", "--workers", "1", "--quiet", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert len(report["already_done"]) == 2 and report["rendered"] == [] and report["num_views"] == 0
    assert err == ""


def test_render_refuses_other_settings_in_the_same_folder(
    views_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["teacher", "render", "procedural:vases:2", "--output", str(views_folder), "--size", "64"]
    assert cli.main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_sample_draws_a_grid(
    tiny_teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = tmp_path / "grid.png"
    words = ["teacher", "sample", "a red chair", "a blue vase", "--teacher", str(tiny_teacher_folder)]
    assert cli.main([*words, "--output", str(grid), "--steps", "2"]) == 0
    assert capsys.readouterr().out == f"{grid}\n"
    pixels = np.asarray(Image.open(grid).convert("RGB"))
    assert pixels.ndim == 3 and pixels.std() > 0
    assert cli.main([*words, "--output", str(grid)]) == 2
    assert "exists; choose another name or pass --overwrite" in capsys.readouterr().err


def test_vocabulary_lists_and_filters(tiny_teacher_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["teacher", "vocabulary", "--teacher", str(tiny_teacher_folder)]) == 0
    assert capsys.readouterr().out == "nouns (2): chair, vase\ncolours (1): red\n"
    assert cli.main(["teacher", "vocabulary", "va", "--teacher", str(tiny_teacher_folder)]) == 0
    assert capsys.readouterr().out == "nouns (1): vase\n"


def test_training_on_no_views_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["teacher", "train"], ["evaluator", "train"]):
        assert cli.main([*words, str(tmp_path), "--output", str(tmp_path / "run")]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.splitlines()[-1].startswith("uni3d: error: ") and "Traceback" not in err


def test_inspect_says_what_a_mesh_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "box.glb"
    trimesh.creation.box().export(file)
    assert cli.main(["inspect", str(file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 12 in report.values() or any(
        12 in group.values() for group in report.values() if isinstance(group, dict)
    )
    assert cli.main(["inspect", str(file)]) == 0
    assert ": " in capsys.readouterr().out
    (tmp_path / "cut.glb").write_bytes(file.read_bytes()[:200])
    assert cli.main(["inspect", str(tmp_path / "cut.glb")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_evaluate_asks_for_what_a_file_does_not_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", str(tmp_path)]) == 2
    assert "holds no mesh.glb" in capsys.readouterr().err
    assert cli.main(["evaluate", str(tmp_path / "none.glb")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "flag", "message"),
    [
        ("evaluator", "--steps", "steps is 0; expected a number from 1"),
        ("teacher", "--denoiser.planned-steps", "denoiser.planned_steps is 0; expected a number from 1"),
    ],
)
def test_training_for_no_steps_is_one_sentence(
    command: str, flag: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [command, "train", str(tmp_path), "--output", str(tmp_path / "run"), flag, "0"]
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_fog_is_read_from_the_run_that_recorded_it(tmp_path: Path) -> None:
    assert recorded_fog(tmp_path) is None and recorded_fog(tmp_path / "mesh.glb") is None
    file = tmp_path / "metrics.json"
    cases = [('{"fog": 0.25}', 0.25), ('{"fog": 0}', 0.0), ("{}", None), ("[1]", None), ("{", None)]
    cases += [
        ('{"fog": 2}', None),
        ('{"fog": NaN}', None),
        ('{"fog": "much"}', None),
        ('{"fog": null}', None),
    ]
    for text, expected in cases:
        file.write_text(text)
        assert recorded_fog(tmp_path) == expected, text
    file.write_bytes(b"\xff\xfe")
    assert recorded_fog(tmp_path) is None


def test_evaluate_reports_the_fog_of_runs_and_names_a_broken_mesh(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mesh.glb").write_bytes(b"no mesh")
    (tmp_path / "metrics.json").write_text('{"fog": 0.5}')
    assert cli.main(["evaluate", str(tmp_path), "--prompt", "a red chair", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["rates"]["is_foggy"]["mean"] == 1.0
    assert err.count(str(tmp_path / "mesh.glb")) == 1
