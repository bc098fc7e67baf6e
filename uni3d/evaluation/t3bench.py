"""The quality half of T3Bench, which needs no language model: the best smoothed view on a sphere of views.

As the benchmark's own program does it (He et al. 2023): the mesh, centred on the mean of its vertices and
scaled into [-1, 1], is seen unlit over black from the 162 vertices of an icosphere through five lenses; the
reward of a vertex is its best lens; three rounds of averaging with the neighbours follow, and the best vertex
counts, times 20 plus 50. One good side is enough for it, so the mean and the worst vertex stand beside it.
Legend: P viewpoints, L lenses, S pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import trimesh
from numpy.typing import NDArray
from torch import Tensor

from uni3d.mesh.raycaster import load_renderable
from uni3d.mesh.turntable import render_mesh
from uni3d.scene.camera import Cameras

RADIUS = 2.2
LENSES_DEG = (60.0, 45.0, 36.0, 30.0, 24.0)
SIZE = 512
NUM_ROUNDS = 3

Reward = Callable[[Tensor, str], Tensor]
"""Images [B, 3, S, S] in [0, 1] and a prompt to rewards [B]."""


@dataclass(frozen=True)
class SphereQuality:
    """On T3Bench's scale: `best` is its quality; `mean` and `worst` are of the smoothed views as well."""

    best: float
    mean: float
    worst: float


def viewpoints() -> tuple[NDArray[np.float64], list[list[int]]]:
    """Unit directions [162, 3] and the neighbours of each."""
    sphere = trimesh.creation.icosphere(subdivisions=2)
    return np.asarray(sphere.vertices, dtype=np.float64), [list(row) for row in sphere.vertex_neighbors]


def sphere_quality(
    scores: Tensor, neighbours: list[list[int]], *, num_rounds: int = NUM_ROUNDS
) -> SphereQuality:
    """From rewards [P, L] of viewpoints and lenses; `neighbours` of each viewpoint."""
    values = scores.double().max(dim=1).values
    mixing = torch.eye(len(values), dtype=torch.float64)
    for index, row in enumerate(neighbours):
        mixing[index, row] = 1.0
    mixing = mixing / mixing.sum(dim=1, keepdim=True)
    for _ in range(num_rounds):
        values = mixing @ values
    scaled = 20 * values + 50
    return SphereQuality(float(scaled.max()), float(scaled.mean()), float(scaled.min()))


def sphere_cameras(directions: NDArray[np.float64], fov_y_deg: float) -> Cameras:
    """Cameras that look at the origin from `directions` [P, 3] times the protocol's radius."""
    azimuths = [math.degrees(math.atan2(x, z)) for x, _, z in directions]
    elevations = [math.degrees(math.asin(max(-1.0, min(1.0, y)))) for _, y, _ in directions]
    return Cameras.from_lists(azimuths, elevations, radius=RADIUS, fov_y_deg=fov_y_deg)


def t3bench_quality(path: str | Path, prompt: str, reward: Reward, *, size: int = SIZE) -> SphereQuality:
    """Judge a mesh file. UsageError if it cannot be read; the caller counts that as the worst."""
    mesh = load_renderable(path)
    placed = np.eye(4)
    centre = mesh.vertices.mean(axis=0)
    scale = 1 / max(float(np.abs(mesh.vertices - centre).max()), 1e-12)
    placed[:3, :3] *= scale
    placed[:3, 3] = -scale * centre
    mesh = mesh.transformed(placed)
    directions, neighbours = viewpoints()
    by_lens = []
    for lens in LENSES_DEG:
        images, _ = render_mesh(mesh, sphere_cameras(directions, lens), size, background=0.0, supersample=1)
        by_lens.append(reward(torch.from_numpy(images).permute(0, 3, 1, 2), prompt))
    return sphere_quality(torch.stack(by_lens, dim=1), neighbours)
