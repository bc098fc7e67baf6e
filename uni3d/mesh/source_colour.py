"""The colours that a mesh made elsewhere came with, as a function of points: where a new texture starts.

Legend: K points.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from uni3d.mesh.base_colour import BaseColour
from uni3d.mesh.renderable import RenderableMesh
from uni3d.mesh.signed_distance import NearestSurface

# Samples by which the nearest face is found, as a share of the scene unit.
SAMPLE_SPACING = 0.004


class SourceColour:
    """Unlit sRGB colours of `mesh`; a `SurfaceColour`.

    by_face: points come from the faces of `mesh` itself. Otherwise each takes the colour of the nearest point
    of its surface, which is how a remeshed surface keeps its colours.
    """

    def __init__(self, mesh: RenderableMesh, *, by_face: bool) -> None:
        self._colour = BaseColour(mesh)
        self._nearest = None if by_face else NearestSurface(mesh.vertices, mesh.faces, SAMPLE_SPACING)

    def __call__(self, points: Tensor, face: Tensor, barycentric: Tensor) -> Tensor:
        """Colours float32 [K, 3] in [0, 1] at points [K, 3] on faces [K] with weights [K, 3]; no gradient."""
        if self._nearest is None:
            chosen = face.cpu().numpy(), barycentric.detach().cpu().numpy()
        else:
            chosen = self._nearest.query(points.detach().cpu().numpy())
        colours = np.clip(self._colour.at(*chosen)[:, :3], 0.0, 1.0)
        return torch.from_numpy(colours.astype(np.float32)).to(points.device)
