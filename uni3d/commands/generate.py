"""The command `generate`: read flags and files, check them, run the program, print where the mesh is."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import tyro

from uni3d.cli import be_quiet, results_only
from uni3d.commands.batch import generate_many, is_for_many
from uni3d.commands.parsing import option_value, parse_flags
from uni3d.config.loader import load_config
from uni3d.config.presets import load_run_config
from uni3d.config.text_to_3d import Quality, TextTo3DConfig
from uni3d.errors import UsageError
from uni3d.outputs import check_output_file, check_output_folder
from uni3d.prompts import check_prompt

MAY_CHANGE_ON_RESUME = ("output", "resume", "overwrite", "quiet", "json", "device", "vram")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(TextTo3DConfig):
    """Make a textured mesh from a prompt.

    Flags win over the file of --config, the file over the values of --quality. A schedule is given as one
    number, or as pairs of fraction of the run and value: --guidance.guidance-scale 0 12 1 6.
    Many at once: --prompts FILE --output-dir DIR [--seeds 0-3] [--scenes-at-once 8].
    """

    prompt: tyro.conf.Positional[str] = ""
    """What to make, for example "a red wooden chair"."""
    config: Path | None = None
    """YAML file of settings, such as configs/text_to_3d.yaml."""


def generate(arguments: Sequence[str]) -> int:
    """`uni3d generate`: checks everything that can be checked before the heavy imports."""
    if is_for_many(arguments):
        return generate_many(arguments)
    options = read_generate_options(arguments)
    if options.quiet:
        be_quiet()
    if options.resume is None:
        check_prompt(options.prompt)
        check_prompt(options.negative_prompt, name="negative prompt", may_be_empty=True)
        check_output_folder(options.runs_folder)
    if options.output is not None:
        check_output_file(options.output, overwrite=options.overwrite)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from uni3d.text_to_3d.shared_run import generate_shared as run
    else:
        from uni3d.text_to_3d.pipeline import generate as run

    with results_only() as stdout:
        result = run(options)
        if result is not None:  # in the first of several processes
            stdout.write(f"{json.dumps(result.as_dict()) if options.json else result.output}\n")
    return 0


def read_generate_options(arguments: Sequence[str]) -> TextTo3DConfig:
    """The settings of a run from flags, file, quality and, with --resume, the run's own settings."""
    file, resume = option_value(arguments, "config"), option_value(arguments, "resume")
    quality = option_value(arguments, "quality")
    if quality is not None and quality not in get_args(Quality):
        raise UsageError(f"unknown quality {quality[:80]!r}; expected one of {', '.join(get_args(Quality))}")
    if resume is not None:
        if file is not None or quality is not None:
            raise UsageError("--resume takes the settings of its run; leave out --config and --quality")
        saved = Path(resume) / "config.yaml"
        if not saved.is_file():
            raise UsageError(
                f"'{resume}' is not the directory of a run (it has no config.yaml); "
                f"pass the directory that the interrupted run named"
            )
        base = dataclasses.replace(load_config(saved, TextTo3DConfig()), output=None, overwrite=False)
    else:
        base = load_run_config(file, quality)  # pyright: ignore[reportArgumentType]
    default = GenerateOptions(**_fields(base))
    parsed = parse_flags(GenerateOptions, arguments, command="generate", default=default)
    values = _fields(parsed)
    values.pop("config")
    if file is not None and parsed.output is not None and parsed.output.resolve() == Path(file).resolve():
        raise UsageError(f"output '{parsed.output}' is the file of --config; choose another name")
    if resume is not None:
        changed = [name for name in values if values[name] != getattr(base, name)]
        refused = [name for name in changed if name not in MAY_CHANGE_ON_RESUME]
        if refused:
            raise UsageError(
                f"--resume goes on with the settings of its run, but {', '.join(refused)} would change; "
                f"leave that out or start a new run"
            )
    return TextTo3DConfig(**values)


def _fields(instance: Any) -> dict[str, Any]:
    """The fields of a dataclass instance, nested ones as they are."""
    return {item.name: getattr(instance, item.name) for item in dataclasses.fields(instance)}
