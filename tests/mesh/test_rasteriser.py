"""The rasteriser: coverage, depth and barycentric coordinates against exact rays, and awkward meshes."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor

from uni3d.errors import MissingPackageError, UsageError
from uni3d.mesh import rasteriser_benchmark
from uni3d.mesh.rasteriser import Fragments, antialias, choose_backend, interpolate, mesh_edges, rasterise
from uni3d.mesh.raycaster import Raycaster
from uni3d.mesh.renderable import Material, RenderableMesh
from uni3d.mesh.surface import open_edge_count, signed_volumes
from uni3d.scene.camera import Cameras

CAMERAS = Cameras.from_lists([33.0, -140.0], [21.0, -8.0])


def tensors(mesh: trimesh.Trimesh, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.tensor(np.array(mesh.vertices), dtype=dtype), torch.tensor(np.array(mesh.faces))


def bumpy_sphere(subdivisions: int) -> tuple[Tensor, Tensor]:
    vertices, faces = tensors(trimesh.creation.icosphere(subdivisions=subdivisions, radius=0.7))
    return vertices * (1 + 0.15 * torch.sin(9 * vertices).prod(dim=1, keepdim=True)), faces


def ray_hits(vertices: Tensor, faces: Tensor, cameras: Cameras, height: int, width: int) -> Tensor:
    """Distance along each pixel's ray by trying every face in float64, infinite for a miss, [B, H, W]."""
    origins, directions = (rays.double().reshape(-1, 1, 3) for rays in cameras.rays(height, width))
    corner, second, third = vertices.double()[faces].unbind(1)
    first_edge, second_edge = second - corner, third - corner
    across = torch.linalg.cross(directions, second_edge[None])
    determinant = (first_edge * across).sum(-1)
    offset = origins - corner
    u = (offset * across).sum(-1) / determinant
    turned = torch.linalg.cross(offset, first_edge[None])
    v = (directions * turned).sum(-1) / determinant
    distance = (second_edge * turned).sum(-1) / determinant
    is_hit = (u >= 0) & (v >= 0) & (u + v <= 1) & (distance > 0)
    return torch.where(is_hit, distance, torch.inf).amin(-1).view(len(cameras), height, width)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40), (40, 20)])
@pytest.mark.parametrize("subdivisions", [0, 2])
def test_depth_is_that_of_exact_rays(height: int, width: int, subdivisions: int) -> None:
    vertices, faces = bumpy_sphere(subdivisions)
    fragments = rasterise(vertices, faces, CAMERAS, height, width)
    exact = ray_hits(vertices, faces, CAMERAS, height, width)
    seen = fragments.face >= 0
    assert 0.1 < seen.float().mean() < 0.9
    differs = seen != exact.isfinite()
    assert differs.sum() <= 1e-3 * seen.sum()
    agreed = seen & ~differs
    torch.testing.assert_close(fragments.depth[agreed], exact[agreed].float(), atol=2e-5, rtol=0)
    assert (fragments.depth[~seen] == 0).all() and (fragments.barycentric[~seen] == 0).all()


def test_points_on_the_surface_lie_on_their_rays() -> None:
    """Barycentric coordinates are perspective correct: the interpolated position is on the pixel's ray."""
    vertices, faces = tensors(trimesh.creation.box([0.9, 0.7, 0.5]))
    fragments = rasterise(vertices, faces, CAMERAS, 40, 48)
    points = interpolate(vertices, faces, fragments).permute(0, 2, 3, 1)
    origins, directions = CAMERAS.rays(40, 48)
    on_ray = origins + directions * fragments.depth[..., None]
    seen = fragments.face >= 0
    torch.testing.assert_close(points[seen], on_ray[seen], atol=1e-5, rtol=0)
    torch.testing.assert_close(fragments.barycentric.sum(-1)[seen], torch.ones(int(seen.sum())))
    assert fragments.barycentric.min() >= 0


def test_silhouette_is_that_of_the_ray_caster() -> None:
    vertices, faces = bumpy_sphere(3)
    mesh = RenderableMesh(
        vertices=vertices.numpy(), faces=faces.numpy(), corner_normals=None, corner_uv=None,
        corner_colour=None, face_material=np.zeros(len(faces), np.int64),
        materials=[Material(np.ones(4, np.float32))],
    )  # fmt: skip
    fragments = rasterise(vertices, faces, CAMERAS[:1], 64, 64)
    view = Raycaster(mesh).render(CAMERAS[:1], 64, supersample=1)
    seen = fragments.face[0] >= 0
    assert (seen != torch.from_numpy(view.alpha > 0)).sum() <= 1e-3 * seen.sum()
    # Antialiased opacity is the covered share of each pixel, on average.
    opacity = antialias(fragments.coverage, fragments, faces)[0, 0]
    share = torch.from_numpy(Raycaster(mesh).render(CAMERAS[:1], 64, supersample=8).alpha)
    hard_error = (seen.float() - share).abs().sum()
    assert (opacity - share).abs().sum() < 0.3 * hard_error


def test_one_of_several_objects_hides_the_others() -> None:
    near, faces = tensors(trimesh.creation.box([0.2, 0.2, 0.2]))
    vertices = torch.cat([near + torch.tensor([0.0, 0.0, 0.5]), near * 4])
    both = torch.cat([faces + len(near), faces])
    fragments = rasterise(vertices, both, Cameras.from_lists([0.0], [0.0]), 33, 33)
    assert fragments.face[0, 16, 16] >= len(faces)
    assert 0 <= fragments.face[0, 16, 22] < len(faces)
    torch.testing.assert_close(fragments.depth[0, 16, 16], torch.tensor(2.4 - 0.6))


def test_shared_edges_leave_no_gaps() -> None:
    """A fan of slivers whose edges and centre run through pixel centres covers its square completely."""
    num, size = 60, 64
    angle = torch.arange(num) * 2 * torch.pi / num
    rim = torch.stack([angle.cos(), angle.sin(), torch.zeros(num)], dim=1)
    vertices = torch.cat([torch.zeros(1, 3), rim])
    index = torch.arange(num)
    faces = torch.stack([torch.zeros(num, dtype=torch.long), 1 + index, 1 + (index + 1) % num], dim=1)
    for cameras in (Cameras.from_lists([0.0], [0.0]), CAMERAS):
        for side in (size, size + 1):
            face = rasterise(vertices, faces, cameras, side, side).face
            exact = ray_hits(vertices * 0.98, faces, cameras, side, side).isfinite()
            assert (face[exact] >= 0).all()


def test_a_face_through_the_camera_plane_is_seen_where_it_lies_before_it() -> None:
    """A floor from in front of the camera to behind it."""
    corners = [[-50.0, -1.0, -50.0], [50.0, -1.0, -50.0], [50.0, -1.0, 50.0], [-50.0, -1.0, 50.0]]
    vertices = torch.tensor(corners)
    faces = torch.tensor([[0, 2, 1], [0, 3, 2]])
    cameras = Cameras.from_lists([10.0], [5.0])
    fragments = rasterise(vertices, faces, cameras, 24, 32)
    exact = ray_hits(vertices, faces, cameras, 24, 32)
    seen = fragments.face >= 0
    assert torch.equal(seen, exact.isfinite()) and 0.3 < seen.float().mean() < 0.9
    torch.testing.assert_close(fragments.depth[seen], exact[seen].float(), rtol=1e-4, atol=1e-4)
    assert antialias(fragments.coverage, fragments, faces).isfinite().all()


def test_nothing_behind_the_camera_is_seen() -> None:
    vertices, faces = tensors(trimesh.creation.icosphere(subdivisions=1, radius=0.3))
    behind = vertices + Cameras.from_lists([33.0], [21.0]).positions() * 2
    assert (rasterise(behind, faces, CAMERAS[:1], 16, 16).face == -1).all()


def test_degenerate_and_broken_faces_are_not_seen_and_harm_no_gradient() -> None:
    vertices, faces = tensors(trimesh.creation.icosphere(subdivisions=2, radius=0.5))
    line = torch.tensor([[-0.9, 0.8, 0.9], [0.0, 0.8, 0.9], [0.9, 0.8, 0.9], [0.3, torch.nan, 0.0]])
    num = len(vertices)
    bad = torch.tensor([[0, 0, 0], [1, 1, 2], [num, num + 1, num + 2], [0, 1, num + 3]])
    clean = rasterise(vertices, faces, CAMERAS, 32, 32)
    everything = torch.cat([vertices, line]).requires_grad_()
    all_faces = torch.cat([faces, bad])
    fragments = rasterise(everything, all_faces, CAMERAS, 32, 32)
    assert torch.equal(fragments.face, clean.face)
    image = interpolate(everything, all_faces, fragments)
    antialias(image, fragments, all_faces).square().sum().backward()
    assert everything.grad is not None and everything.grad[: num + 3].isfinite().all()


def test_an_empty_mesh_gives_empty_images_that_run_backwards() -> None:
    vertices = torch.zeros(0, 3, requires_grad=True)
    faces = torch.zeros(0, 3, dtype=torch.long)
    fragments = rasterise(vertices, faces, CAMERAS, 6, 8)
    assert fragments.face.shape == (2, 6, 8) and (fragments.face == -1).all()
    image = interpolate(torch.zeros(0, 5), faces, fragments)
    assert image.shape == (2, 5, 6, 8)
    image = antialias(image, fragments, faces)
    (image.sum() + fragments.depth.sum()).backward()


def test_corner_attributes_differ_across_an_edge() -> None:
    vertices, faces = tensors(trimesh.creation.box([0.9, 0.7, 0.5]))
    fragments = rasterise(vertices, faces, CAMERAS, 32, 32)
    per_vertex = interpolate(vertices, faces, fragments)
    torch.testing.assert_close(interpolate(vertices[faces], faces, fragments), per_vertex)
    number = torch.arange(len(faces)).float()[:, None, None].expand(-1, 3, 1)
    seen = fragments.face >= 0
    numbers = interpolate(number, faces, fragments)[:, 0]
    torch.testing.assert_close(numbers[seen], fragments.face[seen].float())


def test_cameras_are_independent() -> None:
    vertices, faces = bumpy_sphere(2)
    together = rasterise(vertices, faces, CAMERAS, 32, 40)
    for index in range(2):
        alone = rasterise(vertices, faces, CAMERAS[index : index + 1], 32, 40)
        assert torch.equal(alone.face[0], together.face[index])
        image = interpolate(vertices, faces, together)
        both = antialias(image, together, faces)[index]
        one = interpolate(vertices, faces, alone)
        one = antialias(one, alone, faces)[0]
        torch.testing.assert_close(one, both)


def test_images_and_gradients_are_bitwise_the_same_in_every_run() -> None:
    first_vertices, faces = bumpy_sphere(4)
    results = []
    for _ in range(3):
        vertices = first_vertices.clone().requires_grad_()
        fragments = rasterise(vertices, faces, CAMERAS, 96, 96)
        image = torch.cat([interpolate(vertices, faces, fragments), fragments.coverage], dim=1)
        image = antialias(image, fragments, faces)
        (image.square().sum() + fragments.depth.sum()).backward()
        results.append((image.detach(), vertices.grad))
    for image, gradient in results[1:]:
        assert torch.equal(image, results[0][0]) and torch.equal(gradient, results[0][1])


def test_edges_know_the_third_vertices_of_their_faces() -> None:
    """Two triangles that share an edge: five edges, one of them with two faces."""
    edges = mesh_edges(torch.tensor([[0, 1, 2], [2, 1, 3]], dtype=torch.int32))
    found = {
        (*ends, *sorted(set(third)))
        for ends, third in zip(edges.ends.tolist(), edges.opposite.tolist(), strict=True)
        if ends[0] != ends[1]
    }
    assert found == {(0, 1, 2), (0, 2, 1), (1, 2, 0, 3), (1, 3, 2), (2, 3, 1)}


def test_bad_input_is_named() -> None:
    vertices, faces = bumpy_sphere(0)
    with pytest.raises(UsageError, match="vertices must be float"):
        rasterise(vertices[:, :2], faces, CAMERAS, 8, 8)
    with pytest.raises(UsageError, match="faces must be integer"):
        rasterise(vertices, faces.float(), CAMERAS, 8, 8)
    with pytest.raises(UsageError, match="at least 1 x 1"):
        rasterise(vertices, faces, CAMERAS, 0, 8)
    with pytest.raises(UsageError, match="unknown rasteriser"):
        rasterise(vertices, faces, CAMERAS, 8, 8, backend="opengl")
    fragments = rasterise(vertices, faces, CAMERAS, 8, 8)
    with pytest.raises(UsageError, match="attributes must be"):
        interpolate(torch.zeros(3), faces, fragments)
    with pytest.raises(UsageError, match="the image is"):
        antialias(torch.zeros(1, 3, 8, 8), fragments, faces)


def test_the_backend_is_chosen_with_a_reason() -> None:
    assert choose_backend("auto", torch.device("cpu")) == ("torch", "the vertices are on cpu")
    assert choose_backend("torch", torch.device("cuda"))[0] == "torch"
    assert choose_backend("auto", torch.device("cuda"))[0] in ("torch", "triton")
    fragments = rasterise(*bumpy_sphere(0), CAMERAS, 8, 8)
    assert isinstance(fragments, Fragments) and fragments.backend == "torch"


def test_nvdiffrast_is_imported_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error without it names the licence; with it, its faces are used. A stand-in fills in for it that
    puts the one face of the test where its clip coordinates say."""
    vertices = torch.tensor([[-0.5, 0.1, 0.0], [0.1, 0.1, 0.0], [-0.2, 0.6, 0.0]])
    faces = torch.tensor([[0, 1, 2]])
    expected = rasterise(vertices, faces, CAMERAS, 24, 32)
    monkeypatch.setitem(sys.modules, "nvdiffrast.torch", None)
    with pytest.raises(MissingPackageError, match="non-commercial"):
        rasterise(vertices, faces, CAMERAS, 24, 32, backend="nvdiffrast")

    def clip_space_rasterise(
        _: object, clip: Tensor, faces: Tensor, resolution: list[int], **__: object
    ) -> tuple[Tensor, None]:
        height, width = resolution
        scale = torch.tensor([width / 2, height / 2])
        points = (clip[..., :2] / clip[..., 3:] + 1)[:, faces[0].long()] * scale
        assert (clip[..., 2].abs() < clip[..., 3]).all()
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        start, step = points[:, :, None, None], (points.roll(-1, 1) - points)[:, :, None, None]
        sides = step[..., 0] * (y - start[..., 1]) - step[..., 1] * (x - start[..., 0])
        is_inside = (sides >= 0).all(1) | (sides <= 0).all(1)
        return torch.stack([torch.zeros_like(x).expand(2, -1, -1)] * 3 + [is_inside.float()], dim=-1), None

    stand_in = types.ModuleType("nvdiffrast.torch")
    stand_in.RasterizeCudaContext = lambda device: None  # type: ignore[attr-defined]
    stand_in.rasterize = clip_space_rasterise  # type: ignore[attr-defined]
    package = types.ModuleType("nvdiffrast")
    package.torch = stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvdiffrast", package)
    monkeypatch.setitem(sys.modules, "nvdiffrast.torch", stand_in)
    got = rasterise(vertices, faces, CAMERAS, 24, 32, backend="nvdiffrast")
    assert (expected.face == 0).sum() > 20
    assert torch.equal(got.face, expected.face)
    torch.testing.assert_close(got.depth, expected.depth)


def test_the_benchmark_says_what_a_step_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "figures.json"
    arguments = ["--device", "cpu", "--size", "16", "--triangles", "200", "--repeats", "2"]
    assert rasteriser_benchmark.main([*arguments, "--output", str(output)]) == 0
    figures = json.loads(output.read_text())
    assert 150 < figures["num_triangles"] < 250 and figures["backend"]["name"] == "torch"
    assert 0 < figures["min_ms"] <= figures["median_ms"] and figures["peak_memory_mib"] > 0
    assert sum(figures["parts_min_ms"].values()) <= figures["min_ms"] * 1.001
    assert f"{figures['num_triangles']} triangles" in capsys.readouterr().out


def test_the_benchmark_mesh_is_closed() -> None:
    vertices, faces = rasteriser_benchmark.bumpy_sphere(500)
    assert open_edge_count(faces.numpy()) == 0
    assert signed_volumes(vertices.numpy(), faces.numpy()).sum() > 0
