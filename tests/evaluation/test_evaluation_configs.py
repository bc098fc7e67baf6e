"""The evaluator's YAML file says what the dataclass says, and the settings import nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from uni3d.config.loader import load_config
from uni3d.errors import ConfigError
from uni3d.evaluation.settings import EvaluatorSettings, MeshQualitySettings, TeacherQualitySettings
from uni3d.resources import resource_path


def test_the_yaml_file_repeats_the_defaults_with_a_comment_on_every_key() -> None:
    path = resource_path("configs/evaluator.yaml")
    assert load_config(path, EvaluatorSettings()) == EvaluatorSettings()
    lines = path.read_text().splitlines()
    for field in fields(EvaluatorSettings):
        index = next(i for i, line in enumerate(lines) if line.startswith(f"{field.name}:"))
        assert lines[index - 1].startswith("# "), field.name


def test_settings_import_no_torch() -> None:
    code = "import sys, uni3d.evaluation.settings; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("kind", [EvaluatorSettings, MeshQualitySettings, TeacherQualitySettings])
def test_every_number_has_a_range(kind: type) -> None:
    defaults = kind()
    for field in fields(kind):
        value = getattr(defaults, field.name)
        is_tuple = isinstance(value, tuple)
        if isinstance(value, (str, bool)) or field.type == "Path | None":
            continue
        for bad in (float("nan"), -1e30, 1e30):
            with pytest.raises(ConfigError, match=f"^{field.name} is .*; expected a number from"):
                kind(**{field.name: (bad,) if is_tuple else bad})
        if is_tuple:
            with pytest.raises(ConfigError, match=f"^{field.name} is empty"):
                kind(**{field.name: ()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0; expected a number from 1 to 1e\\+09"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        (
            {"stage_channels": (8, 16)},
            "stage_channels has 2 entries and stage_blocks 7; expected equally many",
        ),
        ({"stage_channels": (8,) * 8, "stage_blocks": (1,) * 8}, "at most 7"),
        ({"text_width": 190}, "text_width is 190; expected a multiple of text_heads"),
    ],
)
def test_settings_that_cannot_work_are_one_sentence(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluatorSettings(**changes)  # type: ignore[arg-type]


def test_a_bad_value_in_the_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "evaluator.yaml"
    file.write_text("batch_size: 0\n")
    with pytest.raises(ConfigError, match=r"evaluator\.yaml:1: batch_size is 0"):
        load_config(file, EvaluatorSettings())
