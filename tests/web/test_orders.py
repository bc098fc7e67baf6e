"""What may be ordered, and the command that reproduces it."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
from web_fixtures import order, settings_in

from uni3d.commands.generate import read_generate_options
from uni3d.config.presets import load_run_config
from uni3d.config.text_to_3d import TextTo3DConfig
from uni3d.errors import UsageError
from uni3d.text_to_3d.scene_optimiser import resolve_recipe
from uni3d.web.orders import (
    METHODS,
    METHODS_WITH_DIVERGENCE,
    check_order,
    reproducing_command,
    reproducing_config,
    run_config,
)


def what_is_made(config: TextTo3DConfig) -> TextTo3DConfig:
    """The settings without those that say where the result goes and who is told."""
    plain = TextTo3DConfig()
    names = ("runs_folder", "device", "quiet", "checkpoints", "output", "overwrite", "resume", "json")
    return dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, formats=("glb",)),
        **{name: getattr(plain, name) for name in names},
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_page_needs_a_prompt_alone(method: str) -> None:
    divergence = "js" if method in METHODS_WITH_DIVERGENCE else None
    assert resolve_recipe(TextTo3DConfig(method=method, divergence=divergence))


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": " "},
        {"prompt": "a\x1bb"},
        {"prompt": "a" * 1025},
        {"negative_prompt": "\u202e"},
        {"method": "dds"},
        {"divergence": "kl"},
        {"teacher": "../../etc"},
        {"quality": "best"},
        {"seed": -1},
        {"seed": 2**31},
    ],
)
def test_nothing_else_can_be_ordered(changes: dict, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        check_order(order(**changes), settings_in(tmp_path))


def test_a_divergence_is_dropped_where_the_method_brings_its_own(tmp_path: Path) -> None:
    assert check_order(order(method="sds", divergence="js"), settings_in(tmp_path)).divergence is None


@pytest.mark.parametrize("quality", ["draft", "default"])
@pytest.mark.parametrize(
    "prompt", ["a red chair", "-x 'quoted'; rm", "--help", "Stuhl \u00e4\U0001f600 $(id)"]
)
def test_the_command_reads_back_as_the_run(prompt: str, quality: str, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, max_steps=7, teachers={"embedded": "embedded", "own": str(tmp_path)})
    wanted = check_order(
        order(prompt, negative_prompt="--fog", method="f-distill", divergence="js", seed=9, quality=quality),
        settings,
    )
    words = shlex.split(reproducing_command(wanted, settings))
    assert words[:2] == ["uni3d", "generate"]
    config = read_generate_options(words[2:])
    run = run_config(wanted, settings, runs_folder=tmp_path)
    assert what_is_made(config) == what_is_made(run)
    file = tmp_path / "config.yaml"
    file.write_text(reproducing_config(wanted, settings), encoding="utf-8")
    assert what_is_made(load_run_config(file)) == what_is_made(run)
    assert str(tmp_path) not in reproducing_command(order(teacher="own"), settings)
