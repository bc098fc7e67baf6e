"""Gradients of the rasteriser against finite differences and against the volume renderer.

An image of a moving silhouette is piecewise smooth, so finite differences are taken over steps of about a
pixel, and compared in sums.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor

from uni3d.mesh.rasteriser import antialias, interpolate, rasterise
from uni3d.scene.camera import Cameras
from uni3d.scene.renderer import render

CAMERAS = Cameras.from_lists([33.0, -140.0], [21.0, -8.0])
RADIUS = 0.45
BOX = [0.9, 0.7, 0.5]
SHAPES = {
    "sphere": trimesh.creation.icosphere(subdivisions=3, radius=RADIUS),
    "coarse sphere": trimesh.creation.icosphere(subdivisions=1, radius=RADIUS),
    "box": trimesh.creation.box(BOX),
}


def mesh_of(shape: str) -> tuple[Tensor, Tensor]:
    mesh = SHAPES[shape]
    return torch.tensor(np.array(mesh.vertices)).float(), torch.tensor(np.array(mesh.faces))


def opacity(vertices: Tensor, faces: Tensor, height: int, width: int) -> Tensor:
    fragments = rasterise(vertices, faces, CAMERAS, height, width)
    return antialias(fragments.coverage, fragments, faces)


def slope(function: Callable[[Tensor], Tensor], step: float) -> tuple[Tensor, Tensor]:
    """Gradients at 1 of the numbers [N] that `function` returns, the mean over the middles of three stretches
    of `step` on either side, and the difference quotients over all of them."""
    gradients = []
    for place in 1 + step * torch.tensor([-2 / 3, 0, 2 / 3]):
        variable = place.clone().requires_grad_()
        values = function(variable)
        gradients.append(
            torch.stack([torch.autograd.grad(value, variable, retain_graph=True)[0] for value in values])
        )
    with torch.no_grad():
        high, low = (function(torch.tensor(1 + way * step)) for way in (1, -1))
    return torch.stack(gradients).mean(dim=0), (high - low) / (2 * step)


MOVES = {
    "scale": lambda vertices, amount: vertices * amount,
    "sideways": lambda vertices, amount: vertices + (amount - 1) * torch.tensor([0.8, 0.0, 0.6]),
    "stretch": lambda vertices, amount: vertices * torch.stack([amount, amount.new_ones(()), 2 - amount]),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("shape", ["sphere", "box"])
def test_silhouettes_move_as_finite_differences_say(shape: str, move: str) -> None:
    """Area, position and width of the silhouette: the sums of the opacity times 1, x and |x|."""
    vertices, faces = mesh_of(shape)
    height, width = 64, 56
    x = (torch.arange(width) + 0.5) / width - 0.5
    weights = torch.stack([torch.ones(width), x, x.abs()])[:, None, None, None, :]

    def moments(amount: Tensor) -> Tensor:
        return (opacity(MOVES[move](vertices, amount), faces, height, width) * weights).mean(dim=(1, 2, 3, 4))

    gradients, differences = slope(moments, 0.03)
    assert ((gradients - differences).abs() < 0.02 * differences.abs() + 0.002).all()


class _Solid:
    """Dense matter inside a shape whose rim is soft over a few lattice steps, so that it has a gradient."""

    half_extent = 0.7

    def __init__(self, shape: str, scale: Tensor) -> None:
        self.shape, self.scale = shape, scale

    def density(self, points: Tensor) -> Tensor:
        if self.shape == "sphere":
            outside = points.norm(dim=-1) - RADIUS * self.scale
        else:
            outside = (points.abs() - torch.tensor(BOX) / 2 * self.scale).amax(dim=-1)
        return 150 * torch.sigmoid(-outside / 0.004)

    def normals(self, points: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, points: Tensor) -> tuple[Tensor, Tensor]:
        return self.density(points), torch.ones_like(points)


@pytest.mark.parametrize("shape", ["sphere", "box"])
def test_silhouettes_move_as_in_the_volume_renderer(shape: str) -> None:
    """Same silhouette within a pixel, and the same relative growth of its area, on average over some scales:
    the volume's rim is narrower than a pixel and gives only few of them a gradient."""
    vertices, faces = mesh_of(shape)
    size = 48
    growths = []
    for start in torch.linspace(0.85, 1.05, 5):
        scale = start.clone().requires_grad_()
        volume = render(_Solid(shape, scale), CAMERAS, size, size, num_samples=128).opacity
        surface = opacity(vertices * scale, faces, size, size)
        for image, other in ((volume, surface), (surface, volume)):
            grown = torch.nn.functional.max_pool2d((other > 0.5).float(), 3, stride=1, padding=1)
            assert ((image > 0.5) <= (grown > 0.5)).all()
        growths.append(
            [torch.autograd.grad(image.sum(), scale)[0] / image.sum().item() for image in (volume, surface)]
        )
    of_volume, of_surface = torch.tensor(growths).mean(dim=0)
    torch.testing.assert_close(of_surface, of_volume, rtol=0.05, atol=0)


def test_gradients_inside_a_surface_are_exact() -> None:
    """Interpolated attributes and depth, in float64, away from silhouettes: one large triangle."""
    corners = [[-3.0, -2.0, -0.5], [3.0, -2.5, 0.4], [0.2, 4.0, 0.1]]
    vertices = torch.tensor(corners, dtype=torch.float64, requires_grad=True)
    attributes = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    faces = torch.tensor([[0, 1, 2]])

    def image(vertices: Tensor, attributes: Tensor) -> tuple[Tensor, Tensor]:
        fragments = rasterise(vertices, faces, CAMERAS, 3, 4)
        return interpolate(attributes, faces, fragments), fragments.depth

    assert rasterise(vertices, faces, CAMERAS, 3, 4).face.max() == 0
    assert torch.autograd.gradcheck(image, (vertices, attributes))
    per_corner = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(image, (vertices, per_corner))


def test_gradients_of_blending_are_exact() -> None:
    """The place of every crossing, in float64, under a nudge too small to change any pair."""
    vertices, faces = mesh_of("coarse sphere")
    vertices = vertices.double()
    weight = torch.randn(2, 1, 24, 20, dtype=torch.float64)
    direction = torch.randn_like(vertices)

    def loss(amount: Tensor) -> Tensor:
        return (opacity(vertices + amount * direction, faces, 24, 20) * weight).sum()

    amount = torch.zeros((), dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(loss(amount), amount)[0]
    with torch.no_grad():
        step = torch.tensor(1e-5, dtype=torch.float64)
        difference = (loss(step) - loss(-step)) / (2 * step)
    torch.testing.assert_close(gradient, difference, rtol=1e-4, atol=1e-4)


def test_an_object_before_another_moves_their_common_edge() -> None:
    """The colour of a far wall under a near box: what the box uncovers."""
    near, near_faces = mesh_of("box")
    wall = torch.tensor([[-2.0, -2.0, 0.0], [2.0, -2.0, 0.0], [2.0, 2.0, 0.0], [-2.0, 2.0, 0.0]])
    wall_faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    faces = torch.cat([near_faces, wall_faces + len(near)])
    colours = torch.cat([torch.zeros(len(near), 1), torch.ones(4, 1)])
    cameras = Cameras.from_lists([8.0], [5.0])

    def white(amount: Tensor) -> Tensor:
        vertices = torch.cat([near * 0.5 * amount + torch.tensor([0, 0, 0.5]), wall])
        fragments = rasterise(vertices, faces, cameras, 48, 48)
        image = interpolate(colours.to(vertices.dtype), faces, fragments)
        assert (fragments.face >= 0).all()
        return antialias(image, fragments, faces).mean()[None]

    gradient, difference = slope(white, 0.05)
    assert difference < -0.01
    assert abs(gradient - difference) < 0.02 * abs(difference)


def test_triangles_smaller_than_pixels_move_the_silhouette() -> None:
    """At the rim of a round object most edges belong to triangles that no pixel sees."""
    mesh = trimesh.creation.icosphere(subdivisions=4, radius=RADIUS)
    vertices, faces = torch.tensor(np.array(mesh.vertices)).float(), torch.tensor(np.array(mesh.faces))
    gradient, difference = slope(lambda amount: opacity(vertices * amount, faces, 32, 32).mean()[None], 0.08)
    assert abs(gradient - difference) < 0.03 * abs(difference)
