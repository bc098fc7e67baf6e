"""Readers of image data sets: EDM zip, image folder, .npz of arrays or encoded pictures, and CIFAR-10.

An EDM zip (Karras et al. 2022) holds pictures in numbered folders and `dataset.json`, whose "labels" are null
or pairs of file name and class; images are in the order of their sorted names. A folder may hold the same
file, or one subfolder a class. Nothing is ever extracted, and no name in an archive becomes a path.
"""

from __future__ import annotations

import io
import json
import lzma
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from uni3d.data.cifar10 import Split, is_cifar10, open_cifar10
from uni3d.data.image_dataset import ImageDataset, dataset_of_array, dataset_of_files
from uni3d.data.image_decoding import MAX_FILE_BYTES, SUFFIXES, shown
from uni3d.errors import UsageError

LabelSource = Literal["auto", "none"]
LABEL_FILE = "dataset.json"
_MAX_LABEL_BYTES = 128 * 2**20
_MAX_ARRAY_BYTES = 32 * 2**30
_MAX_XZ_BYTES = 4 * 2**30
_SHOWN_SUFFIXES = " ".join(SUFFIXES)


def open_images(
    path: str | Path,
    *,
    split: Split = "train",
    labels: LabelSource = "auto",
    num_classes: int | None = None,
    as_rgb: bool = False,
    name: str | None = None,
) -> ImageDataset:
    """The data set at `path`, whose kind is told by what is there.

    - folder with CIFAR-10 batches, or a .tar.gz of them: `split` chooses train or test; in memory.
    - .zip: labels from its dataset.json, none without one; decoded on demand.
    - other folder: labels from its dataset.json, else the subfolders in alphabetical order, none if all
      images lie at the top; decoded on demand.
    - .npz or .npz.xz: `images` uint8 [N, H, W, C] or [N, H, W], or `data` uint8 and `offsets` int64 [N + 1]
      of encoded pictures, with or without `labels` int [N].

    Args:
        labels: "none" ignores the labels that are there.
        num_classes: refuse labels from this on; None takes the largest plus one.
        as_rgb: read grey, palette and CMYK pictures as sRGB.
        name: for reports; by default after the file.

    Raises UsageError, with the file named, for anything missing, damaged, unsafe or inconsistent. Pictures
    that are decoded on demand are checked when they are read, but for the first.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"'{path}' does not exist; pass a .zip, a folder, a .npz or a CIFAR-10 archive")
    title = name or _title_of(path)
    if is_cifar10(path):
        dataset = open_cifar10(path, split=split, name=name)
        return _without_labels(dataset) if labels == "none" else dataset
    settings = {"num_classes": num_classes, "as_rgb": as_rgb}
    if path.is_dir():
        return _open_folder(path, title, labels, **settings)
    if path.suffix.lower() == ".zip":
        return _open_zip(path, title, labels, **settings)
    if path.name.lower().endswith((".npz", ".npz.xz")):
        return _open_npz(path, title, labels, **settings)
    raise UsageError(
        f"'{path}' is no data set this version reads; pass a .zip, a folder, a .npz or a CIFAR-10 .tar.gz"
    )


def _title_of(path: Path) -> str:
    return path.resolve().name.partition(".")[0] or "images"


def _without_labels(dataset: ImageDataset) -> ImageDataset:
    return ImageDataset(
        dataset.name, dataset.source, None, 0, dataset.num_channels, dataset.resolution
    )  # fmt: skip


# --- zip


@dataclass
class _ZipFiles:
    """Pictures of a zip, opened once a process: a handle that a fork shares would be read by two at once."""

    path: Path
    names: list[str]
    _handle: zipfile.ZipFile | None = field(default=None, repr=False)
    _process: int = 0

    def __len__(self) -> int:
        return len(self.names)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None, "_process": 0}

    def encoded(self, index: int) -> bytes:
        if self._handle is None or self._process != os.getpid():
            self._handle, self._process = _zip_at(self.path), os.getpid()
        return _read_member(self._handle, self.path, self.names[index], MAX_FILE_BYTES)

    def title(self, index: int) -> str:
        return f"'{self.path}': {shown(self.names[index])}"


def _zip_at(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"'{path}' cannot be read as a zip ({reason}); copy or make it again") from None


def _read_member(archive: zipfile.ZipFile, path: Path, name: str, limit: int) -> bytes:
    """The bytes of one member. zipfile reads no more than the declared size, so that is what is limited."""
    info = archive.getinfo(name)
    if info.file_size > limit:
        raise UsageError(
            f"'{path}': {shown(name)} unpacks to {info.file_size / 2**20:.0f} MiB, more than "
            f"{limit // 2**20}; remove it"
        )
    try:
        return archive.read(info)
    except (
        zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, EOFError, zlib.error, lzma.LZMAError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(
            f"'{path}': {shown(name)} is damaged ({reason}); copy or make the zip again"
        ) from None


def _open_zip(
    path: Path, title: str, labels: LabelSource, *, num_classes: int | None, as_rgb: bool
) -> ImageDataset:
    with _zip_at(path) as archive:
        infos = [info for info in archive.infolist() if not info.is_dir()]
        _check_members(infos, path)
        found = [info.filename for info in infos]
        names = sorted(name for name in found if _is_picture(name))
        _check_found(names, found, f"'{path}'")
        document = None
        if labels == "auto" and LABEL_FILE in found:
            document = _read_member(archive, path, LABEL_FILE, _MAX_LABEL_BYTES)
    values = None if document is None else _labels_of(document, names, f"{LABEL_FILE} in '{path}'")
    return dataset_of_files(
        _ZipFiles(path, names), values, name=title, where=f"'{path}'", num_classes=num_classes, as_rgb=as_rgb
    )


def _check_members(infos: Sequence[zipfile.ZipInfo], path: Path) -> None:
    seen: set[str] = set()
    for info in infos:
        name = info.filename
        parts = name.replace("\\", "/").split("/")
        if ".." in parts or name.startswith(("/", "\\")) or (len(name) > 1 and name[1] == ":"):
            raise UsageError(f"'{path}' holds the unsafe name {name[:200]!r}; make the zip again without it")
        if info.flag_bits & 1:
            raise UsageError(f"'{path}': {shown(name)} is encrypted; make the zip again without a password")
        if name in seen:
            raise UsageError(f"'{path}' holds {shown(name)} twice; make the zip again")
        seen.add(name)


def _is_picture(name: str) -> bool:
    parts = name.split("/")
    is_hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not is_hidden and name.lower().endswith(SUFFIXES)


def _check_found(names: Sequence[str], found: Sequence[str], where: str) -> None:
    if names:
        return
    if any(name.endswith(".npy") for name in found):
        raise UsageError(
            f"{where} holds .npy arrays and no pictures; pass the data set before it was encoded"
        )
    raise UsageError(f"{where} holds no pictures ({_SHOWN_SUFFIXES}); pass another")


def _labels_of(document: bytes, names: Sequence[str], where: str) -> np.ndarray | None:
    """The class of each of `names` int64 [N] from the text of a dataset.json; None where it says null."""
    try:
        labels = json.loads(document)["labels"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(
            f'{where} cannot be read ({reason}); expected {{"labels": [["file.png", 0], ...]}} or null'
        ) from None
    if labels is None:
        return None
    class_of: dict[str, int] = {}
    for row in labels if isinstance(labels, list) else [None]:
        if not (isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) and type(row[1]) is int):
            raise UsageError(f"{where} holds the label {str(row)[:80]}; expected [file name, whole number]")
        if row[0] in class_of and class_of[row[0]] != row[1]:
            raise UsageError(f"{where} gives {shown(row[0])} two classes; keep one")
        class_of[row[0]] = row[1]
    missing = [name for name in names if name not in class_of]
    if missing:
        raise UsageError(
            f"{where} has no label for {len(missing)} of {len(names)} images, the first is "
            f"{shown(missing[0])}; label all, or read without labels"
        )
    unknown = len(class_of) - len(names)
    if unknown:
        known = set(names)
        first = next(name for name in class_of if name not in known)
        raise UsageError(
            f"{where} labels {unknown} files that are not there, the first is {shown(first)}; "
            f"remove those labels or add the files"
        )
    values = [class_of[name] for name in names]
    if max(map(abs, values)) >= 2**31:
        raise UsageError(f"{where} has a label of {max(map(abs, values))}; number the classes from 0 on")
    return np.array(values, np.int64)


# --- folder


@dataclass(frozen=True)
class _FolderFiles:
    folder: Path
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def encoded(self, index: int) -> bytes:
        return _read_file(self.folder / self.names[index], MAX_FILE_BYTES)

    def title(self, index: int) -> str:
        return f"'{self.folder}': {shown(self.names[index])}"


def _read_file(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read ({error.strerror}); check the file") from None
    if len(data) > limit:
        raise UsageError(f"'{path}' is larger than {limit // 2**20} MiB; remove it")
    return data


def _open_folder(
    path: Path, title: str, labels: LabelSource, *, num_classes: int | None, as_rgb: bool
) -> ImageDataset:
    found = [
        (Path(parent) / file).relative_to(path).as_posix()
        for parent, _, files in os.walk(path)
        for file in files
    ]
    names = sorted(name for name in found if _is_picture(name))
    _check_found(names, found, f"'{path}'")
    values = None
    if labels == "auto" and LABEL_FILE in found:
        document = _read_file(path / LABEL_FILE, _MAX_LABEL_BYTES)
        values = _labels_of(document, names, f"'{path / LABEL_FILE}'")
    elif labels == "auto":
        values = _labels_by_folder(names, path)
    return dataset_of_files(
        _FolderFiles(path, names),
        values,
        name=title,
        where=f"'{path}'",
        num_classes=num_classes,
        as_rgb=as_rgb,
    )


def _labels_by_folder(names: Sequence[str], path: Path) -> np.ndarray | None:
    tops = [name.partition("/")[0] if "/" in name else None for name in names]
    classes = sorted({top for top in tops if top is not None})
    if not classes:
        return None
    if None in tops:
        raise UsageError(
            f"'{path}' holds images at its top ({names[tops.index(None)]}) and in subfolders ({classes[0]}); "
            f"put each image into the folder of its class, add a {LABEL_FILE}, or read without labels"
        )
    index_of = {top: index for index, top in enumerate(classes)}
    return np.array([index_of[top] for top in tops if top is not None], np.int64)


# --- npz


@dataclass(frozen=True)
class _BlobFiles:
    path: Path
    data: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def encoded(self, index: int) -> bytes:
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()

    def title(self, index: int) -> str:
        return f"'{self.path}': picture {index}"


def _open_npz(
    path: Path, title: str, labels: LabelSource, *, num_classes: int | None, as_rgb: bool
) -> ImageDataset:
    arrays = _read_arrays(path, ("images", "data", "offsets", "labels"))
    where = f"'{path}'"
    values = arrays.get("labels") if labels == "auto" else None
    if "images" in arrays:
        pixels = arrays["images"]
        pixels = pixels[..., None] if pixels.ndim == 3 else pixels
        if pixels.ndim != 4 or pixels.shape[3] not in (1, 3):
            raise UsageError(
                f"'images' of {where} has the shape {list(arrays['images'].shape)}; expected [N, H, W, 3] or "
                f"[N, H, W]"
            )
        pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        pixels = np.repeat(pixels, 3, axis=1) if as_rgb and pixels.shape[1] == 1 else pixels
        return dataset_of_array(pixels, values, name=title, where=where, num_classes=num_classes)
    if "data" not in arrays or "offsets" not in arrays:
        raise UsageError(f"{where} holds neither 'images' nor 'data' with 'offsets'; pass another file")
    data, offsets = arrays["data"], arrays["offsets"]
    is_series = data.dtype == np.uint8 and data.ndim == 1 and offsets.ndim == 1 and offsets.dtype.kind in "iu"
    if not is_series or len(offsets) < 2 or offsets[0] < 0 or offsets[-1] > len(data) or _falls(offsets):
        raise UsageError(f"'offsets' of {where} do not cut its 'data' into pictures; make the file again")
    files = _BlobFiles(path, data, offsets.astype(np.int64))
    return dataset_of_files(
        files, values, name=title, where=where, num_classes=num_classes, as_rgb=as_rgb
    )  # fmt: skip


def _read_all(stream: lzma.LZMAFile, path: Path) -> io.BytesIO:
    """What an .xz file holds, piece by piece: its size is known only at the end."""
    content = io.BytesIO()
    while piece := stream.read(2**20):
        content.write(piece)
        if content.tell() > _MAX_XZ_BYTES:
            raise UsageError(f"'{path}' unpacks to more than {_MAX_XZ_BYTES // 2**30} GiB; unpack it before")
    return content


def _falls(offsets: np.ndarray) -> bool:
    return bool((offsets[1:] <= offsets[:-1]).any())


def _read_arrays(path: Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of `keys` that the .npz (or .npz.xz) holds; no pickled objects."""
    try:
        source: Any = path
        if path.suffix.lower() == ".xz":
            with lzma.open(path) as stream:
                source = _read_all(stream, path)
        with zipfile.ZipFile(source) as archive:
            num_bytes = sum(info.file_size for info in archive.infolist())
        if num_bytes > _MAX_ARRAY_BYTES:
            raise UsageError(f"'{path}' unpacks to {num_bytes / 2**30:.0f} GiB; split it or make a zip of it")
        if source is not path:
            source.seek(0)
        with np.load(source, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in keys if key in arrays.files}
    except UsageError:
        raise
    except (
        zipfile.BadZipFile, OSError, ValueError, EOFError, KeyError, NotImplementedError, RuntimeError,
        SyntaxError, MemoryError, zlib.error, lzma.LZMAError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"'{path}' cannot be read as a .npz ({reason}); copy or make it again") from None
