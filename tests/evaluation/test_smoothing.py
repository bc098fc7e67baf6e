"""Filters that take detail away: exact on edges, nothing at strength zero; the augmentation made of them."""

from __future__ import annotations

import pytest
import torch
from evaluation_fixtures import painted_views

from uni3d.evaluation.augmentation import augment, random_object_detail, random_smoothing
from uni3d.evaluation.smoothing import calm_quadrant, edge_preserving_blur, gaussian_blur, lossy_generator


def noise_image(num: int = 2, size: int = 32) -> torch.Tensor:
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(0))


def step_image(low: float = 0.2, high: float = 0.8, size: int = 32) -> torch.Tensor:
    image = torch.full((1, 3, size, size), low)
    image[..., size // 2 :] = high
    return image


def test_strength_zero_changes_nothing() -> None:
    images, zero = noise_image(), torch.zeros(2)
    torch.testing.assert_close(gaussian_blur(images, zero, ringing=zero), images)
    torch.testing.assert_close(edge_preserving_blur(images, zero), images, atol=1e-3, rtol=0)


def test_a_blurred_edge_is_the_normal_distribution_for_every_sample() -> None:
    sigma = torch.tensor([1.0, 2.5])
    row = gaussian_blur(step_image(0.0, 1.0).expand(2, -1, -1, -1), sigma)[:, 0, 16]
    distance = torch.arange(32) - 15.5
    expected = torch.special.ndtr(distance / sigma[:, None])
    torch.testing.assert_close(row[:, 4:-4], expected[:, 4:-4], atol=0.01, rtol=0)


def test_ringing_overshoots_on_both_sides_of_an_edge() -> None:
    sigma = torch.tensor([1.0])
    sharp = gaussian_blur(step_image(), sigma, ringing=torch.tensor([0.6]))
    dull = gaussian_blur(step_image(), sigma, ringing=torch.tensor([-0.4]))
    assert float(sharp.max()) > 0.82 and float(sharp.min()) < 0.18
    assert float(dull.max()) < 0.81 and float(dull.min()) > 0.19


def test_the_edge_preserving_blur_takes_texture_and_leaves_edges() -> None:
    texture = 0.06 * (noise_image(1, 64) - 0.5)
    image = step_image(size=64) + texture
    smooth = edge_preserving_blur(image, torch.tensor([0.12]))
    assert float(smooth[..., 8:24].std()) < 0.4 * float(image[..., 8:24].std())
    assert float((smooth[..., 33] - smooth[..., 30]).mean()) > 0.45


def test_the_calmest_quadrant_keeps_a_step_and_loses_a_thin_line() -> None:
    torch.testing.assert_close(calm_quadrant(step_image(), 3), step_image())
    line = torch.full((1, 3, 32, 32), 0.5)
    line[..., 16] = 1.0
    assert float(calm_quadrant(line, 3).max()) < 0.65


def test_the_stress_is_the_same_for_every_image_and_every_time() -> None:
    images = noise_image(3, 64)
    stressed = lossy_generator(images)
    torch.testing.assert_close(stressed[1:2], lossy_generator(images[1:2]))
    assert 0 <= float(stressed.min()) and float(stressed.max()) <= 1
    assert float(stressed.std()) < 0.4 * float(images.std())


@pytest.fixture(scope="module")
def cut_outs() -> torch.Tensor:
    rgba = torch.from_numpy(painted_views(40, role="both").images).permute(0, 3, 1, 2).float() / 255
    return torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)


def test_images_that_are_not_softened_stay_crisp(cut_outs: torch.Tensor) -> None:
    closed = torch.zeros(40, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(random_object_detail(cut_outs, closed, generator), cut_outs)
    smoothed = random_smoothing(cut_outs[:, :3], closed, generator)
    torch.testing.assert_close(smoothed, cut_outs[:, :3], atol=1e-4, rtol=0)


def test_softened_objects_keep_their_hue_and_most_of_their_silhouette(cut_outs: torch.Tensor) -> None:
    open_ = torch.ones(40, dtype=torch.bool)
    softened = random_object_detail(cut_outs, open_, torch.Generator().manual_seed(0))
    assert float(softened.min()) >= 0 and float(softened.max()) <= 1
    assert bool((softened[:, :3] <= softened[:, 3:] + 1e-6).all())
    area = softened[:, 3].sum(dim=(1, 2)) / cut_outs[:, 3].sum(dim=(1, 2))
    assert float(area.min()) > 0.65 and float(area.max()) < 2.3  # 2 pixels more around a radius of 6
    assert (area - 1).abs().gt(0.02).sum() >= 8
    colour = softened[:, :3].sum(dim=(2, 3))
    assert bool((colour[::2].argmax(1) == 0).all()) and bool((colour[1::2].argmax(1) == 2).all())


def test_about_a_third_of_the_training_images_stay_crisp() -> None:
    rgba = torch.from_numpy(painted_views(240, role="both", size=64).images).permute(0, 3, 1, 2).float() / 255
    images = augment(rgba, torch.Generator().manual_seed(0)).images
    # The steepest edge of a crisp image runs over one pixel, whatever its contrast.
    jump = images.diff(dim=3).abs().amax(dim=(1, 2, 3))
    contrast = (images.diff(dim=3).unfold(3, 6, 1).sum(-1)).abs().amax(dim=(1, 2, 3))
    crisp = float((jump > 0.6 * contrast).float().mean())
    assert 0.3 < crisp < 0.75
