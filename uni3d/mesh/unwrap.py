"""Texture coordinates for a surface: xatlas in a process of its own, or projection along the axes.

xatlas gives the better charts, but its time grows with the number of triangles and creases and it cannot be
interrupted, so it runs in a child process with a time limit. The projection atlas needs a second or two
whatever the surface, and takes over when xatlas is late, fails or is not installed. Legend: V vertices, F
faces, U vertices of the atlas (V plus copies along seams).
"""

from __future__ import annotations

import importlib.util
import logging
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from uni3d.errors import UsageError
from uni3d.mesh.atlas_raster import overlapping_faces, rasterise
from uni3d.mesh.surface import face_areas, face_normals, vertex_normals

logger = logging.getLogger(__name__)

UnwrapMethod = Literal["auto", "xatlas", "projection"]

XATLAS_SCRIPT = Path(__file__).with_name("xatlas_process.py")
# xatlas keeps twice its padding between two charts, in a square about a third larger than asked for
XATLAS_PADDING_PER_GUTTER = 1.3 / 2
# an atlas that overlaps on more of its texels, or mirrors more of its area, is not used
MAX_OVERLAP, MAX_MIRRORED = 1e-4, 0.01
AXES = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], dtype=np.float64)
# a face may be projected along an axis it makes at most about 72 degrees with
MIN_FACING = 0.3
SMALL_CHART_FACES = 12
MAX_SPLIT_ROUNDS = 12


@dataclass(frozen=True)
class UvAtlas:
    """Where each corner of a surface lies in the texture.

    vertex_of int64 [U] the surface vertex behind each atlas vertex; uv float32 [U, 2] in [0, 1], v down;
    faces int64 [F, 3] into the atlas vertices, in the order of the surface's faces; method the way it was
    made; seconds it took.
    """

    vertex_of: NDArray[np.int64]
    uv: NDArray[np.float32]
    faces: NDArray[np.int64]
    method: str
    seconds: float


def unwrap(
    vertices: NDArray[np.floating],
    faces: NDArray[np.int64],
    *,
    size: int = 1024,
    gutter: int = 8,
    method: UnwrapMethod = "auto",
    time_limit_s: float = 20.0,
) -> UvAtlas:
    """Cut a surface into charts and pack them into a square texture of `size` texels.

    vertices float [V, 3], faces int64 [F, 3]. Charts stay about `gutter` texels apart and that far from the
    border. "auto" tries xatlas for `time_limit_s` seconds and falls back on projection with a warning;
    "xatlas" raises UsageError where "auto" falls back.
    """
    began = time.monotonic()
    if method not in ("auto", "xatlas", "projection"):
        raise UsageError(f"unknown unwrap method '{method}'; choose auto, xatlas or projection")
    if method != "projection":
        result, trouble = _xatlas(vertices, faces, size, gutter, time_limit_s)
        if result is not None:
            vertex_of, uv, atlas_faces = result
            return UvAtlas(vertex_of, uv, atlas_faces, "xatlas", time.monotonic() - began)
        if method == "xatlas":
            raise UsageError(f"{trouble}; give it more time, fewer triangles, or use the projection unwrap")
        logger.warning("%s; using axis projection instead", trouble)
    vertex_of, uv, atlas_faces = _project(vertices, faces, size, gutter)
    return UvAtlas(vertex_of, uv, atlas_faces, "projection", time.monotonic() - began)


Unwrapped = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]


def _xatlas(
    vertices: NDArray[np.floating], faces: NDArray[np.int64], size: int, gutter: int, time_limit_s: float
) -> tuple[Unwrapped | None, str]:
    """Run xatlas in a child process; (atlas, "") or (None, what went wrong)."""
    if importlib.util.find_spec("xatlas") is None:
        return None, "the package xatlas is not installed"
    padding = math.ceil(gutter * XATLAS_PADDING_PER_GUTTER)
    with tempfile.TemporaryDirectory(prefix="uni3d-unwrap-") as folder:
        source, target = Path(folder) / "surface.npz", Path(folder) / "atlas.npz"
        np.savez(
            source,
            vertices=vertices.astype(np.float32),
            normals=vertex_normals(vertices, faces),
            faces=faces.astype(np.uint32),
        )
        # -P: the folder of the script does not become importable
        command = [
            sys.executable,
            "-P",
            str(XATLAS_SCRIPT),
            str(source),
            str(target),
            str(size),
            str(padding),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=time_limit_s, check=False)
        except subprocess.TimeoutExpired:
            return None, f"xatlas needed more than {time_limit_s:g} s for {len(faces)} triangles"
        if done.returncode != 0 or not target.is_file():
            last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return None, f"xatlas failed with exit code {done.returncode} ({last_line})"
        with np.load(target, allow_pickle=False) as atlas:
            vertex_of, texels = atlas["vertex_of"].astype(np.int64), atlas["uv"].astype(np.float64)
            corners = atlas["faces"].astype(np.int64)
    if (
        corners.shape != faces.shape
        or not (vertex_of[corners] == faces).all()
        or not np.isfinite(texels).all()
    ):
        return None, "xatlas returned an atlas that does not belong to the surface"
    uv = _place(texels, corners, size, gutter)
    trouble = _folds(uv[corners], size)
    return (None, f"xatlas made {trouble}") if trouble else ((vertex_of, uv, corners), "")


def _folds(corners: NDArray[np.floating], size: int) -> str:
    """What is wrong with an atlas whose charts fold over themselves, "" if nothing is."""
    double_area = _double_areas(corners)
    mirrored = float(np.maximum(double_area, 0).sum() / max(float(np.abs(double_area).sum()), 1e-12))
    texel, _, _, overlap = rasterise(corners * size, size, margin=0.0)
    if overlap > MAX_OVERLAP * len(texel):
        return f"charts that overlap on {overlap} texels"
    return (
        f"charts that are mirrored on {100 * mirrored:.1f} % of their area" if mirrored > MAX_MIRRORED else ""
    )


def _double_areas(corners: NDArray[np.floating]) -> NDArray[np.float64]:
    """Twice the signed area of triangles [F, 3, 2]; v points down, so it is positive where mirrored."""
    first = corners[:, 1].astype(np.float64) - corners[:, 0]
    second = corners[:, 2].astype(np.float64) - corners[:, 0]
    return first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]


def _place(
    texels: NDArray[np.float64], corners: NDArray[np.int64], size: int, gutter: int
) -> NDArray[np.float32]:
    """Scale packed charts, whatever size the packer ended with, into the texture's inside; uv in [0, 1]."""
    used = np.unique(corners)
    low, high = texels[used].min(axis=0), texels[used].max(axis=0)
    border = gutter / 2
    uv = (border + (texels - low) * ((size - 2 * border) / max(float((high - low).max()), 1e-9))) / size
    if _double_areas(uv[corners]).sum() > 0:
        uv[:, 1] = 1.0 - uv[:, 1]
    return np.clip(uv, 0.0, 1.0).astype(np.float32)


def _project(vertices: NDArray[np.floating], faces: NDArray[np.int64], size: int, gutter: int) -> Unwrapped:
    """Charts of faces that look along the same axis, laid flat along it, in rows."""
    points = vertices.astype(np.float64)
    adjacency = _face_adjacency(faces)
    normals = face_normals(points, faces)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30)
    axis = _axis_of_faces(normals, face_areas(points, faces), adjacency)
    chart = _charts(axis, np.zeros(len(faces), np.int64), adjacency)
    axis, chart = _merge_small_charts(normals, axis, chart, adjacency)
    layer = np.zeros(len(faces), np.int64)
    for attempt in range(MAX_SPLIT_ROUNDS):
        corners = _pack(points[faces], axis, chart, size, gutter)
        first, second = overlapping_faces(corners, size)
        if len(first) == 0:
            break
        # a chart that folds over itself: the faces that are underneath move to a chart of their own
        depth = np.einsum("fi,fi->f", points[faces].mean(axis=1), AXES[axis])
        layer[np.where(depth[first] < depth[second], first, second)] = attempt + 1
        chart = _charts(axis, layer, adjacency)
    uv = corners.reshape(-1, 2) / size
    key = np.stack([faces.reshape(-1), np.repeat(chart, 3)], axis=1)
    unique, first_use, inverse = np.unique(key, axis=0, return_index=True, return_inverse=True)
    return (
        unique[:, 0],
        np.clip(uv[first_use], 0, 1).astype(np.float32),
        inverse.reshape(-1, 3).astype(np.int64),
    )


def _face_adjacency(faces: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pairs of faces that share an edge, [N, 2]."""
    edges = np.sort(np.stack([faces, np.roll(faces, -1, axis=1)], axis=2).reshape(-1, 2), axis=1)
    order = np.lexsort((edges[:, 1], edges[:, 0]))
    same = np.flatnonzero((edges[order[1:]] == edges[order[:-1]]).all(axis=1))
    return np.stack([order[same] // 3, order[same + 1] // 3], axis=1)


def _axis_of_faces(
    normals: NDArray[np.float64], area: NDArray[np.float64], adjacency: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The axis each face is projected along, smoothed by its neighbours' choices so that charts are few."""
    num = len(normals)
    facing = normals @ AXES.T
    both = np.concatenate([adjacency, adjacency[:, ::-1]])
    neighbours = sparse.csr_matrix((area[both[:, 1]], (both[:, 0], both[:, 1])), shape=(num, num))
    axis = np.argmax(facing, axis=1)
    for _ in range(8):
        votes = np.asarray(neighbours @ np.eye(len(AXES))[axis])
        votes /= np.maximum(votes.sum(axis=1, keepdims=True), 1e-30)
        axis = np.argmax(np.where(facing >= MIN_FACING, facing + 1.5 * votes, facing - 10.0), axis=1)
    return axis


def _charts(
    axis: NDArray[np.int64], layer: NDArray[np.int64], adjacency: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Connected pieces of faces with one axis and one layer: the chart of each face."""
    joined = adjacency[
        (axis[adjacency[:, 0]] == axis[adjacency[:, 1]]) & (layer[adjacency[:, 0]] == layer[adjacency[:, 1]])
    ]
    links = sparse.coo_matrix(
        (np.ones(len(joined), np.int8), (joined[:, 0], joined[:, 1])), shape=(len(axis),) * 2
    )
    return sparse.csgraph.connected_components(links, directed=False)[1].astype(np.int64)


def _merge_small_charts(
    normals: NDArray[np.float64],
    axis: NDArray[np.int64],
    chart: NDArray[np.int64],
    adjacency: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give tiny charts to the neighbouring chart with the longest common border that can take them."""
    axis = axis.copy()
    for _ in range(4):
        faces_in = np.bincount(chart)
        between = adjacency[chart[adjacency[:, 0]] != chart[adjacency[:, 1]]]
        between = np.concatenate([between, between[:, ::-1]])
        small = between[faces_in[chart[between[:, 0]]] < SMALL_CHART_FACES]
        if len(small) == 0:
            break
        options, border = np.unique(
            np.stack([chart[small[:, 0]], axis[small[:, 1]]], axis=1), axis=0, return_counts=True
        )
        facing = np.full((len(faces_in), len(AXES)), np.inf)
        np.minimum.at(facing, chart, normals @ AXES.T)
        seen = facing[options[:, 0], options[:, 1]] > 0.05
        options, border = options[seen], border[seen]
        order = np.argsort(border, kind="stable")
        new_axis = np.full(len(faces_in), -1)
        new_axis[options[order, 0]] = options[order, 1]
        moved = new_axis[chart] >= 0
        if not moved.any():
            break
        axis[moved] = new_axis[chart[moved]]
        chart = _charts(axis, np.zeros(len(axis), np.int64), adjacency)
    return axis, chart


def _pack(
    corners: NDArray[np.float64], axis: NDArray[np.int64], chart: NDArray[np.int64], size: int, gutter: int
) -> NDArray[np.float64]:
    """Lay the charts flat and pack their rectangles in rows; corners [F, 3, 3] -> texels [F, 3, 2]."""
    # per axis the two coordinates that make an unmirrored picture with v down
    flat = np.empty((*corners.shape[:2], 2))
    for index, normal in enumerate(AXES):
        chosen = axis == index
        up = np.array([0.0, 0.0, 1.0]) if abs(normal[1]) > 0.5 else np.array([0.0, 1.0, 0.0])
        right = np.cross(up, normal)
        flat[chosen] = np.stack([corners[chosen] @ right, -(corners[chosen] @ up)], axis=-1)
    num = int(chart.max()) + 1
    low, high = np.full((num, 2), np.inf), np.full((num, 2), -np.inf)
    for corner in range(3):
        np.minimum.at(low, chart, flat[:, corner])
        np.maximum.at(high, chart, flat[:, corner])
    extent = high - low
    # a quarter turn (x, y) -> (-y, x) lets every rectangle lie on its long side and mirrors nothing
    turned = extent[:, 1] > extent[:, 0]
    flipped = turned[chart]
    flat[flipped] = np.stack([-flat[flipped][..., 1], flat[flipped][..., 0]], axis=-1)
    low = np.where(turned[:, None], np.stack([-high[:, 1], low[:, 0]], axis=1), low)
    extent = np.where(turned[:, None], extent[:, ::-1], extent)
    scale = _largest_scale(extent, size, gutter)
    origin, _ = _rows(extent * scale, size, gutter)
    return (flat - low[chart][:, None]) * scale + origin[chart][:, None]


def _largest_scale(extent: NDArray[np.float64], size: int, gutter: int) -> float:
    """Texels per unit at which the rows just fit, by bisection."""
    low, high = 0.0, size / max(float(extent.max()), 1e-12)
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if _rows(extent * middle, size, gutter)[1] <= size else (low, middle)
    if low == 0.0:
        raise UsageError(
            f"a texture of {size} texels is too small for the {len(extent)} charts of this mesh; "
            "use a larger one"
        )
    return low


def _rows(extent: NDArray[np.float64], size: int, gutter: int) -> tuple[NDArray[np.float64], float]:
    """Place rectangles, tallest first, left to right in rows; upper left corners and the height used."""
    origin = np.zeros_like(extent)
    order = np.argsort(-extent[:, 1], kind="stable")
    x = y = row_height = gutter / 2
    y, row_height = gutter / 2, 0.0
    for index in order.tolist():
        width, height = extent[index]
        if x + width + gutter / 2 > size and x > gutter / 2:
            x, y, row_height = gutter / 2, y + row_height + gutter, 0.0
        if x + width + gutter / 2 > size:
            return origin, np.inf
        origin[index] = x, y
        x, row_height = x + width + gutter, max(row_height, height)
    return origin, y + row_height + gutter / 2
