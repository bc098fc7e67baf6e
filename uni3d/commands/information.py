"""The commands `inspect`, `methods` and `doctor`: what a mesh, this version and this machine are."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

import uni3d
from uni3d.cli import results_only
from uni3d.commands.parsing import parse_flags
from uni3d.errors import MissingWeightsError, UsageError
from uni3d.resources import resource_roots, weights_folder


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
