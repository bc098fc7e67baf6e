"""CIFAR-10 (Krizhevsky 2009) as it is distributed: the python or the binary version, unpacked or .tar.gz.

Nothing is extracted to disk, and the pickles of the python version are read without running them. Both
versions hold 3072 bytes an image: 32x32 red, then green, then blue, row by row.
"""

from __future__ import annotations

import lzma
import re
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from uni3d.data.image_dataset import ImageDataset, dataset_of_array
from uni3d.errors import UsageError
from uni3d.pickle_reader import DamagedPickle, Known, PickleReader, RefusedPickle, Stateful

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
_BATCH_NAME = re.compile(r"(data_batch_[1-5]|test_batch)(\.bin)?")
_SIDE, _NUM_CLASSES = 32, 10
_IMAGE_BYTES = 3 * _SIDE * _SIDE
_MAX_BATCH_BYTES = 64 * 2**20
_MAX_ARCHIVE_BYTES = 2**30
_MAX_MEMBERS = 1000
_REMEDY = "take the archive from the CIFAR-10 page again"


class _Array(Stateful):
    """numpy's record of an array."""

    state: Any = None

    def set_state(self, state: Any) -> None:
        self.state = state


@dataclass
class _ArrayType(Stateful):
    """numpy's record of the type of an array; whatever else it says of its bytes does not matter."""

    code: Any

    def set_state(self, state: Any) -> None:
        pass


_NAMES = {
    "numpy.ndarray": Known(),
    "numpy.dtype": Known(call=lambda arguments: _ArrayType(arguments[0] if arguments else None)),
    "numpy.core.multiarray._reconstruct": Known(call=lambda _: _Array()),
    "numpy._core.multiarray._reconstruct": Known(call=lambda _: _Array()),
}


def is_cifar10(path: Path) -> bool:
    """True for a folder with CIFAR-10 batches, or holding one, and for a .tar.gz, .tgz or .tar file."""
    if path.is_dir():
        return _batch_folder(path) is not None
    return path.name.lower().endswith((".tar.gz", ".tgz", ".tar"))


def open_cifar10(path: Path, *, split: Split = "train", name: str | None = None) -> ImageDataset:
    """The 50,000 training or 10,000 test images of a folder or archive, in memory, in their official order.

    Raises UsageError for missing, damaged or foreign batches.
    """
    if split not in SPLITS:
        raise UsageError(f"CIFAR-10 has no split '{split}'; choose train or test")
    wanted = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    batches = _read_folder(path, wanted) if path.is_dir() else _read_archive(path, wanted)
    missing = [stem for stem in wanted if stem not in batches]
    if missing:
        raise UsageError(f"'{path}' holds no {missing[0]} of CIFAR-10; {_REMEDY}")
    parts = [_read_batch(*batches[stem], path) for stem in wanted]
    pixels = np.concatenate([part[0] for part in parts])
    labels = np.concatenate([part[1] for part in parts])
    return dataset_of_array(
        pixels, labels, name=name or f"cifar10-{split}", where=f"'{path}'", num_classes=_NUM_CLASSES
    )


def _batch_folder(path: Path) -> Path | None:
    for folder in (path, *(path / name for name in _FOLDERS)):
        if any((folder / f"data_batch_1{suffix}").is_file() for suffix in ("", ".bin")):
            return folder
        if any((folder / f"test_batch{suffix}").is_file() for suffix in ("", ".bin")):
            return folder
    return None


def _read_folder(path: Path, wanted: Sequence[str]) -> dict[str, tuple[str, bytes]]:
    folder = _batch_folder(path) or path
    batches: dict[str, tuple[str, bytes]] = {}
    for stem in wanted:
        for file in (folder / stem, folder / f"{stem}.bin"):
            if not file.is_file() or stem in batches:
                continue
            if file.stat().st_size > _MAX_BATCH_BYTES:
                raise UsageError(f"'{file}' is larger than any batch of CIFAR-10; {_REMEDY}")
            batches[stem] = (file.name, file.read_bytes())
    return batches


def _read_archive(path: Path, wanted: Sequence[str]) -> dict[str, tuple[str, bytes]]:
    """Name and content of the wanted members, read from the stream, wherever they would extract to."""
    batches: dict[str, tuple[str, bytes]] = {}
    num_bytes = 0
    try:
        with tarfile.open(path, "r:*") as archive:
            for number, member in enumerate(archive):
                num_bytes += max(0, member.size)
                if number >= _MAX_MEMBERS or num_bytes > _MAX_ARCHIVE_BYTES:
                    raise UsageError(f"'{path}' holds far more than CIFAR-10 does; {_REMEDY}")
                base = member.name.rpartition("/")[2]
                stem = base.removesuffix(".bin")
                if not member.isreg() or not _BATCH_NAME.fullmatch(base) or stem not in wanted:
                    continue
                if member.size > _MAX_BATCH_BYTES:
                    raise UsageError(f"'{path}': {base} is larger than any batch of CIFAR-10; {_REMEDY}")
                if stem in batches:
                    raise UsageError(f"'{path}' holds {stem} more than once; {_REMEDY}")
                stream = archive.extractfile(member)
                assert stream is not None
                batches[stem] = (base, stream.read())
                if len(batches) == len(wanted):
                    break
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"'{path}' cannot be read as a tar archive ({reason}); {_REMEDY}") from None
    return batches


def _read_batch(base: str, data: bytes, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 3, 32, 32] and labels int64 [N] of one batch."""
    title = f"'{path}': {base}"
    if base.endswith(".bin"):
        if not data or len(data) % (1 + _IMAGE_BYTES):
            raise UsageError(f"{title} has {len(data)} bytes, no multiple of {1 + _IMAGE_BYTES}; {_REMEDY}")
        records = np.frombuffer(data, np.uint8).reshape(-1, 1 + _IMAGE_BYTES)
        pixels, labels = records[:, 1:], records[:, 0].astype(np.int64)
    else:
        try:
            content, _ = PickleReader(memoryview(data), _NAMES).read()
        except (DamagedPickle, RefusedPickle) as error:
            raise UsageError(f"{title} is not what it should be ({error}); {_REMEDY}") from None
        pixels, labels = _pixels_and_labels(content, title)
    if len(labels) != len(pixels):
        raise UsageError(f"{title} has {len(pixels)} images and {len(labels)} labels; {_REMEDY}")
    return pixels.reshape(-1, 3, _SIDE, _SIDE), labels


def _pixels_and_labels(content: Any, title: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        pixels, labels = _array(content[b"data"]), content[b"labels"]
        if type(labels) is not list or not all(type(label) is int for label in labels):
            raise ValueError("its labels are no list of whole numbers")
        return pixels, np.array(labels, np.int64)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{title} is no batch of CIFAR-10 ({reason}); {_REMEDY}") from None


def _array(record: Any) -> np.ndarray:
    """uint8 [N, 3072] from numpy's own record of an array: (version, shape, dtype, order, bytes)."""
    if not isinstance(record, _Array):
        raise ValueError("its data are no array")
    _, shape, kind, is_fortran, data = record.state
    if not isinstance(kind, _ArrayType) or kind.code not in (b"u1", "u1"):
        raise ValueError("its data are no bytes")
    if not isinstance(data, (bytes, memoryview)) or len(shape) != 2 or shape[1] != _IMAGE_BYTES:
        raise ValueError("its data are not 3072 bytes an image")
    return np.frombuffer(data, np.uint8).reshape(shape, order="F" if is_fortran else "C")
