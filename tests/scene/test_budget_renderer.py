"""The renderer with a fixed budget: the packed renderer's picture, or a coarser one, never a hole."""

from __future__ import annotations

import pytest
import torch
from no_waiting import Watch
from rendered_scene import bumpy_ball, gradients_of, maps_of, two_cameras
from torch import Tensor

from uni3d.errors import UsageError
from uni3d.scene.budget_renderer import render_within_budget
from uni3d.scene.camera import Cameras
from uni3d.scene.occupancy import OccupancyGrid
from uni3d.scene.radiance_field import RadianceField
from uni3d.scene.renderer import RenderOutput, render

SIZE = 20
NUM_RAYS = 2 * SIZE * SIZE


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def _occupancy(field: RadianceField) -> OccupancyGrid:
    occupancy = OccupancyGrid(resolution=24).to(next(field.parameters()).device)
    occupancy.update(field)
    return occupancy


@pytest.mark.parametrize("has_occupancy", [True, False])
@pytest.mark.parametrize("stop_transmittance", [1e-3, 0.0])
def test_a_budget_that_suffices_gives_the_packed_picture(
    has_occupancy: bool, stop_transmittance: float
) -> None:
    field, cameras = bumpy_ball(), two_cameras()
    options = {
        "num_samples": 40,
        "occupancy": _occupancy(field) if has_occupancy else None,
        "stop_transmittance": stop_transmittance,
        "with_normals": True,
    }
    packed = render(field, cameras, SIZE, SIZE, 0.3, generator=_generator(), **options)
    ours = render_within_budget(
        field,
        cameras,
        SIZE,
        SIZE,
        0.3,
        generator=_generator(),
        max_samples=50 * NUM_RAYS,
        kernels="torch",
        **options,
    )
    num_samples = packed.samples.weights.shape[0]
    assert ours.samples.weights.shape[0] == 50 * NUM_RAYS > num_samples
    torch.testing.assert_close(maps_of(ours), maps_of(packed), atol=1e-6, rtol=1e-6)
    assert packed.normals is not None and ours.normals is not None
    torch.testing.assert_close(ours.normals, packed.normals, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours.samples.distances[:num_samples], packed.samples.distances)
    pairs = zip(gradients_of(field, maps_of(ours)), gradients_of(field, maps_of(packed)), strict=True)
    for gradient, expected in pairs:
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("share", "mean_error", "max_error"), [(0.5, 0.002, 0.1), (0.25, 0.005, 0.25)])
def test_too_small_a_budget_blurs_but_leaves_no_hole(
    share: float, mean_error: float, max_error: float
) -> None:
    field, cameras = bumpy_ball(), two_cameras()
    occupancy = _occupancy(field)
    packed = render(field, cameras, SIZE, SIZE, 0.3, num_samples=40, occupancy=occupancy)
    num_samples = packed.samples.weights.shape[0]
    budget = max(NUM_RAYS, int(share * num_samples))
    ours = render_within_budget(
        field,
        cameras,
        SIZE,
        SIZE,
        0.3,
        num_samples=40,
        occupancy=occupancy,
        max_samples=budget,
        kernels="torch",
    )
    assert int((ours.samples.weights > 0).sum()) <= budget < num_samples
    torch.testing.assert_close(ours.opacity, packed.opacity, atol=1e-3, rtol=0)  # exact but for the far end
    error = (ours.image - packed.image).abs()
    assert 0 < error.mean() < mean_error and error.max() < max_error
    seen = packed.opacity > 0.5
    torch.testing.assert_close(ours.depth[seen], packed.depth[seen], atol=1.5 * 1.2 / 40, rtol=0)
    assert all(gradient.isfinite().all() for gradient in gradients_of(field, maps_of(ours)))


def test_even_too_few_candidates_leave_no_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solid ball, each of whose rays keeps an eighth of its places in occupied cells."""
    field, cameras = bumpy_ball(), two_cameras()
    occupancy = _occupancy(field)
    monkeypatch.setattr("uni3d.scene.budget_renderer.CANDIDATES_PER_RAY", 1)
    packed = render(field, cameras, SIZE, SIZE, 0.3, num_samples=160, occupancy=occupancy)
    ours = render_within_budget(
        field,
        cameras,
        SIZE,
        SIZE,
        0.3,
        num_samples=160,
        occupancy=occupancy,
        max_samples=4 * NUM_RAYS,
        kernels="torch",
    )
    solid = torch.nn.functional.avg_pool2d(packed.opacity, 3, stride=1, padding=1) > 0.99
    assert solid.any() and (ours.opacity[solid] > 0.9).all()
    assert (ours.image - packed.image).abs().mean() < 0.02


def test_a_gradient_step_helps_also_on_a_small_budget() -> None:
    """The gradient of a thinned picture points the way of the whole one's."""
    field, cameras = bumpy_ball(), two_cameras()
    occupancy = _occupancy(field)
    packed = render(field, cameras, SIZE, SIZE, 0.3, num_samples=40, occupancy=occupancy)
    budget = packed.samples.weights.shape[0] // 2
    ours = render_within_budget(
        field,
        cameras,
        SIZE,
        SIZE,
        0.3,
        num_samples=40,
        occupancy=occupancy,
        max_samples=budget,
        kernels="torch",
    )

    def gradient(output: RenderOutput) -> Tensor:
        parts = torch.autograd.grad((output.image - 0.5).square().sum(), list(field.parameters()))
        return torch.cat([part.flatten() for part in parts])

    whole, thinned = gradient(packed), gradient(ours)
    assert torch.nn.functional.cosine_similarity(whole, thinned, dim=0) > 0.9


def test_an_empty_view_shows_the_background() -> None:
    field = bumpy_ball()
    cameras = Cameras.from_lists([0.0], [90.0], fov_y_deg=0.01)
    occupancy = OccupancyGrid(resolution=8)
    with torch.no_grad():
        field.density_grids[1].fill_(-30.0)
        field.density_grids[1][:, :3, :3, :3] = 3.0  # matter in one corner only
    occupancy.update(field)
    output = render_within_budget(
        field, cameras, 4, 4, 0.5, num_samples=16, occupancy=occupancy, kernels="torch"
    )
    torch.testing.assert_close(output.image, torch.full((1, 3, 4, 4), 0.5))
    output.image.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in field.parameters())


@pytest.mark.parametrize("encoding", ["dense", "hash"])
def test_nothing_waits_and_no_host_data_is_copied(encoding: str) -> None:
    field = RadianceField(
        encoding=encoding,
        resolutions=(9, 21),
        hash_options={"num_levels": 3, "table_size": 2**10} if encoding == "hash" else None,
    )
    occupancy = OccupancyGrid(resolution=12)
    cameras = two_cameras()
    with Watch("lift_fresh"):  # which makes a tensor of Python numbers
        occupancy.update(field, generator=_generator())
        output = render_within_budget(
            field,
            cameras,
            8,
            8,
            0.5,
            num_samples=16,
            generator=_generator(),
            occupancy=occupancy,
            kernels="torch",
            with_normals=True,
        )
        output.image.sum().backward()
    shape = output.samples.weights.shape
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.mul_(-1)
    occupancy.update(field)
    again = render_within_budget(field, cameras, 8, 8, num_samples=16, occupancy=occupancy, kernels="torch")
    assert again.samples.weights.shape == shape


def test_a_ray_needs_a_sample() -> None:
    with pytest.raises(UsageError, match="max_samples is 799, but 2 images of 20 x 20 have 800 rays"):
        render_within_budget(bumpy_ball(), two_cameras(), SIZE, SIZE, max_samples=799)


@pytest.mark.parametrize(("num_cameras", "budget_per_ray"), [(2, 2), (1, 8)])
def test_kernels_render_the_same(num_cameras: int, budget_per_ray: int, kernel_device: torch.device) -> None:
    field = bumpy_ball().to(kernel_device)
    cameras = two_cameras()[:num_cameras].to(kernel_device)
    occupancy = _occupancy(field)
    found = []
    for kernels in ("torch", "triton"):
        output = render_within_budget(
            field, cameras, 4, 4, 0.3, num_samples=24, occupancy=occupancy,
            max_samples=budget_per_ray * num_cameras * 16, with_normals=True, kernels=kernels,
        )  # fmt: skip
        assert output.normals is not None
        maps = torch.cat([maps_of(output), output.normals], dim=1)
        found.append((maps.detach(), gradients_of(field, maps)))
    (reference, expected), (maps, gradients) = found
    torch.testing.assert_close(maps, reference, atol=2e-4, rtol=1e-3)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()


@pytest.mark.gpu
def test_a_step_on_a_gpu_never_waits() -> None:
    field = bumpy_ball().cuda()
    field.encoding_backend = "triton"
    occupancy = _occupancy(field)

    def step() -> None:
        occupancy.update(field, generator=_generator())
        cameras = two_cameras().to("cuda")
        output = render_within_budget(
            field, cameras, 64, 64, 0.3, num_samples=64, generator=_generator(), occupancy=occupancy
        )
        output.image.sum().backward()

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
