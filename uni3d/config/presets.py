"""The quality presets, read from the YAML files that a user can look at and copy."""

from __future__ import annotations

import functools
from pathlib import Path

from uni3d.config.loader import load_config
from uni3d.config.text_to_3d import Quality, TextTo3DConfig
from uni3d.resources import resource_path

PRESET_FILES: dict[Quality, str] = {
    "default": "configs/text_to_3d.yaml",
    "draft": "configs/text_to_3d_draft.yaml",
}


@functools.cache
def quality_preset(quality: Quality) -> TextTo3DConfig:
    """The settings of a quality: what flags and files are laid over."""
    return load_config(resource_path(PRESET_FILES[quality]), TextTo3DConfig(quality=quality))


def load_run_config(file: str | Path | None, quality: Quality | None = None) -> TextTo3DConfig:
    """The settings of `file` over those of a quality: the given one, else the file's own, else the default.

    Raises ConfigError as `load_config` does.
    """
    if file is None:
        return quality_preset(quality or "default")
    chosen = quality or load_config(file, TextTo3DConfig()).quality
    return load_config(file, quality_preset(chosen))
