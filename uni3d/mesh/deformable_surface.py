"""The surface that the geometry stage moves: signed distances and shifts at the nodes of a lattice.

Starts from a mesh (the field's own surface at its iso level, or one made elsewhere), is cut anew by marching
tetrahedra in every step, and ends as a `Surface` that the texture stage paints. Legend: N nodes of the
lattice, V vertices, F faces.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from uni3d.mesh.extraction import EmptySurfaceError, finished_surface
from uni3d.mesh.signed_distance import Grid, signed_distance
from uni3d.mesh.surface import (
    Surface,
    keep_large_components,
    open_edge_count,
    remove_degenerate_faces,
)
from uni3d.mesh.tetrahedra import (
    MAX_SHIFT,
    SurfaceTopology,
    TetrahedralLattice,
    build_lattice,
    crossing_points,
    surface_topology,
)

# Distances beyond this many cubes say nothing about the surface, and would only take longer to change sign.
MAX_DISTANCE = 2.0
MIN_DISTANCE = 0.03
# Pieces with less than this share of the largest one's area are floaters.
MIN_COMPONENT = 0.02


class DeformableSurface(nn.Module):
    """A closed surface, differentiable in `distance` [N] (scene units, negative inside) and `shift` [N, 3].

    Nodes move by less than a quarter of a cube whatever `shift` is, so no tetrahedron turns inside out and
    the surface never passes through itself.
    """

    positions: Tensor
    tetrahedra: Tensor
    is_border: Tensor

    def __init__(self, lattice: TetrahedralLattice, distance: Tensor) -> None:
        super().__init__()
        self.spacing = lattice.spacing
        limit = MAX_DISTANCE * lattice.spacing
        self.distance = nn.Parameter(distance.float().clamp(-limit, limit))
        self.shift = nn.Parameter(torch.zeros_like(lattice.positions))
        for name in ("positions", "tetrahedra", "is_border"):
            self.register_buffer(name, getattr(lattice, name), persistent=False)
        self._topology: tuple[Tensor, SurfaceTopology] | None = None

    @classmethod
    def from_mesh(cls, surface: Surface, resolution: int) -> DeformableSurface:
        """Start from a mesh, closed or not, with `resolution` cubes along its longest side."""
        low, high = surface.vertices.min(axis=0), surface.vertices.max(axis=0)
        lattice = build_lattice(low, high, resolution)
        # Both sub-lattices, corners and centres, are regular grids.
        positions = lattice.positions.numpy().astype(np.float64)
        keep_sheets = open_edge_count(surface.faces) > 0
        parts = []
        for grid in _grids(positions, lattice.spacing):
            parts.append(
                signed_distance(surface.vertices, surface.faces, grid, keep_sheets=keep_sheets).reshape(-1)
            )
        distance = np.concatenate(parts)
        # A node right on the surface would make it pass through all its tetrahedra in one point.
        least = MIN_DISTANCE * lattice.spacing
        distance = np.where(distance < 0, np.minimum(distance, -least), np.maximum(distance, least))
        return cls(lattice, torch.from_numpy(distance))

    def node_distance(self) -> Tensor:
        """Distances [N] with the border outside, so that the surface is closed at the end of the lattice."""
        return torch.where(self.is_border, self.distance.abs() + 1e-3 * self.spacing, self.distance)

    def node_positions(self) -> Tensor:
        """Positions [N, 3] of the nodes after their shifts."""
        length = (1 + self.shift.square().sum(dim=1, keepdim=True)).sqrt()
        return self.positions + MAX_SHIFT * self.spacing * self.shift / length

    @property
    def is_empty(self) -> bool:
        """Whether no node is inside."""
        return not bool((self.node_distance().detach() < 0).any())

    def topology(self) -> SurfaceTopology:
        """How the surface hangs together; kept until a sign changes. EmptySurfaceError if there is none."""
        inside = self.node_distance().detach() < 0
        if self._topology is None or not torch.equal(self._topology[0], inside):
            if not bool(inside.any()):
                raise EmptySurfaceError(
                    "the surface vanished: no point is inside it any more; lower the learning rates or the "
                    "regularisers of the geometry stage"
                )
            self._topology = (inside, surface_topology(inside, self.tetrahedra))
        return self._topology[1]

    def forward(self) -> tuple[Tensor, SurfaceTopology]:
        """Vertices [V, 3] with gradient, and the topology that they belong to."""
        topology = self.topology()
        return crossing_points(self.node_positions(), self.node_distance(), topology.cut_edges), topology

    @torch.no_grad()
    def extract(self, max_triangles: int) -> Surface:
        """The surface as it is now, without floaters and cavities, reduced to `max_triangles`."""
        cut, topology = self()
        vertices, faces = remove_degenerate_faces(cut.cpu().numpy(), topology.faces.cpu().numpy())
        vertices, faces, counts = keep_large_components(
            vertices, faces, min_area_fraction=MIN_COMPONENT, drop_cavities=True
        )
        return finished_surface(vertices, faces, max_triangles, report=dict(counts))


def _grids(positions: np.ndarray, spacing: float) -> list[Grid]:
    """The corners and the centres of the cubes, in the order in which `build_lattice` lists them."""
    low, high = positions.min(axis=0), positions.max(axis=0)
    corners = tuple(np.rint((high - low) / spacing).astype(int) + 1)
    centres = tuple(size - 1 for size in corners)
    return [Grid(low, spacing, corners), Grid(low + spacing / 2, spacing, centres)]
