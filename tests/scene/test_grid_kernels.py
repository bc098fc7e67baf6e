"""Triton look-ups against their torch twins, forwards and backwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from uni3d.scene.encoding import EncodingBackend, HashGridEncoding, dense_corners, weighted_corners
from uni3d.scene.field_stack import FieldStack
from uni3d.scene.radiance_field import RadianceField


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def _points(num: int) -> Tensor:
    """Points inside, on corners and faces, and outside the cube."""
    inside = torch.rand(num, 3, generator=_generator())
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    outside = torch.tensor([[-0.2, 0.5, 0.5], [0.5, 1.3, 0.5], [2.0, -1.0, 0.1]])
    return torch.cat([inside, corners, outside])


def _assert_twins(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.cpu(), theirs.cpu(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("num_features", "num_points"), [(1, 150), (2, 1), (4, 150)])
def test_hash_look_up_and_gradient(num_features: int, num_points: int, kernel_device: torch.device) -> None:
    encoding = HashGridEncoding(
        num_levels=3,
        features_per_level=num_features,
        table_size=2**9,
        base_resolution=3,
        max_resolution=50,
        generator=_generator(),
    )
    assert {level.is_hashed for level in encoding.levels} == {True, False}
    with torch.no_grad():
        encoding.table.normal_(generator=_generator())
    encoding.to(kernel_device)
    points = _points(num_points).to(kernel_device)
    cotangent = torch.randn(points.shape[0], encoding.num_features, generator=_generator())
    cotangent[::3] = 0  # what the kernel skips
    cotangent = cotangent.to(kernel_device)

    def look_up(backend: EncodingBackend, points: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        encoding.backend = backend
        features = encoding(points)
        return features.detach(), torch.autograd.grad(features, encoding.table, cotangent)[0]

    twin = look_up("torch", points, cotangent)
    kernel = look_up("triton", points, cotangent)
    encoding.double()
    exact = look_up("torch", points.double(), cotangent.double())
    assert exact[1].abs().max() > 0.1
    for ours, theirs, true in zip(kernel, twin, exact, strict=True):
        # A GPU fuses the product and the difference behind a fraction; the twin rounds in between, by up to
        # 2e-6 of a cell at 50 vertices. So the kernel has to be as near to the truth, not to the twin.
        assert (ours - true).abs().max() <= (theirs - true).abs().max() + 1e-6
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("num_channels", [1, 3])
def test_dense_look_up_and_gradient(num_channels: int, kernel_device: torch.device) -> None:
    from uni3d.scene import grid_kernels

    grid = torch.randn(num_channels, 7, 7, 7, generator=_generator()).to(kernel_device).requires_grad_()
    points = _points(150).to(kernel_device)
    cotangent = torch.randn(points.shape[0], num_channels, generator=_generator()).to(kernel_device)
    values = grid_kernels.dense_look_up(points, grid)
    reference = weighted_corners(grid, dense_corners(points, 7))
    _assert_twins(values, reference)
    _assert_twins(
        torch.autograd.grad(values, grid, cotangent)[0], torch.autograd.grad(reference, grid, cotangent)[0]
    )


def test_many_scenes_are_looked_up_together(kernel_device: torch.device) -> None:
    def stack(backend: EncodingBackend) -> FieldStack:
        fields = [
            RadianceField(
                resolutions=(4, 9), blob_radius=radius, encoding_backend=backend, generator=_generator()
            )
            for radius in (0.2, 0.3, 0.4)
        ]
        for field in fields:
            for parameter in field.parameters():
                parameter.data += torch.randn(parameter.shape, generator=_generator())
        return FieldStack([field.to(kernel_device) for field in fields])

    points = ((_points(100) - 0.5) * 1.3).to(kernel_device)  # some outside the cube
    scene = torch.randint(3, (points.shape[0],), generator=_generator()).to(kernel_device)
    found = []
    for backend in ("torch", "triton"):
        scenes = stack(backend)
        density, colour = scenes(points, scene)
        (density + colour.sum(dim=1)).sum().backward()
        stacks = [*scenes.density_grids, *scenes.colour_grids]
        found.append([density.detach(), colour.detach(), *(each.tensor.grad for each in stacks)])
    for ours, theirs in zip(*found, strict=True):
        assert theirs.abs().max() > 0.01
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("encoding", ["dense", "hash"])
def test_a_field_is_the_same_with_either(encoding: str, kernel_device: torch.device) -> None:
    def field(backend: str) -> RadianceField:
        return RadianceField(
            encoding=encoding,
            resolutions=(4, 9),
            hash_options={"num_levels": 2, "table_size": 2**8, "max_resolution": 20}
            if encoding == "hash"
            else None,
            encoding_backend=backend,
            generator=_generator(),
        ).to(kernel_device)

    points = ((_points(100) - 0.5) * 1.3).to(kernel_device)  # some outside the cube
    found = []
    for backend in ("torch", "triton"):
        scene = field(backend)
        density, colour = scene(points)
        normals = scene.normals(points)
        # Where the density is flat, rounding errors are all that a normal's gradient consists of.
        total = (density * colour.sum(dim=1)).sum() + normals[points.norm(dim=1) < 0.3, 0].sum()
        found.append([density, colour, normals, *torch.autograd.grad(total, list(scene.parameters()))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_no_points_are_looked_up_too(kernel_device: torch.device) -> None:
    from uni3d.scene import grid_kernels

    encoding = HashGridEncoding(num_levels=2, table_size=2**8, backend="triton").to(kernel_device)
    features = encoding(torch.zeros(0, 3, device=kernel_device))
    assert features.shape == (0, 4)
    features.sum().backward()
    assert encoding.table.grad is not None and not encoding.table.grad.any()
    values = grid_kernels.dense_look_up(
        torch.zeros(0, 3, device=kernel_device), torch.ones(3, 4, 4, 4, device=kernel_device)
    )
    assert values.shape == (0, 3)


def test_every_kernel_compiles_for_an_h100(tmp_path: Path) -> None:
    """What the interpreter lets pass, a compiler may not; compiling needs no GPU."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(tmp_path.rglob("*.cubin"))) == 21
