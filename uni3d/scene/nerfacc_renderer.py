"""The packed renderer with nerfacc's CUDA code (Li et al. 2023) for walking through the grid and compositing.

nerfacc steps on the lattice of `renderer.render`, so that pictures agree to rounding. Its CUDA code is
compiled at its first call on a machine, by nvcc, which is why it is imported as late as that and never
chosen by itself.
Legend: R rays, N packed samples, C features.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uni3d.errors import MissingPackageError, UsageError
from uni3d.random_streams import SharedStream
from uni3d.scene.camera import Cameras
from uni3d.scene.marching import along, lattice_shift, places_inside, scene_bounds
from uni3d.scene.occupancy import OccupancyGrid
from uni3d.scene.packed import Segments
from uni3d.scene.renderer import Field, RaySamples, RenderOutput, evaluate_within_budget, picture

logger = logging.getLogger(__name__)
INSTALL = 'pip install "uni3d[cuda]"'


@functools.cache  # so that one warning is enough
def require_nerfacc(device: torch.device) -> None:
    """Raise MissingPackageError unless nerfacc and what compiles it are here, UsageError on a CPU; warn if
    the first picture will have to wait for the compiler."""
    if device.type != "cuda":
        raise UsageError(f"renderer 'nerfacc' needs a CUDA device, not '{device}'; choose torch or auto")
    package = importlib.util.find_spec("nerfacc")
    if package is None:
        raise MissingPackageError(f"renderer 'nerfacc' is not installed; install it with: {INSTALL}")
    if _is_compiled(package.submodule_search_locations or []):
        return
    if shutil.which("nvcc") is None:
        raise MissingPackageError(
            "nerfacc compiles its CUDA code with nvcc, which was not found; install the CUDA toolkit of your "
            "torch build, or choose another renderer"
        )
    logger.warning(
        "nerfacc compiles its CUDA code at its first call on a machine: this takes a minute or two"
    )


def _is_compiled(package_folders: Sequence[str]) -> bool:
    """Whether the package came with its CUDA code compiled, or has compiled it on this machine before."""
    from torch.utils.cpp_extension import get_default_build_root

    if any(file for folder in package_folders for file in Path(folder).glob("csrc*.so")):
        return True
    built = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return any(built.glob("**/nerfacc_cuda/nerfacc_cuda.so"))


def render_with_nerfacc(
    field: Field,
    cameras: Cameras,
    height: int,
    width: int,
    background: Tensor | float = 1.0,
    *,
    num_samples: int = 80,
    generator: torch.Generator | SharedStream | None = None,
    occupancy: OccupancyGrid | None = None,
    stop_transmittance: float = 1e-3,
    max_samples: int | None = None,
    with_normals: bool = False,
) -> RenderOutput:
    """Render `field` from `cameras` on a GPU; arguments and errors as of `renderer.render`."""
    nerfacc = importlib.import_module("nerfacc")
    origins, directions = (rays.reshape(-1, 3) for rays in cameras.rays(height, width))
    step, num_rays = 2 * field.half_extent / num_samples, origins.shape[0]
    with torch.no_grad():
        ray_index, distances = _samples_in_cells(
            nerfacc, field, origins, directions, lattice_shift(origins, generator), step, occupancy
        )
        if stop_transmittance > 0:
            density = field.density(along(origins, directions, ray_index, distances))
            is_lit = nerfacc.render_visibility_from_density(
                distances - step / 2,
                distances + step / 2,
                density,
                ray_indices=ray_index,
                n_rays=num_rays,
                early_stop_eps=stop_transmittance,
            )
            ray_index, distances = ray_index[is_lit], distances[is_lit]
        points = along(origins, directions, ray_index, distances)
    segments = Segments.from_ray_index(ray_index, num_rays)
    density, colour = evaluate_within_budget(field, points, segments, max_samples, generator)
    normals = field.normals(points) if with_normals else None
    weights, _, _ = nerfacc.render_weight_from_density(
        distances - step / 2, distances + step / 2, density, ray_indices=ray_index, n_rays=num_rays
    )
    columns = [colour, *([] if normals is None else [normals])]
    columns += [torch.ones_like(distances)[:, None], distances[:, None]]
    sums = nerfacc.accumulate_along_rays(weights, torch.cat(columns, dim=1), ray_index, num_rays)
    samples = RaySamples(segments, weights, distances, points, directions, step, normals)
    return picture(sums.view(len(cameras), height, width, -1), background, samples)


def _samples_in_cells(
    nerfacc: Any,
    field: Field,
    origins: Tensor,
    directions: Tensor,
    shift: Tensor,
    step: float,
    occupancy: OccupancyGrid | None,
) -> tuple[Tensor, Tensor]:
    """Ray index int64 [N], ascending, and distance [N] of the lattice places in occupied cells."""
    bounds = scene_bounds(field.half_extent, occupancy, origins)
    first, count = places_inside(origins, directions, bounds, shift, step)
    near = (first + shift - 0.5) * step  # nerfacc's samples are the middles of its steps
    if occupancy is None:
        cells = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=origins.device)
    else:
        cells = occupancy.is_occupied.permute(2, 1, 0)[None]  # ours are stored z, y, x
    cube = scene_bounds(field.half_extent, None, origins).view(1, 6)
    _, samples, _ = nerfacc.traverse_grids(
        origins,
        directions,
        cells,
        cube,
        near_planes=near,
        far_planes=near + count * step,
        step_size=step,
    )
    return samples.ray_indices.long(), samples.vals
