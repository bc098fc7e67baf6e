"""Settings of the image programs: ranges, contradictions, noise laws, and the stages of a run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from uni3d.config.loader import config_to_dict, load_config
from uni3d.diffusion.edm import EDMDenoiser
from uni3d.diffusion.edm_config import preset
from uni3d.distillation.settings import (
    IMAGE_METHODS,
    AverageConfig,
    CompanionsConfig,
    DistillConfig,
    ImageDataConfig,
    LognormalConfig,
    MethodConfig,
    NetworkConfig,
    OptimiserConfig,
    RunConfig,
    SigmaLawConfig,
    TeacherTrainingConfig,
)
from uni3d.distillation.sigma_laws import companion_law, student_law, time_weight_for
from uni3d.distillation.stages import stage_at, stages_of
from uni3d.distillation.weights import average_decay, rate_factor
from uni3d.errors import ConfigError
from uni3d.resources import resource_path

GROUPS = [
    ("data.", ImageDataConfig),
    ("network.", NetworkConfig),
    ("optimiser.", OptimiserConfig),
    ("average.", AverageConfig),
    ("run.", RunConfig),
    ("noise.", LognormalConfig),
    ("noise.", SigmaLawConfig),
    ("method.", MethodConfig),
    ("companions.", CompanionsConfig),
    ("", DistillConfig),
]


@pytest.mark.parametrize(("group", "kind"), GROUPS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_number_has_a_range(group: str, kind: type) -> None:
    defaults = kind()
    for field in fields(kind):
        value = getattr(defaults, field.name)
        sample = value[0] if isinstance(value, tuple) else value
        if not isinstance(sample, (int, float)) and field.type not in ("float | None", "int | None"):
            continue
        if isinstance(sample, bool):
            continue
        for bad in (float("nan"), -1e30, 1e30):
            with pytest.raises(ConfigError, match=f"^{group}{field.name} is .*; expected a number from"):
                kind(**{field.name: (bad,) if isinstance(value, tuple) else bad})


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (RunConfig, {"batch": 9, "accumulate": 2}, "run.batch is 9; expected a multiple of run.accumulate"),
        (NetworkConfig, {"preset": "cifar10-32x32-cond-vpp"}, "did you mean 'cifar10-32x32-cond-vp'"),
        (NetworkConfig, {"channel_mult": ()}, "network.channel_mult is empty"),
        (SigmaLawConfig, {"sigma_min": 90.0}, "noise.sigma_min is 90; expected less than sigma_max"),
        (MethodConfig, {"method": "sidd"}, "unknown method 'sidd'; did you mean 'sid'"),
        (MethodConfig, {"method": "sds"}, "method 'sds' needs prompts, guidance or a reward"),
        (MethodConfig, {"divergence": "forwad_kl"}, "did you mean 'forward_kl'"),
        (MethodConfig, {"first_stage_images": 5}, "belong together"),
        (MethodConfig, {"first_stage_divergence": "reverse_kl"}, "belong together"),
    ],
)
def test_settings_that_cannot_work(kind: type, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "sid", "ratio": "detached"}, "method.ratio belongs to uni-instruct"),
        ({"alpha": 1.2}, "method.alpha belongs to sid and sida"),
        ({"method": "dmd", "divergence": "js"}, "dmd minimises reverse_kl by definition"),
        (
            {"first_stage_divergence": "reverse_kl", "first_stage_images": 10},
            "expected more than the 200000 images of the warm-ups",
        ),
    ],
)
def test_stages_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stages_of(MethodConfig(**changes))


def test_two_stages_and_warm_ups_follow_each_other() -> None:
    stages = stages_of(
        MethodConfig(
            divergence="forward_kl",
            first_stage_divergence="reverse_kl",
            first_stage_images=1000,
            score_warmup_images=100,
            plain_warmup_images=200,
        )
    )
    found = {images: stage_at(stages, images).name for images in (0, 99, 100, 299, 300, 999, 1000, 10**9)}
    assert found == {
        0: "score warm-up", 99: "score warm-up", 100: "plain warm-up", 299: "plain warm-up",
        300: "reverse_kl", 999: "reverse_kl", 1000: "forward_kl", 10**9: "forward_kl",
    }  # fmt: skip
    assert stages[0].recipe is None
    plain, first, second = (stage.recipe for stage in stages[1:])
    assert plain is not None and not plain.needs_discriminator and plain.needs_fake_jacobian
    assert first is not None and first.divergence.is_constant and not first.needs_ratio
    assert second is not None and second.needs_ratio_gradient and second.normalisation == "l1"


@pytest.mark.parametrize("method", IMAGE_METHODS)
def test_a_plain_warm_up_needs_no_more_than_the_method(method: str) -> None:
    stages = stages_of(MethodConfig(method=method))
    main = stages[-1].recipe
    assert main is not None and main.guidance_scale == 1
    assert main.network_passes.total > 0
    plain = [stage.recipe for stage in stages if stage.name == "plain warm-up"]
    assert len(plain) == main.needs_discriminator
    for recipe in plain:
        assert recipe is not None and recipe.needs_teacher_jacobian == main.needs_teacher_jacobian
        assert recipe.fake_steps == main.fake_steps


@pytest.mark.parametrize("companions", ["generator", "published", "mixture"])
@pytest.mark.parametrize("law", ["rho", "lognormal"])
def test_densities_are_those_of_the_samples(law: Any, companions: Any) -> None:
    config = SigmaLawConfig(law=law, companions=companions)
    generator = torch.Generator().manual_seed(1)
    for chosen in (student_law(config), companion_law(config)):
        sigma = chosen.sample(20000, generator)
        edges = torch.tensor([0.05, 0.3, 1.0, 4.0, 20.0])
        for low, high in zip(edges, edges[1:], strict=False):
            share = float(((sigma > low) & (sigma < high)).float().mean())
            grid = torch.logspace(math.log10(low), math.log10(high), 400, dtype=torch.float64)
            mass = float(torch.trapezoid(chosen.density(grid), grid))
            assert abs(share - mass) < 0.015, (law, companions, float(low))
    uniform = student_law(SigmaLawConfig())
    drawn = uniform.sample(1000, generator)
    assert 0.002 <= float(drawn.min()) and 20 < float(drawn.max()) <= 24.42


def test_exact_weights_of_both_forms() -> None:
    law = student_law(SigmaLawConfig())
    sigma = torch.tensor([0.1, 1.0, 5.0])
    quadratic = time_weight_for(law, sigma, power=2.0, is_integral=False)
    linear = time_weight_for(law, sigma, power=2.0, is_integral=True)
    torch.testing.assert_close(quadratic * law.density(sigma), 1 / sigma)
    torch.testing.assert_close(linear * law.density(sigma), 2 / sigma)  # lambda' / sigma^2


def test_average_and_learning_rate() -> None:
    assert average_decay(10, 1000, half_life_images=20, ramp_up=0.5) == pytest.approx(0.5**0.5)
    assert average_decay(10, 100, half_life_images=1e9, ramp_up=0.1) == pytest.approx(0.5)
    assert average_decay(10, 10, half_life_images=10, ramp_up=0.0) == pytest.approx(0.5)
    constant = {"total_images": 100, "ramp_images": 10, "final_fraction": 1.0}
    assert [rate_factor(n, **constant) for n in (0, 5, 10, 100)] == [0, 0.5, 1, 1]  # type: ignore[arg-type]
    falling = [rate_factor(n, total_images=100, ramp_images=0, final_fraction=0.1) for n in (0, 50, 100, 200)]
    assert falling == pytest.approx([1, 0.55, 0.1, 0.1])


def test_a_preset_is_for_its_images() -> None:
    network = NetworkConfig(preset="cifar10-32x32-cond-vp")
    config = network.edm_config(resolution=32, image_channels=3, label_dim=10)
    assert config.model_channels == 128 and config.augment_dim == 0 and config.label_dim == 10
    with pytest.raises(
        ConfigError, match="is for 32x32 images with 3 channels and 10 classes, the data have"
    ):
        network.edm_config(resolution=64, image_channels=3, label_dim=10)


FILES = sorted(resource_path("configs").glob("distill_*.yaml"))
WHOLE_FILES = ("distill_cifar10_uncond", "distill_cifar10_cond", "distill_imagenet64")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shipped_distillations_have_stages(file: Path) -> None:
    config = load_config(file, DistillConfig())
    stages = stages_of(config.method)
    assert stages[0].recipe is None and stages[-1].recipe is not None
    ends = [stage.end for stage in stages]
    assert ends == sorted(ends) and ends[-2] < config.run.total_images
    if file.stem in WHOLE_FILES:
        named = yaml.safe_load(file.read_text(encoding="utf-8"))
        whole = config_to_dict(DistillConfig())
        assert named.keys() == whole.keys()
        for group, values in whole.items():
            assert not isinstance(values, dict) or named[group].keys() == values.keys(), group


def test_the_paper_s_settings() -> None:
    uncond, cond, imagenet = (
        load_config(resource_path(f"configs/{name}.yaml"), DistillConfig()) for name in WHOLE_FILES
    )
    for config in (uncond, cond, imagenet):
        assert config.sigma_init == 2.5 and config.run.total_images == 300_000_000
        assert (config.noise.law, config.noise.t_max, config.noise.rho) == ("rho", 0.8, 7.0)
        assert (config.optimiser.beta1, config.optimiser.beta2) == (0.0, 0.999)
        assert config.companions.learning_rate == config.optimiser.learning_rate
        assert config.method.score_warmup_images == config.method.plain_warmup_images == 100_000
        recipe = stages_of(config.method)[-1].recipe
        assert recipe is not None and recipe.adversarial_weight == 1e-4 and recipe.normalise_adversarial
    assert (uncond.run.batch, uncond.optimiser.learning_rate) == (cond.run.batch, 1e-5) == (256, 1e-5)
    assert (imagenet.run.batch, imagenet.optimiser.learning_rate) == (8192, 4e-6)
    assert imagenet.average.half_life_images == 4 * cond.average.half_life_images == 2_000_000


@pytest.mark.parametrize("name", ["cifar10", "quick", "tiny"])
def test_shipped_teachers_have_networks(name: str) -> None:
    config = load_config(resource_path(f"configs/train_teacher_{name}.yaml"), TeacherTrainingConfig())
    network = config.network.edm_config(resolution=32, image_channels=3, label_dim=10)
    with torch.device("meta"):
        EDMDenoiser(network)
    if name == "cifar10":
        whole, named = config_to_dict(TeacherTrainingConfig()), config_to_dict(config)
        whole["run"]["compile"] = True
        assert named == whole
        assert network == dataclasses.replace(preset("cifar10-32x32-cond-vp"), augment_dim=0)
