"""The command `generate --prompts`: many scenes from a file of prompts, in one folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro

from uni3d.cli import be_quiet, results_only
from uni3d.commands.parsing import option_value, parse_flags, read_numbers
from uni3d.config.loader import load_config
from uni3d.config.presets import load_run_config
from uni3d.config.text_to_3d import Quality, TextTo3DConfig
from uni3d.config.values import check_range
from uni3d.errors import ScenesFailed, UsageError
from uni3d.prompts import check_prompt
from uni3d.text_to_3d.scene_requests import MAX_SCENES, ScenePlan, SceneRequest, is_planned

MAX_FILE_BYTES = 1 << 20
MAY_CHANGE_ON_RESUME = ("resume", "quiet", "json", "device", "vram")


@dataclass(frozen=True, kw_only=True)
class GenerateManyOptions(TextTo3DConfig):
    """Make a textured mesh of every prompt in a file.

    Scenes are optimised together, as many as --scenes-at-once, each as `uni3d generate` makes it. Every scene
    gets a run directory in --output-dir; summary.json and contact_sheet.png show all. Go on after an
    interruption with --resume DIR. The exit code is 1 if any scene failed.
    """

    prompt: tyro.conf.Suppress[str] = ""
    output: tyro.conf.Suppress[Path | None] = None
    runs_folder: tyro.conf.Suppress[Path] = Path("outputs")
    seed: tyro.conf.Suppress[int] = 0
    prompts: Path | None = None
    """Text file with one prompt a line; `a red chair | 0-3` gives one its own seeds, # begins a comment."""
    output_dir: Path | None = None
    """Folder for the run directories of all scenes."""
    seeds: str = "0"
    """Seeds of every prompt without its own, such as 7, 0-3 or 0-9,20-29."""
    scenes_at_once: int = 8
    """Scenes optimised together; fewer need less memory."""
    config: Annotated[Path | None, tyro.conf.arg(help="YAML file of settings.")] = None


def is_for_many(arguments: Sequence[str]) -> bool:
    """Whether `uni3d generate` is asked for many scenes, or to go on with them."""
    folder = option_value(arguments, "resume")
    return option_value(arguments, "prompts") is not None or (folder is not None and is_planned(Path(folder)))


def generate_many(arguments: Sequence[str]) -> int:
    """`uni3d generate --prompts FILE --output-dir DIR`, and --resume DIR of such a folder."""
    config, plan = read_options(arguments)
    if config.quiet:
        be_quiet()
    if config.resume is None:
        plan.check_folder(overwrite=config.overwrite)
    from uni3d.text_to_3d.many_scenes import generate_many as run

    with results_only() as stdout:
        result = run(config, plan)
        if result.is_main:
            stdout.write(f"{json.dumps(result.summary) if config.json else result.folder}\n")
    if result.failures:
        shown = "; ".join(f"{name}: {reason}" for name, reason in result.failures.items())
        raise ScenesFailed(f"{len(result.failures)} of {len(plan.scenes)} scenes failed: {shown}")
    return 0


def read_options(arguments: Sequence[str]) -> tuple[TextTo3DConfig, ScenePlan]:
    """The settings that all scenes share, and the scenes."""
    file, folder = option_value(arguments, "config"), option_value(arguments, "resume")
    quality = option_value(arguments, "quality")
    if quality is not None and quality not in get_args(Quality):
        raise UsageError(f"unknown quality {quality[:80]!r}; expected one of {', '.join(get_args(Quality))}")
    if folder is not None:
        return _read_resumed(arguments, Path(folder))
    base = load_run_config(file, quality)  # pyright: ignore[reportArgumentType]
    options = _parse(arguments, base)
    if options.prompts is None or options.output_dir is None:
        raise UsageError("many scenes need --prompts FILE and --output-dir DIR")
    check_range("--scenes-at-once", options.scenes_at_once, 1, 1024)
    if options.particles > 1:
        raise UsageError("--particles makes several meshes of one prompt; with --prompts give more --seeds")
    if options.fake_score.base is not None or options.fake_score.camera != "conditioning":
        raise UsageError(
            "many scenes at once have their fake scores on the teacher itself, told the camera's five "
            "numbers; leave out --fake-score.base and --fake-score.camera"
        )
    if options.field.encoding != "dense":
        raise UsageError(
            f"many scenes at once need dense fields, but field.encoding is '{options.field.encoding}'; "
            "use --field.encoding dense"
        )
    seeds = read_numbers("--seeds", options.seeds, max_count=MAX_SCENES)
    plan = ScenePlan.of(read_requests(options.prompts, seeds), options.output_dir, options.scenes_at_once)
    return _shared(options, options.output_dir), plan


def _read_resumed(arguments: Sequence[str], folder: Path) -> tuple[TextTo3DConfig, ScenePlan]:
    for flag in ("config", "quality", "prompts", "output-dir", "seeds", "scenes-at-once"):
        if option_value(arguments, flag) is not None:
            raise UsageError(f"--resume goes on with the settings of '{folder}'; leave out --{flag}")
    plan = ScenePlan.load(folder)
    saved = dataclasses.replace(load_config(folder / "config.yaml", TextTo3DConfig()), overwrite=False)
    config = _shared(_parse(arguments, saved), folder)
    changed = [
        item.name
        for item in dataclasses.fields(TextTo3DConfig)
        if getattr(config, item.name) != getattr(saved, item.name)
    ]
    refused = [name for name in changed if name not in (*MAY_CHANGE_ON_RESUME, "runs_folder")]
    if refused:
        raise UsageError(f"--resume goes on with the settings of '{folder}'; leave out {', '.join(refused)}")
    return config, plan


def _parse(arguments: Sequence[str], base: TextTo3DConfig) -> GenerateManyOptions:
    default = GenerateManyOptions(**_fields(base))
    return parse_flags(GenerateManyOptions, arguments, command="generate", default=default)


def _shared(options: GenerateManyOptions, folder: Path) -> TextTo3DConfig:
    values = {item.name: getattr(options, item.name) for item in dataclasses.fields(TextTo3DConfig)}
    negative = check_prompt(options.negative_prompt, name="negative prompt", may_be_empty=True)
    return TextTo3DConfig(**values | {"runs_folder": folder, "negative_prompt": negative})


def _fields(instance: Any) -> dict[str, Any]:
    return {item.name: getattr(instance, item.name) for item in dataclasses.fields(instance)}


def read_requests(file: Path, seeds: Sequence[int]) -> list[SceneRequest]:
    """The prompts of a file with their seeds, in order. UsageError, with the line, for what is no prompt."""
    requests: list[SceneRequest] = []
    for number, line in enumerate(_lines(file), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        prompt, has_seeds, own = text.rpartition("|")
        try:
            chosen = read_numbers("seeds", own, max_count=MAX_SCENES) if has_seeds else seeds
            checked = check_prompt(prompt if has_seeds else text)
        except UsageError as error:
            raise UsageError(f"{file}:{number}: {error}") from error
        requests += [SceneRequest(checked, seed) for seed in chosen]
        if len(requests) > MAX_SCENES:
            raise UsageError(f"{file}:{number}: more than {MAX_SCENES} scenes; split the file")
    if not requests:
        raise UsageError(f"'{file}' holds no prompt; write one a line")
    return requests


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise UsageError(f"'{file}' does not exist or is not a file; pass a text file with a prompt a line")
    content = file.read_bytes()
    if len(content) > MAX_FILE_BYTES:
        raise UsageError(f"'{file}' is larger than {MAX_FILE_BYTES >> 20} MiB; split it")
    try:
        return content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"'{file}' is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
