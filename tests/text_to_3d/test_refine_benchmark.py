"""The measurement of `refine` on a tiny random teacher: its list, its results, its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trimesh

from uni3d.config.refine import RefineConfig
from uni3d.errors import UsageError
from uni3d.evaluation.mesh_quality import JudgedMesh, MeshItem, MeshScore, RenderedMesh
from uni3d.text_to_3d import refine_benchmark
from uni3d.text_to_3d.refine_benchmark import judge_all, read_tasks, refine_all, silhouette_iou


@pytest.fixture
def meshes(tmp_path: Path) -> Path:
    folder = tmp_path / "meshes"
    folder.mkdir()
    trimesh.creation.box().export(folder / "box.stl")
    (folder / "list.txt").write_text("# meshes\nbox.stl | a blue crate\nbox.stl | a red crate\n")
    return folder


def test_a_list_names_meshes_and_prompts(meshes: Path, tmp_path: Path) -> None:
    first, second = read_tasks(meshes / "list.txt", meshes, tmp_path)
    assert (first.source, first.prompt) == (meshes / "box.stl", "a blue crate")
    assert first.result != second.result and first.result.parent == tmp_path
    for line, reason in (
        ("box.stl a blue crate", "expected 'mesh file"),
        ("ball.stl | a blue ball", "there is no mesh"),
        ("box.stl | a large crate", "asks for no colour"),
    ):
        (meshes / "bad.txt").write_text(f"{line}\n")
        with pytest.raises(UsageError, match=reason):
            read_tasks(meshes / "bad.txt", meshes, tmp_path)


def test_nothing_is_made_twice_and_settings_do_not_mix(
    meshes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Result:
        seconds = {"optimise": 1.0}
        report = {"fog": 0.0}

        def save(self, path: Path) -> Path:
            path.write_bytes(b"glb")
            return path

    monkeypatch.setattr(refine_benchmark, "load_run_teacher", lambda *_: (None, None))
    monkeypatch.setattr(refine_benchmark, "refine_mesh", lambda *_: Result())
    tasks = read_tasks(meshes / "list.txt", meshes, tmp_path)
    said: list[str] = []
    refine_all(tasks[:1], RefineConfig(), tmp_path, said.append)
    refine_all(tasks, RefineConfig(), tmp_path, said.append)
    assert [line.partition(":")[0] for line in said] == [task.result.name for task in tasks]
    with pytest.raises(UsageError, match="other settings"):
        refine_all(tasks, RefineConfig(seed=1), tmp_path, said.append)


def test_figures_count_every_mesh(meshes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = read_tasks(meshes / "list.txt", meshes, tmp_path)
    for task in tasks:
        task.result.with_suffix(".json").write_text('{"seconds": {"optimise": 1.0}}')
    views = RenderedMesh(torch.zeros(24, 3, 8, 8), torch.ones(24, 8, 8))

    def judge(item: MeshItem, *_: Any) -> JudgedMesh:
        is_right = item.path == tasks[0].result
        score = MeshScore(str(item.path), item.prompt, None, "crate", "blue", False, colour_right=is_right)
        return JudgedMesh(score, None if item.path == tasks[1].result else views)

    monkeypatch.setattr(refine_benchmark, "judge_mesh", judge)
    evaluator: Any = type("E", (), {"network": type("N", (), {"config": type("C", (), {"image_size": 8})})})
    report = judge_all(tasks, evaluator, tmp_path)
    assert report["rates"]["colour_right_before"]["mean"] == 0.0
    assert report["rates"]["colour_right_after"]["mean"] == 0.5
    assert report["rates"]["lowest_silhouette_iou"] == 0.0, "one that cannot be seen has no silhouette"
    assert (tmp_path / "refine_quality.png").is_file()


def test_silhouettes_overlap_as_their_areas_do() -> None:
    half, whole = torch.zeros(2, 4, 4), torch.ones(2, 4, 4)
    half[:, :2] = 1.0
    images = torch.zeros(2, 3, 4, 4)
    first, second = RenderedMesh(images, half), RenderedMesh(images, whole)
    assert silhouette_iou(first, second) == pytest.approx(0.5)
    assert silhouette_iou(second, second) == 1.0
