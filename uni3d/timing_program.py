"""What the programs share that measure something, print it line by line and keep the figures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from uni3d.training.checkpoint import atomic_write_json


def argument_parser(
    module: str, about: str | None, *, output: str = "JSON file of all figures", needs_output: bool = False
) -> argparse.ArgumentParser:
    """A parser for `python -m module` with --device and --output, explained by the module's docstring;
    `output` says what goes where --output points, which must be given where `needs_output`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", type=_present_device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--output", type=Path, required=needs_output, help=output)
    return parser


def _present_device(name: str) -> str:
    """A device that torch has here; argparse turns the error into one sentence and exit code 2."""
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise argparse.ArgumentTypeError(
            f"there is no device {name!r}; expected cpu, cuda or cuda:N"
        ) from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{name!r} was asked for, but torch sees no CUDA device; use cpu")
    return name


def say(line: str) -> None:
    """Print one line of the table as soon as it is known."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def keep_figures(figures: dict[str, Any], file: Path | None) -> None:
    """Write what was measured to the file of --output, if one was given."""
    if file is not None:
        atomic_write_json(file, figures)
