"""Random gentle changes of an asset's shape, so that few assets show more of the shapes a noun can have.

A change is a projective map of space: it scales the axes, leans what stands and narrows it towards an end.
Such maps keep flat faces flat, so that windows stay on their walls, and here they keep up, front and sides:
no map turns. Left and right, front and back, up and down are treated alike on average.
Legend: V vertices, F faces.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from uni3d.mesh.renderable import RenderableMesh, unit_vectors

_MAX_DEVIATIONS = 2.0
_SIDEWAYS_TAPER = 0.5


@dataclass(frozen=True)
class ShapeChange:
    """The map p -> matrix p / (1 + taper . p) of the unit box; `matrix` [3, 3] with a positive determinant.

    The sum of |taper| [3] must stay below 2, so that the divisor stays positive in the box.
    """

    matrix: np.ndarray
    taper: np.ndarray

    def apply(self, mesh: RenderableMesh) -> RenderableMesh:
        """The mesh, which must lie in the unit box, after the map, and put in the unit box again.

        Normals follow by the inverse transpose of the map's Jacobian, which for w = 1 + taper . p is
        matrix (w - p taper^T) / w^2; without its scale: matrix^-T (n + taper (p . n)).
        """
        vertices = mesh.vertices.astype(np.float64)
        moved = vertices @ self.matrix.T / (1 + vertices @ self.taper)[:, None]
        normals = mesh.corner_normals
        if normals is not None:
            along = np.einsum("fkc,fkc->fk", vertices[mesh.faces], normals)
            normals = (normals + along[..., None] * self.taper) @ np.linalg.inv(self.matrix)
            normals = unit_vectors(normals).astype(np.float32)
        return replace(mesh, vertices=moved, corner_normals=normals).in_unit_box()


def sample_shape_change(
    rng: np.random.Generator, *, scale_deviation: float, taper_deviation: float, lean_deviation: float
) -> ShapeChange:
    """Draw a change; all draws are normal and cut off at two standard deviations.

    `scale_deviation` is that of the logarithm of each axis's factor; `taper_deviation` that of the relative
    width of top against bottom, half of it between the other pairs of sides; `lean_deviation` that of the
    sideways shift per height, in both horizontal directions.
    """

    def draw(num: int) -> np.ndarray:
        return np.clip(rng.standard_normal(num), -_MAX_DEVIATIONS, _MAX_DEVIATIONS)

    scale = np.exp(scale_deviation * draw(3))
    lean = np.eye(3)
    lean[[0, 2], 1] = lean_deviation * draw(2)
    taper = taper_deviation * np.array([_SIDEWAYS_TAPER, 1.0, _SIDEWAYS_TAPER]) * draw(3)
    return ShapeChange(lean @ np.diag(scale), taper)
