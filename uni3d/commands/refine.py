"""The command `refine`: read flags, check what can be checked at once, call the program, write its result."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from uni3d.cli import be_quiet, results_only
from uni3d.commands.parsing import option_value, parse_flags
from uni3d.config.loader import load_config
from uni3d.config.refine import RefineConfig
from uni3d.errors import UsageError
from uni3d.outputs import check_output_folder
from uni3d.prompts import check_prompt

MAY_CHANGE_ON_RESUME = ("source", "output", "resume", "overwrite", "quiet", "json", "device")
PARTS = ("geometry", "texture", "both")


@dataclass(frozen=True, kw_only=True)
class RefineOptions(RefineConfig):
    """Change the texture or the geometry of a mesh: uni3d refine chair.glb --prompt "a blue chair".

    --texture (the default) keeps every vertex, --geometry keeps the colours, --both changes both. Flags win
    over the file of --config.
    """

    source: tyro.conf.Positional[Path | None] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """The mesh to start from: a .glb, .obj, .ply or .stl file."""
    config: Path | None = None
    """YAML file of settings, such as configs/refine.yaml."""


def refine(arguments: Sequence[str]) -> int:
    """`uni3d refine IN --prompt TEXT`: checks everything that can be checked before the heavy imports."""
    options = read_refine_options(arguments)
    if options.quiet:
        be_quiet()
    if options.source is None:
        raise UsageError("no mesh was given; pass a .glb, .obj, .ply or .stl file to start from")
    check_prompt(options.prompt)
    check_output_folder(options.runs_folder)
    from uni3d.text_to_3d.refine import refine as run

    with results_only() as stdout:
        result = run(options)
        stdout.write(f"{json.dumps(result.as_dict()) if options.json else result.output}\n")
    return 0


def read_refine_options(arguments: Sequence[str]) -> RefineConfig:
    """The settings of a refinement from flags, file and, with --resume, the run's own settings."""
    words = _with_part(arguments)
    file, resume = option_value(words, "config"), option_value(words, "resume")
    base = RefineConfig()
    if resume is not None:
        saved = Path(resume) / "config.yaml"
        if file is not None:
            raise UsageError("--resume takes the settings of its run; leave out --config")
        if not saved.is_file():
            raise UsageError(
                f"'{resume}' is not the directory of a run (it has no config.yaml); "
                f"pass the directory that the interrupted run named"
            )
        base = dataclasses.replace(load_config(saved, base), output=None, overwrite=False)
    elif file is not None:
        base = load_config(file, base)
    parsed = parse_flags(RefineOptions, words, command="refine", default=RefineOptions(**_fields(base)))
    values = _fields(parsed)
    values.pop("config")
    if resume is not None:
        changed = [name for name in values if values[name] != getattr(base, name)]
        refused = [name for name in changed if name not in MAY_CHANGE_ON_RESUME]
        if refused:
            raise UsageError(
                f"--resume goes on with the settings of its run, but {', '.join(refused)} would change; "
                f"leave that out or start a new run"
            )
    return RefineConfig(**values)


def _with_part(arguments: Sequence[str]) -> list[str]:
    """`arguments` with --geometry, --texture or --both written as --part; UsageError for more than one."""
    chosen = [word[2:] for word in arguments if word in {f"--{part}" for part in PARTS}]
    if len(set(chosen)) > 1:
        raise UsageError(f"--{chosen[0]} and --{chosen[1]} exclude each other; --both changes both")
    rest = [word for word in arguments if word not in {f"--{part}" for part in PARTS}]
    return [*rest, "--part", chosen[0]] if chosen else rest


def _fields(instance: Any) -> dict[str, Any]:
    """The fields of a dataclass instance, nested ones as they are."""
    return {item.name: getattr(instance, item.name) for item in dataclasses.fields(instance)}
