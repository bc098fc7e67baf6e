"""What a visitor may order, checked without the heavy imports, and the settings of its run."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from uni3d.config.loader import config_to_yaml
from uni3d.config.presets import quality_preset
from uni3d.config.text_to_3d import CheckpointsConfig, Quality, TextTo3DConfig
from uni3d.config.values import DIVERGENCE_NAMES, check_name, check_range
from uni3d.errors import UsageError
from uni3d.prompts import check_prompt
from uni3d.web.settings import WebSettings

MAX_SEED_ON_PAGE = 2**31 - 1

# Methods that need a prompt and nothing else, with what the page says about them.
METHODS: dict[str, str] = {
    "uni-instruct": "the family of losses of uni3d; a divergence can be chosen",
    "f-distill": "one divergence, by the ratio that a discriminator estimates",
    "vsd": "variational score distillation, as in ProlificDreamer",
    "diff-instruct": "the integral form of the reverse KL divergence",
    "dmd2": "distribution matching with an adversarial term",
    "sds": "score distillation, as in DreamFusion: the cheapest",
}
METHODS_WITH_DIVERGENCE = ("uni-instruct", "f-distill")


@dataclass(frozen=True, kw_only=True)
class Order:
    """One mesh that a visitor asks for. `divergence` is none where the method brings its own."""

    prompt: str
    negative_prompt: str = ""
    method: str = "uni-instruct"
    divergence: str | None = None
    teacher: str = "embedded"
    seed: int = 0
    quality: str = "draft"


def check_order(order: Order, settings: WebSettings) -> Order:
    """The order in its normal form; UsageError for anything that the page does not offer."""
    check_range("seed", order.seed, 0, MAX_SEED_ON_PAGE)
    check_name("method", order.method, tuple(METHODS))
    check_name("teacher", order.teacher, tuple(settings.teachers))
    check_name("quality", order.quality, get_args(Quality))
    divergence = order.divergence if order.method in METHODS_WITH_DIVERGENCE else None
    if divergence is not None:
        check_name("divergence", divergence, DIVERGENCE_NAMES)
    return dataclasses.replace(
        order,
        prompt=check_prompt(order.prompt),
        negative_prompt=check_prompt(order.negative_prompt, name="negative prompt", may_be_empty=True),
        divergence=divergence,
    )


def run_config(order: Order, settings: WebSettings, *, runs_folder: Path) -> TextTo3DConfig:
    """The settings of the run that makes `order`."""
    return dataclasses.replace(
        _plain_config(order, settings),
        teacher=settings.teachers[order.teacher],
        device=settings.device,
        runs_folder=runs_folder,
        quiet=True,
        checkpoints=CheckpointsConfig(interval_s=settings.checkpoint_interval_s),
    )


def _plain_config(order: Order, settings: WebSettings) -> TextTo3DConfig:
    if order.teacher not in settings.teachers:
        raise UsageError(f"the teacher {order.teacher!r} is no longer offered; choose another one")
    preset = quality_preset(cast(Quality, order.quality))
    steps = preset.steps if settings.max_steps is None else min(preset.steps, settings.max_steps)
    return dataclasses.replace(
        preset,
        prompt=order.prompt,
        negative_prompt=order.negative_prompt,
        method=order.method,
        divergence=order.divergence,
        teacher=_public_teacher(order, settings),
        seed=order.seed,
        steps=steps,
        mesh=dataclasses.replace(preset.mesh, formats=("glb", "obj")),
    )


def num_steps(order: Order, settings: WebSettings) -> int:
    """How many steps the run of `order` takes."""
    return _plain_config(order, settings).steps


def reproducing_config(order: Order, settings: WebSettings) -> str:
    """YAML that makes the mesh of `order` again; it names no folder of this server."""
    return config_to_yaml(_plain_config(order, settings))


def reproducing_command(order: Order, settings: WebSettings) -> str:
    """The command line that makes the mesh of `order` again."""
    config = _plain_config(order, settings)
    words = ["uni3d", "generate", order.prompt, "--seed", str(order.seed), "--quality", order.quality]
    if order.prompt.startswith("-"):  # not a flag
        words[2:3] = []
        words += ["--", order.prompt]
    flags = ["--method", order.method]
    if order.divergence is not None:
        flags += ["--divergence", order.divergence]
    if order.negative_prompt:
        flags.append(f"--negative-prompt={order.negative_prompt}")
    if config.teacher != "embedded":
        flags += ["--teacher", config.teacher]
    if config.steps != quality_preset(cast(Quality, order.quality)).steps:
        flags += ["--steps", str(config.steps)]
    place = words.index("--") if "--" in words else len(words)
    return shlex.join([*words[:place], *flags, *words[place:]])


def _public_teacher(order: Order, settings: WebSettings) -> str:
    """The teacher as others may read it: an id of the hub as it is, a folder by its name alone."""
    source = settings.teachers[order.teacher]
    return order.teacher if Path(source).is_absolute() or Path(source).exists() else source
