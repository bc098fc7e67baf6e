"""Training backgrounds: range, repeatability, and that they are mostly light."""

from __future__ import annotations

import torch

from uni3d.scene.backgrounds import random_backgrounds, random_gradients, random_greys


def test_plain_colours() -> None:
    colours = random_backgrounds(500, generator=torch.Generator().manual_seed(0))
    assert colours.shape == (500, 3)
    assert 0 <= colours.min() <= colours.max() <= 1
    is_grey = (colours == colours[:, :1]).all(dim=1)
    assert 0.5 < is_grey.float().mean() < 0.7
    assert colours[is_grey].min() >= 0.85
    assert torch.equal(colours, random_backgrounds(500, generator=torch.Generator().manual_seed(0)))


def test_greys_have_no_colour() -> None:
    greys = random_greys(300, generator=torch.Generator().manual_seed(1))
    assert greys.shape == (300, 3) and torch.equal(greys, greys[:, :1].expand(-1, 3))
    assert 0.45 <= greys.min() < 0.5 and 0.95 < greys.max() <= 1


def test_gradients_run_between_two_colours() -> None:
    images = random_gradients(8, 12, 16, generator=torch.Generator().manual_seed(0))
    assert images.shape == (8, 3, 12, 16)
    assert 0 <= images.min() <= images.max() <= 1
    assert (images.amax(dim=(2, 3)) - images.amin(dim=(2, 3))).max() > 0.2
    second_differences = images.diff(n=2, dim=2).abs().max() + images.diff(n=2, dim=3).abs().max()
    assert second_differences < 1e-5
