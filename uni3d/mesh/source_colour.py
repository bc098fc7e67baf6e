"""The colours that a mesh made elsewhere came with, as a function of points: where a new texture starts.

Legend: K points, F faces.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, logit
from torch import Tensor

from uni3d.mesh.base_colour import BaseColour
from uni3d.mesh.renderable import RenderableMesh
from uni3d.mesh.signed_distance import NearestSurface

# Black and white are kept this far from the ends of the sigmoid, where nothing could change them any more.
COLOUR_MARGIN = 0.03
# ITU-R BT.601: how bright red, green and blue look.
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
# Samples by which the nearest face is found, as a share of the scene unit.
SAMPLE_SPACING = 0.004


class SourceColour:
    """Unlit sRGB colours of `mesh`; a `SurfaceColour`.

    by_face: points come from the faces of `mesh` itself. Otherwise each takes the colour of the nearest point
    of its surface, which is how a remeshed surface keeps its colours.
    fading: 0 to 1, how far the colours are taken towards greys about the middle one. At 1 the mesh has no
    hue and no lightness of its own left, but still its light and dark parts: a new texture is then no nearer
    to one colour than to another, and the parts of the object stay in sight.
    """

    def __init__(self, mesh: RenderableMesh, *, by_face: bool, fading: float = 0.0) -> None:
        self._colour = BaseColour(mesh)
        self._nearest = None if by_face else NearestSurface(mesh.vertices, mesh.faces, SAMPLE_SPACING)
        self._fading = fading
        self._mean = _mean_lightness(self._colour) if fading > 0 else 0.0

    def __call__(self, points: Tensor, face: Tensor, barycentric: Tensor) -> Tensor:
        """Colours float32 [K, 3] in [0, 1] at points [K, 3] on faces [K] with weights [K, 3]; no gradient."""
        if self._nearest is None:
            chosen = face.cpu().numpy(), barycentric.detach().cpu().numpy()
        else:
            chosen = self._nearest.query(points.detach().cpu().numpy())
        colours = np.clip(self._colour.at(*chosen)[:, :3], 0.0, 1.0)
        if self._fading > 0:
            raw = _logit(colours)
            grey = (raw @ LUMINANCE - self._mean)[:, None]
            colours = expit(raw + self._fading * (grey - raw))
        return torch.from_numpy(colours.astype(np.float32)).to(points.device)


def _mean_lightness(colour: BaseColour) -> float:
    """The raw grey (before the sigmoid) of the middle of every face, averaged over the surface."""
    mesh = colour.mesh
    corners = mesh.vertices[mesh.faces]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    faces = np.arange(len(mesh.faces))
    middle = np.full((len(faces), 3), 1 / 3, np.float32)
    raw = _logit(np.clip(colour.at(faces, middle)[:, :3], 0.0, 1.0)) @ LUMINANCE
    return float(np.average(raw, weights=np.maximum(area, 1e-20)))


def _logit(colours: NDArray[np.float32]) -> NDArray[np.float32]:
    return logit(np.clip(colours, COLOUR_MARGIN, 1 - COLOUR_MARGIN)).astype(np.float32)
