"""The command `import-edm`: a published network of EDM, SiD or Uni-Instruct for the image programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from uni3d.cli import be_quiet, results_only
from uni3d.commands.parsing import parse_flags
from uni3d.errors import UsageError
from uni3d.outputs import check_output_folder


@dataclass(frozen=True)
class ImportOptions:
    """Convert a network pickle of EDM, SiD or Uni-Instruct to safetensors, without running what it holds.

    The output is a folder with model.safetensors and config.json. The weights keep their licence: those of
    EDM are for non-commercial use.
    """

    file: tyro.conf.Positional[Path]
    """A .pkl file, for example edm-cifar10-32x32-uncond-vp.pkl."""
    output: Path
    """Folder for the network."""
    overwrite: bool = False
    """Replace a network that is there."""
    quiet: bool = False
    """Nothing but errors on stderr."""
    json: bool = False
    """Print what was imported as one JSON object."""


def import_edm(arguments: Sequence[str]) -> int:
    """`uni3d import-edm FILE.pkl --output DIR`."""
    options = parse_flags(ImportOptions, arguments, command="import-edm")
    if options.quiet:
        be_quiet()
    if not options.file.is_file():
        raise UsageError(
            f"'{options.file}' does not exist or is not a file; pass a .pkl of EDM or of a generator"
        )
    check_output_folder(options.output)
    from uni3d.diffusion.edm_import import import_edm as run

    with results_only() as stdout:
        result = run(options.file, options.output, overwrite=options.overwrite)
        stdout.write(f"{json.dumps(result.as_dict()) if options.json else result.directory}\n")
    return 0
