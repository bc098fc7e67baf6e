"""From the settings of a benchmark to its jobs: which variants, which prompts, and what must not change."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uni3d.benchmark.settings import BenchmarkConfig
from uni3d.benchmark.work_list import claim
from uni3d.config.loader import config_to_dict, config_to_yaml, load_config, load_variants
from uni3d.config.text_to_3d import TextTo3DConfig
from uni3d.config.values import Schedule, check_name
from uni3d.errors import ConfigError, UsageError
from uni3d.evaluation.benchmark_nouns import read_prompts
from uni3d.prompts import check_prompt
from uni3d.resources import resource_path
from uni3d.text_to_3d.memory import fitted
from uni3d.text_to_3d.scene_optimiser import stage_recipe
from uni3d.training.checkpoint import atomic_write_text

SHIPPED_VARIANTS = ("methods", "ablations", "stages")
# What networks are made of: one teacher serves all variants.
_OF_THE_TEACHER = ("teacher", "teacher_lora", "teacher_lora_scale", "networks", "vram")
# May differ between the processes and sittings that fill one folder: they only add runs or read them.
_MAY_CHANGE = (
    "output",
    "methods",
    "baseline",
    "limit_prompts",
    "seeds",
    "tune",
    "only_summary",
    "retry_failed",
    "turntables",
    "num_bootstrap",
    "quiet",
    "json",
)


def chosen_variants(config: BenchmarkConfig) -> dict[str, TextTo3DConfig]:
    """The settings of each variant to compare, the baseline among them.

    Raises ConfigError for unknown names and for settings that no recipe can be made of.
    """
    file = (
        resource_path(f"configs/variants/{config.variants}.yaml")
        if config.variants in SHIPPED_VARIANTS
        else Path(config.variants)
    )
    variants = load_variants(file, config.run)
    if config.tuned is not None:
        variants |= load_variants(config.tuned, config.run, over=variants)
    for name in (*config.methods, config.baseline):
        check_name("variant", name, list(variants))
    chosen = {name: variants[name] for name in config.methods or variants}
    if config.baseline not in chosen:
        raise ConfigError(f"the baseline '{config.baseline}' is not among the methods; add it to them")
    for name, settings in chosen.items():
        _check_networks(name, settings, config.run)
        try:
            stage_recipe(settings, 0.0)
            stage_recipe(settings, 1.0)
        except ConfigError as error:
            raise ConfigError(f"variant '{name}': {error}") from error
    _check_mesh_stages(config, chosen)
    return {name: fitted(settings) for name, settings in chosen.items()}


def _check_networks(name: str, settings: TextTo3DConfig, shared: TextTo3DConfig) -> None:
    """Raise ConfigError for a variant whose networks are not those of all."""
    own = [key for key in _OF_THE_TEACHER if getattr(settings, key) != getattr(shared, key)]
    if own:
        raise ConfigError(
            f"variant '{name}' has its own {', '.join(own)}, but one teacher serves all; set it under run"
        )
    if settings.fake_score.base is not None:
        raise ConfigError(
            f"variant '{name}' has a fake_score.base, but passes are counted on the teacher's network alone; "
            f"leave it out"
        )


def _check_mesh_stages(config: BenchmarkConfig, chosen: Mapping[str, TextTo3DConfig]) -> None:
    """Raise ConfigError where a budget says nothing about the stages that a variant has."""
    budget = config.budget
    if budget.reference is not None:
        check_name("variant", budget.reference, list(chosen))
    for name, settings in chosen.items():
        measured = set(budget.kinds) - {"steps"} - ({"seconds"} if name == budget.reference else set())
        if measured and (settings.stages.geometry.steps or settings.stages.texture.steps):
            raise ConfigError(
                f"variant '{name}' has mesh stages, and a budget of {', '.join(sorted(measured))} sets the "
                f"steps of a field alone; use steps, or seconds with the variant as budget.reference"
            )
    if budget.reference is None:
        return
    reference = chosen[budget.reference]
    for name, settings in chosen.items():
        if dataclasses.replace(settings, steps=reference.steps, stages=reference.stages) != reference:
            raise ConfigError(
                f"variant '{name}' differs from budget.reference '{budget.reference}' in more than steps and "
                f"stages, so what a step of it costs is not known; leave budget.reference out"
            )


def all_prompts(config: BenchmarkConfig) -> list[str]:
    """Every prompt of the set that is used: of tuning or of reporting."""
    kind = "tuning" if config.tune else "reporting"
    given = config.tuning_prompts if config.tune else config.prompts
    file = given or resource_path(f"assets/prompts/benchmark_{kind}.txt")
    prompts = [check_prompt(prompt) for prompt in read_prompts(file)]
    if len(set(prompts)) < max(len(prompts), 2):
        raise UsageError(f"{file} holds fewer than two prompts, or one of them twice")
    return prompts


def made_prompts(config: BenchmarkConfig) -> list[str]:
    """Those that are made: all, or `limit_prompts` of them spread evenly over the set, so over its kinds."""
    prompts = all_prompts(config)
    num = min(config.limit_prompts or len(prompts), len(prompts))
    return [prompts[index * len(prompts) // num] for index in range(num)]


def hold_settings(folder: Path, config: BenchmarkConfig) -> None:
    """Write the settings into a new benchmark's folder, or check that they are those of the one there."""
    with claim(folder, wait=True):
        file = folder / "benchmark.yaml"
        if not file.is_file():
            atomic_write_text(file, config_to_yaml(config))
            return
        before, now = _held(load_config(file, BenchmarkConfig())), _held(config)
        changed = [key for key in now if before[key] != now[key]]
        if changed:
            raise ConfigError(
                f"'{folder}' holds a benchmark with other settings of {', '.join(changed)}; choose another "
                f"--output, or the settings of {file}"
            )


def _held(config: BenchmarkConfig) -> dict[str, Any]:
    """The settings that all runs of one folder share; the device is each process's own matter."""
    plain = config_to_dict(dataclasses.replace(config, run=dataclasses.replace(config.run, device="auto")))
    return {key: value for key, value in plain.items() if key not in _MAY_CHANGE}


def candidate_settings(
    config: BenchmarkConfig, variants: Mapping[str, TextTo3DConfig]
) -> dict[str, dict[str, TextTo3DConfig]]:
    """For each variant the settings that tuning tries, by name: the same grid of factors for every one."""
    grid = list(itertools.product(config.tuning.guidance_factors, config.tuning.rate_factors))
    return {
        name: {
            f"{name}.g{guidance:g}.r{rate:g}": _scaled(settings, guidance, rate) for guidance, rate in grid
        }
        for name, settings in variants.items()
    }


def _scaled(settings: TextTo3DConfig, guidance: float, rate: float) -> TextTo3DConfig:
    changed_guidance = dataclasses.replace(
        settings.guidance, guidance_scale=_times(settings.guidance.guidance_scale, guidance)
    )
    changed_rates = dataclasses.replace(
        settings.optimiser,
        density_learning_rate=_times(settings.optimiser.density_learning_rate, rate),
        colour_learning_rate=_times(settings.optimiser.colour_learning_rate, rate),
    )
    return dataclasses.replace(settings, guidance=changed_guidance, optimiser=changed_rates)


def _times(schedule: Schedule, factor: float) -> Schedule:
    return tuple((position, factor * value) for position, value in schedule)


def tuned_yaml(chosen: Mapping[str, TextTo3DConfig], remarks: Mapping[str, str]) -> str:
    """What `BenchmarkConfig.tuned` reads: the tuned settings of each variant under a remark."""

    def pairs(schedule: Schedule) -> str:
        return str([list(pair) for pair in schedule])

    lines = ["# Settings chosen on the tuning prompts by `uni3d benchmark --tune`."]
    for name, settings in chosen.items():
        lines += [
            f"# {remarks[name]}",
            f"{name}:",
            "  guidance:",
            f"    guidance_scale: {pairs(settings.guidance.guidance_scale)}",
            "  optimiser:",
            f"    density_learning_rate: {pairs(settings.optimiser.density_learning_rate)}",
            f"    colour_learning_rate: {pairs(settings.optimiser.colour_learning_rate)}",
        ]
    return "\n".join(lines) + "\n"


def settings_of(config: BenchmarkConfig) -> dict[str, Any]:
    """The settings for JSON, without paths of this machine."""
    plain = config_to_dict(config)
    for key in ("output", "prompts", "tuning_prompts", "tuned"):
        if plain[key] is not None:
            plain[key] = Path(plain[key]).name
    plain["run"]["runs_folder"] = ""
    return plain
