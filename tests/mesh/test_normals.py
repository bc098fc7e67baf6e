"""Normals in torch against their numpy twins and finite differences."""

from __future__ import annotations

import numpy as np
import torch
import trimesh

from uni3d.mesh import surface
from uni3d.mesh.normals import face_normals, vertex_normals


def lump() -> tuple[torch.Tensor, torch.Tensor]:
    mesh = trimesh.creation.icosphere(subdivisions=1, radius=0.5)
    vertices = torch.tensor(np.array(mesh.vertices))
    return vertices * torch.tensor([1.0, 0.6, 1.3], dtype=torch.float64), torch.tensor(np.array(mesh.faces))


def test_normals_are_those_of_the_numpy_twins() -> None:
    vertices, faces = lump()
    smooth = surface.vertex_normals(vertices.numpy(), faces.numpy())
    torch.testing.assert_close(vertex_normals(vertices, faces).float(), torch.from_numpy(smooth))
    flat = surface.face_normals(vertices.numpy(), faces.numpy())
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    torch.testing.assert_close(face_normals(vertices, faces), torch.from_numpy(flat))


def test_gradients_are_those_of_finite_differences() -> None:
    vertices, faces = lump()
    vertices.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: face_normals(v, faces), (vertices,))
    assert torch.autograd.gradcheck(lambda v: vertex_normals(v, faces), (vertices,))


def test_faces_without_area_and_unused_vertices_harm_no_gradient() -> None:
    vertices, faces = lump()
    vertices = torch.cat([vertices, torch.zeros(1, 3, dtype=torch.float64)]).float().requires_grad_()
    faces = torch.cat([faces, torch.tensor([[0, 0, 1], [2, 2, 2]])])
    normals = vertex_normals(vertices, faces)
    (normals.sum() + face_normals(vertices, faces).square().sum()).backward()
    assert vertices.grad is not None and vertices.grad.isfinite().all()
    torch.testing.assert_close(normals[:-1].norm(dim=1), torch.ones(len(vertices) - 1))
