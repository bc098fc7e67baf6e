"""A set of named tensors and a JSON state as one folder, replaced as a whole, in files of bounded size.

`training.checkpoint.CheckpointStore` keeps the last few steps of a run, each as one file of any size. A
training of hours keeps one state, which must travel where files may not be large and be read without its
tensors; its files are written and checked by the same two functions.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uni3d.errors import Uni3DError, UsageError
from uni3d.training.checkpoint import atomic_write_json, read_checked, sync_folder, write_checked

STATE_NAME = "state.json"


def write_checkpoint(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    max_file_mib: float | None = None,
) -> list[Path]:
    """Write `tensors` (cast to `dtype` when given) and `state` to `folder`; returns the files.

    The new folder is complete before it takes the old one's place, so a crash leaves one of the two. No file
    is larger than `max_file_mib`, except for one tensor that alone is.
    """
    target = Path(folder)
    fresh = target.with_name(f".{target.name}.new")
    stale = target.with_name(f".{target.name}.old")
    survivor = _existing(target)
    if survivor is not None and survivor != target:
        shutil.rmtree(target, ignore_errors=True)
        os.replace(survivor, target)
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    limit = float("inf") if max_file_mib is None else max_file_mib * 2**20
    names: list[str] = []
    part: dict[str, Tensor] = {}
    size = 0.0

    def flush() -> None:
        nonlocal part, size
        if part:
            names.append(f"part-{len(names) + 1:05d}.safetensors")
            write_checked(fresh / names[-1], part)
        part, size = {}, 0.0

    for name, tensor in tensors.items():
        stored = tensor.detach().to(device="cpu", dtype=dtype if tensor.is_floating_point() else None)
        stored = stored.contiguous().clone()
        # Each tensor costs its bytes and about 200 more for its entry in the header.
        num_bytes = stored.numel() * stored.element_size() + 200
        if size + num_bytes > limit:
            flush()
        part[name] = stored
        size += num_bytes
    flush()
    atomic_write_json(fresh / STATE_NAME, {**state, "files": names})
    if target.exists():
        os.replace(target, stale)
    os.replace(fresh, target)
    sync_folder(target.parent)
    shutil.rmtree(stale, ignore_errors=True)
    return [target / name for name in [*names, STATE_NAME]]


def read_state(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The JSON state of a checkpoint, or None when there is none. Raises UsageError when it is damaged."""
    source = _existing(Path(folder))
    if source is None:
        return None
    try:
        return json.loads((source / STATE_NAME).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{source / STATE_NAME} is damaged ({error}); delete {source}") from error


def read_tensors(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a checkpoint, on the CPU. Raises UsageError when a file is missing or damaged."""
    source = _existing(Path(folder))
    state = read_state(folder)
    if source is None or state is None:
        raise UsageError(f"{folder} holds no checkpoint; pass the folder that has a {STATE_NAME}")
    tensors: dict[str, Tensor] = {}
    for name in state["files"]:
        try:
            tensors.update(read_checked(source / name)[0])
        except Uni3DError as error:
            raise UsageError(f"{error}, or delete '{source}'") from error
    return tensors


def _existing(folder: Path) -> Path | None:
    """`folder`, or the one it was about to replace when a crash fell between the two renames."""
    others = (folder.with_name(f".{folder.name}.{end}") for end in ("new", "old"))
    for candidate in (folder, *others):
        if (candidate / STATE_NAME).is_file():
            return candidate
    return None
