"""What survives a crash: atomic file writes, and the checkpoints of a run built on them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from uni3d.errors import ConfigError, MissingWeightsError, UsageError
from uni3d.training.state_tree import flatten_state, restore_state

logger = logging.getLogger(__name__)


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
    sync_folder(target.parent)
    return target


def atomic_write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 `text` atomically, see `atomic_write`."""
    return atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def atomic_write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write `value` as indented JSON atomically; NaN and infinity are refused with ValueError."""
    return atomic_write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def sync_folder(folder: Path) -> None:
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


FORMAT = "uni3d-checkpoint-1"
_STEP_FILE = re.compile(r"step_(\d{8,})\.safetensors")
_PICKLE_STARTS = (b"\x80", b"PK\x03\x04", b"\x1f\x8b")


class DamagedFile(UsageError):
    """A weights file or checkpoint that is truncated, altered or not safetensors."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified: `state` is what was handed to `save`, tensors on the CPU."""

    step: int
    state: Any
    path: Path


class CheckpointStore:
    """The checkpoints of one run in one folder, each a single self-describing safetensors file.

    Tensors are the file's tensors; everything else is JSON in its metadata, with a SHA-256 over both. A file
    is written atomically, so a kill at any moment leaves the previous checkpoints and at most a stray
    temporary file. The newest `keep` are kept, and a damaged newest falls back to the one before.

    `fingerprint` is what must not change between the runs that share the folder (JSON values, for example the
    resolved configuration without the output path); a difference is refused when loading, key by key.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, keep: int = 2, fingerprint: Mapping[str, Any] | None = None
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; expected at least 1")
        self.folder = Path(folder)
        self.keep = keep
        self.fingerprint = None if fingerprint is None else json.loads(json.dumps(fingerprint))

    def save(self, step: int, state: Any) -> Path:
        """Write `state` (nested dicts, lists, tensors, plain data) as the checkpoint of `step`.

        A checkpoint of the same step is replaced; later steps, left by a run that rolled back, are removed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        skeleton, tensors = flatten_state(state)
        document = json.dumps(
            {"format": FORMAT, "step": step, "fingerprint": self.fingerprint, "state": skeleton},
            allow_nan=False,
        )
        path = write_checked(self.folder / f"step_{step:08d}.safetensors", tensors, document)
        self._prune(step)
        return path

    def paths(self) -> list[Path]:
        """The checkpoint files of the folder, newest step first."""
        if not self.folder.is_dir():
            return []
        found = [
            (match, path) for path in self.folder.iterdir() if (match := _STEP_FILE.fullmatch(path.name))
        ]
        return [path for _, path in sorted(found, key=lambda pair: int(pair[0][1]), reverse=True)]

    def load_latest(self) -> Checkpoint | None:
        """The newest checkpoint that is intact, or None if the folder holds none.

        Damaged ones are passed over with a warning. Raises UsageError if all are damaged, and ConfigError if
        the fingerprint differs.
        """
        reasons: list[str] = []
        for path in self.paths():
            try:
                return self.load(path)
            except DamagedFile as error:
                logger.warning("%s; going back to the checkpoint before", error)
                reasons.append(path.name)
        if reasons:
            raise UsageError(
                f"every checkpoint in '{self.folder}' is damaged ({', '.join(reasons)}); start the run anew"
            )
        return None

    def load(self, path: str | os.PathLike[str]) -> Checkpoint:
        """Read and verify one file; raises DamagedFile or, if the fingerprint differs, ConfigError."""
        file = Path(path)
        tensors, document = read_checked(file)
        content = json.loads(document)
        if content["format"] != FORMAT:
            raise DamagedFile(
                f"checkpoint '{file}' has the format {content['format']!r}; expected {FORMAT!r}"
            )
        self._compare_fingerprint(file, content["fingerprint"])
        return Checkpoint(content["step"], restore_state(content["state"], tensors), file)

    def _compare_fingerprint(self, file: Path, saved: Any) -> None:
        if self.fingerprint is None or saved is None or saved == self.fingerprint:
            return
        differences = list(_differences(saved, self.fingerprint))
        shown = "; ".join(differences[:4]) + ("; ..." if len(differences) > 4 else "")
        raise ConfigError(
            f"checkpoint '{file}' belongs to other settings: {shown}; use the same ones or start a new run"
        )

    def _prune(self, step: int) -> None:
        for path in self.folder.glob(".step_*.tmp.safetensors"):
            path.unlink(missing_ok=True)
        kept = 0
        for path in self.paths():
            match = _STEP_FILE.fullmatch(path.name)
            kept += 1
            if match and int(match[1]) > step:
                kept -= 1
                path.unlink(missing_ok=True)
            elif kept > self.keep:
                path.unlink(missing_ok=True)


def write_checked(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], document: str = "") -> Path:
    """Write contiguous CPU tensors and the text `document` as one safetensors file, atomically.

    Its metadata hold a SHA-256 over both. Returns the path.
    """
    metadata = {"format": "pt", "uni3d": document, "sha256": _digest(document, tensors)}
    return atomic_write(path, lambda temporary: save_file(dict(tensors), temporary, metadata=metadata))


def read_checked(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], str]:
    """What `write_checked` wrote: (tensors on the CPU, document). Raises as `read_safetensors` does, and
    DamagedFile for contents that do not match the checksum."""
    tensors, metadata = read_safetensors(path)
    document = metadata.get("uni3d", "")
    if _digest(document, tensors) != metadata.get("sha256"):
        raise DamagedFile(f"'{path}' is damaged: its contents do not match its checksum; replace it")
    return tensors, document


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (on the CPU) and the metadata of a safetensors file.

    Raises MissingWeightsError if there is no such file and DamagedFile, with the remedy, if it is truncated,
    not safetensors, or a pickle, which is refused because loading one can run any code.
    """
    file = Path(path)
    if not file.is_file():
        raise MissingWeightsError(f"'{file}' does not exist or is not a file; check the path")
    try:
        with file.open("rb") as stream:
            start = stream.read(10)
        if start.startswith(_PICKLE_STARTS):
            # The first eight bytes of safetensors are the header's length and the ninth opens its JSON.
            if start[8:9] != b"{":
                raise DamagedFile(
                    f"'{file}' looks like a pickle or an archive, which can run code when it is loaded; "
                    f"convert it to safetensors"
                )
        with safe_open(file, framework="pt", device="cpu") as reader:
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
            return tensors, dict(reader.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, DamagedFile):
            raise
        reason = " ".join(str(error).split())[:200]
        raise DamagedFile(f"'{file}' is damaged or not safetensors ({reason}); replace it") from error


def _digest(document: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(document.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _differences(saved: Any, current: Any, place: str = "") -> Iterator[str]:
    """'key was X, now Y' for every leaf in which two nested JSON values differ."""
    if isinstance(saved, dict) and isinstance(current, dict):
        for key in sorted(set(saved) | set(current)):
            path = f"{place}.{key}" if place else str(key)
            yield from _differences(saved.get(key), current.get(key), path)
    elif saved != current:
        yield f"{place} was {json.dumps(saved)[:80]}, now {json.dumps(current)[:80]}"
