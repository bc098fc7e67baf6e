"""The evaluator's YAML file says what the dataclass says, and the settings import nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

from uni3d.config_loader import load_config
from uni3d.evaluation.settings import EvaluatorSettings
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
