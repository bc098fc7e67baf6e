"""From a density field to a clean, closed surface: the first step of the mesh room.

density function -> coarse look at the whole box -> fine grid around the object -> iso level -> marching
cubes -> floaters and cavities removed -> smoothing -> decimation -> `Surface`, which `texture.py` unwraps
and paints. Legend: P points, X Y Z grid nodes along the three axes. Densities are nonnegative, in 1 / scene
length; the grid is numpy float32 [X, Y, Z] and knows its own placement.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from uni3d.errors import Uni3DError, UsageError
from uni3d.mesh.manifold import separate_pinches
from uni3d.mesh.surface import (
    Surface,
    compact,
    decimate,
    face_areas,
    keep_large_components,
    open_edge_count,
    remove_degenerate_faces,
    signed_volumes,
    taubin_smooth,
)
from uni3d.scene.camera import Cameras

logger = logging.getLogger(__name__)

DensityFunction = Callable[[Tensor], Tensor]

COARSE_RESOLUTION = 64
NUM_LEVELS = 64
SLAB_NODES = 1 << 21
# levels whose silhouettes agree about as well as the best one's count as a draw
LEVEL_TOLERANCE = 0.01
# fog: a density that fills most of the occupied box, is thin against the object, and could only look solid
# over a good part of the box (optical depth 3, opacity 0.95, across all of it)
FOG_CONTRAST = 0.1
FOG_MAX_OPTICAL_DEPTH = 3.0
# no ray through the box more opaque than this: nothing to extract
MIN_OPACITY = 0.25
MIN_TRIANGLES = 100


class EmptySurfaceError(Uni3DError):
    """The field holds no object: nothing in it is dense enough to be seen as solid."""


@dataclass(frozen=True)
class DensityGrid:
    """Densities float32 [X, Y, Z] at nodes `origin + spacing * index`; scene units."""

    values: NDArray[np.float32]
    origin: NDArray[np.float64]
    spacing: float


def extract_surface(
    density_fn: DensityFunction,
    half_extent: float,
    resolution: int = 128,
    *,
    iso_level: float | None = None,
    max_triangles: int = 30_000,
    level_score: Callable[[float], float] | None = None,
    min_component_fraction: float = 0.05,
    fill_cavities: bool = True,
    smoothing_iterations: int = 6,
    chunk_size: int = 1 << 17,
    device: torch.device | str = "cpu",
) -> Surface:
    """Cut a closed, outward facing surface out of a density field.

    density_fn: points float32 [P, 3] inside [-half_extent, half_extent]^3 on `device` -> densities [P],
    finite, nonnegative, 1 / scene length; called without gradients on at most `chunk_size` points at a
    time. resolution: grid nodes along the longest side of the object's own bounding box, 16 to 512.
    iso_level: the density of the surface; None chooses it: by `level_score` (higher is better; called with
    about twenty levels) where given, else by `choose_iso_level`. max_triangles: upper bound, at least 100.
    min_component_fraction: pieces with less than this share of the largest piece's area are removed, long
    ones only with less than a fifth of it.
    fill_cavities: hollows that cannot be seen from outside are filled.

    The report holds iso_level, iso_rule, silhouette_agreement, fog_density, spacing, components_found,
    floaters_removed, floater_area_fraction, cavities_removed, triangles_before, triangles, open_edges,
    closed, volume, area. Raises EmptySurfaceError if there is nothing to extract, UsageError for arguments
    out of range, Uni3DError for densities that are not finite.
    """
    if not 16 <= resolution <= 512:
        raise UsageError(
            f"mesh resolution is {resolution}; give a number from 16 to 512 (128 is the default)"
        )
    if max_triangles < MIN_TRIANGLES:
        raise UsageError(f"the triangle budget is {max_triangles}; give at least {MIN_TRIANGLES}")
    if iso_level is not None and not (math.isfinite(iso_level) and iso_level > 0):
        raise UsageError(
            f"iso level is {iso_level}; give a positive density or leave it out to have it chosen"
        )
    evaluate = _Evaluator(density_fn, chunk_size, torch.device(device))
    grid, fog_density = _sample_object(evaluate, half_extent, resolution, iso_level)
    report: dict[str, Any] = {"fog_density": fog_density, "spacing": grid.spacing}
    if iso_level is None:
        level, report["silhouette_agreement"] = _choose_level(grid, fog_density, level_score)
        report["iso_rule"] = "silhouette" if level_score is None else "caller's score"
    else:
        level, report["iso_rule"] = float(iso_level), "given"
    report["iso_level"] = level
    vertices, faces, counts = _polygonise(grid, level, min_component_fraction, fill_cavities)
    report |= counts
    surface = finished_surface(
        vertices,
        faces,
        max_triangles,
        smoothing_iterations=smoothing_iterations,
        iso_level=level,
        report=report,
    )
    logger.info(
        "surface at density %.3g: %d triangles, %d floaters removed",
        level,
        len(surface.faces),
        report["floaters_removed"],
    )
    return surface


def densest_level(
    density_fn: DensityFunction,
    half_extent: float,
    *,
    share: float = 0.02,
    device: torch.device | str = "cpu",
) -> float:
    """The density that the densest `share` of the box exceeds: an iso level for a field that is fog all over,
    to start a surface from rather than to show. EmptySurfaceError if the densities do not differ."""
    ticks = np.linspace(-half_extent, half_extent, COARSE_RESOLUTION, dtype=np.float32)
    points = np.stack(np.meshgrid(ticks, ticks, ticks, indexing="ij"), axis=-1).reshape(-1, 3)
    density = _Evaluator(density_fn, 1 << 17, torch.device(device))(points)
    level = float(np.quantile(density, 1 - share))
    if not 0 < level < float(density.max()):
        raise EmptySurfaceError(_empty_message("its density is the same everywhere"))
    return level


def finished_surface(
    vertices: NDArray[np.floating],
    faces: NDArray[np.int64],
    max_triangles: int,
    *,
    smoothing_iterations: int = 0,
    iso_level: float = 0.0,
    report: dict[str, Any],
) -> Surface:
    """The last steps for any closed surface, vertices [V, 3], faces [F, 3]: smoothed, reduced to at most
    `max_triangles`, manifold and outward. `report` is completed as `extract_surface` describes."""
    report = report | {"triangles_before": len(faces)}
    vertices, faces = _finish(vertices, faces, smoothing_iterations, max_triangles)
    open_edges = open_edge_count(faces)
    report |= {
        "triangles": len(faces),
        "open_edges": open_edges,
        "closed": open_edges == 0,
        "volume": float(signed_volumes(vertices, faces).sum()),
        "area": float(face_areas(vertices, faces).sum()),
    }
    return Surface(vertices.astype(np.float32), faces, iso_level, report)


def choose_iso_level(grid: DensityGrid, *, fog_density: float = 0.0) -> tuple[float, float]:
    """The density at which the solid looks most like the volume: (level, agreement in [0, 1]).

    Seen along an axis the volume has an opacity O = 1 - exp(-integral of density) in every pixel, and the
    solid {density >= s} has the silhouette B_s = (largest density on the ray >= s). The level with the
    highest soft intersection over union, sum min(B, O) / sum max(B, O), averaged over the three axes, wins.
    A thick soft blob so gets a low level and a thin hard plate a high one, without a threshold to tune;
    haze that renders as less than about half opaque is left out. Sharp objects have the same silhouette at
    many levels; among levels within one per cent of the best the one nearest to half the solid's typical
    density is taken, which puts the surface in the middle of the step between two grid nodes, where it is
    unbiased. `fog_density` is taken off first.
    """
    values = np.maximum(grid.values - 2.0 * fog_density, 0.0)
    # below this not even a ray through the whole grid reaches opacity 1/2
    lowest = math.log(2.0) / (max(values.shape) * grid.spacing)
    highest = float(values.max())
    if highest <= lowest:
        return max(highest, 1e-12) / 2 + 2.0 * fog_density, 0.0
    levels = np.geomspace(lowest, highest * 0.98, NUM_LEVELS)
    agreement = np.zeros(NUM_LEVELS)
    for axis in range(3):
        opacity = (1.0 - np.exp(-values.sum(axis=axis, dtype=np.float64) * grid.spacing)).reshape(-1)
        agreement += _soft_iou(values.max(axis=axis).reshape(-1), opacity, levels) / 3.0
    best = int(np.argmax(agreement))
    draw = agreement >= agreement[best] - LEVEL_TOLERANCE
    low = high = best
    while low > 0 and draw[low - 1]:
        low -= 1
    while high < NUM_LEVELS - 1 and draw[high + 1]:
        high += 1
    solid = values[values >= levels[best]]
    preferred = 0.5 * float(np.median(solid)) if len(solid) else float(levels[best])
    level = float(np.clip(preferred, levels[low], levels[high]))
    return level + 2.0 * fog_density, float(agreement[best])


def silhouette_score(
    density_fn: DensityFunction,
    half_extent: float,
    cameras: Cameras,
    opacity: Tensor,
    *,
    num_samples: int = 96,
    chunk_size: int = 1 << 17,
) -> Callable[[float], float]:
    """A `level_score` from rendered views: how well the solid's silhouette matches the opacity in `opacity`.

    opacity: float [B, 1, H, W] in [0, 1], as rendered from `cameras` (length B) on the device of the
    cameras. The field is sampled once, on `num_samples` points of each ray inside the box; the returned
    function is cheap and gives the soft intersection over union in [0, 1] at a level.
    """
    height, width = opacity.shape[-2:]
    origins, directions = cameras.rays(height, width)
    reach = math.sqrt(3.0) * half_extent
    middle = -(origins * directions).sum(-1, keepdim=True)
    offsets = torch.linspace(-reach, reach, num_samples, device=origins.device)
    points = origins[..., None, :] + (middle[..., None] + offsets[:, None]) * directions[..., None, :]
    is_inside = (points.abs() <= half_extent).all(-1).reshape(-1)
    density = torch.zeros(is_inside.shape[0], device=origins.device)
    evaluate = _Evaluator(density_fn, chunk_size, origins.device)
    density[is_inside] = evaluate.tensor(points.reshape(-1, 3)[is_inside])
    largest = density.reshape(-1, num_samples).amax(-1).cpu().numpy()
    target = opacity.detach().reshape(-1).cpu().numpy().astype(np.float64)
    return lambda level: float(_soft_iou(largest, target, np.array([level]))[0])


def _soft_iou(
    largest: NDArray[np.floating], opacity: NDArray[np.floating], levels: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Soft intersection over union of {largest >= level} and opacity, for each level; all pixels at once."""
    order = np.argsort(-largest, kind="stable")
    covered = np.concatenate([[0.0], np.cumsum(opacity[order])])
    count = np.searchsorted(-largest[order], -levels, side="right")
    return covered[count] / np.maximum(count + covered[-1] - covered[count], 1e-12)


class _Evaluator:
    """Calls the density function in chunks and refuses what is not a density."""

    def __init__(self, density_fn: DensityFunction, chunk_size: int, device: torch.device) -> None:
        self.density_fn, self.chunk_size, self.device = density_fn, chunk_size, device

    @torch.no_grad()
    def tensor(self, points: Tensor) -> Tensor:
        chunks = [self.density_fn(chunk).reshape(-1).float() for chunk in points.split(self.chunk_size)]
        density = torch.cat(chunks) if chunks else torch.zeros(0, device=self.device)
        if density.shape[0] != points.shape[0]:
            raise ValueError(f"density_fn gave {density.shape[0]} densities for {points.shape[0]} points")
        if not bool(torch.isfinite(density).all()):
            raise Uni3DError(
                "the field has densities that are not finite, so no surface can be cut out of it; "
                "go back to an earlier checkpoint"
            )
        return density

    def __call__(self, points: NDArray[np.floating]) -> NDArray[np.float32]:
        on_device = torch.from_numpy(np.ascontiguousarray(points, dtype=np.float32)).to(self.device)
        return self.tensor(on_device).cpu().numpy()


def _sample_object(
    evaluate: _Evaluator, half_extent: float, resolution: int, iso_level: float | None
) -> tuple[DensityGrid, float]:
    """Look at the whole box coarsely, then finely at what is there: the grid and the density of the fog."""
    # One random point per coarse cell, and not the cell's centre: a thin plate that is parallel to an axis
    # could lie between two layers of centres, but not between random points.
    random = np.random.default_rng(0).random((COARSE_RESOLUTION,) * 3 + (3,), dtype=np.float32)
    cell = 2.0 * half_extent / COARSE_RESOLUTION
    index = np.stack(np.meshgrid(*[np.arange(COARSE_RESOLUTION)] * 3, indexing="ij"), axis=-1)
    coarse = evaluate((-half_extent + (index + random) * cell).reshape(-1, 3)).reshape(index.shape[:3])
    fog_density = _fog_density(coarse, half_extent)
    lowest_level = iso_level or math.log(2.0) / (2.0 * half_extent) + 2.0 * fog_density
    if float(coarse.max(initial=0.0)) <= 0.0:
        raise EmptySurfaceError(_empty_message("the field's density is zero everywhere"))
    threshold = 0.25 * lowest_level + (1.5 * fog_density if iso_level is None else 0.0)
    occupied = _occupied_cells(evaluate, coarse > threshold, threshold, half_extent)
    if not occupied.any():
        raise EmptySurfaceError(
            _empty_message(
                f"the field's highest density is {coarse.max():.3g}, and a surface needs {lowest_level:.3g}"
            )
        )
    span = [np.flatnonzero(occupied.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    low = np.array([-half_extent + s[0] * cell for s in span])
    high = np.array([-half_extent + (s[-1] + 1) * cell for s in span])
    spacing = float((high - low).max()) / (resolution - 1)
    nodes = [np.arange(math.ceil((high[a] - low[a]) / spacing - 1e-6) + 1) for a in range(3)]
    # equal margins on both sides, and every node inside the box the field is defined on
    origin = np.maximum((low + high) / 2 - spacing * np.array([n[-1] for n in nodes]) / 2, -half_extent)
    # per axis: coordinates of the nodes and the coarse cell each lies in
    place = [np.minimum(origin[a] + nodes[a] * spacing, half_extent).astype(np.float32) for a in range(3)]
    cells = [np.clip((p + half_extent) // cell, 0, COARSE_RESOLUTION - 1).astype(np.int64) for p in place]
    values = np.zeros([len(p) for p in place], np.float32)
    # slab by slab: at high resolutions the coordinates need far more memory than the densities
    slab = max(1, SLAB_NODES // (len(place[1]) * len(place[2])))
    for start in range(0, len(place[0]), slab):
        rows = slice(start, start + slab)
        x, y, z = np.nonzero(occupied[np.ix_(cells[0][rows], cells[1], cells[2])])
        points = np.stack([place[0][rows][x], place[1][y], place[2][z]], axis=1)
        values[rows][x, y, z] = np.maximum(evaluate(points), 0.0)
    # a layer of nothing all around, so that what touches the border is closed there
    return DensityGrid(np.pad(values, 1), origin - spacing, spacing), fog_density


def _occupied_cells(
    evaluate: _Evaluator, is_full: NDArray[np.bool_], threshold: float, half_extent: float
) -> NDArray[np.bool_]:
    """The cells that the fine grid must cover: full ones and two cells around them, [64, 64, 64].

    One point per cell misses stretches of a leg that is thinner than a cell, and what is left below such a
    gap would be taken for a floater. So the cells around full ones are looked at again with eight points
    each, and what they show is followed to its end.
    """
    random = np.random.default_rng(1)
    corners = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij"), axis=-1).reshape(-1, 3)
    cell = 2.0 * half_extent / COARSE_RESOLUTION
    is_full = is_full.copy()
    is_known = is_full.copy()
    while True:
        covered = np.asarray(ndimage.binary_dilation(is_full, iterations=2), dtype=bool)
        index = np.argwhere(covered & ~is_known)
        if len(index) == 0:
            return covered
        offset = (corners + random.random((len(index), 8, 3), dtype=np.float32)) / 2
        density = evaluate((-half_extent + (index[:, None] + offset) * cell).reshape(-1, 3))
        is_full[tuple(index.T)] = (density.reshape(-1, 8) > threshold).any(axis=1)
        is_known |= covered


def _fog_density(coarse: NDArray[np.float32], half_extent: float) -> float:
    """Density of a haze that fills the box, 0 if there is none: the median of the non-empty cells."""
    occupied = coarse[coarse > 1e-6]
    if len(occupied) == 0:
        return 0.0
    typical, dense = float(np.median(occupied)), float(np.quantile(coarse, 0.995))
    is_fog = typical <= FOG_CONTRAST * dense and typical * 2.0 * half_extent <= FOG_MAX_OPTICAL_DEPTH
    return typical if is_fog else 0.0


def _choose_level(
    grid: DensityGrid, fog_density: float, level_score: Callable[[float], float] | None
) -> tuple[float, float]:
    cleared = np.maximum(grid.values - 2.0 * fog_density, 0.0)
    deepest = max(float(cleared.sum(axis=axis, dtype=np.float64).max()) for axis in range(3)) * grid.spacing
    opacity = 1.0 - math.exp(-deepest)
    if opacity < MIN_OPACITY:
        raise EmptySurfaceError(
            _empty_message(f"the field is nowhere more than {100 * opacity:.0f} % opaque")
        )
    if level_score is None:
        return choose_iso_level(grid, fog_density=fog_density)
    lowest = math.log(2.0) / (max(grid.values.shape) * grid.spacing)
    levels = np.geomspace(lowest, max(float(grid.values.max()) * 0.9, lowest * 1.01), 20)
    scores = [float(level_score(float(level))) for level in levels]
    best = int(np.argmax(scores))
    return float(levels[best]), scores[best]


def _polygonise(
    grid: DensityGrid, level: float, min_component_fraction: float, fill_cavities: bool
) -> tuple[NDArray[np.floating], NDArray[np.int64], dict[str, float]]:
    """Marching cubes with outward faces, without floaters and cavities; vertices in scene coordinates."""
    from skimage.measure import marching_cubes

    # Clipped at twice the level: a density of thousands one node inside would otherwise push every crossing
    # to the outer node and print the grid's steps into the surface.
    ratio = np.clip(grid.values / level, 0.0, 2.0)
    if not (ratio > 1.0).any():
        raise EmptySurfaceError(
            _empty_message(
                f"no density reaches the iso level {level:.3g}; the highest is {grid.values.max():.3g}"
            )
        )
    num_filled = 0
    if fill_cavities:
        labelled: Any = ndimage.label(ratio < 1.0)
        outside, num_regions = labelled
        hidden = (ratio < 1.0) & (outside != outside[0, 0, 0])
        num_filled = num_regions - 1
        ratio[hidden] = 2.0
    points, triangles, _, _ = marching_cubes(ratio, 1.0)
    vertices, faces = grid.origin + points * grid.spacing, triangles.astype(np.int64)
    if signed_volumes(vertices, faces).sum() < 0:
        faces = faces[:, ::-1]
    vertices, faces = remove_degenerate_faces(vertices, np.ascontiguousarray(faces))
    vertices, faces, counts = keep_large_components(
        vertices, faces, min_area_fraction=min_component_fraction, drop_cavities=fill_cavities
    )
    counts["cavities_removed"] += num_filled
    return vertices, faces, counts


def _finish(
    vertices: NDArray[np.floating], faces: NDArray[np.int64], smoothing_iterations: int, max_triangles: int
) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
    """Smooth, decimate, drop degenerate faces, make manifold; the orientation outward."""
    if smoothing_iterations > 0:
        vertices = taubin_smooth(vertices, faces, smoothing_iterations)
    dense_vertices, dense_faces, target = vertices, faces, max_triangles
    for _ in range(4):
        vertices, faces = decimate(dense_vertices, dense_faces, target)
        # what is written is float32: faces that only exist in float64 must go now
        vertices, faces = remove_degenerate_faces(vertices.astype(np.float32), faces)
        vertices, faces = separate_pinches(vertices, faces)
        # separating adds a few faces; the budget is a promise
        if len(faces) <= max_triangles:
            break
        target -= 2 * (len(faces) - max_triangles)
    if signed_volumes(vertices, faces).sum() < 0:
        faces = np.ascontiguousarray(faces[:, ::-1])
    return compact(vertices, faces)


def _empty_message(found: str) -> str:
    return (
        f"there is no surface to extract: {found}; train for more steps, "
        "lower the regularisers that thin the field, or give a lower iso level"
    )
