"""Commands on their real programs, as small as they go: render, sample, vocabulary, measure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from uni3d import cli


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
