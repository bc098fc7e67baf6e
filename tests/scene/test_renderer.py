"""The packed, pruned renderer against a plain dense one, and what it promises."""

from __future__ import annotations

import pytest
import torch
from painted_scene import BALL_COLOUR
from rendered_scene import bumpy_ball, gradients_of, maps_of, two_cameras
from torch import Tensor

from uni3d.errors import UsageError
from uni3d.scene.camera import Cameras, ring_cameras
from uni3d.scene.occupancy import OccupancyGrid
from uni3d.scene.radiance_field import RadianceField
from uni3d.scene.renderer import render

SIZE = 20


def _dense_reference(field: RadianceField, cameras: Cameras, background: float, num_samples: int) -> Tensor:
    """All lattice places of all rays, alpha-composited: rgb, opacity, depth as [B, 5, H, W]."""
    origins, directions = cameras.rays(SIZE, SIZE)
    step = 2 * field.half_extent / num_samples
    places = (torch.arange(int(4.5 / step)) + 0.5) * step
    points = origins[..., None, :] + directions[..., None, :] * places[:, None]
    density, colour = field(points.reshape(-1, 3))
    alpha = 1 - torch.exp(-density.view(points.shape[:-1]) * step)
    passed = torch.cumprod(torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha], dim=-1), dim=-1)
    weights = alpha * passed[..., :-1]
    rgb = (weights[..., None] * colour.view(points.shape)).sum(dim=-2)
    opacity = weights.sum(dim=-1, keepdim=True)
    depth = (weights * places).sum(dim=-1, keepdim=True) / opacity.clamp(min=1e-6)
    return torch.cat([rgb + (1 - opacity) * background, opacity, depth], dim=-1).permute(0, 3, 1, 2)


def test_without_pruning_equals_the_dense_reference() -> None:
    field, cameras = bumpy_ball(), two_cameras()
    ours = maps_of(render(field, cameras, SIZE, SIZE, 0.3, num_samples=40, stop_transmittance=0.0))
    reference = _dense_reference(field, cameras, 0.3, 40)
    torch.testing.assert_close(ours[:, :4], reference[:, :4], atol=2e-5, rtol=1e-4)
    is_seen = reference[:, 3] > 1e-3
    torch.testing.assert_close(ours[:, 4][is_seen], reference[:, 4][is_seen], atol=1e-3, rtol=0)
    for gradient, expected in zip(gradients_of(field, ours), gradients_of(field, reference), strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-3)


def test_pruning_changes_almost_nothing_and_drops_most_samples() -> None:
    field, cameras = bumpy_ball(), two_cameras()
    occupancy = OccupancyGrid(resolution=24)
    occupancy.update(field)
    full = render(field, cameras, SIZE, SIZE, 0.3, num_samples=40, stop_transmittance=0.0)
    pruned = render(field, cameras, SIZE, SIZE, 0.3, num_samples=40, occupancy=occupancy)
    assert pruned.samples.weights.shape[0] < 0.4 * full.samples.weights.shape[0]
    reference = _dense_reference(field, cameras, 0.3, 40)
    torch.testing.assert_close(maps_of(pruned)[:, :4], reference[:, :4], atol=4e-3, rtol=0)
    for gradient, expected in zip(
        gradients_of(field, maps_of(pruned)), gradients_of(field, reference), strict=True
    ):
        assert (gradient - expected).norm() < 0.02 * expected.norm()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    field, cameras = bumpy_ball(), two_cameras()
    whole = render(field, cameras, SIZE, SIZE, num_samples=40)
    monkeypatch.setattr("uni3d.scene.renderer.CANDIDATES_PER_CHUNK", 1500)
    assert torch.equal(render(field, cameras, SIZE, SIZE, num_samples=40).image, whole.image)


def test_bitwise_repeatable_from_the_same_generator_state() -> None:
    field, cameras = bumpy_ball(), two_cameras()

    def run(seed: int) -> tuple[Tensor, list[Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        occupancy = OccupancyGrid(resolution=16)
        occupancy.update(field, generator=generator)
        output = render(
            field,
            cameras,
            SIZE,
            SIZE,
            num_samples=40,
            generator=generator,
            occupancy=occupancy,
            max_samples=2000,
        )
        return output.image, gradients_of(field, maps_of(output))

    (image, gradients), (same_image, same_gradients), (other_image, _) = run(1), run(1), run(2)
    assert torch.equal(image, same_image)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same_gradients, strict=True))
    assert not torch.equal(image, other_image)


@pytest.mark.parametrize("seed", [None, 0])
def test_a_sample_budget_keeps_the_image_and_thins_the_gradient(seed: int | None) -> None:
    def generator() -> torch.Generator | None:
        return None if seed is None else torch.Generator().manual_seed(seed)

    field, cameras = bumpy_ball(), two_cameras()
    full = render(field, cameras, SIZE, SIZE, num_samples=40, generator=generator())
    budget = full.samples.weights.shape[0] // 4
    calls: list[int] = []
    original = RadianceField.forward

    class Counting(RadianceField):
        def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
            if torch.is_grad_enabled():
                calls.append(points.shape[0])
            return original(self, points)

    field.__class__ = Counting
    thinned = render(field, cameras, SIZE, SIZE, num_samples=40, generator=generator(), max_samples=budget)
    assert 0.7 * budget < sum(calls) <= budget
    torch.testing.assert_close(thinned.image, full.image)
    norms = [sum(float(g.norm()) for g in gradients_of(field, maps_of(output))) for output in (full, thinned)]
    assert 0 < norms[1] < norms[0]


def test_backgrounds() -> None:
    field, cameras = bumpy_ball(), two_cameras()
    colours = torch.tensor([[1.0, 0.0, 0.5], [0.2, 0.9, 0.1]])

    def corner(background: Tensor | float) -> Tensor:
        return render(field, cameras, SIZE, SIZE, background, num_samples=16).image[:, :, 0, 0]

    torch.testing.assert_close(corner(0.25), torch.full((2, 3), 0.25))
    torch.testing.assert_close(corner(colours[0]), colours[:1].expand(2, 3))
    torch.testing.assert_close(corner(colours), colours)
    torch.testing.assert_close(corner(colours[:, :, None, None].expand(2, 3, SIZE, SIZE)), colours)
    with pytest.raises(UsageError, match=r"\[2, 3, 20, 20\]"):
        corner(torch.zeros(2, 4))


def test_a_ball_has_the_right_outline_depth_and_normals() -> None:
    field = RadianceField(resolutions=(61,))
    with torch.no_grad():
        distance = field.vertex_positions(61).norm(dim=1)
        field.density_grids[0].copy_((400 * (0.35 - distance)).clamp(-20, 6).view(1, 61, 61, 61))
        field.colour_grids[0].copy_(torch.logit(BALL_COLOUR)[:, None, None, None].expand(3, 61, 61, 61))
    output = render(
        field,
        ring_cameras(3, elevation_deg=30.0, radius=2.0),
        41,
        41,
        1.0,
        num_samples=160,
        with_normals=True,
    )
    assert output.normals is not None
    torch.testing.assert_close(output.depth[:, 0, 20, 20], torch.full((3,), 2.0 - 0.35), atol=0.02, rtol=0)
    torch.testing.assert_close(output.image[:, :, 20, 20], BALL_COLOUR.expand(3, 3), atol=0.01, rtol=0)
    toward_camera = ring_cameras(3, elevation_deg=30.0, radius=1.0).positions()
    assert (output.normals[:, :, 20, 20] * toward_camera).sum(dim=1).min() > 0.9
    seen_radius = 0.35 / (2.0**2 - 0.35**2) ** 0.5 / torch.tan(torch.deg2rad(torch.tensor(20.0))) * 41 / 2
    area = (output.opacity > 0.5).float().sum(dim=(1, 2, 3))
    torch.testing.assert_close(area, torch.full((3,), float(torch.pi * seen_radius**2)), rtol=0.1, atol=0)
    assert output.opacity[:, :, 0].max() < 1e-6
    assert output.depth[:, :, 0].max() < 0.01


def test_an_empty_view_renders_the_background_and_has_zero_gradient() -> None:
    field = bumpy_ball()
    cameras = Cameras.from_lists([0.0, 90.0], [0.0, 0.0], fov_y_deg=0.01)
    occupancy = OccupancyGrid(resolution=8)
    with torch.no_grad():
        field.density_grids[1].fill_(-30.0)
        field.density_grids[1][:, :3, :3, :3] = 3.0  # matter in one corner only
    occupancy.update(field)
    output = render(field, cameras, 4, 4, 0.5, num_samples=16, occupancy=occupancy)
    assert output.samples.weights.shape == (0,)
    torch.testing.assert_close(output.image, torch.full((2, 3, 4, 4), 0.5))
    output.image.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in field.parameters())


def test_hash_fields_render_and_train() -> None:
    field = RadianceField(
        encoding="hash",
        hash_options={"num_levels": 3, "table_size": 2**10, "max_resolution": 32},
        generator=torch.Generator().manual_seed(0),
    )
    output = render(field, two_cameras(), SIZE, SIZE, num_samples=24, with_normals=True)
    output.image.square().mean().backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in field.parameters()
    )


@pytest.mark.gpu
def test_gpu_agrees_with_cpu() -> None:
    field, cameras = bumpy_ball(), two_cameras()
    expected = render(field, cameras, SIZE, SIZE, 0.3, num_samples=40)
    gradients = gradients_of(field, maps_of(expected))
    on_gpu = bumpy_ball().cuda()
    output = render(on_gpu, cameras.to("cuda"), SIZE, SIZE, 0.3, num_samples=40)
    torch.testing.assert_close(output.image.cpu(), expected.image, atol=1e-4, rtol=1e-4)
    maps = maps_of(output)
    cotangent = torch.randn(maps.shape, generator=torch.Generator().manual_seed(3)).cuda()
    found = torch.autograd.grad((maps * cotangent)[:, :4].sum(), list(on_gpu.parameters()))
    for gradient, reference in zip(found, gradients, strict=True):
        assert (gradient.cpu() - reference).norm() < 1e-3 * reference.norm()
