"""Measurements on a mesh's textures and texture coordinates, for the report.

Legend: F faces, S side of the measured square in texels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse

from uni3d.mesh.atlas_raster import rasterise
from uni3d.mesh.renderable import RenderableMesh

# distance between charts that smaller mip levels need: 8 texels of 1024
MIN_GUTTER_SHARE = 8 / 1024
# Work that measuring one texture may cost; an atlas of 4096 texels a side needs about half of it.
MAX_MEASURED_TEXELS = 1 << 26
# Rec. 709
LUMINANCE_WEIGHTS = np.array([0.2126, 0.7152, 0.0722])


def measure_textures(mesh: RenderableMesh) -> dict[str, Any]:
    """The texture keys of `report.mesh_report`, the worst over all textures; None where there is none.

    Faces of several materials that show one picture are measured together.
    """
    keys = "texture_size texture_power_of_two uv_in_range uv_coverage uv_overlap_texels uv_overlap_fraction"
    keys += " uv_mirrored_fraction charts gutter_texels gutter_error luminance"
    if mesh.corner_uv is None:
        return dict.fromkeys(keys.split())
    pictures = [None if m.texture is None else id(m.texture) for m in mesh.materials]
    parts = []
    for picture in set(pictures) - {None}:
        members = [index for index, which in enumerate(pictures) if which == picture]
        chosen = np.isin(mesh.face_material, members)
        texture = mesh.materials[members[0]].texture
        if chosen.any() and texture is not None:
            parts.append((int(chosen.sum()), _measure(mesh, chosen, texture)))
    parts.sort(key=lambda part: part[0], reverse=True)
    return dict.fromkeys(keys.split()) | _worst([facts for _, facts in parts])


def _worst(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One set of figures for several textures, the one on most faces first."""
    if len(parts) < 2:
        return parts[0] if parts else {}
    joined = dict(parts[0])
    for name, join in {
        "texture_power_of_two": all,
        "uv_in_range": all,
        "uv_coverage": min,
        "uv_overlap_texels": sum,
        "uv_overlap_fraction": max,
        "uv_mirrored_fraction": max,
        "charts": sum,
        "gutter_texels": min,
        "gutter_error": max,
    }.items():
        values = [part[name] for part in parts if part.get(name) is not None]
        joined[name] = join(values) if values else None
    ranges = [part["luminance"] for part in parts if part.get("luminance") is not None]
    joined["luminance"] = [min(low for low, _ in ranges), max(high for _, high in ranges)] if ranges else None
    return joined


def _measure(mesh: RenderableMesh, chosen: NDArray[np.bool_], texture: NDArray[np.float32]) -> dict[str, Any]:
    """The figures of one texture and the faces `chosen` that show it."""
    assert mesh.corner_uv is not None
    uv = mesh.corner_uv[chosen].astype(np.float64)
    height, width = texture.shape[:2]
    facts: dict[str, Any] = {
        "texture_size": [width, height],
        "texture_power_of_two": not (width & (width - 1)) and not (height & (height - 1)),
        "uv_in_range": bool((uv >= -1e-6).all() and (uv <= 1 + 1e-6).all()),
        "uv_mirrored_fraction": _mirrored_fraction(uv),
    }
    if not facts["uv_in_range"] or not np.isfinite(uv).all():
        return facts
    # rasterised at the texture's own size (the longer side, if it is not square)
    size = max(width, height)
    affordable = _affordable_faces(uv * size)
    uv, corners = uv[affordable], mesh.vertices[mesh.faces[chosen][affordable]]
    texel, face, _, overlap = rasterise(uv * size, size, margin=0.0)
    chart = _charts(corners, uv)
    chart_of_texel = np.full(size * size, -1, np.int64)
    chart_of_texel[texel] = chart[face]
    square = texture[..., :3] if width == height else _stretch(texture[..., :3], size)
    covered = (chart_of_texel >= 0).reshape(size, size)
    # charts without area, points on a palette, show single texels
    points = np.clip(np.rint(uv.reshape(-1, 2) * size - 0.5), 0, size - 1).astype(np.int64)
    shown = square[covered] if covered.any() else square[points[:, 1], points[:, 0]]
    luminance = 255 * (shown @ LUMINANCE_WEIGHTS)
    return facts | {
        "uv_coverage": float(covered.mean()),
        "uv_overlap_texels": overlap,
        "uv_overlap_fraction": overlap / max(len(texel), 1),
        "charts": int(chart.max()) + 1,
        "gutter_texels": _gutter(chart_of_texel.reshape(size, size)),
        "gutter_error": _gutter_error(square, covered),
        "luminance": [float(value) for value in np.quantile(luminance, (0.01, 0.99))],
    }


def _affordable_faces(corners: NDArray[np.float64]) -> NDArray[np.int64]:
    """Faces [F] whose bounding boxes in the texture add up to at most MAX_MEASURED_TEXELS.

    An atlas has few texels twice, but walls of bricks show the whole texture on every face; then some faces,
    chosen at random, show the overlap as well as all of them.
    """
    boxes = np.prod(np.ptp(corners, axis=1) + 1, axis=1)
    if boxes.sum() <= MAX_MEASURED_TEXELS:
        return np.arange(len(corners))
    order = np.random.default_rng(0).permutation(len(corners))
    num = max(int(np.searchsorted(np.cumsum(boxes[order]), MAX_MEASURED_TEXELS)), 1)
    return np.sort(order[:num])


def _mirrored_fraction(uv: NDArray[np.float64]) -> float:
    """Share of the area in texture space whose picture is mirrored on the object."""
    first, second = uv[:, 1] - uv[:, 0], uv[:, 2] - uv[:, 0]
    # v points down, so a triangle that is counter-clockwise from outside has negative area in (u, v)
    area = first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]
    return float(np.maximum(area, 0).sum() / max(float(np.abs(area).sum()), 1e-30))


def _charts(corners: NDArray[np.floating], uv: NDArray[np.float64]) -> NDArray[np.int64]:
    """Chart of each face: faces that share a corner in space and in the texture hang together."""
    num = len(uv)
    both = np.concatenate([corners.reshape(-1, 3), uv.reshape(-1, 2)], axis=1).astype(np.float32)
    corner = np.unique(both, axis=0, return_inverse=True)[1].reshape(-1)
    rows, columns = np.repeat(np.arange(num), 3), corner + num
    links = sparse.coo_matrix(
        (np.ones(len(rows), np.int8), (rows, columns)), shape=(num + int(corner.max()) + 1,) * 2
    )
    label = sparse.csgraph.connected_components(links, directed=False)[1][:num]
    return np.unique(label, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _gutter(chart: NDArray[np.int64]) -> int | None:
    """Smallest number of free texels between two charts along a path; None with fewer than two charts."""
    if len(np.unique(chart[chart >= 0])) < 2:
        return None
    transform: Any = ndimage.distance_transform_edt(chart < 0, return_indices=True)
    distance, nearest = transform
    owner = chart[tuple(nearest)]
    smallest = np.inf
    for axis in (0, 1):
        here = [slice(None)] * 2
        there = [slice(None)] * 2
        here[axis], there[axis] = slice(None, -1), slice(1, None)
        differs = owner[tuple(here)] != owner[tuple(there)]
        between = (distance[tuple(here)] + distance[tuple(there)])[differs]
        smallest = min(smallest, float(between.min(initial=np.inf)))
    return int(smallest)


def _gutter_error(texture: NDArray[np.floating], covered: NDArray[np.bool_]) -> float:
    """How far the texels beside the charts stray from the charts' own colours, in display levels.

    90th percentile over the texels within the gutter, each against the nearest one on a chart.
    Smaller mip levels mix these texels into the object: hardly anything if they continue it, far if they are
    background.
    """
    reach = max(2, round(MIN_GUTTER_SHARE * len(covered)))
    transform: Any = ndimage.distance_transform_edt(~covered, return_indices=True)
    distance, nearest = transform
    beside = (distance > 0) & (distance <= reach)
    if not covered.any() or not beside.any():
        return 0.0
    own = texture[tuple(index[beside] for index in nearest)]
    return float(np.quantile(np.abs(texture[beside] - own).max(axis=-1) * 255, 0.9))


def _stretch(texture: NDArray[np.floating], size: int) -> NDArray[np.floating]:
    """Nearest-neighbour resize to a square, so that uv * size finds the right texel."""
    rows = np.arange(size) * texture.shape[0] // size
    columns = np.arange(size) * texture.shape[1] // size
    return texture[rows][:, columns]
