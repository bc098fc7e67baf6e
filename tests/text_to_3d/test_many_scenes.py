"""Many prompts in one command: complete run directories, failures that stay within a scene, resume."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trimesh

from uni3d import cli
from uni3d.commands.batch import read_options, read_requests
from uni3d.config.loader import config_to_yaml, load_config
from uni3d.config.text_to_3d import (
    CheckpointsConfig,
    DiscriminatorConfig,
    FakeScoreConfig,
    FieldConfig,
    MeshConfig,
    RendererConfig,
    TextTo3DConfig,
)
from uni3d.errors import Interrupted, UsageError
from uni3d.scene.occupancy import OccupancyGrid
from uni3d.scene.radiance_field import RadianceField
from uni3d.text_to_3d import many_scenes
from uni3d.text_to_3d.many_scenes import generate_many
from uni3d.text_to_3d.pipeline import generate
from uni3d.text_to_3d.scene_batch import SceneBatch
from uni3d.text_to_3d.scene_requests import ScenePlan, SceneRequest

SCENES = [SceneRequest("a red chair", 0), SceneRequest("a red chair", 1), SceneRequest("a blue vase", 0)]
NAMES = ["a-red-chair-0", "a-red-chair-1", "a-blue-vase-0"]


@pytest.fixture(autouse=True)
def _plain_meshes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a test is about meshes, a box stands for each, made here and now."""
    if "real_meshes" in request.fixturenames:
        return

    def box(config: TextTo3DConfig, path: Path) -> None:
        trimesh.creation.box().export(path / "mesh.glb")
        (path / "metrics.json").write_text('{"fog": 0.5}')

    monkeypatch.setattr(many_scenes.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(many_scenes, "make_mesh", box)


@pytest.fixture
def real_meshes() -> None:
    """Asked for by tests that are about meshes."""


@pytest.fixture
def config(tiny_teacher_folder: Path, tmp_path: Path) -> TextTo3DConfig:
    return TextTo3DConfig(
        teacher=str(tiny_teacher_folder),
        runs_folder=tmp_path / "set",
        device="cpu",
        quiet=True,
        steps=4,
        method="sds",
        field=FieldConfig(resolutions=(8, 16)),
        renderer=RendererConfig(resolution=((0.0, 16.0),), samples_per_ray=16),
        fake_score=FakeScoreConfig(lora_rank=2, warmup_steps=1),
        discriminator=DiscriminatorConfig(num_real_samples=4, sampling_steps=2),
        mesh=MeshConfig(resolution=24, max_triangles=400, texture_size=64, turntable_frames=0),
        checkpoints=CheckpointsConfig(interval_s=0.0),
    )


def plan_of(config: TextTo3DConfig, at_once: int = 2) -> ScenePlan:
    return ScenePlan.of(SCENES, config.runs_folder, at_once)


def resumed(config: TextTo3DConfig) -> tuple[TextTo3DConfig, ScenePlan]:
    folder = config.runs_folder
    return dataclasses.replace(config, resume=folder), ScenePlan.load(folder)


def steps_of(folder: Path) -> list[int]:
    return [json.loads(row)["step"] for row in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_scene_leaves_an_ordinary_run_directory(
    config: TextTo3DConfig, real_meshes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meshes are made by two processes."""
    monkeypatch.setattr(many_scenes.os, "cpu_count", lambda: 2)
    result = generate_many(config, plan_of(config))
    assert result.failures == {} and result.summary["num_finished"] == 3
    for name in NAMES:
        run = config.runs_folder / name
        wanted = {"mesh.glb", "preview.png", "config.yaml", "metrics.jsonl", "metrics.json", "checkpoints"}
        assert wanted <= {path.name for path in run.iterdir()}
        assert steps_of(run) == [1, 2, 3, 4]
    written = json.loads((config.runs_folder / "summary.json").read_text())
    assert [scene["directory"] for scene in written["scenes"]] == NAMES
    assert (config.runs_folder / "contact_sheet.png").is_file()


def test_a_scene_of_a_set_can_be_gone_on_with_alone(
    config: TextTo3DConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run directory is that of a single run with the same settings, half-way and at the end."""
    with monkeypatch.context() as patch:
        _stop_in(patch, lambda batch: batch.step_index == 1)
        with pytest.raises(Interrupted):
            generate_many(config, plan_of(config))
    run = config.runs_folder / NAMES[1]
    assert steps_of(run) == [1, 2]
    own = dataclasses.replace(load_config(run / "config.yaml", TextTo3DConfig()), resume=run)
    assert generate(own).output == run / "mesh.glb"
    assert steps_of(run) == [1, 2, 3, 4]


def _poison(monkeypatch: pytest.MonkeyPatch, prompt: str) -> None:
    """The views of one prompt are never finite."""
    step = SceneBatch.step

    def poisoned(self: SceneBatch) -> Any:
        encode = self.teacher.encode_images

        def encoded(images: torch.Tensor) -> torch.Tensor:
            views = len(images) // len(self.scenes)
            factor = [torch.nan if scene.prompt == prompt else 1.0 for scene in self.scenes]
            return encode(images) * torch.tensor(factor).repeat_interleave(views).view(-1, 1, 1, 1)

        self.teacher.encode_images = encoded  # type: ignore[method-assign]
        try:
            return step(self)
        finally:
            self.teacher.encode_images = encode  # type: ignore[method-assign]

    monkeypatch.setattr(SceneBatch, "step", poisoned)


def test_a_scene_that_fails_stops_no_other(
    config: TextTo3DConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Both ways to fail: a run that diverges, and a field that has no surface."""
    _poison(monkeypatch, "a red chair")
    make = many_scenes.make_mesh

    def make_but_one(own: TextTo3DConfig, path: Path) -> str | None:
        return "the field has no surface" if own.seed == 7 else make(own, path)

    monkeypatch.setattr(many_scenes, "make_mesh", make_but_one)
    settings, prompts = tmp_path / "settings.yaml", tmp_path / "prompts.txt"
    settings.write_text(config_to_yaml(dataclasses.replace(config, steps=16)))
    prompts.write_text("a red chair\na blue vase | 0,7\n")
    folder = tmp_path / "set"
    words = ["generate", "--prompts", str(prompts), "--output-dir", str(folder), "--config", str(settings)]
    assert cli.main([*words, "--json"]) == 1
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert {scene["directory"]: scene["status"] for scene in summary["scenes"]} == {
        "a-red-chair-0": "failed", "a-blue-vase-0": "finished", "a-blue-vase-7": "failed",
    }  # fmt: skip
    assert (folder / "a-blue-vase-0" / "mesh.glb").is_file()
    assert steps_of(folder / "a-blue-vase-0") == list(range(1, 17))
    last = err.strip().splitlines()[-1]
    assert (
        "2 of 3 scenes failed: a-red-chair-0: " in last and "a-blue-vase-7: the field has no surface" in last
    )


def _stop_in(monkeypatch: pytest.MonkeyPatch, is_now: Callable[[SceneBatch], bool]) -> None:
    step = SceneBatch.step

    def step_and_be_stopped(self: SceneBatch) -> Any:
        if is_now(self):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(SceneBatch, "step", step_and_be_stopped)


def test_a_stopped_set_goes_on_and_makes_nothing_twice(
    config: TextTo3DConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _stop_in(patch, lambda batch: len(batch.scenes) == 1 and batch.step_index == 1)
        with pytest.raises(Interrupted, match=r"uni3d generate --resume .*set") as caught:
            generate_many(config, plan_of(config))
    assert caught.value.exit_code == 143
    first, last = (config.runs_folder / name for name in (NAMES[0], NAMES[2]))
    made_at = (first / "mesh.glb").stat().st_mtime_ns
    assert steps_of(last) == [1, 2] and not (last / "mesh.glb").exists()
    begun: list[tuple[int, int]] = []
    _stop_in(monkeypatch, lambda batch: bool(begun.append((len(batch.scenes), batch.step_index))))
    result = generate_many(*resumed(config))
    assert begun == [(1, 2), (1, 3)]
    assert result.failures == {} and (last / "mesh.glb").is_file()
    assert steps_of(last) == [1, 2, 3, 4]
    assert (first / "mesh.glb").stat().st_mtime_ns == made_at


def test_a_group_goes_on_from_the_step_that_all_its_scenes_have(config: TextTo3DConfig) -> None:
    """As after a kill between two scenes' checkpoints."""
    generate_many(config, plan_of(config))
    for name in NAMES[:2]:
        (config.runs_folder / name / "metrics.json").unlink()
    newest = config.runs_folder / NAMES[1] / "checkpoints" / "step_00000004.safetensors"
    newest.unlink()
    result = generate_many(*resumed(config))
    assert result.summary["num_finished"] == 3 and newest.is_file()
    assert [steps_of(config.runs_folder / name) for name in NAMES] == [[1, 2, 3, 4]] * 3


def test_results_are_not_overwritten_unasked(config: TextTo3DConfig) -> None:
    generate_many(config, plan_of(config))
    made_at = (config.runs_folder / NAMES[0] / "mesh.glb").stat().st_mtime_ns
    with pytest.raises(UsageError, match="--overwrite"):
        generate_many(config, plan_of(config))
    assert (config.runs_folder / NAMES[0] / "mesh.glb").stat().st_mtime_ns == made_at
    fewer = ScenePlan.of(SCENES[:1], config.runs_folder, 2)
    generate_many(dataclasses.replace(config, overwrite=True), fewer)
    assert (config.runs_folder / NAMES[0] / "mesh.glb").stat().st_mtime_ns != made_at
    assert not (config.runs_folder / NAMES[2]).exists()


def test_a_folder_of_something_else_is_left_alone(config: TextTo3DConfig) -> None:
    foreign = config.runs_folder / NAMES[0]
    foreign.mkdir(parents=True)
    (foreign / "letter.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="choose another folder"):
            generate_many(dataclasses.replace(config, overwrite=overwrite), plan_of(config))
    assert (foreign / "letter.txt").read_text() == "dear"


def test_prompts_are_read_with_their_seeds(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# furniture\na red chair\n\n  a blue vase | 3,5-6  # tall\n", encoding="utf-8-sig")
    wanted = [("a red chair", 0), ("a red chair", 1), *(("a blue vase", seed) for seed in (3, 5, 6))]
    assert [(one.prompt, one.seed) for one in read_requests(file, [0, 1])] == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompt"),
        ("# nothing\n", "holds no prompt"),
        ("a chair\na \x07 bell\n", "prompts.txt:2: the prompt holds the control character"),
        ("a chair | x\n", "prompts.txt:1: seeds is ' x'"),
        (" | 3\n", "prompts.txt:1: the prompt is empty"),
        ("a chair | 0-20000\n", "prompts.txt:1: seeds names 20001 numbers"),
    ],
)
def test_bad_prompt_files_are_refused_with_their_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_requests(file, [0])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_names_tell_scenes_apart(tmp_path: Path) -> None:
    requests = [SceneRequest("a chair", 0), SceneRequest("a chair!", 0), SceneRequest("a chair", 1)]
    plan = ScenePlan.of(requests, tmp_path, 2)
    assert list(plan.scenes) == ["a-chair-0", "a-chair-0-2", "a-chair-1"]
    with pytest.raises(UsageError, match="asked for twice"):
        ScenePlan.of([requests[0], requests[0]], tmp_path, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "FILE"], "--output-dir"),
        (["--prompts", "none.txt", "--output-dir", "x"], "does not exist"),
        (["--prompts", "FILE", "--output-dir", "x", "--scenes-at-once", "0"], "--scenes-at-once"),
        (["--prompts", "FILE", "--output-dir", "x", "--seeds", "a"], "--seeds"),
        (["--prompts", "FILE", "--output-dir", "x", "--output", "y.glb"], "output"),
    ],
)
def test_bad_options_are_refused(words: list[str], message: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a chair\n")
    with pytest.raises(UsageError, match=message):
        read_options([str(file) if word == "FILE" else word for word in words])


def test_resume_takes_no_other_settings(config: TextTo3DConfig) -> None:
    many_scenes._begin_folder(config, plan_of(config))
    folder = str(config.runs_folder)
    _, plan = read_options(["--resume", folder, "--quiet"])
    assert list(plan.scenes) == NAMES and plan.at_once == 2
    for words in (["--steps", "9"], ["--prompts", "x"], ["--seeds", "3"]):
        with pytest.raises(UsageError, match="goes on with the settings"):
            read_options(["--resume", folder, *words])


def test_a_mesh_that_cannot_be_made_is_a_sentence(config: TextTo3DConfig, real_meshes: None) -> None:
    plan = plan_of(config)
    many_scenes._begin_folder(config, plan)
    run = many_scenes._open_runs(config, plan)[0]
    field = RadianceField(resolutions=config.field.resolutions)
    for grid in field.density_grids:
        grid.data.fill_(-20.0)
    occupancy = OccupancyGrid()
    run.store.save(4, {"step": 4, "field": field.state_dict(), "occupancy": occupancy.state_dict()})
    reason = many_scenes.make_mesh(run.config, run.run.path)
    assert reason is not None and "surface" in reason and "\n" not in reason


def test_scenes_share_memory_in_halves(
    config: TextTo3DConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Three scenes are too many: two and one go on where all stood."""
    step, begun = SceneBatch.step, []

    def limited(self: SceneBatch) -> Any:
        begun.append((len(self.scenes), self.step_index))
        if len(self.scenes) > 2 and self.step_index == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self)

    monkeypatch.setattr(SceneBatch, "step", limited)
    result = generate_many(dataclasses.replace(config, steps=2), plan_of(config, at_once=3))
    assert begun == [(3, 0), (3, 1), (2, 1), (1, 1)]
    assert "out of memory with 3 scenes at once; going on with 2" in caplog.text
    assert result.failures == {}
    assert [steps_of(config.runs_folder / name) for name in NAMES] == [[1, 2]] * 3
