"""What a benchmark compares: the shipped variants and prompts, and settings that do not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from uni3d.benchmark.plan import (
    SHIPPED_VARIANTS,
    all_prompts,
    candidate_settings,
    chosen_variants,
    hold_settings,
    made_prompts,
)
from uni3d.benchmark.settings import BenchmarkConfig, BudgetConfig, TuningConfig
from uni3d.config.loader import load_config, load_variants
from uni3d.config.text_to_3d import TextTo3DConfig
from uni3d.errors import ConfigError
from uni3d.resources import resource_path
from uni3d.text_to_3d.scene_optimiser import resolve_recipe, stage_recipe

DIVERGENCES = ("forward-kl", "reverse-kl", "jeffreys", "js", "pearson-chi2", "softened-reverse-kl")


def test_every_method_is_among_the_variants() -> None:
    variants = chosen_variants(BenchmarkConfig())
    single = {"sds", "vsd-prolific", "vsd-threestudio", "ism", "sdi", "sim", "adv-sd", "jsd"}
    both_forms = {f"ui-{name}{form}" for name in DIVERGENCES for form in ("", "-exact")}
    assert single | both_forms | {"ui-reverse-to-forward-kl"} <= set(variants)
    for name in DIVERGENCES:
        difference, exact = (resolve_recipe(variants[f"ui-{name}{form}"]) for form in ("", "-exact"))
        assert difference.divergence.name == exact.divergence.name == name.replace("-", "_")
        assert not difference.needs_teacher_jacobian and exact.needs_teacher_jacobian


def test_variants_differ_and_share_scene_and_teacher() -> None:
    variants = chosen_variants(BenchmarkConfig())
    assert len(set(map(repr, variants.values()))) == len(variants)
    for settings in variants.values():
        for shared in ("teacher", "cameras", "field", "regularisers", "mesh", "optimiser", "steps"):
            assert getattr(settings, shared) == getattr(TextTo3DConfig(), shared)


def test_ablations_change_one_thing_each() -> None:
    variants = chosen_variants(BenchmarkConfig(variants="ablations", baseline="default"))
    assert variants["default"] == TextTo3DConfig()
    assert resolve_recipe(variants["discriminator-alone"]).score_weight == 0
    assert not resolve_recipe(variants["no-discriminator"]).needs_discriminator
    assert resolve_recipe(variants["ratio-attached"]).needs_ratio_gradient
    assert not resolve_recipe(variants["ratio-detached"]).needs_ratio_gradient


def test_two_stages_follow_each_other() -> None:
    settings = chosen_variants(BenchmarkConfig())["ui-reverse-to-forward-kl"]
    names = [stage_recipe(settings, progress).divergence.name for progress in (0.0, 0.49, 0.5, 1.0)]
    assert names == ["reverse_kl", "reverse_kl", "forward_kl", "forward_kl"]
    with pytest.raises(ConfigError, match="unknown divergence"):
        dataclasses.replace(settings.guidance, first_stage_divergence="reverse")


def test_prompts_are_split_into_tuning_and_reporting() -> None:
    reporting, tuning = all_prompts(BenchmarkConfig()), all_prompts(BenchmarkConfig(tune=True))
    assert len(reporting) >= 40 and len(tuning) == 20 and len(reporting) + len(tuning) >= 60
    assert not set(reporting) & set(tuning)
    assert "A refined vase with artistic patterns." in reporting
    some = made_prompts(BenchmarkConfig(limit_prompts=12))
    assert len(some) == 12 == len(set(some)) and set(some) <= set(reporting)
    # Evenly spread: the last kinds of prompts are among them.
    assert reporting.index(some[-1]) >= len(reporting) - len(reporting) // 12 - 1


def test_tuning_scales_what_a_method_already_has() -> None:
    config = BenchmarkConfig(tuning=TuningConfig(guidance_factors=(1.0, 2.0), rate_factors=(0.5, 1.0, 2.0)))
    variants = chosen_variants(config)
    candidates = candidate_settings(config, variants)
    assert {len(group) for group in candidates.values()} == {6}
    doubled = candidates["sds"]["sds.g2.r0.5"]
    assert doubled.guidance.guidance_scale == ((0.0, 200.0),)
    rates, own = (c.optimiser.colour_learning_rate for c in (doubled, variants["sds"]))
    assert [value for _, value in rates] == pytest.approx([value / 2 for _, value in own])


def test_the_mesh_stages_are_compared_with_the_field_alone() -> None:
    config = load_config(resource_path("configs/benchmark_stages.yaml"), BenchmarkConfig())
    variants = chosen_variants(config)
    published = load_config(resource_path("configs/uni_instruct.yaml"), TextTo3DConfig())
    assert variants["stages"] == published, "the settings that the README names"
    assert config.budget.reference == "stages" and variants["field"].stages.texture.steps == 0


@pytest.mark.parametrize(
    ("budget", "own", "message"),
    [
        (
            BudgetConfig(kinds=("seconds",), seconds=9),
            "",
            "'stages' has mesh stages, and a budget of seconds",
        ),
        (BudgetConfig(kinds=("seconds", "passes"), reference="stages"), "", "and a budget of passes sets"),
        (BudgetConfig(kinds=("seconds",), reference="stage"), "", "did you mean 'stages'"),
        (
            BudgetConfig(kinds=("seconds",), reference="stages"),
            "method: sds",
            "differs from budget.reference",
        ),
    ],
)
def test_a_budget_that_says_nothing_about_mesh_stages(
    tmp_path: Path, budget: BudgetConfig, own: str, message: str
) -> None:
    file = tmp_path / "variants.yaml"
    file.write_text(f"stages: {{stages: {{texture: {{steps: 3}}}}}}\nfield: {{{own}}}\n")
    with pytest.raises(ConfigError, match=message):
        chosen_variants(BenchmarkConfig(variants=str(file), baseline="field", budget=budget))


def test_a_reference_sets_the_seconds_alone() -> None:
    with pytest.raises(ConfigError, match="budget.kinds has none"):
        BudgetConfig(kinds=("passes",), reference="stages")


def test_a_folder_keeps_its_settings(tmp_path: Path) -> None:
    config = BenchmarkConfig(output=tmp_path)
    hold_settings(tmp_path, config)
    assert load_config(tmp_path / "benchmark.yaml", BenchmarkConfig()) == config
    hold_settings(tmp_path, dataclasses.replace(config, seeds=(5,), methods=("sds", "vsd-prolific")))
    # Each process may have a GPU of its own.
    hold_settings(tmp_path, dataclasses.replace(config, run=TextTo3DConfig(device="cuda:1")))
    with pytest.raises(ConfigError, match="other settings of budget, run; choose another --output"):
        changed = dataclasses.replace(config, budget=BudgetConfig(passes=3), run=TextTo3DConfig(steps=7))
        hold_settings(tmp_path, changed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b:\n  steps: 3\n", r"my.yaml:1: a variant is called 'a b'"),
        ("one:\n  stps: 3\n", r"my.yaml:2: unknown key 'one.stps'; did you mean 'steps'"),
        ("one:\n  steps: 3\none:\n  steps: 4\n", r"my.yaml:3: variant 'one' is given twice"),
        ("- one\n", r"names no variants"),
        ("", r"names no variants"),
    ],
)
def test_mistakes_in_variants(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_variants(file, TextTo3DConfig())


def test_settings_for_a_variant_that_is_not_there(tmp_path: Path) -> None:
    file = tmp_path / "tuned.yaml"
    file.write_text("vsd-prolifik:\n  steps: 3\n")
    with pytest.raises(ConfigError, match="unknown variant 'vsd-prolifik'; did you mean 'vsd-prolific'"):
        chosen_variants(BenchmarkConfig(tuned=file))


def test_a_method_whose_settings_make_no_recipe_is_named(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("vsd-prolific:\n  method: vsd\nodd:\n  method: dds\n")
    with pytest.raises(ConfigError, match="variant 'odd': method 'dds' needs source_x0"):
        chosen_variants(BenchmarkConfig(variants=str(file)))


def test_shipped_variant_files_are_those_that_are_named() -> None:
    names = {file.stem for file in resource_path("configs/variants").glob("*.yaml")}
    assert names == set(SHIPPED_VARIANTS)


def test_variants_share_the_networks_and_the_bounds_of_the_run(tmp_path: Path) -> None:
    file = tmp_path / "variants.yaml"
    config = BenchmarkConfig(variants=str(file), baseline="plain")
    for own in ("networks: {vae_slicing: true}", "teacher_lora_scale: 0.5", "fake_score: {base: other}"):
        file.write_text(f"plain: {{}}\nother: {{{own}}}\n")
        with pytest.raises(ConfigError, match=f"variant 'other' has .*{own.partition(':')[0]}"):
            chosen_variants(config)
    file.write_text("plain: {guidance: {views_per_step: 4}}\n")
    on_a_small_card = dataclasses.replace(config, run=TextTo3DConfig(vram=8))
    for run, num_views in ((config, 4), (on_a_small_card, 1)):
        assert chosen_variants(run)["plain"].guidance.views_per_step == num_views
