"""Whether a result can be written where the user wants it: asked before any work is done."""

from __future__ import annotations

import importlib.util
import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

from uni3d.errors import MissingPackageError, UsageError

MESH_SUFFIXES = (".glb", ".obj", ".ply", ".stl", ".usdz")

USD_IS_MISSING = 'needs the package usd-core: pip install "uni3d[usd]", or choose .glb'


def check_output_file(
    path: str | os.PathLike[str],
    *,
    overwrite: bool,
    suffixes: Sequence[str] = MESH_SUFFIXES,
) -> Path:
    """`path` as a Path, if a file can be written there; nothing is created or changed.

    Raises UsageError for an unknown suffix, a missing or read-only folder, a folder in the file's place, and
    a file that exists unless `overwrite`; what an OBJ brings along is checked as well. MissingPackageError
    for a .usdz without the package that writes it.
    """
    target = Path(path)
    status = _status(target)
    if status is not None and stat.S_ISDIR(status.st_mode):
        raise UsageError(f"output '{target}' is a folder; add a file name such as {target / 'mesh.glb'}")
    if target.suffix.lower() not in suffixes:
        raise UsageError(
            f"output '{target}' has the suffix '{target.suffix}'; use one of {', '.join(suffixes)}"
        )
    if target.suffix.lower() == ".usdz" and importlib.util.find_spec("pxr") is None:
        raise MissingPackageError(f"output '{target}' {USD_IS_MISSING}")
    if not target.parent.is_dir():
        raise UsageError(f"the folder '{target.parent}' of output '{target}' does not exist; create it first")
    if status is not None and not overwrite:
        raise UsageError(f"output '{target}' exists; choose another name or pass --overwrite")
    if target.suffix.lower() == ".obj":
        _check_companions(target, overwrite=overwrite)
    _check_writable(target.parent)
    return target


def obj_companions(path: Path) -> tuple[Path, Path]:
    """The material library and the picture that are written beside an OBJ, free of blanks: OBJ readers end a
    name at one."""
    stem = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in path.stem) or "object"
    return path.with_name(f"{stem}.mtl"), path.with_name(f"{stem}.png")


def _check_companions(target: Path, *, overwrite: bool) -> None:
    for companion in obj_companions(target):
        status = _status(companion)
        if status is None:
            continue
        if stat.S_ISDIR(status.st_mode):
            raise UsageError(
                f"output '{target}' needs the file '{companion}', which is a folder; choose another name"
            )
        if not overwrite:
            raise UsageError(
                f"output '{target}' would replace '{companion}'; choose another name or pass --overwrite"
            )


def check_output_folder(path: str | os.PathLike[str]) -> Path:
    """`path` as a Path, if it is a folder that can be written to or can be made; nothing is created."""
    folder = Path(path)
    status = _status(folder)
    if status is not None and not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"'{folder}' is a file where a folder is needed; choose another name")
    _check_writable(next(place for place in (folder, *folder.absolute().parents) if place.is_dir()))
    return folder


def _status(path: Path) -> os.stat_result | None:
    """What is at `path`, None if nothing is; UsageError if nothing can be."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        shown = repr(str(path)[:200])
        raise UsageError(f"{shown} is no usable path ({reason}); choose another") from error


def _check_writable(folder: Path) -> None:
    """Make and remove a nameless file: permission bits alone say nothing about read-only mounts or quotas."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"the folder '{folder}' cannot be written to ({error.strerror}); choose another one"
        ) from error
