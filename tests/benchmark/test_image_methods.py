"""The comparison of image methods: tiny networks by commands in this process, and how processes are run."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from uni3d import cli
from uni3d.benchmark import image_jobs, image_methods, image_students
from uni3d.benchmark.image_jobs import CommandFailed, CommandStopped, Crew
from uni3d.benchmark.image_pages import spread, summarise_students, summary_lines, write_student_pages
from uni3d.benchmark.image_students import STUDENTS, Comparison, ComparisonSettings, Run
from uni3d.diffusion import edm
from uni3d.diffusion.edm_config import EDMConfig
from uni3d.distillation.settings import IMAGE_METHODS
from uni3d.errors import UsageError
from uni3d.evaluation import fidelity_nets
from uni3d.evaluation.image_tower import EfficientNetTower, TowerShape
from uni3d.training.stop import StopFlag

NET = "efficientnet_lite0"
SHAPE = TowerShape((8,) * 7, (1,) * 7, stem_channels=8, head_channels=8)
NETWORK = EDMConfig(
    body="ddpm++", resolution=8, label_dim=4, model_channels=8, channel_mult=(1, 1), num_blocks=1,
    attention_resolutions=(), dropout=0.0,
)  # fmt: skip
CONFIG = """
method: {score_warmup_images: 8, plain_warmup_images: 8}
companions: {head_channels: 8}
run: {total_images: 24, batch: 8, log_every_s: 0, grid_every_minutes: 0}
"""


class CrewOfOne(Crew):
    """Runs the commands in this process, one after the other, and remembers them."""

    said: list[list[str]]
    failing: str | None = None
    """A command with this word in it fails."""

    def run(self, words: Sequence[object], *, log: Path) -> str:
        shown = [str(word) for word in words]
        self.said.append(shown)
        if self.failing is not None and any(self.failing in word for word in shown):
            raise CommandFailed("the loss is not finite (exit code 1)")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert cli.main(shown) == 0, shown
        return printed.getvalue()


@pytest.fixture(autouse=True)
def crew(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[CrewOfOne]]:
    """A network of features that is narrow and sees 16 pixels, and commands in this process."""
    monkeypatch.setattr(fidelity_nets.EfficientNetLite0, "input_size", 16)
    monkeypatch.setitem(fidelity_nets.LITE_SHAPES, 0, SHAPE)
    monkeypatch.setattr(image_students, "Crew", CrewOfOne)
    CrewOfOne.said, CrewOfOne.failing = [], None
    yield CrewOfOne


@pytest.fixture
def settings(tmp_path: Path) -> ComparisonSettings:
    torch.manual_seed(0)
    tower = EfficientNetTower(SHAPE, input_size=None)
    tensors = {name: value for name, value in tower.state_dict().items() if not name.startswith("norm.")}
    save_file(tensors, tmp_path / "lite0.safetensors")
    teacher = edm.EDMDenoiser(NETWORK, generator=torch.Generator().manual_seed(0))
    edm.save(teacher, tmp_path / "teacher")
    (tmp_path / "students.yaml").write_text(CONFIG)
    return ComparisonSettings(
        teacher=tmp_path / "teacher",
        data="shapes:24:8",
        config=tmp_path / "students.yaml",
        output=tmp_path / "comparison",
        net=NET,
        weights=tmp_path / "lite0.safetensors",
        teacher_steps=(2,),
        num_samples=12,
    )


def made(settings: ComparisonSettings) -> tuple[Comparison, dict[str, Any]]:
    comparison = Comparison(settings, report=lambda line: None)
    with StopFlag() as stop:
        comparison.make(stop)
    return comparison, write_student_pages(comparison)


def test_every_student_is_trained_and_measured(settings: ComparisonSettings, crew: type[CrewOfOne]) -> None:
    _, summary = made(replace(settings, extra_seeds=1, best=2))
    rows = {row["name"]: row for row in summary["rows"]}
    assert rows.keys() == {"teacher_2_steps", *STUDENTS}
    assert not summary["failed"] and not summary["missing"]
    assert rows["teacher_2_steps"]["num_evaluations"] == 3 and rows["dmd2"]["num_evaluations"] == 1
    assert rows["uni_instruct_jeffreys"]["divergence"] == "jeffreys"
    twice = [row for row in summary["rows"] if len(row["runs"]) == 2]
    assert len(twice) == 2 and all(row["frechet_distance"]["std"] is not None for row in twice)
    first = {row["name"]: row["frechet_distance"]["values"][0] for row in summary["rows"][1:]}
    assert {row["name"] for row in twice} == set(sorted(first, key=lambda name: first[name])[:2])
    assert all(row["images_per_s"]["mean"] > 0 for row in summary["rows"][1:])
    names = {file.name for file in settings.output.iterdir() if file.is_file()}
    assert {"summary.json", "summary.md", "sheet.png", "reference.npz", "images.npz"} <= names
    assert json.loads((settings.output / "summary.json").read_text()) == summary
    table = (settings.output / "summary.md").read_text()
    assert "| sida | 1 |" in table and "best Uni-Instruct student" in table

    crew.said = []  # a second call has nothing to do
    assert made(replace(settings, extra_seeds=1, best=2))[1] == summary
    assert crew.said == []


def test_all_settings_but_the_method_are_shared(settings: ComparisonSettings) -> None:
    comparison = Comparison(settings, report=lambda line: None)
    configs = {run.student: comparison.config_of(run) for run in comparison.first_runs}
    assert {configs["sid"].method.alpha, configs["f_distill"].method.divergence} == {1.2, "forward_kl"}
    same = {replace(config, method=comparison.base.method) for config in configs.values()}
    assert len(same) == 1
    assert comparison.first_runs[0] == Run("dmd2", 0)  # five updates of the fake score for one of its own
    assert {student.method for student in STUDENTS.values()} <= set(IMAGE_METHODS)


def test_a_failure_is_listed_and_tried_again(settings: ComparisonSettings, crew: type[CrewOfOne]) -> None:
    settings = replace(settings, students=("sid", "diff_instruct"))
    crew.failing = "sid_0.yaml"
    comparison, summary = made(settings)
    assert summary["failed"] == {"sid_0": "the loss is not finite (exit code 1)"}
    assert [row["name"] for row in summary["rows"]] == ["teacher_2_steps", "diff_instruct"]
    assert summary["goal"] is None and not summary["missing"]
    assert "Failed: sid_0: the loss is not finite" in "\n".join(summary_lines(summary))

    crew.failing, crew.said = None, []
    assert not made(settings)[1]["failed"]
    assert [words[0] for words in crew.said] == ["distill", "evaluate"]


def test_a_half_trained_student_is_resumed(settings: ComparisonSettings, crew: type[CrewOfOne]) -> None:
    settings = replace(settings, students=("sid",), teacher_steps=())
    run = Run("sid", 0)
    half = ["distill", "--output", str(settings.output / "runs" / run.name), "--json", "--quiet"]
    comparison = Comparison(settings, report=lambda line: None)
    file = settings.output.parent / "half.yaml"
    file.write_text(image_students.config_to_yaml(comparison.config_of(run)))
    crew(1, device="cpu").run([*half, "--config", file, "--run.max-minutes", "0.001"], log=file)
    images, _ = comparison.progress(run)
    assert 0 < images < 24
    assert summarise_students(comparison)["missing"] == {"sid_0": images}
    _, summary = made(settings)
    assert "--resume" in crew.said[-2] and not summary["missing"]
    assert comparison.trained(run) is not None and comparison.progress(run)[0] == 24


def test_nothing_begins_after_the_time_is_up(settings: ComparisonSettings, crew: type[CrewOfOne]) -> None:
    _, summary = made(replace(settings, deadline_s=time.monotonic()))
    assert [words[0] for words in crew.said] == ["reference"]
    assert summary["rows"] == [] and len(summary["missing"]) == 1 + len(STUDENTS)
    assert "Missing: sid_0." in summary_lines(summary)


def test_more_samples_measure_again_and_train_nothing(
    settings: ComparisonSettings, crew: type[CrewOfOne]
) -> None:
    settings = replace(settings, students=("sid",), teacher_steps=())
    made(settings)
    crew.said = []
    _, summary = made(replace(settings, num_samples=14))
    assert [words[0] for words in crew.said] == ["evaluate"] and summary["num_samples"] == 14


def test_another_comparison_is_refused(settings: ComparisonSettings) -> None:
    Comparison(settings, report=lambda line: None)
    with pytest.raises(UsageError, match="with other images_of_each_student; pass the same"):
        Comparison(replace(settings, num_images=64), report=lambda line: None)
    with pytest.raises(UsageError, match="--weights '/nowhere' is not a file"):
        Comparison(replace(settings, weights=Path("/nowhere")), report=lambda line: None)
    with pytest.raises(UsageError, match="16x16 pixels, the teacher makes 8x8"):
        Comparison(replace(settings, data="shapes:24:16"), report=lambda line: None)
    with pytest.raises(UsageError, match="at_once is 0"):
        replace(settings, at_once=0)


def test_errors_are_one_sentence(settings: ComparisonSettings, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--teacher", "/nowhere", "--data", "shapes:24:8", "--weights", str(settings.weights)]
    words += ["--config", str(settings.config), "--output", str(settings.output), "--device", "cpu"]
    assert image_methods.main(words) == 2
    assert capsys.readouterr().err == (
        "error: the teacher '/nowhere' is not a folder; pass one that train-teacher or import-edm wrote\n"
    )
    assert image_methods.main([*words, "--best", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: best is 0")
    assert not settings.output.exists()
    with pytest.raises(SystemExit) as left:
        image_methods.main(["--students", "sidd"])
    assert left.value.code == 2
    with pytest.raises(SystemExit) as left:
        image_methods.main(words[:6])
    assert left.value.code == 2 and "required: --output" in capsys.readouterr().err


def test_spread_is_of_all_seeds_or_none() -> None:
    assert spread([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "values": [1.0, 3.0]}
    assert spread([2.0]) == {"mean": 2.0, "std": None, "values": [2.0]}
    assert spread([1.0, None]) is None and spread([]) is None


def test_commands_run_as_processes(tmp_path: Path) -> None:
    crew = Crew(2, device="cpu")
    log = tmp_path / "logs" / "words.txt"
    assert crew.run(["--version"], log=log).strip()
    with pytest.raises(CommandFailed, match=r"'/nowhere' .* \(exit code 2\)") as failed:
        crew.run(["distill", "--config", "/nowhere", "--output", tmp_path / "run"], log=log)
    assert "error:" not in str(failed.value)
    crew.stop()
    with pytest.raises(CommandStopped):
        crew.run(["--version"], log=log)


def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert image_jobs.visible_gpus() == ["3", "5"]
    crew = Crew(3, device="cuda")
    assert [crew._places.get() for _ in range(3)] == ["3", "5", "3"]
