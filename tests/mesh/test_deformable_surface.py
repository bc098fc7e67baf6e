"""The surface of the geometry stage: closed and outward whatever its numbers, right gradients and start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st

from uni3d.mesh.deformable_surface import DeformableSurface
from uni3d.mesh.extraction import EmptySurfaceError
from uni3d.mesh.raycaster import Light
from uni3d.mesh.signed_distance import Grid, is_inside, signed_distance
from uni3d.mesh.surface import Surface, component_labels, open_edge_count, signed_volumes
from uni3d.mesh.surface_renderer import shade
from uni3d.mesh.surface_terms import laplacian, normal_consistency, sign_entropy, smooth_normals
from uni3d.mesh.tetrahedra import build_lattice


def _surface(mesh: trimesh.Trimesh) -> Surface:
    return Surface(mesh.vertices.astype(np.float32), mesh.faces.astype(np.int64), 0.0)


SPHERE = _surface(trimesh.creation.icosphere(3, 0.4))
BOX = _surface(trimesh.creation.box((1.0, 0.5, 0.3)))


def _volume(vertices: torch.Tensor, faces: torch.Tensor) -> float:
    return float(signed_volumes(vertices.detach().numpy(), faces.numpy()).sum())


def test_the_lattice_fills_its_box_with_tetrahedra_turned_alike() -> None:
    lattice = build_lattice(np.zeros(3), np.array([1.0, 0.5, 0.25]), 4)
    corners = lattice.positions[lattice.tetrahedra.long()].double()
    edges = corners[:, 1:] - corners[:, :1]
    volume = torch.linalg.det(edges) / 6
    torch.testing.assert_close(volume, torch.full_like(volume, lattice.spacing**3 / 12))
    is_in_box = ((lattice.positions >= 0) & (lattice.positions <= torch.tensor([1.0, 0.5, 0.25]))).all(dim=1)
    assert bool(is_in_box.any()) and not bool(lattice.is_border[is_in_box].any())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_any_numbers_give_a_closed_outward_surface(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lattice = build_lattice(np.zeros(3), np.ones(3), 3)
    surface = DeformableSurface(lattice, torch.randn(len(lattice.positions), generator=generator))
    with torch.no_grad():
        surface.shift.normal_(0, 10, generator=generator)
        surface.distance[~lattice.is_border] -= 0.2
    if surface.is_empty:
        return
    vertices, topology = surface()
    assert open_edge_count(topology.faces.numpy()) == 0
    # every body is outward: shells of negative volume are the walls of hollows in a larger one
    assert _volume(vertices, topology.faces) > 0


def test_no_tetrahedron_turns_inside_out() -> None:
    lattice = build_lattice(np.zeros(3), np.ones(3), 3)
    surface = DeformableSurface(lattice, torch.ones(len(lattice.positions)))
    with torch.no_grad():
        surface.shift.normal_(0, 1000)
    corners = surface.node_positions().detach()[lattice.tetrahedra.long()].double()
    assert float(torch.linalg.det(corners[:, 1:] - corners[:, :1]).min()) > 0


@pytest.mark.parametrize("start", [SPHERE, BOX], ids=["sphere", "box"])
def test_it_starts_as_the_mesh_that_it_is_given(start: Surface) -> None:
    surface = DeformableSurface.from_mesh(start, 12)
    vertices, topology = surface()
    wanted = float(signed_volumes(start.vertices, start.faces).sum())
    assert _volume(vertices, topology.faces) == pytest.approx(wanted, rel=0.02)
    extracted = surface.extract(300)
    assert len(extracted.faces) <= 300 and extracted.report["closed"]
    assert component_labels(extracted.faces, len(extracted.vertices))[0] == 1


def test_a_sheet_and_an_open_box_become_solids() -> None:
    sheet = Surface(
        np.array([[-0.5, 0, -0.5], [0.5, 0, -0.5], [0, 0, 0.5]], np.float32), np.array([[0, 1, 2]]), 0
    )
    vertices, topology = DeformableSurface.from_mesh(sheet, 12)()
    assert open_edge_count(topology.faces.numpy()) == 0 and _volume(vertices, topology.faces) > 0
    box = trimesh.creation.box((1.0, 0.8, 0.6))
    without_top = _surface(trimesh.Trimesh(box.vertices, box.faces[box.face_normals[:, 1] < 0.9]))
    vertices, topology = DeformableSurface.from_mesh(without_top, 12)()
    assert _volume(vertices, topology.faces) == pytest.approx(0.48, rel=0.25)


def test_inside_is_where_the_mesh_says() -> None:
    grid = Grid(np.full(3, -0.6), 0.1, (13, 13, 13))
    box = trimesh.creation.box((0.9, 0.7, 0.5))
    inside = is_inside(box.vertices, box.faces, grid).reshape(-1)
    assert np.array_equal(inside, (np.abs(grid.points()) < np.array([0.45, 0.35, 0.25])).all(axis=1))
    distance = signed_distance(SPHERE.vertices, SPHERE.faces, grid, keep_sheets=False).reshape(-1)
    exact = np.linalg.norm(grid.points(), axis=1) - 0.4
    near = np.abs(exact) < 0.2
    np.testing.assert_allclose(distance[near], exact[near], atol=0.015)


def test_two_bodies_that_overlap_are_inside_both() -> None:
    grid = Grid(np.full(3, -0.6), 0.1, (13, 13, 13))
    pair = trimesh.util.concatenate(
        [trimesh.creation.box((0.7, 0.3, 0.3)), trimesh.creation.box((0.3, 0.7, 0.3))]
    )
    assert is_inside(pair.vertices, pair.faces, grid)[6, 6, 6]


def test_topology_is_kept_until_a_sign_changes() -> None:
    surface = DeformableSurface.from_mesh(SPHERE, 8)
    first = surface.topology()
    with torch.no_grad():
        surface.distance *= 1.1
        surface.shift += 0.1
    assert surface.topology() is first
    with torch.no_grad():
        surface.distance[int(surface.distance.argmin())] = 1.0
    assert surface.topology() is not first


def test_an_empty_surface_says_so() -> None:
    lattice = build_lattice(np.zeros(3), np.ones(3), 3)
    surface = DeformableSurface(lattice, torch.ones(len(lattice.positions)))
    assert surface.is_empty
    with pytest.raises(EmptySurfaceError, match="vanished"):
        surface()


def _energy(surface: DeformableSurface) -> torch.Tensor:
    vertices, topology = surface()
    normals = smooth_normals(vertices, topology.faces)
    return (
        (vertices * normals).sum() * 0.01
        + normal_consistency(vertices, topology)
        + laplacian(vertices, topology)
        + sign_entropy(surface.node_distance(), topology, surface.spacing)
    )


@pytest.mark.parametrize("name", ["distance", "shift"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    torch.manual_seed(3)
    surface = DeformableSurface.from_mesh(BOX, 6).double()
    with torch.no_grad():
        surface.shift.normal_(0, 0.3)
        # away from sign changes, where the surface jumps
        surface.distance += torch.sign(surface.distance) * 0.2 * surface.spacing
    parameter = getattr(surface, name)
    _energy(surface).backward()
    assert parameter.grad is not None
    direction = torch.randn_like(parameter) * (parameter.grad != 0)
    step = 1e-6
    with torch.no_grad():
        parameter += step * direction
        above = float(_energy(surface))
        parameter -= 2 * step * direction
        below = float(_energy(surface))
    slope = float((parameter.grad * direction).sum())
    assert (above - below) / (2 * step) == pytest.approx(slope, rel=1e-4)


def test_a_sphere_is_smoother_than_a_crumpled_one() -> None:
    surface = DeformableSurface.from_mesh(SPHERE, 8)
    vertices, topology = surface()
    crumpled = vertices.detach() + 0.01 * torch.randn_like(vertices)
    assert normal_consistency(crumpled, topology) > normal_consistency(vertices, topology)
    assert laplacian(crumpled, topology) > laplacian(vertices, topology)
    outward = (smooth_normals(vertices, topology.faces) * vertices).sum(dim=1) / vertices.norm(dim=1)
    assert float(outward.detach().min()) > 0.9


def test_light_falls_as_in_the_ray_caster() -> None:
    light = Light(key_azimuth_deg=-20.0)
    normals = torch.nn.functional.normalize(torch.randn(50, 3), dim=1)
    expected = torch.from_numpy(light.shade(normals.numpy()))
    torch.testing.assert_close(shade(normals, light)[:, 0], expected.float())
