"""Settings of the teacher's training that cannot work are refused in one sentence."""

from __future__ import annotations

from dataclasses import fields

import pytest

from uni3d.errors import ConfigError
from uni3d.teacher.settings import AutoencoderConfig, DenoiserConfig, TeacherConfig, TeacherDataConfig

GROUPS = [
    ("data.", TeacherDataConfig),
    ("autoencoder.", AutoencoderConfig),
    ("denoiser.", DenoiserConfig),
    ("", TeacherConfig),
]


@pytest.mark.parametrize(("group", "kind"), GROUPS)
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
        (DenoiserConfig, {"planned_steps": 0}, "denoiser.planned_steps is 0"),
        (DenoiserConfig, {"batch_size": -8}, "denoiser.batch_size is -8"),
        (
            DenoiserConfig,
            {"text_dropout": 1.5},
            "denoiser.text_dropout is 1.5; expected a number from 0 to 1",
        ),
        (
            DenoiserConfig,
            {"batch_size": 9, "accumulate_steps": 2},
            "is 9; expected a multiple of accumulate_ste",
        ),
        (DenoiserConfig, {"context_dim": 100}, "context_dim is 100; expected a multiple of text_heads"),
        (
            DenoiserConfig,
            {"attention_heads": (1, 2)},
            "attention_heads has 2 entries and block_out_channels 3",
        ),
        (DenoiserConfig, {"attention_heads": (5, 6, 11)}, "is 96; expected a multiple of attention_heads"),
        (DenoiserConfig, {"block_out_channels": ()}, "denoiser.block_out_channels is empty"),
        (
            AutoencoderConfig,
            {"block_out_channels": (30, 64)},
            "is 30; expected a multiple of norm_num_groups",
        ),
        (AutoencoderConfig, {"image_size": 100}, "image_size is 100; expected a multiple of 8"),
        (AutoencoderConfig, {"crop_size": 48}, "crop_size is 48; expected a multiple of 8 that divides"),
        (TeacherDataConfig, {"flip_probability": -0.1}, "data.flip_probability is -0.1"),
        (TeacherDataConfig, {"roles": ()}, "data.roles is empty"),
    ],
)
def test_settings_that_cannot_work(kind: type, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**changes)
