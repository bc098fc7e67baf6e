"""The commands `generate`, `inspect`, `methods`, `doctor`: read flags, call a program, write its result."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import tyro

import uni3d
from uni3d.batch_commands import generate_many, is_for_many
from uni3d.cli import be_quiet, results_only
from uni3d.cli_parsing import option_value, parse_flags
from uni3d.config import Quality, TextTo3DConfig
from uni3d.config_loader import load_config
from uni3d.errors import MissingWeightsError, UsageError
from uni3d.outputs import check_output_file, check_output_folder
from uni3d.presets import load_run_config
from uni3d.prompts import check_prompt
from uni3d.resources import resource_roots, weights_folder

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
        from uni3d.shared_run import generate_shared as run
    else:
        from uni3d.text_to_3d import generate as run

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


@dataclass(frozen=True)
class InspectOptions:
    """Figures of a mesh file by anybody: size, surface, texture, how it was made, and the limits it misses.

    Exit code 1 if it misses one.
    """

    file: tyro.conf.Positional[Path]
    """A .glb, .obj, .ply or .stl file."""
    json: bool = False
    """Print one JSON object."""


def inspect(arguments: Sequence[str]) -> int:
    """`uni3d inspect FILE`."""
    options = parse_flags(InspectOptions, arguments, command="inspect")
    if not options.file.is_file():
        raise UsageError(
            f"'{options.file}' does not exist or is not a file; pass a .glb, .obj, .ply or .stl file"
        )
    from uni3d.mesh.report import inspect_file

    with results_only() as stdout:
        report = inspect_file(options.file)
        stdout.write(f"{json.dumps(report, indent=2) if options.json else _as_lines(report)}\n")
    return 1 if report["missed"] else 0


@dataclass(frozen=True)
class MethodsOptions:
    """The guidance methods: divergence, terms, and cost in network passes per step."""

    json: bool = False
    """Print one JSON list."""


def methods(arguments: Sequence[str]) -> int:
    """`uni3d methods`."""
    options = parse_flags(MethodsOptions, arguments, command="methods")
    from uni3d.losses.recipes import method_table

    with results_only() as stdout:
        table = [row._asdict() for row in method_table()]
        stdout.write(f"{json.dumps(table, indent=2) if options.json else format_table(table)}\n")
    return 0


@dataclass(frozen=True)
class DoctorOptions:
    """What this machine offers: versions, devices, weights and optional packages."""

    json: bool = False
    """Print one JSON object."""


OPTIONAL_PACKAGES = {
    "triton": "rendering on a GPU: comes with torch's CUDA builds for Linux",
    "nerfacc": 'another renderer for GPUs: pip install "uni3d[cuda]"',
    "tinycudann": "faster encodings on a GPU: on no registry, see github.com/NVlabs/tiny-cuda-nn",
    "torch-fidelity": 'the Inception-v3 of FID: pip install "uni3d[eval]"',
    "gradio": 'the web page app.py: pip install "uni3d[demo]"',
    "huey": 'the web page app.py: pip install "uni3d[demo]"',
    "usd-core": '.usdz files: pip install "uni3d[usd]"',
}
NEEDED_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "numpy",
    "trimesh",
    "embreex",
    "xatlas",
    "fast-simplification",
    "imageio-ffmpeg",
    "tyro",
)


def doctor(arguments: Sequence[str]) -> int:
    """`uni3d doctor`; exit code 3 if something that `generate` needs is missing."""
    options = parse_flags(DoctorOptions, arguments, command="doctor")
    with results_only() as stdout:
        findings = examine()
        text = json.dumps(findings, indent=2) if options.json else _as_lines(findings)
        stdout.write(f"{text}\n")
    return 0 if findings["ready"] else MissingWeightsError.exit_code


def examine() -> dict[str, Any]:
    """The findings of `uni3d doctor` as nested dicts of text, numbers and truth values."""
    packages = {name: _version(name) for name in NEEDED_PACKAGES}
    weights = {name: _weights(name) for name in ("teacher", "evaluator")}
    optional = {
        name: _version(name) or f"not installed; {purpose}" for name, purpose in OPTIONAL_PACKAGES.items()
    }
    return {
        "ready": all(packages.values()) and not weights["teacher"].startswith("missing"),
        "uni3d": f"{uni3d.__version__} in {Path(uni3d.__file__).parent}",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "cpu": f"{os.cpu_count()} cores",
        "devices": _devices(),
        "packages": {name: version or "missing: reinstall uni3d" for name, version in packages.items()},
        "optional packages": optional,
        "weights": weights,
        "files": [str(root) for root in resource_roots() if root.is_dir()],
        "hub cache": _hub_cache(),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _weights(name: str) -> str:
    try:
        folder = weights_folder(name)
    except MissingWeightsError as error:
        return f"missing: {error}"
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return f"{folder} ({size / 1e6:.1f} MB)"


def _devices() -> dict[str, str]:
    if importlib.util.find_spec("torch") is None:
        return {"cpu": "torch is not installed"}
    import torch

    found = {"cpu": f"{torch.get_num_threads()} threads"}
    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "no device was found"
        return {**found, "cuda": f"none: {reason}"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return found


def _hub_cache() -> str:
    from huggingface_hub import constants

    state = "offline" if constants.HF_HUB_OFFLINE else "online"
    return f"{constants.HF_HUB_CACHE} ({state})"


def _as_lines(value: dict[str, Any], indent: int = 0) -> str:
    """Nested dicts as indented `key: value` lines."""
    lines = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines.append(f"{'  ' * indent}{key}:")
            lines.append(_as_lines(item, indent + 1))
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            lines.append(f"{'  ' * indent}{key}: {json.dumps(item)}")
        else:
            shown = ", ".join(map(str, item)) if isinstance(item, list) else item
            lines.append(f"{'  ' * indent}{key}: {_say(shown)}")
    return "\n".join(line for line in lines if line)


def _say(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Dicts with the same keys as aligned columns under a header."""
    cells = [list(rows[0])] + [[str(value) for value in row.values()] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    return "\n".join(lines)
