"""View shards: many rendered pictures with their masks, cameras and captions' words in a few files.

A shard is one .npz: WebP pictures (RGBA, straight alpha) and lossless WebP masks as concatenated bytes with
offsets, plus a JSON table of assets and views. No pickle. Legend: N views, H W pixels.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from uni3d.errors import UsageError
from uni3d.training.checkpoint import atomic_write

SHARD_PATTERN = "views_*.npz"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ViewRecord:
    """Everything known about one view. Angles in degrees; `main_colour` sRGB in [0, 1]; words lower case."""

    asset_id: str
    name: str
    noun: str
    category: str
    colours: tuple[str, ...]
    materials: tuple[str, ...]
    tags: tuple[str, ...]
    main_colour: tuple[float, float, float]
    role: str
    source: str
    creator: str
    licence: str
    azimuth_deg: float
    elevation_deg: float
    radius: float
    fov_y_deg: float


_VIEW_FIELDS = ("azimuth_deg", "elevation_deg", "radius", "fov_y_deg")
_ASSET_FIELDS = tuple(f.name for f in fields(ViewRecord) if f.name not in _VIEW_FIELDS)


@dataclass(frozen=True)
class EncodedView:
    """One view as it is stored: WebP bytes of picture and mask, and its record."""

    image: bytes
    mask: bytes
    record: ViewRecord


@dataclass(frozen=True)
class Views:
    """Decoded views: images uint8 [N, H, W, 4] RGBA straight alpha; main_masks uint8 [N, H, W] 0 or 255."""

    images: np.ndarray
    main_masks: np.ndarray
    records: list[ViewRecord]

    def __len__(self) -> int:
        return len(self.records)


class ViewShardWriter:
    """Collects the views of whole assets and writes a shard whenever `assets_per_shard` are there.

    Existing shards stay: `finished_assets` names what they hold, and new shards take the next free number.
    """

    def __init__(self, folder: str | Path, *, assets_per_shard: int = 100) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.assets_per_shard = assets_per_shard
        self._pending: list[list[EncodedView]] = []
        existing = sorted(self.folder.glob(SHARD_PATTERN))
        self._next_number = 1 + max((int(p.stem.split("_")[1]) for p in existing), default=-1)

    def finished_assets(self) -> set[str]:
        """Ids of the assets that shards on disk hold."""
        finished: set[str] = set()
        for path in sorted(self.folder.glob(SHARD_PATTERN)):
            with _open_shard(path) as shard:
                finished.update(asset["asset_id"] for asset in _table(shard)["assets"])
        return finished

    def add_asset(self, views: Sequence[EncodedView]) -> None:
        """Take all views of one asset; may write a shard."""
        if views:
            self._pending.append(list(views))
        if len(self._pending) >= self.assets_per_shard:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as one shard, atomically."""
        if not self._pending:
            return
        views = [view for asset in self._pending for view in asset]
        table = _encode_table([view.record for view in views])
        arrays = {
            **_blob("image", [view.image for view in views]),
            **_blob("mask", [view.mask for view in views]),
            "table": np.frombuffer(json.dumps(table).encode(), dtype=np.uint8),
        }
        path = self.folder / f"views_{self._next_number:05d}.npz"

        def write(target: Path) -> None:
            with open(target, "wb") as file:
                np.savez(file, **arrays)

        atomic_write(path, write)
        self._next_number += 1
        self._pending = []


def _blob(name: str, items: list[bytes]) -> dict[str, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum([len(item) for item in items])]).astype(np.int64)
    return {f"{name}_bytes": np.frombuffer(b"".join(items), dtype=np.uint8), f"{name}_offsets": offsets}


def _encode_table(records: list[ViewRecord]) -> dict[str, Any]:
    index_of: dict[str, int] = {}
    assets: list[dict[str, Any]] = []
    views: list[list[float]] = []
    for record in records:
        row = asdict(record)
        if record.asset_id not in index_of:
            index_of[record.asset_id] = len(assets)
            assets.append({key: row[key] for key in _ASSET_FIELDS})
        views.append([index_of[record.asset_id], *(round(float(row[key]), 4) for key in _VIEW_FIELDS)])
    return {
        "version": FORMAT_VERSION,
        "view_fields": ["asset", *_VIEW_FIELDS],
        "assets": assets,
        "views": views,
    }


def _decode_records(table: dict[str, Any]) -> list[ViewRecord]:
    assets = []
    for row in table["assets"]:
        lists = {k: tuple(row[k]) for k in ("colours", "materials", "tags", "main_colour")}
        assets.append({**row, **lists})
    return [
        ViewRecord(**assets[int(view[0])], **dict(zip(_VIEW_FIELDS, view[1:], strict=True)))
        for view in table["views"]
    ]


def _open_shard(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"the view shard '{path}' is damaged ({error}); delete it and render again"
        ) from error


def _table(shard: Any) -> dict[str, Any]:
    table = json.loads(shard["table"].tobytes().decode())
    if table.get("version") != FORMAT_VERSION:
        raise UsageError(
            f"a view shard has format {table.get('version')}, this version reads {FORMAT_VERSION}"
        )
    return table


def encode_image(rgba: np.ndarray, *, quality: int) -> bytes:
    """Lossy WebP of uint8 [H, W, 4] with lossless alpha."""
    buffer = io.BytesIO()
    Image.fromarray(rgba, "RGBA").save(buffer, "WEBP", quality=quality, method=4, exact=True)
    return buffer.getvalue()


def encode_mask(mask: np.ndarray) -> bytes:
    """Lossless 1-bit PNG of a boolean mask [H, W]."""
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def load_views(
    folder: str | Path,
    *,
    num_workers: int = 2,
    limit: int | None = None,
    roles: Collection[str] | None = None,
) -> Views:
    """Decode the shards in `folder`, in order; `num_workers` threads (decoding releases the GIL).

    `limit` keeps the first views only, `roles` those of assets with one of these roles. Raises UsageError for
    a folder without shards, a damaged shard, or no view left.
    """
    paths = sorted(Path(folder).glob(SHARD_PATTERN))
    if not paths:
        raise UsageError(
            f"'{folder}' holds no view shards ({SHARD_PATTERN}); make some with: uni3d teacher render"
        )
    chosen_of: dict[Path, list[int]] = {}
    records: list[ViewRecord] = []
    for path in paths:
        with _open_shard(path) as shard:
            shard_records = _decode_records(_table(shard))
        chosen = [i for i, r in enumerate(shard_records) if roles is None or r.role in roles]
        chosen = chosen if limit is None else chosen[: limit - len(records)]
        records += [shard_records[i] for i in chosen]
        if chosen:
            chosen_of[path] = chosen
    if not records:
        raise UsageError(f"no view in '{folder}' has one of the roles {sorted(roles or [])}")
    return _decode_all(chosen_of, records, num_workers)


def _decode_all(chosen_of: dict[Path, list[int]], records: list[ViewRecord], num_workers: int) -> Views:
    """Decode straight into the arrays that are returned: half the memory of stacking."""
    images = masks = np.zeros(0, np.uint8)
    start = 0
    with ThreadPoolExecutor(max_workers=max(1, num_workers)) as pool:
        for path, chosen in chosen_of.items():
            with _open_shard(path) as shard:
                pictures, covers = _Blob(shard, "image"), _Blob(shard, "mask")
            if start == 0:
                height, width = pictures.decode_rgba(chosen[0]).shape[:2]
                images = np.empty((len(records), height, width, 4), np.uint8)
                masks = np.empty((len(records), height, width), np.uint8)
            for row, picture, mask in zip(
                range(start, start + len(chosen)),
                pool.map(pictures.decode_rgba, chosen),
                pool.map(covers.decode_mask, chosen),
                strict=True,
            ):
                images[row], masks[row] = picture, mask
            start += len(chosen)
    return Views(images, masks, records)


class _Blob:
    """One concatenated series of encoded pictures."""

    def __init__(self, shard: Any, name: str) -> None:
        self._bytes: np.ndarray = shard[f"{name}_bytes"]
        self._offsets: np.ndarray = shard[f"{name}_offsets"]

    def _open(self, index: int) -> Image.Image:
        low, high = self._offsets[index], self._offsets[index + 1]
        return Image.open(io.BytesIO(self._bytes[low:high].tobytes()))

    def decode_rgba(self, index: int) -> np.ndarray:
        return np.asarray(self._open(index).convert("RGBA"))

    def decode_mask(self, index: int) -> np.ndarray:
        return np.asarray(self._open(index).convert("L"))
