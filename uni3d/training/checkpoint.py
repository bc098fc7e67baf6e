"""What survives a crash: atomic file writes now, checkpoints of a whole run built on them."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any


def atomic_write(path: str | os.PathLike[str], writer: Callable[[Path], object]) -> Path:
    """Write `path` so that a reader sees the old file or the complete new one, whatever happens in between.

    `writer(temporary)` is handed a path in the same folder with the same suffix (exporters choose the format
    by it) and must create that file. It is then flushed to disk and renamed over `path`; the folder entry is
    flushed too. If `writer` raises, the temporary file is removed and `path` is left as it was.
    Returns `path` as a Path. Raises whatever `writer` raises, and OSError from the file system.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp{target.suffix}")
    try:
        writer(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)
    return target


def atomic_write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 `text` atomically, see `atomic_write`."""
    return atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def atomic_write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write `value` as indented JSON atomically; NaN and infinity are refused with ValueError."""
    return atomic_write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def _sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename outlives a power cut; a no-op where that is impossible."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
