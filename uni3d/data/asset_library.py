"""Folders, archives and catalogues of 3D models as one list of named assets, each with its part in training.

A library is any mix of folders of GLB/OBJ/PLY files, zip archives of them, Sweet Home 3D catalogues (.sh3f),
single files, and built-in procedural assets ("procedural:vases"). Names come from a metadata table (CSV or
JSON, columns path, name, noun, category, tags, creator, licence, source, yaw_deg), from the catalogue, or
from the file name.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import posixpath
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import numpy as np

from uni3d.data import naming, vases
from uni3d.errors import UsageError
from uni3d.mesh.raycaster import load_renderable
from uni3d.mesh.renderable import RenderableMesh, safe_relative_name

logger = logging.getLogger(__name__)

Role = Literal["teacher", "evaluator", "neither", "both"]
ROLES: tuple[Role, ...] = ("teacher", "evaluator", "neither", "both")

MODEL_SUFFIXES = (".glb", ".obj", ".ply")
MAX_MEMBER_BYTES = 300_000_000
PROCEDURAL_VASES = "procedural:vases"


@dataclass(frozen=True)
class Asset:
    """One model: where it lies, what it is called, who made it, and how to set it upright and facing +Z.

    `path` is a file; `member` the name inside it when it is an archive. `rotation` is a row-major 3x3 matrix;
    `size` the real width, height, depth (any unit) that the model is stretched to before normalisation.
    """

    asset_id: str
    name: str
    noun: str
    category: str = ""
    tags: tuple[str, ...] = ()
    source: str = ""
    creator: str = ""
    licence: str = ""
    path: str = ""
    member: str = ""
    yaw_deg: float = 0.0
    rotation: tuple[float, ...] = ()
    size: tuple[float, ...] = ()
    role: Role = "both"


@dataclass(frozen=True)
class Skipped:
    """An asset that is left out, and why."""

    asset_id: str
    reason: str


def scan_assets(
    paths: Sequence[str | Path], *, metadata: str | Path | None = None
) -> tuple[list[Asset], list[Skipped]]:
    """List the assets under `paths` in a fixed order, with roles assigned, and what the naming tables skip.

    `metadata` is a CSV or JSON table; without it a `metadata.csv` or `metadata.json` in a scanned folder is
    used. Procedural assets and catalogues bring their own names: a given table draws a warning there. Raises
    UsageError for a path that does not exist, an unreadable table, or nothing to render.
    """
    assets: list[Asset] = []
    skipped: list[Skipped] = []
    for path in paths:
        has_names = str(path).startswith(PROCEDURAL_VASES) or Path(path).suffix.lower() == ".sh3f"
        if metadata and has_names:
            logger.warning("the table '%s' has no effect on '%s', which brings its own names", metadata, path)
        found, left_out = _scan_one(str(path), metadata)
        assets += found
        skipped += left_out
    unique = {asset.asset_id: asset for asset in assets}
    if len(unique) != len(assets):
        twice = next(i for i, n in Counter(a.asset_id for a in assets).items() if n > 1)
        raise UsageError(f"the asset '{twice}' was given twice; pass each folder once")
    if not assets:
        raise UsageError(f"no {', '.join(MODEL_SUFFIXES)} or .sh3f files under {', '.join(map(str, paths))}")
    return assign_roles([unique[key] for key in sorted(unique)]), skipped


def _scan_one(path: str, metadata: str | Path | None) -> tuple[list[Asset], list[Skipped]]:
    if path.startswith(PROCEDURAL_VASES):
        count = path.removeprefix(PROCEDURAL_VASES).lstrip(":") or "240"
        if not count.isdigit():
            raise UsageError(f"'{path}' should read {PROCEDURAL_VASES} or {PROCEDURAL_VASES}:NUMBER")
        return [_vase_asset(seed) for seed in range(int(count))], []
    root = Path(path)
    if root.is_dir():
        return _scan_folder(root, metadata)
    if not root.is_file():
        raise UsageError(f"there is no file or folder '{path}'")
    match root.suffix.lower():
        case ".sh3f":
            return _scan_catalogue(root)
        case ".zip":
            return _scan_archive(root, metadata)
        case suffix if suffix in MODEL_SUFFIXES:
            return _name_files(root.parent, [root.name], _read_metadata(metadata, root.parent))
        case suffix:
            raise UsageError(
                f"cannot take assets from '{path}': '{suffix}' is not a model, archive or catalogue"
            )


# ---------------------------------------------------------------- sources


def _scan_folder(root: Path, metadata: str | Path | None) -> tuple[list[Asset], list[Skipped]]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    catalogues = [p for p in files if p.suffix.lower() == ".sh3f"]
    names = [p.relative_to(root).as_posix() for p in files if p.suffix.lower() in MODEL_SUFFIXES]
    assets, skipped = _name_files(root, names, _read_metadata(metadata, root))
    for catalogue in catalogues:
        found, left_out = _scan_catalogue(catalogue)
        assets += found
        skipped += left_out
    return assets, skipped


def _scan_archive(archive: Path, metadata: str | Path | None) -> tuple[list[Asset], list[Skipped]]:
    with _open_archive(archive) as file:
        members = sorted(n for n in file.namelist() if posixpath.splitext(n)[1].lower() in MODEL_SUFFIXES)
    return _name_files(archive, members, _read_metadata(metadata, archive.parent), in_archive=True)


def _name_files(
    root: Path, relative_names: Iterable[str], table: dict[str, dict[str, Any]], *, in_archive: bool = False
) -> tuple[list[Asset], list[Skipped]]:
    assets: list[Asset] = []
    skipped: list[Skipped] = []
    for relative in relative_names:
        folder = posixpath.basename(posixpath.dirname(relative)) or root.name
        stem = posixpath.splitext(posixpath.basename(relative))[0]
        row = table.get(relative) or table.get(posixpath.basename(relative)) or {}
        named = naming.name_file(stem, folder)
        name = str(row.get("name") or named.name).strip().lower()
        asset_id = (
            f"{folder}/{stem}" if posixpath.dirname(relative) or not in_archive else f"{root.stem}/{stem}"
        )
        if not row and named.skip_reason:
            skipped.append(Skipped(asset_id, named.skip_reason))
            continue
        known = naming.collection_of(folder)
        tags = row.get("tags") or ()
        assets.append(
            Asset(
                asset_id=asset_id,
                name=name,
                noun=str(row.get("noun") or naming.noun_of(name)).strip().lower(),
                category=str(row.get("category") or folder.replace("_", " ")),
                tags=tuple(re.split(r"\s*[;,]\s*", tags) if isinstance(tags, str) else map(str, tags)),
                source=str(row.get("source") or known.get("source", root.name)),
                creator=str(row.get("creator") or known.get("creator", "")),
                licence=str(row.get("licence") or row.get("license") or known.get("licence", "")),
                path=str(root if in_archive else root / relative),
                member=relative if in_archive else "",
                yaw_deg=float(row.get("yaw_deg") or named.yaw_deg),
            )
        )
    return assets, skipped


def _read_metadata(metadata: str | Path | None, root: Path) -> dict[str, dict[str, Any]]:
    """Rows of the metadata table by their `path`; an empty table when there is none."""
    candidates = [Path(metadata)] if metadata else [root / "metadata.csv", root / "metadata.json"]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        if metadata:
            raise UsageError(f"there is no metadata table '{metadata}'")
        return {}
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text) if path.suffix.lower() == ".json" else list(csv.DictReader(io.StringIO(text)))
        return {str(row["path"]): row for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"the metadata table '{path}' cannot be read ({type(error).__name__}: {error}); it needs a "
            "column 'path' and may have name, noun, category, tags, creator, licence, yaw_deg"
        ) from error


def _open_archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise UsageError(f"'{path}' is not a readable zip archive: {error}") from error


def _scan_catalogue(path: Path) -> tuple[list[Asset], list[Skipped]]:
    """Entries of a Sweet Home 3D furniture catalogue: a Java properties file with numbered keys."""
    with _open_archive(path) as file:
        try:
            text = file.read("PluginFurnitureCatalog.properties").decode("latin-1")
        except KeyError as error:
            raise UsageError(f"'{path}' holds no PluginFurnitureCatalog.properties") from error
    entries: dict[int, dict[str, str]] = defaultdict(dict)
    for key, index, value in re.findall(r"^(\w+)#(\d+)=(.*?)\s*$", text, flags=re.MULTILINE):
        entries[int(index)][key] = _unescape(value)
    licence_line = re.search(r"^license=(.*?)\s*$", text, flags=re.MULTILINE)
    licence = _licence_code(_unescape(licence_line[1]) if licence_line else "")
    assets: list[Asset] = []
    skipped: list[Skipped] = []
    for entry in entries.values():
        if not {"id", "name", "model"} <= entry.keys():
            continue
        asset_id = f"{path.stem}/{entry['id'].partition('#')[2] or entry['id']}"
        named = naming.name_catalogue_entry(entry["name"])
        if named.skip_reason:
            skipped.append(Skipped(asset_id, named.skip_reason))
            continue
        assets.append(
            Asset(
                asset_id=asset_id,
                name=named.name,
                noun=named.noun,
                category=entry.get("category", "").lower(),
                tags=tuple(t.strip().lower() for t in entry.get("tags", "").split(",") if t.strip()),
                source=f"sweethome3d-furniture/{path.stem}",
                creator=entry.get("creator", ""),
                licence=licence,
                path=str(path),
                member=unquote(entry["model"]).lstrip("/"),
                yaw_deg=named.yaw_deg,
                rotation=_numbers(entry.get("modelRotation", ""), 9),
                size=_numbers(" ".join(entry.get(k, "") for k in ("width", "height", "depth")), 3),
            )
        )
    return assets, skipped


def _unescape(value: str) -> str:
    return re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), value)


def _numbers(text: str, count: int) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split())
    except ValueError:
        return ()
    return values if len(values) == count else ()


def _licence_code(text: str) -> str:
    lowered = text.lower()
    if "public domain" in lowered or "cc-0" in lowered or "cc0" in lowered:
        return "CC0-1.0"
    if "attribution 3.0 united states" in lowered:
        return "CC-BY-3.0-US"
    return "CC-BY-3.0" if "attribution 3.0" in lowered else text


def _vase_asset(seed: int) -> Asset:
    return Asset(
        asset_id=f"vases/vase_{seed:04d}",
        name=vases.vase_name(seed),
        noun="vase",
        category="decoration",
        tags=vases.vase_tags(seed),
        source="procedural",
        creator="uni3d",
        licence="Apache-2.0",
        path=PROCEDURAL_VASES,
        member=str(seed),
    )


# ---------------------------------------------------------------- roles


def _order_key(asset: Asset) -> str:
    return hashlib.sha256(asset.asset_id.encode()).hexdigest()


def assign_roles(assets: list[Asset]) -> list[Asset]:
    """Give every asset its role, by the hash of its id within its noun (procedural assets apart).

    A noun with one asset serves both models. Otherwise a tenth (at least one from five assets on) trains
    neither, and the rest is shared in halves: what names objects needs as many different ones as what draws
    them. An odd one goes to the teacher of up to four assets, else to the evaluator.
    """
    groups: dict[tuple[str, bool], list[Asset]] = defaultdict(list)
    for asset in assets:
        groups[asset.noun, asset.path == PROCEDURAL_VASES].append(asset)
    role_of: dict[str, Role] = {}
    for group in groups.values():
        num = len(group)
        num_neither = max(1, round(num / 10)) if num >= 5 else 0
        num_shared = num - num_neither
        num_evaluator = num_shared // 2 if num < 5 else -(-num_shared // 2)
        for rank, asset in enumerate(sorted(group, key=_order_key)):
            if num == 1:
                role: Role = "both"
            elif rank < num_evaluator:
                role = "evaluator"
            else:
                role = "neither" if rank < num_evaluator + num_neither else "teacher"
            role_of[asset.asset_id] = role
    return [replace(asset, role=role_of[asset.asset_id]) for asset in assets]


# ---------------------------------------------------------------- reading


def load_asset(asset: Asset, *, max_texture: int = 512, max_faces: int | None = None) -> RenderableMesh:
    """Read one asset, upright, facing +Z, in the unit box. Raises UsageError with the reason if it fails."""
    if asset.path == PROCEDURAL_VASES:
        return vases.make_vase(int(asset.member)).in_unit_box()
    if asset.member:
        mesh = _load_member(asset, max_texture=max_texture, max_faces=max_faces)
    else:
        mesh = load_renderable(asset.path, max_texture=max_texture, max_faces=max_faces)
    if asset.rotation:
        matrix = np.eye(4)
        matrix[:3, :3] = np.asarray(asset.rotation).reshape(3, 3)
        mesh = mesh.transformed(matrix)
    return _stretched_to(mesh, asset.size).turned(asset.yaw_deg).in_unit_box()


def _load_member(asset: Asset, *, max_texture: int, max_faces: int | None) -> RenderableMesh:
    folder = posixpath.dirname(asset.member)
    with _open_archive(Path(asset.path)) as archive:
        known = {name.lower(): name for name in archive.namelist()}

        def read(name: str) -> bytes:
            member = known.get(safe_relative_name(name).lower())
            if member is None:
                raise FileNotFoundError(name)
            if archive.getinfo(member).file_size > MAX_MEMBER_BYTES:
                raise UsageError(f"'{member}' is larger than {MAX_MEMBER_BYTES} bytes when unpacked")
            return archive.read(member)

        try:
            data = read(asset.member)
        except FileNotFoundError as error:
            raise UsageError(f"the archive holds no '{asset.member}'") from error
        return load_renderable(
            posixpath.basename(asset.member),
            max_texture=max_texture,
            max_faces=max_faces,
            read_sibling=lambda name: read(posixpath.join(folder, name)),
            data=data,
        )


def _stretched_to(mesh: RenderableMesh, size: tuple[float, ...]) -> RenderableMesh:
    """Give the bounding box the proportions of `size`, unless they differ so much that it is an error."""
    if len(size) != 3 or min(size) <= 0:
        return mesh
    corners = mesh.vertices[mesh.faces.reshape(-1)]
    extent = corners.max(axis=0) - corners.min(axis=0)
    if extent.min() <= 1e-6 * extent.max():
        return mesh
    factor = np.asarray(size) / extent
    factor = factor / np.median(factor)
    if factor.max() > 4 or factor.min() < 0.25:
        return mesh
    return mesh.transformed(np.diag([*factor, 1.0]))


def library_summary(assets: Sequence[Asset]) -> dict[str, Any]:
    """Counts by source, licence, role and noun, and the creators each licence asks to be named."""
    by_licence: dict[str, Counter[str]] = defaultdict(Counter)
    for asset in assets:
        by_licence[asset.licence or "unknown"][asset.creator or "unknown"] += 1
    names: dict[str, set[Role]] = defaultdict(set)
    for asset in assets:
        names[asset.name].add(asset.role)
    held_out = sorted(n for n, roles in names.items() if roles <= {"evaluator", "neither"})
    return {
        "num_assets": len(assets),
        "num_names": len(names),
        "num_nouns": len({asset.noun for asset in assets}),
        "names_not_trained_on_by_teacher": held_out,
        "roles": dict(Counter(asset.role for asset in assets)),
        "sources": dict(Counter(asset.source for asset in assets)),
        "licences": {
            licence: {"num_assets": sum(creators.values()), "creators": dict(creators.most_common())}
            for licence, creators in sorted(by_licence.items())
        },
        "nouns": dict(Counter(asset.noun for asset in assets).most_common()),
        "assets": [
            {k: v for k, v in asdict(a).items() if k not in ("path", "rotation", "size")} for a in assets
        ],
    }
