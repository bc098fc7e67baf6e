"""The Triton kernels against their torch twins: compiled on a CUDA device, interpreted without.


tests/conftest.py turns on Triton's interpreter. Both must see the same faces and mark the same edges, so that
images and gradients agree to rounding.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor

from uni3d.mesh import rasteriser_torch
from uni3d.mesh.rasteriser import antialias, interpolate, mesh_edges, rasterise
from uni3d.scene.camera import Cameras

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAMERAS = Cameras.from_lists([33.0, -140.0], [21.0, -8.0]).to(DEVICE)


pytest.importorskip("triton")


def mesh_of(mesh: trimesh.Trimesh) -> tuple[Tensor, Tensor]:
    vertices = torch.tensor(np.array(mesh.vertices), dtype=torch.float32, device=DEVICE)
    return vertices, torch.tensor(np.array(mesh.faces), device=DEVICE)


def crowd() -> tuple[Tensor, Tensor]:
    """Small triangles before large ones, a floor that reaches behind the camera, and broken faces."""
    sphere, sphere_faces = mesh_of(trimesh.creation.icosphere(subdivisions=1, radius=0.4))
    box, box_faces = mesh_of(trimesh.creation.box([1.1, 0.4, 0.7]))
    floor = [[-9.0, -0.6, -9.0], [9.0, -0.6, -9.0], [0.0, -0.6, 9.0], [torch.nan, 0.0, 0.0]]
    sphere = sphere * (1 + 0.2 * torch.sin(9 * sphere).prod(dim=1, keepdim=True))
    vertices = torch.cat([sphere + 0.2, box, torch.tensor(floor, device=DEVICE)])
    num, last = len(sphere), len(vertices) - 1
    extra = torch.tensor([[last - 3, last - 2, last - 1], [0, 1, last], [2, 2, 3]], device=DEVICE)
    return vertices, torch.cat([sphere_faces, box_faces + num, extra])


def results(vertices: Tensor, faces: Tensor, backend: str, height: int, width: int) -> dict[str, Tensor]:
    vertices = vertices.clone().requires_grad_()
    colours = (torch.arange(len(vertices) * 2, device=DEVICE) % 7).view(-1, 2).float().requires_grad_()
    fragments = rasterise(vertices, faces, CAMERAS, height, width, backend=backend)
    flags = (torch.arange(faces.numel(), device=DEVICE) % 5).view(-1, 3, 1).float().requires_grad_()
    values = [interpolate(attributes, faces, fragments) for attributes in (colours, flags)]
    image = torch.cat([*values, fragments.coverage], dim=1)
    image = antialias(image, fragments, faces)
    weight = torch.linspace(-1, 1, image.numel(), device=DEVICE).view(image.shape)
    ((image * weight).sum() + fragments.depth.sum()).backward()
    assert vertices.grad is not None and colours.grad is not None and flags.grad is not None
    return {
        "face": fragments.face,
        "barycentric": fragments.barycentric.detach(),
        "depth": fragments.depth.detach(),
        "image": image.detach(),
        "vertex gradient": vertices.grad,
        "colour gradient": colours.grad,
        "corner gradient": flags.grad,
    }


def test_images_and_gradients_are_those_of_torch() -> None:
    vertices, faces = crowd()
    expected = results(vertices, faces, "torch", 18, 28)
    got = results(vertices, faces, "triton", 18, 28)
    assert (expected["face"] >= 0).float().mean() > 0.3
    assert (got["image"] - got["image"].round()).abs().max() > 0.1
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_silhouette_edges_are_those_of_torch() -> None:
    from uni3d.mesh import rasteriser_triton

    vertices, faces = crowd()
    edges = mesh_edges(faces)
    projected = CAMERAS.project(vertices, 20, 28)
    fragments = rasterise(vertices, faces, CAMERAS, 20, 28, backend="torch")
    depth = torch.where(fragments.face >= 0, fragments.depth / CAMERAS.ray_lengths(20, 28), torch.inf)
    for wins_ties in (True, False):
        found = [
            passes.crossing_edges(
                projected, edges.ends, edges.opposite, fragments.face, depth, wins_ties=wins_ties
            )
            for passes in (rasteriser_torch, rasteriser_triton)
        ]
        assert (found[0] >= 0).sum() > 10
        assert torch.equal(found[0], found[1])
