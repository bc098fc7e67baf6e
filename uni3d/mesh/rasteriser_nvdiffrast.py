"""The visibility pass by nvdiffrast: a chosen option only, because of its licence.

nvdiffrast may be used for research and evaluation only, non-commercially, so uni3d imports it only when it is
asked for by name. It finds the visible faces; barycentric coordinates, depth, antialiasing and all gradients
stay uni3d's own, so that an image means the same with every backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uni3d.errors import MissingPackageError
from uni3d.mesh.rasteriser_torch import crossing_edges

__all__ = ["crossing_edges", "visible_faces"]

NEAR_DEPTH = 1e-2  # scene units; farther than elsewhere, because depth is resolved relative to it


def visible_faces(projected: Tensor, faces: Tensor, height: int, width: int) -> Tensor:
    """As `rasteriser_torch.visible_faces`, for tensors on a CUDA device.

    Raises MissingPackageError without nvdiffrast.
    """
    try:
        import nvdiffrast.torch as nvdiffrast  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingPackageError(
            "the rasteriser nvdiffrast is not installed, and its licence allows non-commercial use only; use "
            "auto or torch, or install it from github.com/NVlabs/nvdiffrast if the licence suits you"
        ) from error
    x, y, depth = projected.unbind(-1)
    # Its first row is at -1, so y downwards needs no flip.
    clip = torch.stack([2 * x / width - depth, 2 * y / height - depth, depth - 2 * NEAR_DEPTH, depth], dim=-1)
    context = nvdiffrast.RasterizeCudaContext(device=projected.device)
    fragments, _ = nvdiffrast.rasterize(context, clip, faces.int(), resolution=[height, width], grad_db=False)
    return fragments[..., 3].int() - 1
