"""Colours onto the surface: unwrap it, ask the field for the colour under every texel, fill the gutters.

Between `extraction.py` and `export.py`. Legend: P points, V vertices, K covered texels, S texture size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from uni3d.errors import Uni3DError, UsageError
from uni3d.mesh.atlas_raster import rasterise
from uni3d.mesh.surface import Surface, vertex_normals
from uni3d.mesh.textured_mesh import TexturedMesh
from uni3d.mesh.unwrap import UnwrapMethod, unwrap

logger = logging.getLogger(__name__)

ColourFunction = Callable[[Tensor], Tensor]
SurfaceColourFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

# Bilinear look-ups inside a chart reach texels whose centres are up to this far outside of it (the diagonal).
BORDER_TEXELS = 1.5
# Keeps the charts of a texture of 1024 texels apart down to its mip level of 128.
DEFAULT_GUTTER = 8


def bake_texture(
    surface: Surface,
    colour_fn: ColourFunction,
    size: int = 1024,
    *,
    supersample: int = 1,
    gutter: int | None = None,
    unwrap_method: UnwrapMethod = "auto",
    unwrap_time_limit_s: float = 20.0,
    chunk_size: int = 1 << 17,
    device: torch.device | str = "cpu",
) -> TexturedMesh:
    """Unwrap `surface` and paint it with a function of points.

    colour_fn: points float32 [P, 3] on the surface, in scene units on `device` -> colours [P, 3], sRGB
    display values (clipped to [0, 1]). The rest is as in `bake_surface_colours`.
    """
    return bake_surface_colours(
        surface,
        lambda points, face, barycentric: colour_fn(points),
        size,
        supersample=supersample,
        gutter=gutter,
        unwrap_method=unwrap_method,
        unwrap_time_limit_s=unwrap_time_limit_s,
        chunk_size=chunk_size,
        device=device,
    )


def bake_surface_colours(
    surface: Surface,
    colour_fn: SurfaceColourFunction,
    size: int = 1024,
    *,
    supersample: int = 1,
    gutter: int | None = None,
    unwrap_method: UnwrapMethod = "auto",
    unwrap_time_limit_s: float = 20.0,
    chunk_size: int = 1 << 17,
    device: torch.device | str = "cpu",
) -> TexturedMesh:
    """Unwrap `surface` and paint it with a function of where on which face a point lies.

    colour_fn: points float32 [P, 3] in scene units, their faces int64 [P] and barycentric weights float32
    [P, 3], all on `device` -> sRGB colours [P, 3] (clipped to [0, 1]); called without gradients on at most
    `chunk_size` points at a time.
    size: texels a side, a power of two from 64 to 4096. supersample: samples a side per texel, averaged.
    gutter: distance between charts in texels, None: DEFAULT_GUTTER of 1024 and never less; the space between
    them is filled from the nearest chart whatever its width, so that no mip level mixes background into the
    object.

    Adds to the report: unwrap_method, unwrap_seconds, bake_seconds, texture_coverage (share of the texels
    on a chart), uv_overlap_texels. Raises UsageError for a size out of range, Uni3DError for colours that
    are not finite.
    """
    if size & (size - 1) or not 64 <= size <= 4096:
        raise UsageError(f"texture size is {size}; give a power of two from 64 to 4096")
    if not 1 <= supersample <= 4:
        raise UsageError(f"texture supersampling is {supersample}; give 1 to 4 samples a side")
    atlas = unwrap(
        surface.vertices,
        surface.faces,
        size=size,
        gutter=max(DEFAULT_GUTTER, DEFAULT_GUTTER * size // 1024) if gutter is None else gutter,
        method=unwrap_method,
        time_limit_s=unwrap_time_limit_s,
    )
    began = time.monotonic()
    fine = size * supersample
    texel, face, barycentric, overlap = rasterise(
        atlas.uv[atlas.faces] * fine, fine, margin=BORDER_TEXELS * supersample
    )
    corners = surface.vertices[surface.faces[face]]
    points = np.einsum("kc,kcd->kd", barycentric, corners)
    places = [
        torch.from_numpy(np.ascontiguousarray(values)).to(device)
        for values in (points.astype(np.float32), face, barycentric.astype(np.float32))
    ]
    colours = _colours(colour_fn, places, chunk_size)
    pixels, is_covered = _average(texel, colours, fine, supersample)
    texture = np.rint(_fill(pixels, is_covered) * 255.0).astype(np.uint8)
    report = surface.report | {
        "unwrap_method": atlas.method,
        "unwrap_seconds": atlas.seconds,
        "bake_seconds": time.monotonic() - began,
        "texture_coverage": float(_uv_area(atlas.uv[atlas.faces])),
        "uv_overlap_texels": overlap,
    }
    normals = vertex_normals(surface.vertices, surface.faces)[atlas.vertex_of]
    return TexturedMesh(surface.vertices[atlas.vertex_of], atlas.faces, normals, atlas.uv, texture, report)


@torch.no_grad()
def _colours(
    colour_fn: SurfaceColourFunction, places: Sequence[Tensor], chunk_size: int
) -> NDArray[np.float32]:
    """Colours float32 [P, 3] in [0, 1] at points [P, 3] of faces [P] and barycentric weights [P, 3]."""
    chunks = zip(*(part.split(chunk_size) for part in places), strict=True)
    colours = torch.cat([colour_fn(*chunk).float() for chunk in chunks])
    num = len(places[0])
    if colours.shape != (num, 3):
        raise ValueError(f"colour_fn gave {tuple(colours.shape)} for {num} points; expected [P, 3]")
    if not bool(torch.isfinite(colours).all()):
        raise Uni3DError(
            "the field has colours that are not finite, so no texture can be baked; "
            "go back to an earlier checkpoint"
        )
    return colours.clamp(0.0, 1.0).cpu().numpy()


def _average(
    texel: NDArray[np.int64], colours: NDArray[np.float32], fine: int, supersample: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Mean of the covered samples of each texel: (colours [S, S, 3], covered [S, S])."""
    size = fine // supersample
    target = (texel // fine // supersample) * size + (texel % fine) // supersample
    count = np.bincount(target, minlength=size * size)
    sums = [np.bincount(target, weights=colours[:, c], minlength=size * size) for c in range(3)]
    pixels = np.stack(sums, axis=1) / np.maximum(count, 1)[:, None]
    return pixels.reshape(size, size, 3).astype(np.float32), (count > 0).reshape(size, size)


def _fill(pixels: NDArray[np.float32], is_covered: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Give every texel that no chart covers the colour of the nearest one that is covered."""
    nearest = ndimage.distance_transform_edt(~is_covered, return_distances=False, return_indices=True)
    return pixels[tuple(np.asarray(nearest))]


def _uv_area(corners: NDArray[np.floating]) -> float:
    """Summed area of triangles [F, 3, 2]."""
    first, second = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    return 0.5 * float(np.abs(first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]).sum())
