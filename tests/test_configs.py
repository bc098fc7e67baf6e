"""Configuration: every shipped file loads, and every mistake is one sentence with file, line and remedy."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from uni3d.config.loader import config_to_dict, config_to_yaml, load_config
from uni3d.config.presets import load_run_config, quality_preset
from uni3d.config.refine import RefineConfig
from uni3d.config.text_to_3d import TextTo3DConfig
from uni3d.config.values import DIVERGENCE_NAMES, METHOD_NAMES, parse_divergence, value_at
from uni3d.errors import ConfigError
from uni3d.resources import resource_path, weights_folder

CONFIGS = resource_path("configs")
RECIPES = ("sds_", "vsd_", "csd", "uni_instruct_")
ONE_RUN_KEYS = {"prompt", "negative_prompt", "output", "runs_folder", "resume", "overwrite", "quiet", "json"}


def schema_of(file: Path) -> Any:
    """The settings that a file of configs/ fills, by its name."""
    if file.stem.startswith(("text_to_3d", "stages", "uni_instruct", *RECIPES)):
        return TextTo3DConfig()
    if file.stem == "refine":
        return RefineConfig()
    if file.stem.startswith("teacher"):
        from uni3d.teacher.settings import TeacherConfig

        return TeacherConfig()
    if file.stem.startswith(("train_teacher", "distill")):
        from uni3d.distillation.settings import DistillConfig, TeacherTrainingConfig

        return DistillConfig() if file.stem.startswith("distill") else TeacherTrainingConfig()
    if file.stem.startswith("benchmark"):
        from uni3d.benchmark.settings import BenchmarkConfig

        return BenchmarkConfig()
    from uni3d.evaluation.settings import EvaluatorSettings

    assert file.stem.startswith("evaluator"), f"{file.name}: tell this test which settings it fills"
    return EvaluatorSettings()


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_every_shipped_file_loads_and_comments_every_key(file: Path) -> None:
    load_config(file, schema_of(file))
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if re.match(r"\s*[A-Za-z_]\w*:", line):
            above = lines[number - 1].strip() if number else ""
            assert above.startswith("#") or "#" in line, f"{file.name}:{number + 1} has no comment"


def test_the_default_file_is_all_of_the_defaults() -> None:
    file = CONFIGS / "text_to_3d.yaml"
    assert load_config(file, TextTo3DConfig()) == TextTo3DConfig() == quality_preset("default")
    named = yaml.safe_load(file.read_text(encoding="utf-8"))
    whole = config_to_dict(TextTo3DConfig())
    assert set(whole) - set(named) <= ONE_RUN_KEYS
    for group, values in whole.items():
        if isinstance(values, dict):
            assert set(values) == set(named[group]), f"{group} of {file.name} lacks keys"


def test_draft_is_cheaper() -> None:
    draft, default = quality_preset("draft"), quality_preset("default")
    assert draft.quality == "draft"
    assert draft.steps < default.steps and draft.mesh.texture_size <= default.mesh.texture_size


def test_yaml_round_trip_is_exact(tmp_path: Path) -> None:
    config = TextTo3DConfig(
        prompt='a "red" chair: # not a comment',
        output=Path("a b/c.glb"),
        seed=2**63 - 1,
        divergence="0.4*forward_kl+0.6*reverse_kl",
    )
    config = dataclasses.replace(
        config,
        negative_prompt="no",
        fake_score=dataclasses.replace(config.fake_score, learning_rate=((0.0, 1e-05),)),
        mesh=dataclasses.replace(config.mesh, iso_level=0.1 + 0.2, formats=("glb", "obj")),
    )
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(config), encoding="utf-8")
    assert load_config(file, TextTo3DConfig()) == config
    plain = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert plain == config_to_dict(config)


def write(tmp_path: Path, text: str | bytes) -> Path:
    file = tmp_path / "my.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "guidance:\n  guidence_scale: 7\n",
            r"my.yaml:2: unknown key 'guidance.guidence_scale'; did you mean",
        ),
        ("\n\nstps: 5\n", r"my.yaml:3: unknown key 'stps'; did you mean 'steps'\?"),
        ("wheels: 4\n", r"my.yaml:1: unknown key 'wheels'; expected one of prompt, negative_prompt,"),
        ("steps: fifty\n", r"my.yaml:1: 'steps' is 'fifty'; expected a whole number"),
        ("steps: 1.5\n", r"'steps' is '1.5'; expected a whole number"),
        ("steps: '50'\n", r"'steps' is the quoted text '50'; expected a whole number"),
        ("guidance:\n\tviews_per_step: 2\n", r"my.yaml:2: not valid YAML: a tab .* indent with spaces"),
        (
            "guidance.guidance_scale: 3\n",
            r"unknown key 'guidance.guidance_scale'; write 'guidance_scale' indented under 'guidance:'",
        ),
        (f"steps: {'9' * 5000}\n", r"'steps' is '9+'; expected a whole number"),
        ("steps:\n", r"'steps' is empty; expected a whole number"),
        ("steps: [1]\n", r"'steps' is a list of 1; expected a whole number"),
        ("fake_score:\n  learning_rate: fast\n", r"'fake_score.learning_rate' is 'fast'; expected a number"),
        ("fake_score:\n  learning_rate: .nan\n", r"'fake_score.learning_rate' is '.nan'; expected a number"),
        ("fake_score:\n  learning_rate: 1e999\n", r"expected a number"),
        ("quiet: maybe\n", r"'quiet' is 'maybe'; expected true or false"),
        ("prompt: yes\n", r"'prompt' is 'yes'; expected text, so put it in quotes"),
        ("prompt:\n", r"'prompt' is empty; expected text"),
        ("quality: fine\n", r"'quality' is 'fine'; expected one of default, draft"),
        (
            "mesh:\n  formats: [glb, stl]\n",
            r"my.yaml:2: 'mesh.formats' is 'stl'; expected one of glb, obj, ply",
        ),
        ("cameras:\n  radius: [1, 2, 3]\n", r"'cameras.radius' has 3 values; expected 2"),
        ("guidance:\n  guidance_scale: [[0, 1, 2]]\n", r"expected a number or pairs \[\[0, 12\], \[1, 6\]\]"),
        ("guidance: 7\n", r"my.yaml:1: 'guidance' holds '7'; expected keys with values"),
        ("- steps\n", r"my.yaml:1: the file holds a list of 1; expected keys with values"),
        ("steps: 5\nsteps: 6\n", r"my.yaml:2: key 'steps' is given twice; keep one of them"),
        ("{1: 2}: 3\n", r"a key under '.' is a group of keys; expected a name"),
        ("a: b: c\n", r"my.yaml:1: not valid YAML: mapping values are not allowed here"),
        ("steps: [1\n", r"my.yaml:\d: not valid YAML"),
        ("\x00", r"my.yaml: not valid YAML: .*special characters are not allowed"),
        ("steps: 5\n---\nsteps: 6\n", r"my.yaml:\d: not valid YAML"),
        ("prompt: !!python/object/apply:os.system ['true']\n", r"my.yaml:1: anchors, aliases and tags"),
        ("a: &x [1]\nb: *x\n", r"my.yaml:1: anchors, aliases and tags are not accepted"),
        ("prompt: " + "[" * 200_000, r"my.yaml:1: the values are nested too deeply"),
        ("- " * 10_000, r"my.yaml:1: the values are nested too deeply"),
        (b"prompt: \xff\xfe\n", r"is not UTF-8 text \(byte 8\); save it as UTF-8"),
        (b"#" * (1 << 20) + b"\n", r"is larger than 1 MiB; pass a settings file, not data"),
        ("seed: -1\n", r"my.yaml:1: seed is -1; expected a number from 0"),
        ("method: uni-instrukt\n", r"unknown method 'uni-instrukt'; did you mean 'uni-instruct'\?"),
        ("divergence: revers_kl\n", r"unknown divergence 'revers_kl'; did you mean 'reverse_kl'\?"),
        ("divergence: x*js\n", r"'x' is not a positive weight"),
        ("mesh:\n  texture_size: 1000\n", r"my.yaml:2: mesh.texture_size is 1000; expected a power of two"),
        ("guidance:\n  noise_min: 0.99\n", r"guidance.noise_min is 0.99 and guidance.noise_max is 0.98 at 0"),
        (
            "guidance:\n  guidance_scale: [[1, 2], [0, 3]]\n",
            r"fractions of the run from 0 to 1 in rising order",
        ),
        ("guidance:\n  guidance_scale: []\n", r"guidance.guidance_scale is empty"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(tmp_path, text), TextTo3DConfig())
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert "my.yaml" in str(caught.value)


def test_values_are_read_by_type(tmp_path: Path) -> None:
    text = (
        "prompt: 1984\nsteps: 1_000\nseed: +3\nquiet: True\noutput: chair.glb\nruns_folder: '~'\n"
        "fake_score: {learning_rate: 1e-4, lora_rank: 4}\n"
        "guidance: {guidance_scale: 50, noise_max: [[0, .9]]}\n"
        "mesh: {iso_level: ~}\nmethod: f_distill\n"
    )
    config = load_config(write(tmp_path, text), TextTo3DConfig())
    assert (config.prompt, config.steps, config.seed, config.quiet) == ("1984", 1000, 3, True)
    assert config.output == Path("chair.glb") and config.runs_folder == Path("~")
    assert config.fake_score.learning_rate == ((0.0, 1e-4),) and config.fake_score.lora_rank == 4
    assert config.guidance.guidance_scale == ((0.0, 50.0),) and config.guidance.noise_max == ((0.0, 0.9),)
    assert config.mesh.iso_level is None and config.cameras == TextTo3DConfig().cameras


def test_a_file_that_is_not_there_or_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; check the path"):
        load_config(tmp_path / "none.yaml", TextTo3DConfig())
    with pytest.raises(ConfigError, match="is not a file"):
        load_config(tmp_path, TextTo3DConfig())
    empty = write(tmp_path, "# nothing\n")
    assert load_config(empty, TextTo3DConfig(seed=4)) == TextTo3DConfig(seed=4)


def test_a_file_lies_over_the_quality_it_names(tmp_path: Path) -> None:
    file = write(tmp_path, "quality: draft\nsteps: 7\n")
    config = load_run_config(file)
    assert config.steps == 7 and config.mesh == quality_preset("draft").mesh
    other = load_run_config(write(tmp_path, "steps: 7\n"), "draft")
    assert other.quality == "draft" and other.steps == 7 and other.mesh == quality_preset("draft").mesh


def test_schedules() -> None:
    schedule = ((0.2, 10.0), (0.6, 20.0), (0.6, 5.0), (1.0, 1.0))
    values = [value_at(schedule, progress) for progress in (0.0, 0.2, 0.4, 0.6, 0.61, 0.8, 1.0, 2.0)]
    assert values == pytest.approx([10, 10, 15, 20, 4.9, 3, 1, 1])
    assert value_at(((0.5, 3.0),), 0.1) == 3.0


def test_mixtures_of_divergences() -> None:
    assert parse_divergence("js") == {"js": 1.0}
    assert parse_divergence("0.4*forward_kl + 0.6*reverse-kl") == {"forward_kl": 0.4, "reverse_kl": 0.6}
    for bad in ("-1*js", "0*js", "inf*js", "js+", ""):
        with pytest.raises(ConfigError):
            parse_divergence(bad)


def test_names_are_those_of_the_losses() -> None:
    from uni3d.losses import divergence, recipes

    assert set(METHOD_NAMES) == {row.method for row in recipes.method_table()}
    for name in METHOD_NAMES:
        recipes.get(name)
    for name in DIVERGENCE_NAMES:
        assert divergence.get(name).name == name


def test_resources_are_found_in_a_checkout_and_in_a_wheel(tmp_path: Path) -> None:
    from uni3d.errors import MissingWeightsError, UsageError

    package = tmp_path / "site" / "uni3d"
    (package / "_checkout" / "configs").mkdir(parents=True)
    (package / "_checkout" / "configs" / "a.yaml").touch()
    weights = package / "_checkout" / "assets" / "teacher" / "unet"
    weights.mkdir(parents=True)
    assert resource_path("configs/a.yaml", package=package).is_relative_to(package / "_checkout")
    with pytest.raises(UsageError, match="is missing from this installation"):
        resource_path("configs/b.yaml", package=package)
    with pytest.raises(MissingWeightsError, match="reinstall uni3d"):
        weights_folder("teacher", package=package)
    (weights / "model.safetensors").touch()
    assert weights_folder("teacher", package=package) == package / "_checkout" / "assets" / "teacher"
    # A checkout, known by its pyproject.toml, comes first.
    (package.parent / "pyproject.toml").touch()
    (package.parent / "configs").mkdir()
    (package.parent / "configs" / "a.yaml").touch()
    assert resource_path("configs/a.yaml", package=package) == package.parent / "configs" / "a.yaml"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_to_a_file_is_more_than_one_sentence(tmp_path: Path, data: st.DataObject) -> None:
    """Shipped text with a piece replaced by arbitrary bytes is read or refused, never anything else."""
    whole = (CONFIGS / "text_to_3d.yaml").read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 40)))
    file = write(tmp_path, whole[:start] + data.draw(st.binary(max_size=20)) + whole[end:])
    try:
        assert isinstance(load_config(file, TextTo3DConfig()), TextTo3DConfig)
    except ConfigError as error:
        assert "\n" not in str(error) and "my.yaml" in str(error)
